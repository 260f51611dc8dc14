"""Configurations: the families of Stable Diffusion, the fields of config.json files, and the user's `LoadOptions`.

A single file holds no configuration, so that of its family stands here, with the fields and values of the published
directories (`unet/config.json` and the like) less the libraries' defaults; sizes are the native ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from ldm.files import read_json

BuildResult = TypeVar("BuildResult")


HUB_ACCESS = "token", "local_files_only"  # options that do not change what is loaded


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is found and read; `Pipeline.from_pretrained` takes the same names.

    `revision`, `token` and `local_files_only` (its cache alone) are the hub's; `variant` chooses among a directory's
    weights ("fp16"); `family` and `ema` (the U-Net's moving average in place of its last weights) are for single files.
    `prediction` ("eps", "v", "x0") and `zero_snr` (zero terminal SNR) override what the model says; `vae` is the
    folder, file or hub id of another VAE.
    """

    revision: str | None = None
    vae: str | Path | None = None
    variant: str | None = None
    family: str | None = None
    prediction: str | None = None
    zero_snr: bool | None = None
    ema: bool = False
    token: str | None = None
    local_files_only: bool = False

    def to_record(self) -> dict[str, Any]:
        """The options that are set and choose what is loaded, as JSON values; never the token."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {
            n: str(value) if isinstance(value, Path) else value for n, value in options.items() if n not in HUB_ACCESS
        }


@dataclass(frozen=True)
class ConfigSchema:
    """The fields that a kind of configuration may have, each name once.

    `supported` fields are read (names separated by spaces); a field of `allowed_values` must have one of these;
    `ignored` maps the reason why fields are not read to their names, likewise.
    """

    config_kind: str
    supported: str
    allowed_values: Mapping[str, tuple[Any, ...]]
    ignored: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def field_names(self) -> frozenset[str]:
        """The names of all fields."""
        return frozenset([*self.supported.split(), *self.allowed_values, *" ".join(self.ignored.values()).split()])

    def validate(self, config: Mapping[str, Any]) -> None:
        """ValueError names the first field that is unknown or has an unsupported value."""
        for name, value in config.items():
            if name in self.allowed_values and value not in self.allowed_values[name]:
                allowed = " or ".join(map(repr, self.allowed_values[name]))
                raise ValueError(f"{self.config_kind} config: {name} = {value!r} is not supported, only {allowed}")
            if not (name in self.field_names or name.startswith("_")):
                raise ValueError(f"{self.config_kind} config: unknown field {name} = {value!r}")


VAE_CONFIG_SCHEMA = ConfigSchema(
    "VAE",
    """in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block act_fn
    latent_channels norm_num_groups sample_size scaling_factor force_upcast use_quant_conv use_post_quant_conv
    mid_block_add_attention""",
    {
        "shift_factor": (None, 0),  # later families shift their latents too
        "latents_mean": (None,),
        "latents_std": (None,),
    },
)
TEXT_ENCODER_CONFIG_SCHEMA = ConfigSchema(
    "text encoder",
    """vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads
    max_position_embeddings layer_norm_eps bos_token_id eos_token_id pad_token_id""",
    {
        "hidden_act": ("quick_gelu", "gelu"),
        "model_type": ("clip_text_model",),
        "is_decoder": (False,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "chunk_size_feed_forward": (0,),
        "quantization_config": (None,),
        "auto_map": (None,),  # code in the repository
    },
    {
        "the model's index names the class": "architectures",
        "the caller chooses": "dtype torch_dtype",
        "who wrote the file": "transformers_version",
        "of training": "attention_dropout dropout initializer_factor initializer_range gradient_checkpointing",
        "of other uses of the class": """use_cache return_dict output_attentions output_hidden_states torchscript
        tie_word_embeddings problem_type id2label label2id""",
    },
)


MAX_SAMPLE_SIZE = 8192  # latents a side
VALUE_KINDS: dict[str, Callable[[Any], bool]] = {  # by what a value must be
    "a whole number, at least 1": lambda v: type(v) is int and v >= 1,
    "a whole number, at least 1, or null": lambda v: v is None or (type(v) is int and v >= 1),
    "a number above 0": lambda v: _is_number(v) and v > 0,
    "a number": lambda v: _is_number(v),
    "true or false": lambda v: v is None or isinstance(v, bool),
    f"a whole number from 1 to {MAX_SAMPLE_SIZE}, or two": lambda v: (
        v is None or all(type(side) is int and 1 <= side <= MAX_SAMPLE_SIZE for side in (v if _is_pair(v) else [v]))
    ),
}
FIELD_NAMES_BY_KIND = {  # of the networks' configurations: values that are used long after they were read
    "a whole number, at least 1": """in_channels out_channels latent_channels norm_num_groups cross_attention_dim
    vocab_size hidden_size intermediate_size projection_dim max_position_embeddings""",
    "a whole number, at least 1, or null": "num_attention_heads",  # a U-Net's is null in files of diffusers
    "a number above 0": "scaling_factor layer_norm_eps norm_eps",
    "a number": "freq_shift",
    "true or false": """force_upcast use_quant_conv use_post_quant_conv mid_block_add_attention center_input_sample
    flip_sin_to_cos use_linear_projection upcast_attention""",
    f"a whole number from 1 to {MAX_SAMPLE_SIZE}, or two": "sample_size",
}
FIELD_KINDS = {name: kind for kind, names in FIELD_NAMES_BY_KIND.items() for name in names.split()}


def check_config_values(config: Mapping[str, Any]) -> None:
    """ValueError names the first field of a network's configuration that is not of its kind."""
    for name, value in config.items():
        if (kind := FIELD_KINDS.get(name)) and not VALUE_KINDS[kind](value):
            raise ValueError(f"{name} {value!r:.60}: {kind} is needed")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def build_from_config(path: Path, build: Callable[[dict[str, Any]], BuildResult]) -> BuildResult:
    """What `build` makes of the configuration in a file; ValueError in one line that names the file."""
    config = read_json(path)
    try:
        return build(config)
    except Exception as error:  # diffusers, transformers and torch raise errors of all kinds
        reason = str(error) if type(error) is ValueError else f"nothing can be built from it: {error!r}"
        raise ValueError(f"{path}: {' '.join(reason.split())}") from None


