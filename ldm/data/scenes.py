"""Captioned scenes of sprites: an endless training set in which picture k is a pure function of (seed, k)."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from ldm.config import SceneData
from ldm.data.sprites import HUE_WINDOW, Colour, Sprite, apart, read_sprites
from ldm.data.words import countable, indefinite, plural, uncoloured

Rng = np.random.Generator

LENGTH = 2**40
MIXTURE = 2  # raise it when the same sprites and seed give other scenes
KINDS = {"single": 0.66, "recoloured": 0.16, "pair": 0.12, "count": 0.06}
WEIGHTS = {"animals-nature": 1.6, "food-drink": 1.6, "people-body": 0.35, "symbols": 0.5}  # else 1
ON_COLOUR, BY_TAG, STYLED = 0.4, 0.2, 0.5  # shares of scenes, names and captions

# Hue, saturation and value, 0 to 255, that an object's dominant colour is moved to.
PAINTS: dict[str, Colour] = {
    "red": (0, 215, 225),
    "orange": (20, 230, 250),
    "yellow": (36, 215, 255),
    "green": (85, 190, 175),
    "blue": (155, 200, 230),
    "purple": (196, 150, 195),
    "pink": (232, 105, 255),
}
PAINTS_RGB = {name: colorsys.hsv_to_rgb(h / 256, s / 255, v) for name, (h, s, v) in PAINTS.items()}
BACKGROUNDS: dict[str, Colour] = {
    "red": (222, 50, 45),
    "orange": (246, 148, 44),
    "yellow": (250, 216, 66),
    "green": (66, 166, 80),
    "blue": (44, 92, 206),
    "light blue": (156, 208, 246),
    "purple": (128, 70, 176),
    "pink": (246, 160, 194),
    "brown": (128, 84, 48),
    "gray": (150, 150, 150),
    "black": (18, 18, 18),
    "white": (246, 246, 246),
}
SIDE = (0.65, 0.92)  # of a lone object, over the picture's
JITTER = 8
CONTRAST = 80  # least distance, in RGB, of an object's mean colour from its background


def one_in(n: int, *key: str) -> bool:
    """True for one key in n, the same in every process and version: sha256(key) mod n = 0."""
    return int.from_bytes(hashlib.sha256("|".join(key).encode()).digest()[:8]) % n == 0


def held_out_style(sprite: Sprite) -> bool:
    """Is this (concept, style) pair kept from training? One in 76: some 150 of the 11,000 sprites."""
    return one_in(76, sprite.concept, sprite.style)


def held_out_colour(colour: str, concept: str) -> bool:
    """Is this (colour, concept) pair kept from training? One in 14; red and green apples are one concept."""
    return one_in(14, colour, uncoloured(concept) or concept)


class Scene(NamedTuple):
    """A picture, uint8 [size, size, 3], and what is in it."""

    image: np.ndarray
    caption: str


class Item(NamedTuple):
    """A sprite in a scene: its row, and its square's side and centre as fractions of the picture's side."""

    row: int
    side: float
    x: float
    y: float
    colour: str | None = None


class Pool(NamedTuple):
    """Rows of the sprite table with the cumulative probabilities they are drawn with."""

    rows: np.ndarray
    cdf: np.ndarray

    def draw(self, rng: Rng) -> int:
        return int(self.rows[np.searchsorted(self.cdf, rng.random(), side="right")])


def choose(rng: Rng, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


class Scenes:
    """An endless sequence of captioned scenes; item k depends on (seed, k) and the arguments alone.

    `len` is 2**40: draw indices, do not shuffle them. `concepts` restricts what is drawn, each to a concept's
    own name, any other name (`car`: every concept called so) or an fnmatch pattern; ValueError where it fits
    nothing. split="train" has no held-out (concept, style) or (colour, concept) pair; "held-out" shows these
    alone: single objects, and recoloured ones in styles that were trained on. `size` is
    the pictures' side in pixels.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 128,
        seed: int = 0,
        split: Literal["train", "held-out"] = "train",
        concepts: Sequence[str] | None = None,
    ) -> None:
        if split not in ("train", "held-out"):
            raise ValueError(f"split {split!r}: choose 'train' or 'held-out'")
        self.sprites, self.pixels = read_sprites(Path(folder))
        self.folder, self.size, self.seed, self.split = Path(folder), size, seed, split
        self.known = {sprite.concept for sprite in self.sprites}
        self.wanted = self.known if concepts is None else select(self.sprites, concepts)
        self._fill_pools([row for row, sprite in enumerate(self.sprites) if sprite.concept in self.wanted])

    def _fill_pools(self, rows: list[int]) -> None:
        """Which sprites each kind of scene draws from; kinds that none fits are left out."""
        sprites, held = self.sprites, self.split == "held-out"
        single = [row for row in rows if held_out_style(sprites[row]) == held]
        trained = [row for row in rows if not held_out_style(sprites[row])]
        self.paints = {row: paints for row in trained if (paints := self._paints(sprites[row]))}
        pools = {"single": single, "recoloured": list(self.paints)}
        self.partners: dict[str, Pool] = {}
        if not held:
            by_style: dict[str, list[int]] = {}
            for row in trained:
                by_style.setdefault(sprites[row].style, []).append(row)
            self.partners = {style: self._pool(some) for style, some in by_style.items() if len(some) > 1}
            pools["pair"] = [row for row in trained if sprites[row].style in self.partners]
            pools["count"] = [row for row in trained if repeatable(sprites[row])]
        self.pools = {kind: self._pool(some) for kind, some in pools.items() if some}
        if not self.pools:
            raise ValueError(f"split {self.split!r}: none of its pairs is among these {len(rows)} sprites")
        shares = np.cumsum([KINDS[kind] for kind in self.pools])
        self.shares = shares / shares[-1]

    def _pool(self, rows: list[int]) -> Pool:
        cdf = np.cumsum([WEIGHTS.get(self.sprites[row].group, 1.0) for row in rows])
        return Pool(np.array(rows), cdf / cdf[-1])

    def _paints(self, sprite: Sprite) -> list[str]:
        """The colours that this split shows the sprite in."""
        base = uncoloured(sprite.concept) or sprite.concept
        if sprite.paint is None or not paintable(sprite):
            return []
        hidden = {c for c in PAINTS if held_out_colour(c, sprite.concept) and f"{c} {base}" not in self.known}
        return [c for c in PAINTS if (c in hidden) == (self.split == "held-out")]

    def key(self) -> list[object]:
        """What every item depends on, as JSON can say it: equal keys, equal scenes."""
        sprites = hashlib.sha256((self.folder / "sprites.jsonl").read_bytes()).hexdigest()
        return [MIXTURE, sprites, self.size, self.seed, self.split, sorted(self.wanted)]

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, k: int) -> Scene:
        if not 0 <= k < LENGTH:
            raise IndexError(k)
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, k], np.uint64)))
        kind = list(self.pools)[np.searchsorted(self.shares, rng.random(), side="right")]
        items, phrase = ARRANGE[kind](self, rng)
        ground, colour = self._background(items, rng)
        caption = f"{phrase} on {indefinite(ground)} background" if ground else phrase
        if rng.random() < STYLED:
            caption = f"{self.sprites[items[0].row].style} style, {caption}"
        return Scene(self._paint(items, colour), caption)

    def call(self, row: int, rng: Rng) -> str:
        """One of the names of a sprite, now and then one of its tags."""
        sprite = self.sprites[row]
        return choose(rng, sprite.tags if sprite.tags and rng.random() < BY_TAG else sprite.names)

    def _background(self, items: list[Item], rng: Rng) -> tuple[str, Colour]:
        """A named colour on which every item shows, or plain white, which has no name."""
        shown = np.array([shown_colour(self.sprites[item.row], item.colour) for item in items])  # [items, 3]
        said = {item.colour for item in items}
        fit = {name: rgb for name, rgb in BACKGROUNDS.items() if not said & {*name.split()}}
        clear = [name for name, rgb in fit.items() if apart_from(shown, rgb)]
        if clear and (rng.random() < ON_COLOUR or "white" not in clear):
            name = choose(rng, clear)
            shift = int(rng.integers(-JITTER, JITTER + 1))  # the same for all channels: gray stays gray
            red, green, blue = (min(max(c + shift, 0), 255) for c in BACKGROUNDS[name])
            return name, (red, green, blue)
        return "", (255, 255, 255)

    def _paint(self, items: list[Item], ground: Colour) -> np.ndarray:
        canvas = Image.new("RGB", (self.size, self.size), ground)
        for row, side, x, y, colour in items:
            pixels = max(1, round(side * self.size))
            # Pillow resizes RGBA with premultiplied alpha: no fringe of the transparent pixels' colour
            sprite = Image.fromarray(self.pixels[row]).resize((pixels, pixels), Image.Resampling.LANCZOS)
            old = self.sprites[row].paint
            if colour is not None and old is not None:
                sprite = recolour(sprite, old, PAINTS[colour])
            corner = round(x * self.size - pixels / 2), round(y * self.size - pixels / 2)
            canvas.paste(sprite, corner, sprite)
        return np.array(canvas)


