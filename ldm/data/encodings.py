"""Latents looked at before any training: what is not finite or far from all others ruins a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from ldm.checkpoints.files import place
from ldm.data.buckets import Placement
from ldm.data.choices import centre
from ldm.data.pictures import Surveyed
from ldm.data.samples import Fault, Sample
from ldm.decode import decode
from ldm.hardware import best_device, working
from ldm.images import from_uint8
from ldm.nn.vae import AutoencoderKL, encode

EXTREME = 20.0  # of latents that have a deviation of about 1


@torch.no_grad()
def latent_faults(
    rows: Sequence[tuple[Sample, Surveyed]], vae: AutoencoderKL, said: Callable[[int], None]
) -> Iterator[Fault]:
    """A fault for each sample whose latents are not finite or are extreme; `said(done)` hears how many are done."""
    device = best_device()
    vae = place(vae, device, working(device)).eval()
    for done, (sample, look) in enumerate(rows, 1):
        pixels = centred(decode(sample.open()).rgb, look.placement)
        mean, std = encode(vae, from_uint8(pixels[None]).to(device))
        most = max(mean.abs().max().item(), std.max().item())
        if not torch.isfinite(torch.stack([mean, std])).all():
            yield Fault("latents not finite", sample.key, "the VAE makes numbers of it that are not finite")
        elif most > EXTREME:
            yield Fault("extreme latents", sample.key, f"the VAE makes {most:.3g} of it, where 1 is usual")
        said(done)


def centred(picture: Image.Image, placement: Placement) -> np.ndarray:
    """A picture resized to cover its bucket and cropped in the middle, uint8 [H, W, 3]."""
    left, top = centre(placement.slack)
    width, height = placement.bucket
    whole = picture.resize(placement.resized, Image.Resampling.LANCZOS)
    return np.array(whole.crop((left, top, left + width, top + height)))