def get_config_number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number of a configuration."""
    value = config.get(name, default)
    if not _is_number(value):
        raise ValueError(f"{name} {value!r}: a finite number is needed")
    return value


EOS_TOKEN_ID, EXCLAMATION_TOKEN_ID = 49407, 0  # token ids of "<|endoftext|>" and "!"


@dataclass(frozen=True)
class TextEncoderSpec:
    """One CLIP text encoder: its configuration, how the U-Net reads it, and where a single file keeps it.

    `config` has the fields of transformers' CLIPTextConfig. The U-Net attends to the output of layer `layer_idx`, after
    the final norm if `final_norm`, and takes the pooled vector if `with_projection`
    (`ldm.nn.text_encoders.TextEncoder`). A single file uses the names of the library `layout` below `prefix`, and may
    hold `num_dropped_layers` last layers that a directory does not have, since nothing reads them. `pad_token_id` pads
    a prompt to 77 tokens.
    """

    config: Mapping[str, Any]
    prefix: str
    layout: Literal["transformers", "open_clip"]
    pad_token_id: int
    layer_idx: int = -1
    final_norm: bool = True
    with_projection: bool = False
    num_dropped_layers: int = 0


@dataclass(frozen=True)
class ModelFamily:
    """A kind of checkpoint: the configurations of its networks by component, and its generation defaults.

    `resolution` is the native side of an image in pixels, `pipeline_class` that of diffusers;
    `force_zeros_for_empty_prompt`: an empty negative prompt is encoded as zeros rather than as "".
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: Mapping[str, TextEncoderSpec]
    scheduler: Mapping[str, Any]
    resolution: int
    pipeline_class: str
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    force_zeros_for_empty_prompt: bool = False

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """The recommended settings of a request."""
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The configurations of the networks by component."""
        return {"unet": self.unet, "vae": self.vae, **{name: spec.config for name, spec in self.text_encoders.items()}}


def _clip_text_config(hidden_size: int, num_hidden_layers: int, hidden_act: str, projection_dim: int) -> dict[str, Any]:
    """A CLIPTextConfig with 64 channels a head and the tokenizer's ids of BOS and EOS, not the 0 and 2 of old files."""
    return {
        "vocab_size": 49408,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "projection_dim": projection_dim,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": hidden_size // 64,
        "max_position_embeddings": 77,
        "hidden_act": hidden_act,
        "bos_token_id": 49406,
        "eos_token_id": EOS_TOKEN_ID,
    }


