"""Captioned scenes of sprites: an endless dataset in which item k is a pure function of (seed, k)."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from ldm.config import SceneDataConfig
from ldm.picto.nouns import add_indefinite_article, is_countable, pluralize, strip_color_word
from ldm.picto.sprites import HUE_WINDOW, Color, Sprite, hue_distance, read_sprites

Rng = np.random.Generator
Split = Literal["train", "held-out"]
Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the image

NUM_SCENES = 2**40
SCENES_VERSION = 2  # increase it when the same sprites and seed give other scenes
SCENE_KIND_WEIGHTS = {"single": 0.66, "recoloured": 0.16, "pair": 0.12, "count": 0.06}
GROUP_WEIGHTS = {"animals-nature": 1.6, "food-drink": 1.6, "people-body": 0.35, "symbols": 0.5}  # else 1
BACKGROUND_PROBABILITY, TAG_PROBABILITY, STYLE_PROBABILITY = 0.4, 0.2, 0.5  # of scenes, names and captions

RECOLOR_HSV: dict[str, Color] = {  # what an object's dominant colour is moved to
    "red": (0, 215, 225),
    "orange": (20, 230, 250),
    "yellow": (36, 215, 255),
    "green": (85, 190, 175),
    "blue": (155, 200, 230),
    "purple": (196, 150, 195),
    "pink": (232, 105, 255),
}
RECOLOR_RGB = {name: colorsys.hsv_to_rgb(h / 256, s / 255, v) for name, (h, s, v) in RECOLOR_HSV.items()}
BACKGROUND_COLORS: dict[str, Color] = {
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
SINGLE_OBJECT_SIZE_RANGE = (0.65, 0.92)  # relative to the image
BACKGROUND_JITTER = 8
MIN_COLOR_CONTRAST = 80  # RGB distance of an object's mean colour from its background


def hash_selects_one_in(n: int, *key: str) -> bool:
    """True for one key in n, by its hash: sha256(key) mod n = 0."""
    return int.from_bytes(hashlib.sha256("|".join(key).encode()).digest()[:8]) % n == 0


def is_held_out_style(sprite: Sprite) -> bool:
    """Whether a (concept, style) pair is excluded from training: one in 76, some 150 of the 11,000 sprites."""
    return hash_selects_one_in(76, sprite.concept, sprite.style)


def is_held_out_color(color: str, concept: str) -> bool:
    """Whether a (colour, concept) pair is excluded from training: one in 14; red and green apples are one concept."""
    return hash_selects_one_in(14, color, strip_color_word(concept) or concept)


class Scene(NamedTuple):
    """An image, uint8 [size, size, 3], and its caption."""

    image: np.ndarray
    caption: str


class SceneObject(NamedTuple):
    """A sprite in a scene: its index, and its square's side and centre as fractions of the image's side."""

    sprite_index: int
    size: float
    x: float
    y: float
    color: str | None = None


class SpritePool(NamedTuple):
    """Indices of sprites, and the cumulative probabilities with which they are sampled."""

    sprite_indices: np.ndarray
    cdf: np.ndarray

    def sample(self, rng: Rng) -> int:
        return int(self.sprite_indices[np.searchsorted(self.cdf, rng.random(), side="right")])


def random_choice(rng: Rng, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


class SceneDataset:
    """An endless sequence of captioned scenes; item k depends on (seed, k) and the arguments alone.

    `len` is 2**40: sample indices, do not shuffle them. `concepts` restricts the objects: a concept's own name, any
    other name (`car`: every concept of that name) or an fnmatch pattern; ValueError where one matches nothing.
    split="train" has no held-out (concept, style) or (colour, concept) pair; "held-out" has only these: single
    objects, and recoloured ones in styles that are trained on. `size` is the side of the images in pixels.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 128,
        seed: int = 0,
        split: Split = "train",
        concepts: Sequence[str] | None = None,
    ) -> None:
        if split not in ("train", "held-out"):
            raise ValueError(f"split {split!r}: choose 'train' or 'held-out'")
        self.sprites, self.pixels = read_sprites(Path(folder))
        self.folder, self.size, self.seed, self.split = Path(folder), size, seed, split
        self.all_concepts = {sprite.concept for sprite in self.sprites}
        self.selected_concepts = self.all_concepts if concepts is None else select_concepts(self.sprites, concepts)
        self._build_pools([row for row, sprite in enumerate(self.sprites) if sprite.concept in self.selected_concepts])

    def _build_pools(self, rows: list[int]) -> None:
        """The sprites of each kind of scene; kinds without any are left out."""
        sprites, held = self.sprites, self.split == "held-out"
        single = [row for row in rows if is_held_out_style(sprites[row]) == held]
        trained = [row for row in rows if not is_held_out_style(sprites[row])]
        self.recolor_choices = {row: colors for row in trained if (colors := self._allowed_recolors(sprites[row]))}
        pools = {"single": single, "recoloured": list(self.recolor_choices)}
        self.pools_by_style: dict[str, SpritePool] = {}
        if not held:
            by_style: dict[str, list[int]] = {}
            for row in trained:
                by_style.setdefault(sprites[row].style, []).append(row)
            self.pools_by_style = {style: self._make_pool(some) for style, some in by_style.items() if len(some) > 1}
            pools["pair"] = [row for row in trained if sprites[row].style in self.pools_by_style]
            pools["count"] = [row for row in trained if is_repeatable(sprites[row])]
        self.pools = {kind: self._make_pool(some) for kind, some in pools.items() if some}
        if not self.pools:
            raise ValueError(f"split {self.split!r}: none of its pairs is among these {len(rows)} sprites")
        cdf = np.cumsum([SCENE_KIND_WEIGHTS[kind] for kind in self.pools])
        self.kind_cdf = cdf / cdf[-1]

    def _make_pool(self, rows: list[int]) -> SpritePool:
        cdf = np.cumsum([GROUP_WEIGHTS.get(self.sprites[row].group, 1.0) for row in rows])
        return SpritePool(np.array(rows), cdf / cdf[-1])

    def _allowed_recolors(self, sprite: Sprite) -> list[str]:
        """The colours in which the sprite may be shown in this split."""
        base = strip_color_word(sprite.concept) or sprite.concept
        if sprite.paint is None or not is_recolorable(sprite):
            return []
        held_out = [c for c in RECOLOR_HSV if is_held_out_color(c, sprite.concept)]
        held_out = [c for c in held_out if f"{c} {base}" not in self.all_concepts]
        return [c for c in RECOLOR_HSV if (c in held_out) == (self.split == "held-out")]

    def cache_key(self) -> list[object]:
        """Everything that the items depend on, as JSON values."""
        sprites = hashlib.sha256((self.folder / "sprites.jsonl").read_bytes()).hexdigest()
        return [SCENES_VERSION, sprites, self.size, self.seed, self.split, sorted(self.selected_concepts)]

    def __len__(self) -> int:
        return NUM_SCENES

    def __getitem__(self, k: int) -> Scene:
        if not 0 <= k < NUM_SCENES:
            raise IndexError(k)
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, k], np.uint64)))
        kind = list(self.pools)[np.searchsorted(self.kind_cdf, rng.random(), side="right")]
        objects, phrase = SCENE_COMPOSERS[kind](self, rng)
        color_name, color = self._sample_background(objects, rng)
        caption = f"{phrase} on {add_indefinite_article(color_name)} background" if color_name else phrase
        if rng.random() < STYLE_PROBABILITY:
            caption = f"{self.sprites[objects[0].sprite_index].style} style, {caption}"
        return Scene(self._render(objects, color), caption)

    def sample_name(self, sprite_index: int, rng: Rng) -> str:
        """One of the names of a sprite, sometimes one of its tags."""
        sprite = self.sprites[sprite_index]
        return random_choice(rng, sprite.tags if sprite.tags and rng.random() < TAG_PROBABILITY else sprite.names)

    def _sample_background(self, objects: list[SceneObject], rng: Rng) -> tuple[str, Color]:
        """A named colour on which every object is visible, or plain white, without a name."""
        sprites = [self.sprites[item.sprite_index] for item in objects]
        means = [s.mean if o.color is None else RECOLOR_RGB[o.color] for s, o in zip(sprites, objects, strict=True)]
        used, contrasting = {item.color for item in objects}, []
        for name, rgb in BACKGROUND_COLORS.items():
            distances = np.linalg.norm(np.array(means) - rgb, axis=-1)
            if not used & {*name.split()} and float(distances.min()) > MIN_COLOR_CONTRAST:
                contrasting.append(name)
        if contrasting and (rng.random() < BACKGROUND_PROBABILITY or "white" not in contrasting):
            name = random_choice(rng, contrasting)
            # the same for all channels: gray stays gray
            shift = int(rng.integers(-BACKGROUND_JITTER, BACKGROUND_JITTER + 1))
            red, green, blue = (min(max(c + shift, 0), 255) for c in BACKGROUND_COLORS[name])
            return name, (red, green, blue)
        return "", (255, 255, 255)

    def _render(self, objects: list[SceneObject], background: Color) -> np.ndarray:
        canvas = Image.new("RGB", (self.size, self.size), background)
        for index, side, x, y, color in objects:
            pixels = max(1, round(side * self.size))
            # Pillow resizes RGBA with premultiplied alpha: no fringe of the transparent pixels' colour
            sprite = Image.fromarray(self.pixels[index]).resize((pixels, pixels), Image.Resampling.LANCZOS)
            paint = self.sprites[index].paint
            if color is not None and paint is not None:
                sprite = recolor_sprite(sprite, paint, RECOLOR_HSV[color])
            corner = round(x * self.size - pixels / 2), round(y * self.size - pixels / 2)
            canvas.paste(sprite, corner, sprite)
        return np.array(canvas)


