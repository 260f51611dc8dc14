"""Latents looked at before any training: what is not finite or far from all others ruins a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from ldm.data.augment import center_crop_corner
from ldm.data.buckets import BucketPlacement
from ldm.data.image_dataset import ImageInfo
from ldm.data.sources import DatasetIssue, ImageSample
from ldm.hardware import best_device, preferred_dtype, to_device
from ldm.image_io import decode_image, from_uint8
from ldm.nn.vae import AutoencoderKL, encode_images

MAX_LATENT_MAGNITUDE = 20.0  # of latents that have a deviation of about 1


@torch.no_grad()
def check_latents(
    samples_with_info: Sequence[tuple[ImageSample, ImageInfo]], vae: AutoencoderKL, on_progress: Callable[[int], None]
) -> Iterator[DatasetIssue]:
    """A fault for each sample whose latents are not finite or are extreme; `said(done)` hears how many are done."""
    device = best_device()
    vae = to_device(vae, device, preferred_dtype(device)).eval()
    for done, (sample, look) in enumerate(samples_with_info, 1):
        pixels = resize_and_center_crop(decode_image(sample.read_bytes()).rgb, look.placement)
        mean, std = encode_images(vae, from_uint8(pixels[None]).to(device))
        most = max(mean.abs().max().item(), std.max().item())
        if not torch.isfinite(torch.stack([mean, std])).all():
            yield DatasetIssue("latents not finite", sample.key, "the VAE makes numbers of it that are not finite")
        elif most > MAX_LATENT_MAGNITUDE:
            yield DatasetIssue("extreme latents", sample.key, f"the VAE makes {most:.3g} of it, where 1 is usual")
        on_progress(done)


def resize_and_center_crop(image: Image.Image, placement: BucketPlacement) -> np.ndarray:
    """A picture resized to cover its bucket and cropped in the middle, uint8 [H, W, 3]."""
    left, top = center_crop_corner(placement.crop_margin)
    width, height = placement.bucket
    whole = image.resize(placement.resized_size, Image.Resampling.LANCZOS)
    return np.array(whole.crop((left, top, left + width, top + height)))
