"""The conditional U-Net of latent diffusion: Rombach et al. 2022 (arXiv:2112.10752), sec. 3.3.

Parameter names and configuration fields are those of diffusers' UNet2DConditionModel, so that its files, Stable
Diffusion 1.x, 2.x and XL among them, load with strict=True.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice, zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.conditioning import Conditioning
from ldm.errors import choose
from ldm.nn.attention import get_attention_backend
from ldm.nn.blocks import (
    Attention,
    Downsample,
    GaussianFourierProjection,
    KVPair,
    ResnetBlock,
    SinusoidalEmbedding,
    SpatialTransformer,
    TimestepEmbedding,
    TransformerBlock,
    Upsample,
    apply_rowwise,
    silu,
)
from ldm.nn.norms import GroupNorm
from ldm.nn.packing import Conv2d

UNET_CLASS_NAME = "UNet2DConditionModel"

DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # whether each residual block has a transformer
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
MID_BLOCKS = {"UNetMidBlock2DCrossAttn": (2, 1), "UNetMidBlock2D": (1, 0), None: (0, 0)}  # resnets, transformers
RESNET_TIME_SCALE_SHIFTS = {"default": False, "scale_shift": True}
TIME_EMBEDDING_TYPES = {"positional": 4, "fourier": 2}  # width of the embedding over block_out_channels[0]
ADDITION_EMBED_TYPES = {None: False, "text_time": True}  # whether the U-Net takes Conditioning.vector
UNET_FIELD_CHOICES: dict[str, Mapping[Any, Any]] = {
    "addition_embed_type": ADDITION_EMBED_TYPES,
    "down_block_types": DOWN_BLOCKS,
    "up_block_types": UP_BLOCKS,
    "mid_block_type": MID_BLOCKS,
    "resnet_time_scale_shift": RESNET_TIME_SCALE_SHIFTS,
    "time_embedding_type": TIME_EMBEDDING_TYPES,
}
PER_LEVEL_FIELDS = (
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
)
# diffusers' fields that are not implemented, with the only value that is accepted
UNSUPPORTED_UNET_FIELDS: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "timestep_post_act": None,
}


@dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' config.json of a U-Net; a tuple holds a value per resolution, the finest first.

    `attention_head_dim` is a misnomer that every published file keeps: it is the NUMBER of heads, each of width
    channels / heads. `transformer_layers_per_block` may hold a tuple for a resolution, a depth for each of its
    transformers; `reverse_transformer_layers_per_block` are then those of the up blocks, in their order. A network with
    `time_cond_proj_dim` is distilled: it takes the guidance scale as an input. `upcast_attention` asks for float32
    logits where float16 overflows, which every backend computes anyway; it is kept for other readers of the file.
    ValueError names an invalid field.
    """

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    time_embedding_type: str = "positional"
    down_block_types: tuple[str, ...] = (*3 * ("CrossAttnDownBlock2D",), "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *3 * ("CrossAttnUpBlock2D",))
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    use_linear_projection: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _to_tuple(getattr(self, field.name)))  # JSON has no tuples
        for name, table in UNET_FIELD_CHOICES.items():
            value = getattr(self, name)
            for choice in value if isinstance(value, tuple) else (value,):
                choose(table, choice, f"U-Net {name}")
        for name in PER_LEVEL_FIELDS:
            self.per_level(name)  # checks their number
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if ADDITION_EMBED_TYPES[self.addition_embed_type] and not getattr(self, name):
                raise ValueError(f"U-Net {name} {getattr(self, name)!r}: {self.addition_embed_type} needs a width")
        for width, heads in zip(self.block_out_channels, self.per_level("attention_head_dim"), strict=True):
            for name, divisor in (("norm_num_groups", self.norm_num_groups), ("attention_head_dim", heads)):
                if width % divisor:
                    raise ValueError(f"U-Net block_out_channels {width}: not a multiple of {name} {divisor}")

    def per_level(self, name: str) -> tuple[Any, ...]:
        """The value of a field for each resolution."""
        value, levels = getattr(self, name), len(self.block_out_channels)
        values = value if isinstance(value, tuple) else (value,) * levels
        if len(values) != levels:
            raise ValueError(f"U-Net {name} {value!r}: expected {levels} values, one per entry of block_out_channels")
        return values

    def transformer_depths(self, level: int, count: int, up: bool = False) -> list[int]:
        """The layers of each of the `count` transformers of a resolution, on the way down or up."""
        name = "transformer_layers_per_block"
        depth = self.per_level(name)[level]
        if up and self.reverse_transformer_layers_per_block is not None:
            name = "reverse_transformer_layers_per_block"
            depth = self.per_level(name)[-1 - level]
        elif up and isinstance(depth, tuple):
            raise ValueError(f"U-Net {name} {depth}: reverse_transformer_layers_per_block is needed beside it")
        depths = list(depth[:count]) if isinstance(depth, tuple) else [depth] * count
        if len(depths) != count:
            raise ValueError(f"U-Net {name} {depth}: {count} transformers need a depth each")
        return depths

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """A diffusers config.json; ValueError names the first field that is unknown or not implemented."""
        names = {field.name for field in fields(cls)}
        for name, value in config.items():
            if name == "_class_name" and value != UNET_CLASS_NAME:
                raise ValueError(f"U-Net config: _class_name is {value!r}, not {UNET_CLASS_NAME!r}")
            if value != (supported := UNSUPPORTED_UNET_FIELDS.get(name, value)):
                raise ValueError(f"U-Net config: {name} = {value!r} is not supported, only {supported!r}")
            if not (name in names or name in UNSUPPORTED_UNET_FIELDS or name.startswith("_")):
                raise ValueError(f"U-Net config: unknown field {name} = {value!r}")
        return cls(**{name: value for name, value in config.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, for diffusers' `UNet2DConditionModel.from_config`."""
        return {"_class_name": UNET_CLASS_NAME, **{name: _to_list(value) for name, value in asdict(self).items()}}


def _to_tuple(value: Any) -> Any:
    return tuple(map(_to_tuple, value)) if isinstance(value, list | tuple) else value


def _to_list(value: Any) -> Any:
    return list(map(_to_list, value)) if isinstance(value, list | tuple) else value


UNetLayer = tuple[nn.Module, nn.Module | None]  # a residual block and its transformer


class UNetBlock(nn.Module):
    """One resolution: a residual block per input width, transformers of `depths` layers among them, then resampling."""

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        inputs: list[int],
        depths: Sequence[int],
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        width, groups, eps = config.block_out_channels[level], config.norm_num_groups, config.norm_eps
        emb = TIME_EMBEDDING_TYPES[config.time_embedding_type] * config.block_out_channels[0]
        shift = RESNET_TIME_SCALE_SHIFTS[config.resnet_time_scale_shift]
        heads = config.per_level("attention_head_dim")[level]
        context, linear = config.cross_attention_dim, config.use_linear_projection
        # initialized first: the initial weights of a seed depend on the order
        downsamplers, upsamplers = [Downsample(width)] if down else [], [Upsample(width)] if up else []
        self.resnets = nn.ModuleList(ResnetBlock(dim, width, emb, groups, eps, shift) for dim in inputs)
        self.attentions = nn.ModuleList(
            SpatialTransformer(width, context, heads, depth, groups, linear) for depth in depths
        )
        self.downsamplers, self.upsamplers = nn.ModuleList(downsamplers), nn.ModuleList(upsamplers)

    def layers(self) -> Iterator[UNetLayer]:
        return zip_longest(self.resnets, self.attentions)


def apply_layer(layer: UNetLayer, x: Tensor, emb: Tensor, kv_pairs: Sequence[KVPair]) -> Tensor:
    resnet, transformer = layer
    x = resnet(x, emb)
    return x if transformer is None else transformer(x, iter(kv_pairs))


def native_size(config: UNetConfig) -> tuple[int, int]:
    """Rows and columns of the latents that a U-Net was trained on; 64 where its configuration does not say it."""
    size = config.sample_size or 64
    rows, columns = size if isinstance(size, tuple) else (size, size)
    return rows, columns


class UNet(nn.Module):
    """The network of a `Denoiser`: (x [B, C, H, W], t [B], cond) -> [B, C', H, W] in the dtype of its weights.

    H and W are free, odd sizes included; t is the timestep, from 0 to `num_train_timesteps` - 1, and may be fractional.
    `cond.concat`, in a network for inpainting, follows the channels of x. `attention` is a key of `ATTENTION_BACKENDS`.
    ValueError for a backend that cannot run here, and for channels or a `cond.vector` that do not fit the
    configuration.
    """

    def __init__(self, config: UNetConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.per_level("layers_per_block")
        emb = TIME_EMBEDDING_TYPES[config.time_embedding_type] * widths[0]
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_proj = (
            GaussianFourierProjection(emb, config.flip_sin_to_cos)
            if config.time_embedding_type == "fourier"
            else SinusoidalEmbedding(widths[0], config.flip_sin_to_cos, config.freq_shift)
        )
        self.time_embedding = TimestepEmbedding(self.time_proj.width, emb, config.time_cond_proj_dim)
        self.guidance_proj = (
            SinusoidalEmbedding(config.time_cond_proj_dim, flip_sin_to_cos=False, freq_shift=1)
            if config.time_cond_proj_dim
            else None
        )
        self.add_time_proj = self.add_embedding = None
        if ADDITION_EMBED_TYPES[config.addition_embed_type]:
            width = config.addition_time_embed_dim or 0
            self.add_time_proj = SinusoidalEmbedding(width, config.flip_sin_to_cos, config.freq_shift)
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim or 0, emb)

        dim, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            inputs = [dim] + [widths[i]] * (layers[i] - 1)
            down = i < len(widths) - 1
            depths = config.transformer_depths(i, layers[i] * DOWN_BLOCKS[kind])
            self.down_blocks.append(UNetBlock(config, i, inputs, depths, down=down))
            skips += [widths[i]] * (layers[i] + down)
            dim = widths[i]

        resnets, attentions = MID_BLOCKS[config.mid_block_type]
        depths = config.transformer_depths(len(widths) - 1, attentions)
        self.mid_block = UNetBlock(config, len(widths) - 1, [dim] * resnets, depths)

        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(len(widths))), config.up_block_types, strict=True):
            inputs = [n + skips.pop() for n in [dim] + [widths[i]] * layers[i]]
            depths = config.transformer_depths(i, len(inputs) * UP_BLOCKS[kind], up=True)
            self.up_blocks.append(UNetBlock(config, i, inputs, depths, up=i > 0))
            dim = widths[i]

        self.conv_norm_out = GroupNorm(config.norm_num_groups, dim, config.norm_eps)
        self.conv_out = Conv2d(dim, config.out_channels, 3, padding=1)
        self.attention = attention
        self.gradient_checkpointing = False  # recompute activations in the backward pass

    @property
    def attention(self) -> str:
        """The attention backend by name; may be set at any time."""
        return self._attention

    @attention.setter
    def attention(self, name: str) -> None:
        attention_fn = get_attention_backend(name)
        self._attention = name
        for module in self.modules():
            if isinstance(module, Attention):
                module.attention_fn = attention_fn

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_norm_out.weight.dtype  # not a packed one, which would be unpacked

    @property
    def device(self) -> torch.device:
        return self.conv_norm_out.weight.device

    def compute_kv_cache(self, cond: Conditioning) -> Conditioning:
        """The conditioning with the keys and values of every cross-attention, which no step then computes again."""
        if cond.kv_cache is not None:
            return cond
        context, blocks = cond.context.to(self.dtype), (m for m in self.modules() if isinstance(m, TransformerBlock))
        return replace(cond, kv_cache=tuple(block.attn2.project_kv(context) for block in blocks))

    def make_vector(self, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """`Conditioning.vector` [B, P + n width], float32: pooled text [B, P] and the embedded time ids [B, n].

        They are diffusers' `added_cond_kwargs`, text_embeds and time_ids (addition_embed_type "text_time").
        SDXL's ids are the original height and width, the crop's top and left, the target height and width, in pixels
        (Podell et al. 2023, arXiv:2307.01952, sec. 2.2). ValueError if the U-Net takes none, or another number of them.
        """
        if self.add_time_proj is None:
            raise ValueError("this U-Net takes no pooled text and time ids")
        time_embeds = self.add_time_proj(time_ids.flatten()).view(len(time_ids), -1)
        vector = torch.cat([pooled.float(), time_embeds], dim=-1)
        if (width := vector.shape[-1]) != (expected := self.config.projection_class_embeddings_input_dim):
            inputs = f"pooled text of {pooled.shape[-1]} and {time_ids.shape[-1]} time ids"
            raise ValueError(f"{inputs}: {width} numbers, and this U-Net takes {expected}")
        return vector

    def embed_timestep(self, t: Tensor, cond: Conditioning) -> Tensor:
        """The embedding [B, E] of the timestep, plus that of `cond.vector` if the U-Net takes it.

        It is [1, E] where one timestep was expanded to all rows and nothing else is embedded.
        A distilled U-Net adds the projected embedding of 1000 (w - 1), w = `cond.guidance`, before the perceptron
        (Meng et al. 2023, arXiv:2210.03142, sec. 3; Luo et al. 2023, arXiv:2310.04378, for latents).
        """
        guidance = None
        if self.guidance_proj is not None and cond.guidance is not None:
            guidance = self.guidance_proj(1000 * (cond.guidance.to(t.device) - 1)).to(self.dtype)
        if t.stride(0) == 0 and guidance is None and cond.vector is None:
            t = t[:1]
        emb = apply_rowwise(self.time_embedding, self.time_proj(t).to(self.dtype), guidance)
        if (self.add_embedding is None) != (cond.vector is None):
            takes = "takes no" if self.add_embedding is None else "needs"
            raise ValueError(f"this U-Net {takes} pooled text and time ids (Conditioning.vector)")
        if self.add_embedding is None:
            return emb
        return emb + apply_rowwise(self.add_embedding, cast(Tensor, cond.vector).to(self.dtype))

    def prepare_input(self, x: Tensor, cond: Conditioning) -> Tensor:
        """The input of the first convolution: x [B, C, H, W], then the channels of `cond.concat`."""
        x = x.to(self.dtype)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat.to(self.dtype)], dim=1)
        if x.shape[1] != self.config.in_channels:
            raise ValueError(f"this U-Net takes {self.config.in_channels} channels, got {x.shape[1]}")
        return 2 * x - 1 if self.config.center_input_sample else x

    def _apply_layer(self, layer: UNetLayer, x: Tensor, emb: Tensor, kv_pairs: Iterator[KVPair]) -> Tensor:
        transformer = cast(SpatialTransformer | None, layer[1])
        own = list(islice(kv_pairs, len(transformer.transformer_blocks) if transformer else 0))
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(apply_layer, layer, x, emb, own, use_reentrant=False)
        return apply_layer(layer, x, emb, own)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        pairs = iter(self.compute_kv_cache(cond).kv_cache or ())
        emb = silu(self.embed_timestep(t, cond))
        x = self.conv_in(self.prepare_input(x, cond))
        skips = [x]
        for down in cast(Iterable[UNetBlock], self.down_blocks):
            for layer in down.layers():
                x = self._apply_layer(layer, x, emb, pairs)
                skips.append(x)
            for downsample in down.downsamplers:
                x = downsample(x)
                skips.append(x)
        for layer in self.mid_block.layers():
            x = self._apply_layer(layer, x, emb, pairs)
        for up in cast(Iterable[UNetBlock], self.up_blocks):
            for layer in up.layers():
                x = self._apply_layer(layer, torch.cat([x, skips.pop()], dim=1), emb, pairs)
            for upsample in up.upsamplers:
                x = upsample(x, skips[-1].shape[-2:])
        return self.conv_out(silu(self.conv_norm_out(x)))
