"""What chance decides about one visit of one sample: a function of (seed, sample, visit), whoever asks."""

from __future__ import annotations

import numpy as np

from ldm.data.buckets import Size
from ldm.rng import keyed, keyed_uniform


def flipped(seed: int, key: str, visit: int) -> bool:
    """Is it mirrored? One time in two."""
    return keyed_uniform(seed, key, visit, "flip") < 0.5


def corner(slack: Size, seed: int, key: str, visit: int) -> Size:
    """Left and top of a crop that takes `slack` off, all places alike."""
    left, top = (keyed_uniform(seed, key, visit, name) for name in ("left", "top"))
    return int(left * (slack[0] + 1)), int(top * (slack[1] + 1))


def centre(slack: Size) -> Size:
    """Left and top of the crop in the middle."""
    return slack[0] // 2, slack[1] // 2


def dropped(rate: float, seed: int, key: str, visit: int) -> bool:
    """Is its caption left out, for classifier-free guidance? At a rate (Ho & Salimans 2022, algorithm 1)."""
    return keyed_uniform(seed, key, visit, "caption") < rate


def shuffled_tags(caption: str, separator: str, keep: int, seed: int, key: str, visit: int) -> str:
    """The caption's tags in any order, all alike, but for the first `keep`."""
    tags = [tag.strip() for tag in caption.split(separator)]
    rng = np.random.Generator(np.random.Philox(keyed(seed, key, visit, "tags")))
    tail = tags[keep:]
    return f"{separator} ".join([*tags[:keep], *(tail[k] for k in rng.permutation(len(tail)))])
