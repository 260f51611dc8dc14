"""Every picture of a source decoded, by several processes, and what its pixels tell."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.data.duplicates import Print, fingerprint
from ldm.data.pictures import Surveyed
from ldm.data.samples import Fault, Masks, Sample
from ldm.decode import Decoded, decode, grey

ENLARGED = 1.25  # times: more shows as blur
CROPPED = 0.25  # of a picture's area: more cuts off what the caption tells
AHEAD = 256  # pictures that processes are asked for beyond the last that was taken


class Scan(NamedTuple):
    """What a picture's pixels tell."""

    faults: tuple[Fault, ...]
    print: Print | None = None  # None where it cannot be decoded
    masked: bool = False


def scans(samples: Sequence[Sample], masks: Masks, said: Callable[[int], None]) -> Iterator[Scan]:
    """Each sample's scan, in order; `said(done)` hears how many are done. Memory does not grow with their number."""
    with ProcessPoolExecutor() as pool:
        for start in range(0, len(samples), AHEAD):
            part = samples[start : start + AHEAD]
            yield from pool.map(partial(scan, masks=masks), part, chunksize=8)
            said(start + len(part))


def scan(sample: Sample, masks: Masks) -> Scan:
    """One sample decoded, with its mask."""
    part = ""
    try:
        data = sample.open()
        decoded = decode(data)
        part = "the mask: "
        mask = grey(sample.mask()) if sample.mask else decoded.alpha if masks == "alpha" else None
    except (OSError, ValueError) as error:
        return Scan((Fault("broken picture", sample.key, f"{part}{error}"),))
    found = [*decoded.notices, *_pixels(decoded), *_mode(data, masks)]
    if mask is not None and not mask.getextrema()[1]:
        found.append(("black mask", "black all over: nothing of the picture would count"))
    faults = tuple(Fault(kind, sample.key, what) for kind, what in found)
    return Scan(faults, fingerprint(decoded.rgb), mask is not None)


def _pixels(decoded: Decoded) -> Iterator[tuple[str, str]]:
    if decoded.alpha is not None and not decoded.alpha.getextrema()[1]:
        yield "blank picture", "transparent all over"
    elif np.ptp(np.asarray(decoded.rgb), (0, 1)).max() == 0:
        yield "blank picture", "of one colour all over"


def _mode(data: bytes, masks: Masks) -> Iterator[tuple[str, str]]:
    """What is done to a picture that is not RGB of 8 bits."""
    with Image.open(io.BytesIO(data)) as picture:
        mode, shows = picture.mode, picture.has_transparency_data
    if shows and masks != "alpha":
        yield "mode", f"{mode}, shown on white where it is transparent"
    elif mode not in ("RGB", "RGBA"):
        yield "mode", f"{mode}, converted to RGB"


def shape_faults(sample: Sample, look: Surveyed) -> Iterator[Fault]:
    """What the way to its bucket does to a picture."""
    (width, height), (bucket, resized) = look.size, look.placement
    scale, lost = max(resized[0] / width, resized[1] / height), cropped(look)
    if scale > ENLARGED:
        yield Fault("small picture", sample.key, f"{width}x{height} is enlarged {scale:.2f} times, to {_named(bucket)}")
    if lost > CROPPED:
        yield Fault("extreme shape", sample.key, f"{width}x{height} loses {lost:.0%} of its area to {_named(bucket)}")


def cropped(look: Surveyed) -> float:
    """The share of a picture's area that its bucket cuts off."""
    return 1 - float(np.prod(look.placement.bucket) / np.prod(look.placement.resized))


def _named(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
