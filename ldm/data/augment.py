"""Random augmentation of one use of a sample: a function of (seed, sample key, times seen), in whichever process."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

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


def shuffle_tags(caption: str, separator: str, keep_tokens: int, seed: int, key: str, times_seen: int) -> str:
    """The caption with its tags in random order, except for the first `keep_tokens`."""
    tags = [tag.strip() for tag in caption.split(separator)]
    rng = np.random.Generator(np.random.Philox(derive_seed(seed, key, times_seen, "tags")))
    shuffled_part = tags[keep_tokens:]
    order = rng.permutation(len(shuffled_part))
    return f"{separator} ".join([*tags[:keep_tokens], *(shuffled_part[k] for k in order)])


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
