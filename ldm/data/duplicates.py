"""Pictures that are there more than once: the same file, or nearly the same to the eye."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn

from ldm.data.samples import HELD_OUT, Fault, Sample

SIDE = 32  # pixels a side of what is hashed
DISTANCE = 10  # of 64 bits: pictures whose hashes differ in no more may be the same;
LEVELS = 6.0  # they are where their thumbnails' colours differ by no more on average, of 255
THUMBNAIL = 8  # pixels a side


class Print(NamedTuple):
    """What tells pictures apart: 64 bits of shape, and a thumbnail of colours, uint8 [8, 8, 3]."""

    bits: int
    colours: np.ndarray


def fingerprint(picture: Image.Image) -> Print:
    """The print of an RGB picture."""
    small = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return Print(perceptual_hash(picture), np.asarray(small))


def perceptual_hash(picture: Image.Image) -> int:
    """Which of the 8 x 8 lowest frequencies of a picture in grey exceed their median (Zauner 2010, section 3.2.1)."""
    grey = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    low = dctn(grey)[:8, :8]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def same_files(samples: Sequence[Sample], digests: Sequence[str]) -> Iterator[Fault]:
    """A fault for each sample whose file's bytes an earlier one has; those held out come last."""
    first: dict[str, Sample] = {}
    for sample, digest in zip(samples, digests, strict=True):
        other = first.setdefault(digest, sample)
        if leaks(sample, other):
            yield Fault("held out too", sample.key, f"the same file as {other.key}, which is learnt from")
        elif other.caption != sample.caption:
            yield Fault("other caption", sample.key, f"the same file as {other.key}, which says {other.caption[:60]!r}")
        elif other is not sample:
            yield Fault("same picture", sample.key, f"the same file as {other.key}")


def near(samples: Sequence[Sample], prints: Sequence[Print]) -> Iterator[Fault]:
    """A fault for each sample that nearly looks like an earlier one; those held out come last.

    n samples take n^2 / 2 comparisons of 64 bits.
    """
    bits = np.array([each.bits for each in prints], np.uint64)
    colours = np.array([each.colours for each in prints], np.int16).reshape(len(prints), 3 * THUMBNAIL**2)
    for row in range(1, len(bits)):
        apart = np.bitwise_count(bits[:row] ^ bits[row])
        alike = np.flatnonzero(apart <= DISTANCE)
        levels = np.abs(colours[alike] - colours[row]).mean(1)
        if (close := levels <= LEVELS).any():
            number = int(alike[close][0])
            sample, other = samples[row], samples[number]
            what = f"looks like {other.key}: {apart[number]} of 64 bits and {levels[close][0]:.1f} levels apart"
            yield Fault("held out too" if leaks(sample, other) else "looks the same", sample.key, what)


def leaks(sample: Sample, other: Sample) -> bool:
    """Is one held out that is learnt from as the other?"""
    return sample.key.startswith(HELD_OUT) > other.key.startswith(HELD_OUT)
