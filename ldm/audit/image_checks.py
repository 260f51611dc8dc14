"""Every picture of a source decoded, by several processes, and what its pixels tell."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm.audit.duplicates import ImageFingerprint, fingerprint_image
from ldm.data.image_dataset import ImageInfo
from ldm.data.sources import DatasetIssue, ImageSample, MaskMode
from ldm.image_io import DecodedImage, decode_image, decode_mask

MAX_UPSCALE = 1.25  # times: more shows as blur
MAX_CROPPED_FRACTION = 0.25  # of a picture's area: more cuts off what the caption tells
IMAGE_CHECK_CHUNK_SIZE = 256  # pictures that processes are asked for beyond the last that was taken


class ImageCheckResult(NamedTuple):
    """What a picture's pixels tell."""

    issues: tuple[DatasetIssue, ...]
    fingerprint: ImageFingerprint | None = None  # None where it cannot be decoded
    has_mask: bool = False


def check_images(
    samples: Sequence[ImageSample], masks: MaskMode, on_progress: Callable[[int], None]
) -> Iterator[ImageCheckResult]:
    """Each sample's scan, in order; `said(done)` hears how many are done. Memory does not grow with their number."""
    with ProcessPoolExecutor() as pool:
        for start in range(0, len(samples), IMAGE_CHECK_CHUNK_SIZE):
            part = samples[start : start + IMAGE_CHECK_CHUNK_SIZE]
            yield from pool.map(partial(check_image, masks=masks), part, chunksize=8)
            on_progress(start + len(part))


def check_image(sample: ImageSample, masks: MaskMode) -> ImageCheckResult:
    """One sample decoded, with its mask."""
    part = ""
    try:
        data = sample.read_bytes()
        decoded = decode_image(data)
        part = "the mask: "
        mask = decode_mask(sample.read_mask()) if sample.read_mask else decoded.alpha if masks == "alpha" else None
    except (OSError, ValueError) as error:
        return ImageCheckResult((DatasetIssue("broken picture", sample.key, f"{part}{error}"),))
    found = [*decoded.notices, *_check_pixels(decoded), *_check_color_mode(data, masks)]
    if mask is not None and not mask.getextrema()[1]:
        found.append(("black mask", "black all over: nothing of the picture would count"))
    faults = tuple(DatasetIssue(kind, sample.key, what) for kind, what in found)
    return ImageCheckResult(faults, fingerprint_image(decoded.rgb), mask is not None)


def _check_pixels(decoded: DecodedImage) -> Iterator[tuple[str, str]]:
    if decoded.alpha is not None and not decoded.alpha.getextrema()[1]:
        yield "blank picture", "transparent all over"
    elif np.ptp(np.asarray(decoded.rgb), (0, 1)).max() == 0:
        yield "blank picture", "of one colour all over"


def _check_color_mode(data: bytes, masks: MaskMode) -> Iterator[tuple[str, str]]:
    """What is done to a picture that is not RGB of 8 bits."""
    with Image.open(io.BytesIO(data)) as picture:
        mode, shows = picture.mode, picture.has_transparency_data
    if shows and masks != "alpha":
        yield "mode", f"{mode}, shown on white where it is transparent"
    elif mode not in ("RGB", "RGBA"):
        yield "mode", f"{mode}, converted to RGB"


def check_bucket_fit(sample: ImageSample, info: ImageInfo) -> Iterator[DatasetIssue]:
    """What the way to its bucket does to a picture."""
    (width, height), (bucket, resized) = info.size, info.placement
    scale, lost = max(resized[0] / width, resized[1] / height), cropped_fraction(info)
    if scale > MAX_UPSCALE:
        yield DatasetIssue(
            "small picture", sample.key, f"{width}x{height} is enlarged {scale:.2f} times, to {_format_size(bucket)}"
        )
    if lost > MAX_CROPPED_FRACTION:
        yield DatasetIssue(
            "extreme shape", sample.key, f"{width}x{height} loses {lost:.0%} of its area to {_format_size(bucket)}"
        )


def cropped_fraction(info: ImageInfo) -> float:
    """The share of a picture's area that its bucket cuts off."""
    return 1 - float(np.prod(info.placement.bucket) / np.prod(info.placement.resized_size))


def _format_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
