"""Sprites: drawings on a transparent background and their names, as `sprites.npy` and `sprites.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Color = tuple[int, int, int]
HUE_WINDOW = 16  # of 256: hues at most so far apart count as one


@dataclass(frozen=True)
class Sprite:
    """One drawing of one concept; `names` and, less often, `tags` are what captions call it.

    `mean` is its average colour (RGB, 0 to 255), `paint` its dominant colour (hue, saturation and value, 0 to 255),
    None where there is none; `write_sprites` computes both.
    """

    concept: str
    code: str
    style: str
    names: tuple[str, ...]
    tags: tuple[str, ...] = ()
    group: str = ""
    subgroup: str = ""
    mean: Color = (0, 0, 0)
    paint: Color | None = None


def write_sprites(folder: Path, sprites: Sequence[Sprite], pixels: Iterable[np.ndarray], size: int = 128) -> None:
    """Write `sprites.npy`, uint8 [N, size, size, 4], RGBA with straight alpha, and `sprites.jsonl`."""
    shape = (len(sprites), size, size, 4)
    array = np.lib.format.open_memmap(folder / "sprites.npy", mode="w+", dtype=np.uint8, shape=shape)
    records = []
    for row, sprite, rgba in zip(array, sprites, pixels, strict=True):
        row[:] = rgba
        mean, paint = measure_colors(rgba)
        records.append(json.dumps(asdict(replace(sprite, mean=mean, paint=paint))))
    array.flush()
    (folder / "sprites.jsonl").write_text("\n".join(records) + "\n")


def read_sprites(folder: Path) -> tuple[list[Sprite], np.ndarray]:
    """The records, and the pixels as a memory map."""
    sprites = []
    for line in (folder / "sprites.jsonl").read_text().splitlines():
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(line).items()}
        sprites.append(Sprite(**fields))
    return sprites, np.load(folder / "sprites.npy", mmap_mode="r")


def measure_colors(rgba: np.ndarray) -> tuple[Color, Color | None]:
    """A sprite's mean colour, and its dominant (hue, saturation, value) where there is one.

    That is where four fifths of its saturated pixels, and two fifths of all, lie within HUE_WINDOW of one hue.
    """
    pixels = rgba[rgba[..., 3] > 200]
    if len(pixels) == 0:
        return (0, 0, 0), None
    red, green, blue = (int(c) for c in pixels[:, :3].mean(0))
    hsv = np.asarray(Image.fromarray(pixels[None, :, :3]).convert("HSV"))[0]
    vivid = hsv[(hsv[:, 1] > 90) & (hsv[:, 2] > 70)]
    counts = np.bincount(vivid[:, 0], minlength=256)
    window = sum(np.roll(counts, shift) for shift in range(-HUE_WINDOW, HUE_WINDOW + 1))
    hue = int(np.argmax(window))
    near = vivid[hue_distance(vivid[:, 0], hue) <= HUE_WINDOW]
    if len(near) < max(0.8 * len(vivid), 0.4 * len(pixels), 1):
        return (red, green, blue), None
    centre = hue + np.median((near[:, 0].astype(int) - hue + 128) % 256 - 128)
    return (red, green, blue), (int(centre) % 256, int(np.median(near[:, 1])), int(np.median(near[:, 2])))


def hue_distance(hue: np.ndarray, other: int) -> np.ndarray:
    """Distance on the colour circle of 256 hues."""
    return np.abs((hue.astype(np.int16) - other + 128) % 256 - 128)