def open_scenes(data: SceneData, seed: int, split: Literal["train", "held-out"] = "train") -> Scenes:
    """The scenes of a recipe; its file of concepts has one a line, and comments after `#`."""
    lines = [] if data.concepts is None else data.concepts.read_text(encoding="utf-8").splitlines()
    concepts = [name for name in (line.partition("#")[0].strip() for line in lines) if name]
    return Scenes(data.sprites, size=data.size, seed=seed, split=split, concepts=concepts or None)


def select(sprites: Sequence[Sprite], patterns: Sequence[str]) -> set[str]:
    """The concepts that the patterns name; ValueError for a pattern that names none."""
    called: dict[str, set[str]] = {}
    for sprite in sprites:
        for name in (*sprite.names, *sprite.tags):
            called.setdefault(name, set()).add(sprite.concept)
    called |= {sprite.concept: {sprite.concept} for sprite in sprites}  # a concept's own name means it alone
    wanted: set[str] = set()
    for pattern in patterns:
        fitting = [pattern] if pattern in called else [name for name in called if fnmatchcase(name, pattern)]
        found = {concept for name in fitting for concept in called[name]}
        if not found:
            raise ValueError(f"concept {pattern!r}: nothing in the data set is called that")
        wanted |= found
    return wanted


def paintable(sprite: Sprite) -> bool:
    """May it be shown in another colour? Faces, people and signs may not: their colour is part of them."""
    fixed = sprite.group in ("smileys-emotion", "people-body", "symbols")
    return bool(plain(sprite)) and (not fixed or sprite.subgroup in ("heart", "geometric"))


