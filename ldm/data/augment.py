"""Random augmentation of one use of a sample: a function of (seed, sample key, times seen), in whichever process."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.config import ImageDataConfig
from ldm.data.buckets import BucketPlacement, ImageSize
from ldm.rng import derive_seed, derive_uniform


class Augmentation(NamedTuple):
    """Horizontal flip or not, then a crop at `crop_corner` (left, top)."""

    flip: bool
    crop_corner: ImageSize


def should_flip(seed: int, key: str, times_seen: int) -> bool:
    """Flip horizontally? With probability 1/2."""
    return derive_uniform(seed, key, times_seen, "flip") < 0.5


def random_crop_corner(margin: ImageSize, seed: int, key: str, times_seen: int) -> ImageSize:
    """Left and top of a crop that removes `margin` pixels in all, uniform."""
    left, top = (derive_uniform(seed, key, times_seen, name) for name in ("left", "top"))
    return int(left * (margin[0] + 1)), int(top * (margin[1] + 1))


def center_crop_corner(margin: ImageSize) -> ImageSize:
    """Left and top of the center crop."""
    return margin[0] // 2, margin[1] // 2


def should_drop_caption(rate: float, seed: int, key: str, times_seen: int) -> bool:
    """Drop the caption, for classifier-free guidance? With probability `rate` (Ho & Salimans 2022, algorithm 1)."""
    return derive_uniform(seed, key, times_seen, "caption") < rate


def augment_tags(caption: str, data: ImageDataConfig, seed: int, key: str, times_seen: int) -> str:
    """The caption with its tags dropped at random and in random order, as `data` says, except for those that are kept.

    Kept are the first `keep_tokens`, or what is before the first `keep_tokens_separator` and after the second.
    """
    separator, mark = data.caption_separator, data.keep_tokens_separator
    first, middle, last = "", caption, ""
    if mark and mark in caption:
        first, middle, last = [*caption.split(mark, 2), ""][:3]
    tags = [tag.strip() for tag in middle.split(separator)]
    kept = 0 if middle != caption else data.keep_tokens
    fixed, free = tags[:kept], tags[kept:]
    if data.caption_tag_dropout:
        draws = (derive_uniform(seed, key, times_seen, "tag", k) for k in range(len(free)))
        free = [tag for tag, u in zip(free, draws, strict=True) if u >= data.caption_tag_dropout]
    if data.shuffle_caption:
        rng = np.random.Generator(np.random.Philox(derive_seed(seed, key, times_seen, "tags")))
        free = [free[k] for k in rng.permutation(len(free))]
    ends = [[tag.strip() for tag in part.split(separator) if tag.strip()] for part in (first, last)]
    return f"{separator} ".join([*ends[0], *fixed, *free, *ends[1]])


def resize_and_crop(
    image: Image.Image,
    placement: BucketPlacement,
    augmentation: Augmentation,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """An image resized to cover its bucket, flipped or not, and cropped to it."""
    (width, height), (left, top) = placement.bucket, augmentation.crop_corner
    resized = image.resize(placement.resized_size, resample)
    if augmentation.flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return resized.crop((left, top, left + width, top + height))


def downsample_mask(mask: np.ndarray, factor: int) -> np.ndarray:
    """A mask, uint8 [H, W], averaged over squares of `factor` pixels: float32 [1, H / factor, W / factor] in [0, 1]."""
    height, width = mask.shape
    squares = mask.reshape(1, height // factor, factor, width // factor, factor)
    return (squares.mean((2, 4)) / 255).astype(np.float32)
