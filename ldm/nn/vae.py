"""The VAE of latent diffusion: images [B, 3, H, W] in [-1, 1] to scaled latents [B, C, h, w] and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import warn_of_input
from ldm.nn.attention import sdpa
from ldm.nn.blocks import ResnetBlock, Upsample, add, silu
from ldm.nn.norms import GroupNorm
from ldm.nn.packing import Conv2d, Linear
from ldm.nn.tiling import TILE_BYTES, run_tiled

NORM_EPS = 1e-6
VAE_CLASS_NAME = "AutoencoderKL"
VAE_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


class Posterior(NamedTuple):
    """q(z | x): a diagonal Gaussian of scaled latents, [B, C, h, w] each."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + std * noise (Kingma & Welling 2014, section 2.4)."""
        return self.mean + self.std * noise


@dataclass(frozen=True)
class VAEConfig:
    """The fields of diffusers' config.json of an AutoencoderKL; ValueError names an invalid field.

    `block_out_channels` holds a width per resolution, the finest first. `force_upcast`: float16 overflows in it.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for name in ("block_out_channels", *VAE_BLOCK_TYPES):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has no tuples
        if self.act_fn != "silu":
            raise ValueError(f"VAE config: act_fn = {self.act_fn!r} is not supported, only 'silu'")
        for name, supported in VAE_BLOCK_TYPES.items():
            types = getattr(self, name)
            if len(types) != len(self.block_out_channels) or {*types} != {supported}:
                expected = f"{len(self.block_out_channels)} of {supported!r}, one per entry of block_out_channels"
                raise ValueError(f"VAE config: {name} = {list(types)}: expected {expected}")
        for width in self.block_out_channels:
            if self.norm_num_groups < 1 or width < 1 or width % self.norm_num_groups:
                raise ValueError(
                    f"VAE config: block_out_channels {width}: not a multiple of norm_num_groups {self.norm_num_groups}"
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VAEConfig:
        """The fields of a config.json; ValueError for another that is set."""
        names = {field.name for field in fields(cls)}
        for name, value in config.items():
            if value and not (name in names or name.startswith("_")):
                raise ValueError(f"VAE config: unknown field {name} = {value!r}")
        return cls(**{name: value for name, value in config.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {"_class_name": VAE_CLASS_NAME, **values}


class LatentDistribution(NamedTuple):
    """q(z | x) of unscaled latents, with the methods of diffusers' class."""

    mean: Tensor
    std: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device if generator else None)
        return self.mean + self.std * noise.to(self.mean)


class Encoded(NamedTuple):
    """What `AutoencoderKL.encode` returns."""

    latent_dist: LatentDistribution


class Decoded(NamedTuple):
    """What `AutoencoderKL.decode` returns."""

    sample: Tensor