def plain(sprite: Sprite) -> list[str]:
    """Its names, without the colours in them."""
    return [name for name in map(uncoloured, sprite.names) if name]


def repeatable(sprite: Sprite) -> bool:
    """May it be counted? Things and animals, by those of its names that have a plural."""
    return sprite.group not in ("people-body", "symbols") and any(map(countable, sprite.names))


def shown_colour(sprite: Sprite, colour: str | None) -> tuple[float, float, float]:
    """The RGB colour that a sprite shows by and large, after recolouring."""
    return sprite.mean if colour is None else PAINTS_RGB[colour]


def apart_from(shown: np.ndarray, rgb: Colour) -> bool:
    """Do all the colours shown [n, 3] stand out from a background?"""
    return float(np.linalg.norm(shown - rgb, axis=-1).min()) > CONTRAST


def recolour(sprite: Image.Image, old: Colour, new: Colour) -> Image.Image:
    """Move pixels near the old hue to the new one, their saturation and value in proportion (HSV, of 256)."""
    hsv = np.array(sprite.convert("RGB").convert("HSV"))
    hue, rest = hsv[..., 0], hsv[..., 1:].astype(np.float32)
    near = (apart(hue, old[0]) <= 2 * HUE_WINDOW) & (hsv[..., 1] > 20)
    turned = hue + np.int16(new[0] - old[0])
    scaled = np.minimum(rest * (np.divide(new[1:], old[1:], dtype=np.float32)), 255)
    hsv[near] = np.concatenate([turned[..., None] % 256, scaled], -1).astype(np.uint8)[near]
    painted = Image.fromarray(hsv, "HSV").convert("RGB")
    painted.putalpha(sprite.getchannel("A"))
    return painted


