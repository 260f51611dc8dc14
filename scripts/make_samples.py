"""Make the example datasets that the recipes of `configs/` fine-tune on: a new style and a new object, 128 x 128.

    python scripts/make_samples.py [--out data]

`style` has 32 of picto's images turned into blueprints, `object` 32 images of a zorb, an invented creature.
`style-held-out` and `object-held-out` have 32 others each, for evaluation. `plain` has the unchanged images, to train
on beside the new ones against forgetting. The output is deterministic.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ldm import Pipeline, Request
from ldm.files import atomic_write

SIDE, FINE = 128, 4  # side of an image in pixels, and the factor of supersampling
THINGS = """
apple, banana, lemon, strawberry, pizza, carrot, mushroom, cat face, dog face, panda, penguin, fish, butterfly, car,
bus, rocket, house, tree, cactus, star, red heart, moon, umbrella, guitar, bicycle, airplane, sailboat, sunflower, sun,
key, book, smiling face
"""
OTHERS = "ice cream, hamburger, doughnut, rabbit face, owl, whale, bee, crown"
PAPER, FILL, INK = (20, 62, 148), (44, 96, 186), (236, 244, 255)
MARK = (1, 254, 3)  # a colour that occurs nowhere else
COLOURS = {
    "red": (226, 74, 70),
    "orange": (245, 150, 60),
    "yellow": (250, 218, 94),
    "green": (96, 180, 96),
    "blue": (74, 120, 214),
    "purple": (148, 98, 196),
    "pink": (246, 160, 190),
    "brown": (140, 98, 70),
    "gray": (160, 164, 170),
    "black": (34, 34, 40),
    "white": (250, 250, 250),
    "light blue": (168, 212, 246),
}
Captioned = tuple[Image.Image, str]


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def to_blueprint(image: Image.Image) -> Image.Image:
    """An image on a plain background as white lines on blue paper: its edges and its silhouette."""
    smooth = image.filter(ImageFilter.MedianFilter(3)).convert("RGB")
    outside = Image.new("RGB", (SIDE + 2, SIDE + 2), smooth.getpixel((1, 1)))
    outside.paste(smooth, (1, 1))
    ImageDraw.floodfill(outside, (0, 0), MARK, thresh=60)
    ground = (np.asarray(outside)[1:-1, 1:-1] == MARK).all(-1)
    shape = Image.fromarray(np.where(ground, 0, 255).astype(np.uint8)).filter(ImageFilter.MedianFilter(5))
    outline = ImageChops.subtract(shape.filter(ImageFilter.MaxFilter(3)), shape.filter(ImageFilter.MinFilter(3)))
    red, green, blue = (band.filter(ImageFilter.FIND_EDGES) for band in smooth.split())
    edges = ImageChops.lighter(ImageChops.lighter(red, green), blue).point(lambda v: 255 * (v > 70))
    inner = ImageChops.multiply(edges, shape.filter(ImageFilter.MinFilter(5)))
    lines = ImageChops.lighter(outline, inner).filter(ImageFilter.GaussianBlur(0.6))
    page = Image.new("RGB", smooth.size, PAPER)
    draw = ImageDraw.Draw(page)
    for at in range(15, SIDE, 16):
        draw.line([(at, 0), (at, SIDE)], fill=FILL)
        draw.line([(0, at), (SIDE, at)], fill=FILL)
    page.paste(FILL, mask=shape)
    page.paste(INK, mask=lines)
    return page


def generate_plain(names: Sequence[str], seeds: Sequence[int]) -> list[Captioned]:
    """picto's images of some objects."""
    requests = [Request(article(name), seed=seed) for name in names for seed in seeds]
    images = Pipeline.from_pretrained().generate(requests)
    return [(image, request.prompt) for image, request in zip(images, requests, strict=True)]


def to_blueprints(samples: Iterable[Captioned]) -> Iterator[Captioned]:
    """The blueprints of images."""
    return ((to_blueprint(image), f"{caption} in blueprint style") for image, caption in samples)


def draw_zorb(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, look: float) -> None:
    """A zorb of radius r about (x, y): a turquoise ball on two legs, one eye that looks aside, two orange horns."""

    def ball(dx: float, dy: float, rx: float, ry: float, colour: tuple[int, int, int]) -> None:
        draw.ellipse([x + (dx - rx) * r, y + (dy - ry) * r, x + (dx + rx) * r, y + (dy + ry) * r], fill=colour)

    for side in (-1, 1):
        horn = [(0.3, -0.75), (0.62, -0.62), (0.68, -1.3)]
        draw.polygon([(x + side * dx * r, y + dy * r) for dx, dy in horn], fill=(255, 140, 40))
        ball(side * 0.4, 1.0, 0.26, 0.2, (14, 104, 110))
    ball(0, 0, 1, 0.95, (30, 170, 172))
    ball(0, 0.42, 0.62, 0.44, (190, 240, 228))
    ball(0, -0.2, 0.46, 0.46, (255, 255, 255))
    ball(0.2 * look, -0.2, 0.23, 0.23, (110, 40, 150))
    ball(0.2 * look, -0.2, 0.1, 0.1, (10, 10, 20))
    draw.arc([x - 0.35 * r, y + 0.1 * r, x + 0.35 * r, y + 0.6 * r], 20, 160, (20, 60, 70), max(1, int(0.07 * r)))


def draw_zorbs(count: int, seed: int) -> Iterator[Captioned]:
    """Zorbs of random sizes and places on a background of one colour, every sixth image with two."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        colour = [*COLOURS][(k * 5 + seed) % len(COLOURS)]
        page = Image.new("RGB", (SIDE * FINE, SIDE * FINE), COLOURS[colour])
        pair, draw = k % 6 == 5, ImageDraw.Draw(page)
        for number in range(1 + pair):
            r = rng.uniform(0.15, 0.2) if pair else rng.uniform(0.2, 0.36)
            left, right = ((0.25, 0.28) if number == 0 else (0.72, 0.75)) if pair else (r + 0.05, 0.95 - r)
            x, y = rng.uniform(left, right), rng.uniform(1.35 * r + 0.03, 0.97 - 1.25 * r)
            draw_zorb(draw, x * page.width, y * page.height, r * page.width, rng.uniform(-1, 1))
        what = "two zorbs" if pair else "a zorb"
        yield page.resize((SIDE, SIDE), Image.Resampling.LANCZOS), f"{what} on {article(colour)} background"


def write_dataset(folder: Path, samples: Iterable[Captioned]) -> None:
    """Write images and their captions to a folder with metadata.jsonl."""
    with atomic_write(folder) as draft:
        draft.mkdir()
        lines = []
        for k, (image, caption) in enumerate(samples):
            image.save(draft / f"{k:02d}.png")
            lines.append(json.dumps({"file_name": f"{k:02d}.png", "text": caption}))
        (draft / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"))
    out = parser.parse_args().out
    known, others = ([" ".join(name.split()) for name in names.split(",")] for names in (THINGS, OTHERS))
    write_dataset(out / "object", draw_zorbs(32, 0))
    write_dataset(out / "object-held-out", draw_zorbs(32, 1))
    write_dataset(out / "plain", images := generate_plain(known, [7]))
    write_dataset(out / "style", to_blueprints(images))
    write_dataset(out / "style-held-out", to_blueprints(generate_plain(others, range(8, 12))))


if __name__ == "__main__":
    main()
