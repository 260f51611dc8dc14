"""The autoencoder, diffusers' AutoencoderKL: pictures [B, 3, H, W] in [-1, 1] and scaled latents [B, C, h, w]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor


class Posterior(NamedTuple):
    """q(z | x): a diagonal Gaussian of scaled latents, [B, C, h, w] each."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + std * noise (Kingma & Welling 2014, section 2.4)."""
        return self.mean + self.std * noise


def build_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """An AutoencoderKL with torch's default initial weights, from diffusers' configuration fields."""
    return AutoencoderKL.from_config(dict(config))


def init_weights(vae: AutoencoderKL) -> None:
    """Initial weights for training: a linear map that keeps variance, from pixels to latents and back.

    Residual branches start at zero (Goyal et al. 2017, section 5.1), and the convolutions between them are orthogonal
    (Saxe et al. 2014). With torch's defaults each of the latter shrinks the signal, and the branches bury it.
    """
    for name, parameter in vae.named_parameters():
        if name.endswith(("conv2.weight", "to_out.0.weight", "bias")):  # the ends of branches
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 4:
            torch.nn.init.orthogonal_(parameter)


def get_vae_config(vae: AutoencoderKL) -> dict[str, Any]:
    """The fields of a `vae/config.json`."""
    return {k: v for k, v in vae.config.items() if not k.startswith("_") or k == "_class_name"}


def vae_scale_factor(vae: AutoencoderKL) -> int:
    """Pixels a side for each latent: 8 for Stable Diffusion."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def encode_unscaled(vae: AutoencoderKL, images: Tensor) -> Posterior:
    """The unscaled posterior; log-variance is clipped to [-30, 20] as Stable Diffusion's is."""
    hidden = vae.encoder(images)
    mean, log_var = (vae.quant_conv(hidden) if vae.quant_conv is not None else hidden).chunk(2, dim=1)
    return Posterior(mean, torch.exp(0.5 * log_var.clamp(-30, 20)))


def decode_unscaled(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Pictures from unscaled latents."""
    return vae.decoder(vae.post_quant_conv(z) if vae.post_quant_conv is not None else z)


def encode_images(vae: AutoencoderKL, images: Tensor) -> Posterior:
    """q(z | x) of scaled latents, float32: variance about 1, as the U-Net sees them."""
    scale = vae.config["scaling_factor"]
    mean, std = encode_unscaled(vae, images.to(vae.dtype, memory_format=torch.channels_last))
    return Posterior(mean.float() * scale, std.float() * scale)


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures [B, 3, H, W], about [-1, 1], float32, from scaled latents."""
    z = (latents / vae.config["scaling_factor"]).to(vae.dtype, memory_format=torch.channels_last)
    return decode_unscaled(vae, z).float()
