"""The families of Stable Diffusion as records: a single file says nothing of its configuration, so it is kept here.

Fields and values are those of the directories that their makers published (`unet/config.json` and the like), less what
is a library's default; sizes are the native ones, where some of those say another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

EOS, EXCLAMATION = 49407, 0  # token ids of "<|endoftext|>" and "!"


@dataclass(frozen=True)
class TextTower:
    """One CLIP text encoder: its configuration, how it is read, and where a single file keeps it.

    `config` has the fields of transformers' CLIPTextConfig. `pad` fills a prompt to 77 tokens. The U-Net attends to the
    output of layer `layer`, counted from the end, after the final norm where `final_norm`; `projected`, it also takes
    the pooled vector. `layout` is whose names a single file uses below `prefix`; `dropped` counts the last layers that
    it may hold and a directory does not, as nothing reads them.
    """

    config: Mapping[str, Any]
    prefix: str
    layout: Literal["transformers", "open_clip"]
    pad: int
    layer: int = -1
    final_norm: bool = True
    projected: bool = False
    dropped: int = 0


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint: the configurations of its networks, by folder, and what its makers recommend.

    `unet`, `vae` and `scheduler` are configurations of diffusers, `towers` the text encoders by folder; `size` is the
    native side of a picture in pixels, `pipeline` diffusers' class for the whole. `zero_negative`: an empty negative
    prompt stands for zeros rather than for the embedding of "".
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    towers: Mapping[str, TextTower]
    scheduler: Mapping[str, Any]
    size: int
    pipeline: str
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    zero_negative: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings of a request that its makers recommend."""
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The configurations of the networks, by folder."""
        return {"unet": self.unet, "vae": self.vae, **{name: tower.config for name, tower in self.towers.items()}}


def _tower(width: int, layers: int, activation: str, projection: int) -> dict[str, Any]:
    """A CLIPTextConfig; heads are 64 wide. The ids of BOS and EOS are the tokenizer's, not the 0 and 2 of old files."""
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": projection,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "bos_token_id": 49406,
        "eos_token_id": EOS,
    }


UNET: dict[str, Any] = {
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
UNET_2 = UNET | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
UNET_2_V = UNET_2 | {"sample_size": 96, "upcast_attention": True}
UNET_XL = UNET | {
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
INPAINTING = {"in_channels": 9}  # the noisy latents, the mask, the latents of what is known

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "down_block_types": 4 * ["DownEncoderBlock2D"],
    "up_block_types": 4 * ["UpDecoderBlock2D"],
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
VAE_2_V = VAE | {"sample_size": 768}
VAE_XL = VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}

CLIP_L = TextTower(_tower(768, 12, "quick_gelu", 768), "cond_stage_model.transformer.", "transformers", EOS)
CLIP_H = TextTower(_tower(1024, 23, "gelu", 1024), "cond_stage_model.model.", "open_clip", EXCLAMATION, dropped=1)
CLIP_L_XL = TextTower(
    CLIP_L.config, "conditioner.embedders.0.transformer.", "transformers", EOS, layer=-2, final_norm=False
)
CLIP_G = TextTower(
    _tower(1280, 32, "gelu", 1280),
    "conditioner.embedders.1.model.",
    "open_clip",
    EXCLAMATION,
    layer=-2,
    final_norm=False,
    projected=True,
)

SCHEDULE: dict[str, Any] = {
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
SCHEDULE_V = SCHEDULE | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SCHEDULE_XL = SCHEDULE | {"_class_name": "EulerDiscreteScheduler"}

PLAIN, PAINTED, XL = "StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionXLPipeline"
FAMILIES: dict[str, Family] = {
    "sd1": Family(UNET, VAE, {"text_encoder": CLIP_L}, SCHEDULE, 512, PLAIN),
    "sd1-inpainting": Family(UNET | INPAINTING, VAE, {"text_encoder": CLIP_L}, SCHEDULE, 512, PAINTED),
    "sd2-base": Family(UNET_2, VAE, {"text_encoder": CLIP_H}, SCHEDULE, 512, PLAIN),
    "sd2-v": Family(UNET_2_V, VAE_2_V, {"text_encoder": CLIP_H}, SCHEDULE_V, 768, PLAIN),
    "sd2-inpainting": Family(UNET_2 | INPAINTING, VAE, {"text_encoder": CLIP_H}, SCHEDULE, 512, PAINTED),
    "sdxl": Family(
        UNET_XL,
        VAE_XL,
        {"text_encoder": CLIP_L_XL, "text_encoder_2": CLIP_G},
        SCHEDULE_XL,
        1024,
        XL,
        guidance_scale=5.0,
        zero_negative=True,
    ),
}
