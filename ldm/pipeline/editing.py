"""Editing: a picture to begin from, and a mask of what is redrawn, as the latents of a drawing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.sde import NoiseLevel
from ldm.image_io import from_uint8
from ldm.nn.vae import AutoencoderKL, encode_images, vae_scale_factor
from ldm.pipeline.request import Request


@dataclass(frozen=True)
class EditInputs:
    """What a drawing begins from: a picture and, unless all of it is redrawn, a mask (L, white is redrawn), both sized.

    `cache_scene_latents` [C, h, w] are the mean of the picture's posterior (diffusers draws a sample of it). `kept` [1, h, w] is 1
    where the sampler has to leave them as they are. `num_concat_channels` [1 + C, h, w] are the mask and the latents of the
    picture without what is redrawn, for a network that heeds them itself; then nothing else is kept.
    """

    image: Image.Image
    mask: Image.Image | None
    strength: float
    image_latents: Tensor
    keep_mask: Tensor
    concat: Tensor | None

    def init_latents(self, noise: Tensor, level: NoiseLevel) -> Tensor:
        """x at the first level, alpha z + sigma noise [C, h, w]: Meng et al. 2022 (SDEdit), algorithm 1.

        Under a mask, strength 1 is told nothing of what it redraws: that begins as noise alone, as in diffusers.
        """
        x = level.alpha * self.image_latents + level.sigma * noise
        return torch.lerp(noise, x, self.keep_mask) if self.mask is not None and self.strength == 1 else x

    def composite(self, output: Image.Image) -> Image.Image:
        """The drawn picture under the mask, and the given one elsewhere, bit for bit; strength 0 draws nothing."""
        if self.strength == 0:
            return self.image
        return output if self.mask is None else Image.composite(output, self.image, self.mask)


def prepare_edit_inputs(request: Request, vae: AutoencoderKL, is_inpaint_unet: bool) -> EditInputs | None:
    """The canvas of a request with its defaults filled in, for a network that `inpaints` or not; None without image.

    A pixel is redrawn where the mask is half white or more, and a latent where any of its pixels is: a thin stroke is
    not lost between the latents, as it is in diffusers, which looks at the first pixel of each.
    """
    if request.image is None:
        return None
    size, f = (request.width or 0, request.height or 0), vae_scale_factor(vae)
    picture = request.image.resize(size, Image.Resampling.LANCZOS)
    mask = None if request.mask is None else request.mask.resize(size, Image.Resampling.LANCZOS)
    pixels = from_uint8(np.asarray(picture)[None].copy()).to(vae.device)
    redrawn = torch.ones_like(pixels[:, :1])
    if mask is not None:
        redrawn = torch.from_numpy(np.asarray(mask) >= 128).to(redrawn)[None, None]
    cells = F.max_pool2d(redrawn, f)[0]
    latents, channels, kept = encode_images(vae, pixels).mean[0], None, 1 - cells
    if is_inpaint_unet:
        channels = torch.cat([cells, encode_images(vae, pixels * (1 - redrawn)).mean[0]])
        kept = torch.zeros_like(cells)
    return EditInputs(picture, mask, request.strength or 0.0, latents, kept, channels)