class SpatialSelfAttention(nn.Module):
    """x + out(attention(norm(x))), one head over all positions [B, C, H, W] (Esser et al. 2021, arXiv:2012.09841)."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, dim, NORM_EPS)
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)  # [B, HW, C]
        tokens = self.to_out[0](sdpa(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), 1))
        return add(tokens.transpose(1, 2).reshape(x.shape), x)


class MidBlock(nn.Module):
    """Residual block, self-attention where there is one, residual block."""

    def __init__(self, dim: int, config: VAEConfig) -> None:
        super().__init__()
        groups, num_attentions = config.norm_num_groups, int(config.mid_block_add_attention)
        self.attentions = nn.ModuleList(SpatialSelfAttention(dim, groups) for _ in range(num_attentions))
        self.resnets = nn.ModuleList(ResnetBlock(dim, dim, None, groups, NORM_EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class PaddedDownsample(nn.Module):
    """Halve height and width by a strided convolution, padded at the right and the bottom only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class VAEBlock(nn.Module):
    """One resolution: `depth` residual blocks, then resampling."""

    def __init__(self, dim: int, out: int, depth: int, groups: int, down: bool = False, up: bool = False) -> None:
        super().__init__()
        widths = [dim, *(depth - 1) * [out]]
        self.resnets = nn.ModuleList(ResnetBlock(width, out, None, groups, NORM_EPS) for width in widths)
        self.downsamplers = nn.ModuleList([PaddedDownsample(out)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(out)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        for upsample in self.upsamplers:
            x = upsample(x, [2 * side for side in x.shape[-2:]])
        return x


class Encoder(nn.Module):
    """Images to the mean and log-variance of latents, [B, 2 C, h, w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups, depth = config.block_out_channels, config.norm_num_groups, config.layers_per_block
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VAEBlock(dim, out, depth, groups, down=k < len(widths) - 1)
            for k, (dim, out) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.mid_block = MidBlock(widths[-1], config)
        self.conv_norm_out = GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [B, C, h, w] to images."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            VAEBlock(dim, out, config.layers_per_block + 1, groups, up=k < len(widths) - 1)
            for k, (dim, out) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.mid_block = MidBlock(widths[0], config)
        self.conv_norm_out = GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Rombach et al. 2022 (arXiv:2112.10752), appendix G; parameters are named as in diffusers' class of this name.

    With `tile_bytes` it runs in strips that take so much memory each, with the same result: see `ldm.nn.tiling`.
    """

    tile_bytes: int | None = None

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config, channels = config, config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = Conv2d(channels, channels, 1) if config.use_post_quant_conv else nn.Identity()

    def encode(self, images: Tensor, return_dict: bool = True) -> Encoded:
        """As diffusers' method; a tuple and its names at once, whatever `return_dict` says."""
        return Encoded(LatentDistribution(*encode_unscaled(self, images)))

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> Decoded:
        """As diffusers' method, which draws nothing from the generator either."""
        return Decoded(decode_unscaled(self, z))

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Run in strips of `TILE_BYTES`; unlike diffusers' tiles they give the image of the whole, for any size."""
        self.tile_bytes = TILE_BYTES if use_tiling else None

    def disable_tiling(self) -> None:
        """Run at once."""
        self.enable_tiling(False)

    def enable_slicing(self) -> None:
        """As diffusers' method; nothing is sliced here."""
        warn_of_input("vae: slicing has no effect; images are decoded by parts once memory runs out")

    disable_slicing = enable_slicing

    def run(self, coder: Encoder | Decoder, x: Tensor) -> Tensor:
        """The output of the encoder or the decoder, tiled or at once."""
        return run_tiled(coder, x, self.tile_bytes) if self.tile_bytes else coder(x)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_norm_out.weight.dtype  # not a packed one, which would be unpacked

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_norm_out.weight.device


def build_vae(config: Mapping[str, Any]) -> AutoencoderKL:
    """An AutoencoderKL with torch's default initial weights, from diffusers' configuration fields."""
    return AutoencoderKL(VAEConfig.from_dict(config))


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


def vae_scale_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent along each side: 8 for Stable Diffusion."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def import_diffusers_class() -> Any:
    """diffusers' own AutoencoderKL, whose `from_pretrained` remembers where it was loaded from."""
    from diffusers import AutoencoderKL as DiffusersAutoencoderKL

    return DiffusersAutoencoderKL


def make_image_processor(vae: AutoencoderKL) -> Any:
    """diffusers' converter between its images and PIL's, arrays and tensors."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=vae_scale_factor(vae))


def latent_shape(vae: AutoencoderKL, height: int, width: int) -> tuple[int, int, int]:
    """[C, h, w] of the latents of an image of that size in pixels."""
    f = vae_scale_factor(vae)
    return vae.config.latent_channels, height // f, width // f


def encode_unscaled(vae: AutoencoderKL, images: Tensor) -> Posterior:
    """The unscaled posterior of images; its log-variance is clipped to [-30, 20], as in Stable Diffusion."""
    mean, log_var = vae.quant_conv(vae.run(vae.encoder, images)).chunk(2, dim=1)
    return Posterior(mean, torch.exp(0.5 * log_var.clamp(-30, 20)))


def decode_unscaled(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Images from unscaled latents."""
    return vae.run(vae.decoder, vae.post_quant_conv(z))


def encode_images(vae: AutoencoderKL, images: Tensor) -> Posterior:
    """q(z | x) of scaled latents, float32: of variance about 1, as the U-Net takes them."""
    scale = vae.config.scaling_factor
    mean, std = encode_unscaled(vae, images.to(vae.dtype, memory_format=torch.channels_last))
    return Posterior(mean.float() * scale, std.float() * scale)


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W], about [-1, 1], float32, from scaled latents."""
    z = (latents / vae.config.scaling_factor).to(vae.dtype, memory_format=torch.channels_last)
    return decode_unscaled(vae, z).float()