def make_scene_dataset(config: SceneDataConfig, seed: int, split: Split = "train") -> SceneDataset:
    """The scenes of a recipe; its file of concepts has one per line, and comments after `#`."""
    lines = [] if config.concepts is None else config.concepts.read_text(encoding="utf-8").splitlines()
    concepts = [name for name in (line.partition("#")[0].strip() for line in lines) if name]
    return SceneDataset(config.sprites, size=config.size, seed=seed, split=split, concepts=concepts or None)


def select_concepts(sprites: Sequence[Sprite], patterns: Sequence[str]) -> set[str]:
    """The concepts whose names match any of the patterns; ValueError for a pattern that matches none."""
    by_name: dict[str, set[str]] = {}
    for sprite in sprites:
        for name in (*sprite.names, *sprite.tags):
            by_name.setdefault(name, set()).add(sprite.concept)
    by_name |= {sprite.concept: {sprite.concept} for sprite in sprites}  # a concept's own name means it alone
    selected: set[str] = set()
    for pattern in patterns:
        names = [pattern] if pattern in by_name else [name for name in by_name if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"concept {pattern!r}: nothing in the dataset has that name")
        selected.update(*(by_name[name] for name in names))
    return selected


def is_recolorable(sprite: Sprite) -> bool:
    """Whether it may be shown in another colour: faces, people and signs may not, as their colour is part of them."""
    fixed = sprite.group in ("smileys-emotion", "people-body", "symbols")
    return bool(names_without_color(sprite)) and (not fixed or sprite.subgroup in ("heart", "geometric"))


