"""Checks of decoded images, of their bucket sizes, and of their latents."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ldm.audit.duplicates import ImageFingerprint, fingerprint_image
from ldm.data.augment import Augmentation, center_crop_corner, resize_and_crop
from ldm.data.buckets import format_size
from ldm.data.image_dataset import ImageInfo
from ldm.data.sources import DatasetIssue, ImageSample, MaskMode
from ldm.errors import error_text
from ldm.hardware import best_device, preferred_dtype, to_device
from ldm.image_io import DecodedImage, decode_image, decode_mask, from_uint8
from ldm.nn.vae import AutoencoderKL, encode_images

MAX_UPSCALE = 1.25  # times: more shows as blur
MAX_CROPPED_FRACTION = 0.25  # of an image's area: more removes what the caption describes
MAX_LATENT_MAGNITUDE = 20.0  # of latents that have a deviation of about 1
IMAGE_CHECK_CHUNK_SIZE = 256  # images given to the worker processes at a time


class ImageCheckResult(NamedTuple):
    """What an image's pixels tell; `fingerprint` is None if it cannot be decoded."""

    issues: tuple[DatasetIssue, ...]
    fingerprint: ImageFingerprint | None = None
    has_mask: bool = False


def check_images(
    samples: Sequence[ImageSample], masks: MaskMode, on_progress: Callable[[int], None]
) -> Iterator[ImageCheckResult]:
    """Each sample's `check_image`, in order, by several processes; `on_progress(done)` after each chunk."""
    with ProcessPoolExecutor() as pool:
        for start in range(0, len(samples), IMAGE_CHECK_CHUNK_SIZE):
            chunk = samples[start : start + IMAGE_CHECK_CHUNK_SIZE]
            yield from pool.map(partial(check_image, masks=masks), chunk, chunksize=8)
            on_progress(start + len(chunk))


def check_image(sample: ImageSample, masks: MaskMode) -> ImageCheckResult:
    """One sample decoded, with its mask."""
    part = ""
    try:
        data = sample.read_image()
        decoded = decode_image(data)
        part = "the mask: "
        mask = decode_mask(sample.read_mask()) if sample.read_mask else decoded.alpha if masks == "alpha" else None
    except (OSError, ValueError) as error:
        return ImageCheckResult((DatasetIssue("broken image", sample.key, part + error_text(error)),))
    found = [*decoded.notices, *_check_pixels(data, decoded, masks)]
    if mask is not None and not mask.getextrema()[1]:
        found.append(("black mask", "all black: no part of the image would count"))
    issues = tuple(DatasetIssue(kind, sample.key, what) for kind, what in found)
    return ImageCheckResult(issues, fingerprint_image(decoded.rgb), mask is not None)


def _check_pixels(data: bytes, decoded: DecodedImage, masks: MaskMode) -> Iterator[tuple[str, str]]:
    """Blank images, and how one that is not 8-bit RGB is converted."""
    if decoded.alpha is not None and not decoded.alpha.getextrema()[1]:
        yield "blank image", "fully transparent"
    elif np.ptp(np.asarray(decoded.rgb), (0, 1)).max() == 0:
        yield "blank image", "a single color"
    with Image.open(io.BytesIO(data)) as image:
        if image.has_transparency_data and masks != "alpha":
            yield "color mode", f"{image.mode}, transparency is put on white"
        elif image.mode not in ("RGB", "RGBA"):
            yield "color mode", f"{image.mode}, converted to RGB"


def check_bucket_fit(sample: ImageSample, info: ImageInfo) -> Iterator[DatasetIssue]:
    """Issues for an image that is enlarged or cropped much to fit its bucket."""
    (width, height), (bucket, resized) = info.size, info.placement
    scale, lost = max(resized[0] / width, resized[1] / height), info.placement.cropped_fraction
    size, target = format_size(info.size), format_size(bucket)
    if scale > MAX_UPSCALE:
        yield DatasetIssue("small image", sample.key, f"{size} is enlarged {scale:.2f} times, to {target}")
    if lost > MAX_CROPPED_FRACTION:
        yield DatasetIssue("extreme aspect ratio", sample.key, f"{size} loses {lost:.0%} of its area to {target}")


@torch.no_grad()
def check_latents(
    samples_with_info: Sequence[tuple[ImageSample, ImageInfo]], vae: AutoencoderKL, on_progress: Callable[[int], None]
) -> Iterator[DatasetIssue]:
    """An issue for each image whose latents are not finite, or extreme: either ruins a batch."""
    device = best_device()
    vae = to_device(vae, device, preferred_dtype(device)).eval()
    for done, (sample, info) in enumerate(samples_with_info, 1):
        center = Augmentation(False, center_crop_corner(info.placement.crop_margin))
        image = resize_and_crop(decode_image(sample.read_image()).rgb, info.placement, center)
        mean, std = encode_images(vae, from_uint8(np.array(image)[None]).to(device))
        magnitude = max(mean.abs().max().item(), std.max().item())
        if not torch.isfinite(torch.stack([mean, std])).all():
            yield DatasetIssue("non-finite latents", sample.key, "the VAE encodes it to numbers that are not finite")
        elif magnitude > MAX_LATENT_MAGNITUDE:
            what = f"the VAE encodes it to numbers up to {magnitude:.3g}, where 1 is usual"
            yield DatasetIssue("extreme latents", sample.key, what)
        on_progress(done)
