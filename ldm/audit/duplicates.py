"""Duplicate images: identical files, and images that look nearly the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn

from ldm.data.sources import HELD_OUT_PREFIX, DatasetIssue, ImageSample

PHASH_IMAGE_SIZE = 32  # pixels a side
MAX_HASH_DISTANCE = 10  # of 64 bits: that near duplicates may differ by
MAX_COLOR_DIFFERENCE = 6.0  # of 255: mean difference of the color grids of near duplicates
COLOR_GRID_SIZE = 8  # pixels a side


class ImageFingerprint(NamedTuple):
    """What two images are compared by: a perceptual hash of 64 bits, and colors, uint8 [8, 8, 3]."""

    phash: int
    color_grid: np.ndarray


def fingerprint_image(image: Image.Image) -> ImageFingerprint:
    """The fingerprint of an RGB image."""
    small = image.resize((COLOR_GRID_SIZE, COLOR_GRID_SIZE), Image.Resampling.BOX)
    return ImageFingerprint(perceptual_hash(image), np.asarray(small))


def perceptual_hash(image: Image.Image) -> int:
    """Which of the 8 x 8 lowest frequencies of the gray image exceed their median (Zauner 2010, section 3.2.1)."""
    gray = image.convert("L").resize((PHASH_IMAGE_SIZE, PHASH_IMAGE_SIZE), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(gray, np.float64))[:8, :8]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def find_identical_files(pairs: Sequence[tuple[ImageSample, str]]) -> Iterator[DatasetIssue]:
    """An issue for each sample whose file's bytes an earlier one has; held-out samples come last."""
    first: dict[str, ImageSample] = {}
    for sample, digest in pairs:
        other = first.setdefault(digest, sample)
        same = f"the same file as {other.key}"
        if is_held_out_leak(sample, other):
            yield DatasetIssue("held-out leak", sample.key, f"{same}, which is trained on")
        elif other.caption != sample.caption:
            yield DatasetIssue("other caption", sample.key, f"{same}, whose caption is {other.caption[:60]!r}")
        elif other is not sample:
            yield DatasetIssue("same image", sample.key, same)


def find_near_duplicates(pairs: Sequence[tuple[ImageSample, ImageFingerprint]]) -> Iterator[DatasetIssue]:
    """An issue for each sample that looks nearly like an earlier one; held-out samples come last. O(n^2)."""
    hashes = np.array([fingerprint.phash for _, fingerprint in pairs], np.uint64)
    grids = np.array([fingerprint.color_grid for _, fingerprint in pairs], np.int16)
    colors = grids.reshape(len(pairs), 3 * COLOR_GRID_SIZE**2)
    for row in range(1, len(hashes)):
        distances = np.bitwise_count(hashes[:row] ^ hashes[row])
        candidates = np.flatnonzero(distances <= MAX_HASH_DISTANCE)
        differences = np.abs(colors[candidates] - colors[row]).mean(1)
        if (close := differences <= MAX_COLOR_DIFFERENCE).any():
            nearest = int(candidates[close][0])
            sample, other = pairs[row][0], pairs[nearest][0]
            kind = "held-out leak" if is_held_out_leak(sample, other) else "near duplicate"
            what = f"{distances[nearest]} of 64 bits and {differences[close][0]:.1f} levels apart"
            yield DatasetIssue(kind, sample.key, f"looks like {other.key}: {what}")


def is_held_out_leak(sample: ImageSample, other: ImageSample) -> bool:
    """Is `sample` held out and `other` trained on?"""
    return sample.key.startswith(HELD_OUT_PREFIX) > other.key.startswith(HELD_OUT_PREFIX)
