"""Image to image and inpainting: an initial image and a mask as the latents of a sample."""

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
    """The initial image of a request and, for inpainting, its mask (L, white is regenerated), in the output's size.

    `image_latents` [C, h, w] are the mean of the image's posterior, or its sample by `Request.posterior_noise`.
    `keep_mask` [1, h, w] is 1 where the sampler keeps them. `concat` [1 + C, h, w], for a U-Net made for inpainting, is
    the mask and the latents of the masked image; such a U-Net keeps the image by itself, and `keep_mask` is zero. Note
    the polarities: 1 in `keep_mask` keeps, white in `mask` regenerates.
    """

    image: Image.Image
    mask: Image.Image | None
    strength: float
    image_latents: Tensor
    keep_mask: Tensor
    concat: Tensor | None

    def init_latents(self, noise: Tensor, level: NoiseLevel) -> Tensor:
        """x at the first level, alpha z + sigma noise [C, h, w]: the VP form of Meng et al. 2022 (SDEdit).

        Their algorithm 1 is the VE form, which has alpha = 1.

        Inpainting with strength 1 starts from noise alone under the mask, as in diffusers.
        """
        x = level.alpha * self.image_latents + level.sigma * noise
        return torch.lerp(noise, x, self.keep_mask) if self.mask is not None and self.strength == 1 else x

    def composite(self, output: Image.Image) -> Image.Image:
        """The output under the mask and the input elsewhere, bit for bit; the input at strength 0."""
        if self.strength == 0:
            return self.image
        return output if self.mask is None else Image.composite(output, self.image, self.mask)


def prepare_edit_inputs(request: Request, vae: AutoencoderKL, is_inpaint_unet: bool) -> EditInputs | None:
    """The edit inputs of a resolved request, or None without an image.

    A pixel is regenerated where the mask is at least half white, and a latent where any of its pixels is, so that thin
    strokes survive the downsampling; diffusers takes the first pixel of each latent.
    """
    if request.image is None:
        return None
    size = request.width or 0, request.height or 0
    image = request.image.resize(size, Image.Resampling.LANCZOS)
    mask = None if request.mask is None else request.mask.resize(size, Image.Resampling.LANCZOS)
    pixels = from_uint8(np.asarray(image)[None].copy()).to(vae.device)
    pixel_mask = torch.ones_like(pixels[:, :1])
    if mask is not None:
        pixel_mask = torch.from_numpy(np.asarray(mask) >= 128).to(pixel_mask)[None, None]
    latent_mask = F.max_pool2d(pixel_mask, vae_scale_factor(vae))[0]
    noise = (None, None) if request.posterior_noise is None else request.posterior_noise.to(latent_mask)
    latents, concat, keep_mask = request.image_latents, None, 1 - latent_mask
    latents = encode_image(vae, pixels, noise[0]) if latents is None else latents.to(latent_mask)
    if is_inpaint_unet:
        concat = torch.cat([latent_mask, encode_image(vae, pixels * (1 - pixel_mask), noise[1])])
        keep_mask = torch.zeros_like(latent_mask)
    return EditInputs(image, mask, request.strength or 0.0, latents, keep_mask, concat)


def encode_image(vae: AutoencoderKL, pixels: Tensor, noise: Tensor | None) -> Tensor:
    """The scaled latents [C, h, w] of an image [1, 3, H, W]: the posterior's mean, or its sample with that noise."""
    posterior = encode_images(vae, pixels)
    return posterior.mean[0] if noise is None else posterior.sample(noise)[0]