def names_without_color(sprite: Sprite) -> list[str]:
    """Its names without the colour words in them."""
    return [name for name in map(strip_color_word, sprite.names) if name]


def is_repeatable(sprite: Sprite) -> bool:
    """Whether several may be shown: things and animals, by those of its names that have a plural."""
    return sprite.group not in ("people-body", "symbols") and any(map(is_countable, sprite.names))


def recolor_sprite(sprite: Image.Image, old: Color, new: Color) -> Image.Image:
    """Move pixels near the old hue to the new one, their saturation and value in proportion (HSV, of 256)."""
    hsv = np.array(sprite.convert("RGB").convert("HSV"))
    hue, rest = hsv[..., 0], hsv[..., 1:].astype(np.float32)
    near = (hue_distance(hue, old[0]) <= 2 * HUE_WINDOW) & (hsv[..., 1] > 20)
    turned = hue + np.int16(new[0] - old[0])
    scaled = np.minimum(rest * (np.divide(new[1:], old[1:], dtype=np.float32)), 255)
    hsv[near] = np.concatenate([turned[..., None] % 256, scaled], -1).astype(np.uint8)[near]
    painted = Image.fromarray(hsv, "HSV").convert("RGB")
    painted.putalpha(sprite.getchannel("A"))
    return painted


