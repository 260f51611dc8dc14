"""Tiny random models of the classes of diffusers, and the arguments of its pipelines: oracles of several tests."""

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

UNCHECKED = {"safety_checker": None, "requires_safety_checker": False}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
CONTRAST = 0.7  # of the random decoder: images of many levels, few of them 0 or 255
PROMPT, NEGATIVE = "a red apple on a blue background", "two stars"


def unet(channels, **options):
    fields = {
        "sample_size": 8,
        "in_channels": channels,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**fields | options)


def vae():
    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        scaling_factor=3.0,
    )
    with torch.no_grad():
        made.decoder.conv_out.weight *= CONTRAST
    return made


def transformers_tokenizer(ours):
    """transformers' own tokenizer with the vocabulary, the padding and the length of ours."""
    return ours.to_transformers()


def transformers_text_encoder(ours):
    """transformers' own text encoder with the configuration and the weights of ours."""
    projects = hasattr(ours, "text_projection")
    theirs = (CLIPTextModelWithProjection if projects else CLIPTextModel)(CLIPTextConfig(**ours.config.to_dict()))
    tensors = {name if projects else name.removeprefix("text_model."): a for name, a in ours.state_dict().items()}
    (table,) = (name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[table] = tensors[table][: ours.config.vocab_size]  # without those of placeholder tokens
    theirs.load_state_dict(tensors)
    return theirs.eval()


def text_encoder(tokenizer, kind=CLIPTextModel, width=32, activation="quick_gelu"):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config)


def plain(tokenizer, channels):
    """The networks of a tiny Stable Diffusion 1, or of its inpainting."""
    networks = {
        "unet": unet(channels, cross_attention_dim=32),
        "text_encoder": text_encoder(tokenizer),
        "tokenizer": tokenizer,
        **UNCHECKED,
        "feature_extractor": None,
    }
    kind = diffusers.StableDiffusionPipeline if channels == 4 else diffusers.StableDiffusionInpaintPipeline
    return kind, networks


def second(tokenizer, channels):
    """The networks of a tiny Stable Diffusion 2: linear projections, heads of one width, "!" as padding."""
    kind, networks = plain(tokenizer, channels)
    tokenizer.pad_token = "!"
    heads = {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True, "sample_size": 12}
    changed = {
        "unet": unet(channels, cross_attention_dim=48, **heads),
        "text_encoder": text_encoder(tokenizer, width=48, activation="gelu"),
    }
    return kind, networks | changed


def xl(tokenizer, channels):
    """The networks of a tiny Stable Diffusion XL: text encoders of 32 and 48, ids of 8 numbers each."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    networks = {
        "unet": unet(channels, cross_attention_dim=80, **added, projection_class_embeddings_input_dim=24 + 6 * 8),
        "text_encoder": text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "text_encoder_2": text_encoder(tokenizer, CLIPTextModelWithProjection, 48, "gelu"),
        "tokenizer_2": tokenizer,
    }
    kind = diffusers.StableDiffusionXLPipeline if channels == 4 else diffusers.StableDiffusionXLInpaintPipeline
    return kind, networks


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def distilled(tokenizer, channels):
    """The networks of a tiny latent consistency model, whose U-Net takes the guidance scale as an input."""
    kind, networks = plain(tokenizer, channels)
    network = unet(channels, cross_attention_dim=32, time_cond_proj_dim=16)
    with torch.no_grad():
        network.time_embedding.cond_proj.weight *= 10  # else the scale hardly matters
    return kind, networks | {"unet": network}


def pruned(tokenizer, channels):
    """The networks of a tiny SSD-1B: XL with a depth for each transformer, and none in the middle."""
    kind, networks = xl(tokenizer, channels)
    fields = {
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 3, 2], 1],
    }
    return kind, networks | {"unet": UNet2DConditionModel(**{**networks["unet"].config, **fields})}