SD1_UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "down_block_types": [*3 * ["CrossAttnDownBlock2D"], "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *3 * ["CrossAttnUpBlock2D"]],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD2_UNET_CONFIG = SD1_UNET_CONFIG | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SD2_V_UNET_CONFIG = SD2_UNET_CONFIG | {"sample_size": 96, "upcast_attention": True}
SDXL_UNET_CONFIG = SD1_UNET_CONFIG | {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", *2 * ["CrossAttnDownBlock2D"]],
    "up_block_types": [*2 * ["CrossAttnUpBlock2D"], "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,  # 1280 pooled + 6 time ids of 256
}

SD1_VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "down_block_types": 4 * ["DownEncoderBlock2D"],
    "up_block_types": 4 * ["UpDecoderBlock2D"],
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
SD2_V_VAE_CONFIG = SD1_VAE_CONFIG | {"sample_size": 768}
SDXL_VAE_CONFIG = SD1_VAE_CONFIG | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}

SD1_CLIP_L = TextEncoderSpec(
    _clip_text_config(768, 12, "quick_gelu", 768), "cond_stage_model.transformer.", "transformers", EOS_TOKEN_ID
)
SD2_CLIP_H = TextEncoderSpec(
    _clip_text_config(1024, 23, "gelu", 1024),
    prefix="cond_stage_model.model.",
    layout="open_clip",
    pad_token_id=EXCLAMATION_TOKEN_ID,
    num_dropped_layers=1,
)
SDXL_CLIP_L = replace(SD1_CLIP_L, prefix="conditioner.embedders.0.transformer.", layer_idx=-2, final_norm=False)
SDXL_CLIP_G = TextEncoderSpec(
    _clip_text_config(1280, 32, "gelu", 1280),
    prefix="conditioner.embedders.1.model.",
    layout="open_clip",
    pad_token_id=EXCLAMATION_TOKEN_ID,
    layer_idx=-2,
    final_norm=False,
    with_projection=True,
)

SD1_SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
SD2_V_SCHEDULER_CONFIG = SD1_SCHEDULER_CONFIG | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL_SCHEDULER_CONFIG = SD1_SCHEDULER_CONFIG | {"_class_name": "EulerDiscreteScheduler"}

_SD1 = ModelFamily(
    SD1_UNET_CONFIG, SD1_VAE_CONFIG, {"text_encoder": SD1_CLIP_L}, SD1_SCHEDULER_CONFIG, 512, "StableDiffusionPipeline"
)
_SD2 = replace(_SD1, unet=SD2_UNET_CONFIG, text_encoders={"text_encoder": SD2_CLIP_H})

_SDXL = ModelFamily(
    SDXL_UNET_CONFIG,
    SDXL_VAE_CONFIG,
    {"text_encoder": SDXL_CLIP_L, "text_encoder_2": SDXL_CLIP_G},
    SDXL_SCHEDULER_CONFIG,
    resolution=1024,
    pipeline_class="StableDiffusionXLPipeline",
    guidance_scale=5.0,
    force_zeros_for_empty_prompt=True,
)


def _inpainting(family: ModelFamily) -> ModelFamily:
    """The family with a U-Net that also takes the mask and the latents of the masked image."""
    pipeline_class = family.pipeline_class.replace("Pipeline", "InpaintPipeline")
    return replace(family, unet={**family.unet, "in_channels": 9}, pipeline_class=pipeline_class)


FAMILIES: dict[str, ModelFamily] = {
    "sd1": _SD1,
    "sd1-inpainting": _inpainting(_SD1),
    "sd2-base": _SD2,
    "sd2-v": replace(
        _SD2, unet=SD2_V_UNET_CONFIG, vae=SD2_V_VAE_CONFIG, scheduler=SD2_V_SCHEDULER_CONFIG, resolution=768
    ),
    "sd2-inpainting": _inpainting(_SD2),
    "sdxl": _SDXL,
    "sdxl-inpainting": _inpainting(_SDXL),
}