Box = tuple[float, float, float, float]  # left, top, right, bottom


def within(rng: Rng, row: int, side: float, box: Box, colour: str | None = None, reach: float = 0.05) -> Item:
    """An item near the middle of a box, never over its edge."""
    left, top, right, bottom = box
    slack_x, slack_y = (max(0.0, min(reach, (room - side) / 2)) for room in (right - left, bottom - top))
    x = (left + right) / 2 + rng.uniform(-slack_x, slack_x)
    y = (top + bottom) / 2 + rng.uniform(-slack_y, slack_y)
    return Item(row, side, x, y, colour)


WHOLE: Box = (0, 0, 1, 1)
LEFT, RIGHT, TOP, BOTTOM = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 0.5), (0, 0.5, 1, 1)
QUARTERS: list[Box] = [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)]
RELATIONS: dict[str, tuple[Box, Box]] = {
    "to the left of": (LEFT, RIGHT),
    "to the right of": (RIGHT, LEFT),
    "above": (TOP, BOTTOM),
    "below": (BOTTOM, TOP),
}
LAYOUTS: dict[str, list[list[Box]]] = {
    "two": [[LEFT, RIGHT], [QUARTERS[0], QUARTERS[3]], [QUARTERS[1], QUARTERS[2]]],
    "three": [
        [(i / 3, 0, (i + 1) / 3, 1) for i in range(3)],
        [(0.25, 0, 0.75, 0.5), QUARTERS[2], QUARTERS[3]],
    ],
    "four": [QUARTERS],
}


def single(scenes: Scenes, rng: Rng) -> tuple[list[Item], str]:
    row = scenes.pools["single"].draw(rng)
    return [within(rng, row, rng.uniform(*SIDE), WHOLE)], indefinite(scenes.call(row, rng))


def recoloured(scenes: Scenes, rng: Rng) -> tuple[list[Item], str]:
    row = scenes.pools["recoloured"].draw(rng)
    colour = choose(rng, scenes.paints[row])
    name = uncoloured(scenes.call(row, rng)) or choose(rng, plain(scenes.sprites[row]))
    phrase = indefinite(f"{colour} {name}")
    return [within(rng, row, rng.uniform(*SIDE), WHOLE, colour)], phrase


def pair(scenes: Scenes, rng: Rng) -> tuple[list[Item], str]:
    first = scenes.pools["pair"].draw(rng)
    partners = scenes.partners[scenes.sprites[first].style]
    while (second := partners.draw(rng)) == first:
        pass
    names = [scenes.call(row, rng) for row in (first, second)]
    if names[0] == names[1]:
        names = [scenes.sprites[row].concept for row in (first, second)]
    relation = choose(rng, list(RELATIONS))
    boxes = RELATIONS[relation]
    items = [within(rng, row, rng.uniform(0.35, 0.5), box) for row, box in zip((first, second), boxes, strict=True)]
    return items, f"{indefinite(names[0])} {relation} {indefinite(names[1])}"


def count(scenes: Scenes, rng: Rng) -> tuple[list[Item], str]:
    row = scenes.pools["count"].draw(rng)
    number = choose(rng, list(LAYOUTS))
    layouts = LAYOUTS[number]
    boxes = layouts[int(rng.random() * len(layouts))]
    side = min(right - left for left, _, right, _ in boxes) * rng.uniform(0.8, 0.97)
    name = scenes.call(row, rng)
    name = name if countable(name) else choose(rng, list(filter(countable, scenes.sprites[row].names)))
    return [within(rng, row, side, box, reach=0.03) for box in boxes], f"{number} {plural(name)}"


ARRANGE: dict[str, Callable[[Scenes, Rng], tuple[list[Item], str]]] = {
    "single": single,
    "recoloured": recoloured,
    "pair": pair,
    "count": count,
}
