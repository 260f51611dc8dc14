"""Pictures that are there more than once: the same file, or nearly the same to the eye."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn

from ldm.data.sources import HELD_OUT_PREFIX, DatasetIssue, ImageSample

PHASH_IMAGE_SIZE = 32  # pixels a side of what is hashed
MAX_HASH_DISTANCE = 10  # of 64 bits: pictures whose hashes differ in no more may be the same;
MAX_COLOR_DIFFERENCE = 6.0  # they are where their thumbnails' colours differ by no more on average, of 255
COLOR_GRID_SIZE = 8  # pixels a side


class ImageFingerprint(NamedTuple):
    """What tells pictures apart: 64 bits of shape, and a thumbnail of colours, uint8 [8, 8, 3]."""

    phash: int
    color_grid: np.ndarray


def fingerprint_image(image: Image.Image) -> ImageFingerprint:
    """The print of an RGB picture."""
    small = image.resize((COLOR_GRID_SIZE, COLOR_GRID_SIZE), Image.Resampling.BOX)
    return ImageFingerprint(perceptual_hash(image), np.asarray(small))


def perceptual_hash(image: Image.Image) -> int:
    """Which of the 8 x 8 lowest frequencies of a picture in grey exceed their median (Zauner 2010, section 3.2.1)."""
    grey = np.asarray(
        image.convert("L").resize((PHASH_IMAGE_SIZE, PHASH_IMAGE_SIZE), Image.Resampling.LANCZOS), np.float64
    )
    low = dctn(grey)[:8, :8]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def find_identical_files(samples: Sequence[ImageSample], digests: Sequence[str]) -> Iterator[DatasetIssue]:
    """A fault for each sample whose file's bytes an earlier one has; those held out come last."""
    first: dict[str, ImageSample] = {}
    for sample, digest in zip(samples, digests, strict=True):
        other = first.setdefault(digest, sample)
        if is_held_out_leak(sample, other):
            yield DatasetIssue("held out too", sample.key, f"the same file as {other.key}, which is learnt from")
        elif other.caption != sample.caption:
            yield DatasetIssue(
                "other caption", sample.key, f"the same file as {other.key}, which says {other.caption[:60]!r}"
            )
        elif other is not sample:
            yield DatasetIssue("same picture", sample.key, f"the same file as {other.key}")


def find_near_duplicates(
    samples: Sequence[ImageSample], fingerprints: Sequence[ImageFingerprint]
) -> Iterator[DatasetIssue]:
    """A fault for each sample that nearly looks like an earlier one; those held out come last.

    n samples take n^2 / 2 comparisons of 64 bits.
    """
    bits = np.array([each.phash for each in fingerprints], np.uint64)
    colours = np.array([each.color_grid for each in fingerprints], np.int16).reshape(
        len(fingerprints), 3 * COLOR_GRID_SIZE**2
    )
    for row in range(1, len(bits)):
        apart = np.bitwise_count(bits[:row] ^ bits[row])
        alike = np.flatnonzero(apart <= MAX_HASH_DISTANCE)
        levels = np.abs(colours[alike] - colours[row]).mean(1)
        if (close := levels <= MAX_COLOR_DIFFERENCE).any():
            number = int(alike[close][0])
            sample, other = samples[row], samples[number]
            what = f"looks like {other.key}: {apart[number]} of 64 bits and {levels[close][0]:.1f} levels apart"
            yield DatasetIssue(
                "held out too" if is_held_out_leak(sample, other) else "looks the same", sample.key, what
            )


def is_held_out_leak(sample: ImageSample, other: ImageSample) -> bool:
    """Is one held out that is learnt from as the other?"""
    return sample.key.startswith(HELD_OUT_PREFIX) > other.key.startswith(HELD_OUT_PREFIX)