def place_in_box(
    rng: Rng, sprite_index: int, size: float, box: Box, color: str | None = None, max_offset: float = 0.05
) -> SceneObject:
    """An object near the middle of a box, never over its edge."""
    left, top, right, bottom = box
    slack_x, slack_y = (max(0.0, min(max_offset, (room - size) / 2)) for room in (right - left, bottom - top))
    x = (left + right) / 2 + rng.uniform(-slack_x, slack_x)
    y = (top + bottom) / 2 + rng.uniform(-slack_y, slack_y)
    return SceneObject(sprite_index, size, x, y, color)


FULL_BOX: Box = (0, 0, 1, 1)
LEFT_HALF, RIGHT_HALF, TOP_HALF, BOTTOM_HALF = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 0.5), (0, 0.5, 1, 1)
QUARTERS: list[Box] = [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)]
SPATIAL_RELATIONS: dict[str, tuple[Box, Box]] = {
    "to the left of": (LEFT_HALF, RIGHT_HALF),
    "to the right of": (RIGHT_HALF, LEFT_HALF),
    "above": (TOP_HALF, BOTTOM_HALF),
    "below": (BOTTOM_HALF, TOP_HALF),
}
COUNT_LAYOUTS: dict[str, list[list[Box]]] = {
    "two": [[LEFT_HALF, RIGHT_HALF], [QUARTERS[0], QUARTERS[3]], [QUARTERS[1], QUARTERS[2]]],
    "three": [
        [(i / 3, 0, (i + 1) / 3, 1) for i in range(3)],
        [(0.25, 0, 0.75, 0.5), QUARTERS[2], QUARTERS[3]],
    ],
    "four": [QUARTERS],
}


Composition = tuple[list[SceneObject], str]  # the objects and the caption's phrase for them


def compose_single(scenes: SceneDataset, rng: Rng) -> Composition:
    index = scenes.pools["single"].sample(rng)
    item = place_in_box(rng, index, rng.uniform(*SINGLE_OBJECT_SIZE_RANGE), FULL_BOX)
    return [item], add_indefinite_article(scenes.sample_name(index, rng))


def compose_recolored(scenes: SceneDataset, rng: Rng) -> Composition:
    index = scenes.pools["recoloured"].sample(rng)
    color = random_choice(rng, scenes.recolor_choices[index])
    name = strip_color_word(scenes.sample_name(index, rng))
    name = name or random_choice(rng, names_without_color(scenes.sprites[index]))
    item = place_in_box(rng, index, rng.uniform(*SINGLE_OBJECT_SIZE_RANGE), FULL_BOX, color)
    return [item], add_indefinite_article(f"{color} {name}")


def compose_pair(scenes: SceneDataset, rng: Rng) -> Composition:
    first = scenes.pools["pair"].sample(rng)
    partners = scenes.pools_by_style[scenes.sprites[first].style]
    while (second := partners.sample(rng)) == first:
        pass
    pair = first, second
    names = [scenes.sample_name(index, rng) for index in pair]
    if names[0] == names[1]:
        names = [scenes.sprites[index].concept for index in pair]
    relation = random_choice(rng, list(SPATIAL_RELATIONS))
    boxes = SPATIAL_RELATIONS[relation]
    objects = [place_in_box(rng, i, rng.uniform(0.35, 0.5), box) for i, box in zip(pair, boxes, strict=True)]
    return objects, f"{add_indefinite_article(names[0])} {relation} {add_indefinite_article(names[1])}"


def compose_count(scenes: SceneDataset, rng: Rng) -> Composition:
    index = scenes.pools["count"].sample(rng)
    number = random_choice(rng, list(COUNT_LAYOUTS))
    layouts = COUNT_LAYOUTS[number]
    boxes = layouts[int(rng.random() * len(layouts))]
    side = min(right - left for left, _, right, _ in boxes) * rng.uniform(0.8, 0.97)
    name = scenes.sample_name(index, rng)
    name = name if is_countable(name) else random_choice(rng, list(filter(is_countable, scenes.sprites[index].names)))
    return [place_in_box(rng, index, side, box, max_offset=0.03) for box in boxes], f"{number} {pluralize(name)}"


SCENE_COMPOSERS: dict[str, Callable[[SceneDataset, Rng], Composition]] = {
    "single": compose_single,
    "recoloured": compose_recolored,
    "pair": compose_pair,
    "count": compose_count,
}
