"""What is known of a model besides its weights: the families of Stable Diffusion, and the user's `LoadOptions`.

A single file holds no configuration. Fields and values here are those of the published directories (`unet/config.json`
and the like) without the libraries' defaults; sizes are the native ones, where some of those say another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

EOS_TOKEN_ID, EXCLAMATION_TOKEN_ID = 49407, 0  # token ids of "<|endoftext|>" and "!"


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is found and read; `Pipeline.from_pretrained` takes the same names.

    `revision` and `token` are of the hub; `variant` chooses among the weights of a directory ("fp16"); `family` and `ema`
    (the U-Net's moving average in place of its last weights) are of single files. `prediction` ("eps", "v", "x0") and
    `zero_snr` (zero terminal SNR) override what the model says; `vae` is a folder, file or hub id of another autoencoder.
    """

    revision: str | None = None
    vae: str | Path | None = None
    variant: str | None = None
    family: str | None = None
    prediction: str | None = None
    zero_snr: bool | None = None
    ema: bool = False
    token: str | None = None

    def to_record(self) -> dict[str, Any]:
        """The options that are set, as JSON values; never the token."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {n: str(value) if isinstance(value, Path) else value for n, value in given.items() if n != "token"}


@dataclass(frozen=True)
class TextEncoderSpec:
    """One CLIP text encoder: its configuration, how it is read, and where a single file keeps it.

    `config` has the fields of transformers' CLIPTextConfig. `pad` fills a prompt to 77 tokens. The U-Net attends to the
    output of layer `read_clip_skip`, counted from the end, after the final norm where `final_norm`; `projected`, it also takes
    the pooled vector. `layout` is whose names a single file uses below `format_label_prefix`; `should_drop_caption` counts the last layers that
    it may hold and a directory does not, as nothing reads them.
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
    """A kind of checkpoint: the configurations of its networks, by folder, and what its makers recommend.

    `unet_from_config`, `vae` and `scheduler` are configurations of diffusers, `split_clip` the text encoders by folder; `size` is the
    native side of a picture in pixels, `pipeline` diffusers' class for the whole. `zero_negative`: an empty negative
    prompt stands for zeros rather than for the embedding of "".
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
        """The settings of a request that its makers recommend."""
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The configurations of the networks, by folder."""
        return {
            "unet": self.unet,
            "vae": self.vae,
            **{name: tower.config for name, tower in self.text_encoders.items()},
        }


def _clip_text_config(hidden_size: int, num_hidden_layers: int, hidden_act: str, projection_dim: int) -> dict[str, Any]:
    """A CLIPTextConfig; heads are 64 wide. The ids of BOS and EOS are the tokenizer's, not the 0 and 2 of old files."""
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
    "projection_class_embeddings_input_dim": 2816,  # 1280 pooled, and 6 ids of 256
}
INPAINTING_UNET_OVERRIDES = {"in_channels": 9}  # the noisy latents, the mask, the latents of what is known

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
    "cond_stage_model.model.",
    "open_clip",
    EXCLAMATION_TOKEN_ID,
    num_dropped_layers=1,
)
SDXL_CLIP_L = TextEncoderSpec(
    SD1_CLIP_L.config,
    "conditioner.embedders.0.transformer.",
    "transformers",
    EOS_TOKEN_ID,
    layer_idx=-2,
    final_norm=False,
)
SDXL_CLIP_G = TextEncoderSpec(
    _clip_text_config(1280, 32, "gelu", 1280),
    "conditioner.embedders.1.model.",
    "open_clip",
    EXCLAMATION_TOKEN_ID,
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

SD_PIPELINE_CLASS, SD_INPAINT_PIPELINE_CLASS, SDXL_PIPELINE_CLASS = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
)
FAMILIES: dict[str, ModelFamily] = {
    "sd1": ModelFamily(
        SD1_UNET_CONFIG, SD1_VAE_CONFIG, {"text_encoder": SD1_CLIP_L}, SD1_SCHEDULER_CONFIG, 512, SD_PIPELINE_CLASS
    ),
    "sd1-inpainting": ModelFamily(
        SD1_UNET_CONFIG | INPAINTING_UNET_OVERRIDES,
        SD1_VAE_CONFIG,
        {"text_encoder": SD1_CLIP_L},
        SD1_SCHEDULER_CONFIG,
        512,
        SD_INPAINT_PIPELINE_CLASS,
    ),
    "sd2-base": ModelFamily(
        SD2_UNET_CONFIG, SD1_VAE_CONFIG, {"text_encoder": SD2_CLIP_H}, SD1_SCHEDULER_CONFIG, 512, SD_PIPELINE_CLASS
    ),
    "sd2-v": ModelFamily(
        SD2_V_UNET_CONFIG,
        SD2_V_VAE_CONFIG,
        {"text_encoder": SD2_CLIP_H},
        SD2_V_SCHEDULER_CONFIG,
        768,
        SD_PIPELINE_CLASS,
    ),
    "sd2-inpainting": ModelFamily(
        SD2_UNET_CONFIG | INPAINTING_UNET_OVERRIDES,
        SD1_VAE_CONFIG,
        {"text_encoder": SD2_CLIP_H},
        SD1_SCHEDULER_CONFIG,
        512,
        SD_INPAINT_PIPELINE_CLASS,
    ),
    "sdxl": ModelFamily(
        SDXL_UNET_CONFIG,
        SDXL_VAE_CONFIG,
        {"text_encoder": SDXL_CLIP_L, "text_encoder_2": SDXL_CLIP_G},
        SDXL_SCHEDULER_CONFIG,
        1024,
        SDXL_PIPELINE_CLASS,
        guidance_scale=5.0,
        force_zeros_for_empty_prompt=True,
    ),
}
