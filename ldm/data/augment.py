"""What chance decides about one visit of one sample: a function of (seed, sample, visit), whoever asks."""

from __future__ import annotations

import numpy as np

from ldm.data.buckets import ImageSize
from ldm.rng import derive_seed, derive_uniform


def should_flip(seed: int, key: str, times_seen: int) -> bool:
    """Is it mirrored? One time in two."""
    return derive_uniform(seed, key, times_seen, "flip") < 0.5


def random_crop_corner(margin: ImageSize, seed: int, key: str, times_seen: int) -> ImageSize:
    """Left and top of a crop that takes `slack` off, all places alike."""
    left, top = (derive_uniform(seed, key, times_seen, name) for name in ("left", "top"))
    return int(left * (margin[0] + 1)), int(top * (margin[1] + 1))


def center_crop_corner(margin: ImageSize) -> ImageSize:
    """Left and top of the crop in the middle."""
    return margin[0] // 2, margin[1] // 2


def should_drop_caption(rate: float, seed: int, key: str, times_seen: int) -> bool:
    """Is its caption left out, for classifier-free guidance? At a rate (Ho & Salimans 2022, algorithm 1)."""
    return derive_uniform(seed, key, times_seen, "caption") < rate


def shuffle_tags(caption: str, separator: str, keep_tokens: int, seed: int, key: str, times_seen: int) -> str:
    """The caption's tags in any order, all alike, but for the first `inpaint`."""
    tags = [tag.strip() for tag in caption.split(separator)]
    rng = np.random.Generator(np.random.Philox(derive_seed(seed, key, times_seen, "tags")))
    tail = tags[keep_tokens:]
    return f"{separator} ".join([*tags[:keep_tokens], *(tail[k] for k in rng.permutation(len(tail)))])
