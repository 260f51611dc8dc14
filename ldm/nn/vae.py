"""The VAE, diffusers' AutoencoderKL: images [B, 3, H, W] in [-1, 1] to scaled latents [B, C, h, w] and back."""

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
    """Initialize for training: linear maps from pixels to latents and back that keep the variance.

    Residual branches start at zero (Goyal et al. 2017, section 5.1), and the convolutions between them are orthogonal
    (Saxe et al. 2014). With torch's defaults each convolution shrinks the signal below the output of the branches.
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
    """Pixels per latent along each side: 8 for Stable Diffusion."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def make_image_processor(vae: AutoencoderKL) -> Any:
    """diffusers' converter between its images and PIL's, arrays and tensors."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=vae_scale_factor(vae))


def latent_shape(vae: AutoencoderKL, height: int, width: int) -> tuple[int, int, int]:
    """[C, h, w] of the latents of an image of that size in pixels."""
    f = vae_scale_factor(vae)
    return vae.config["latent_channels"], height // f, width // f


def encode_unscaled(vae: AutoencoderKL, images: Tensor) -> Posterior:
    """The unscaled posterior of images; its log-variance is clipped to [-30, 20], as in Stable Diffusion."""
    hidden = vae.encoder(images)
    mean, log_var = (vae.quant_conv(hidden) if vae.quant_conv is not None else hidden).chunk(2, dim=1)
    return Posterior(mean, torch.exp(0.5 * log_var.clamp(-30, 20)))


def decode_unscaled(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Images from unscaled latents."""
    return vae.decoder(vae.post_quant_conv(z) if vae.post_quant_conv is not None else z)


def encode_images(vae: AutoencoderKL, images: Tensor) -> Posterior:
    """q(z | x) of scaled latents, float32: of variance about 1, as the U-Net takes them."""
    scale = vae.config["scaling_factor"]
    mean, std = encode_unscaled(vae, images.to(vae.dtype, memory_format=torch.channels_last))
    return Posterior(mean.float() * scale, std.float() * scale)


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W], about [-1, 1], float32, from scaled latents."""
    z = (latents / vae.config["scaling_factor"]).to(vae.dtype, memory_format=torch.channels_last)
    return decode_unscaled(vae, z).float()
