"""CLIP's training (Radford et al. 2021): two random towers for a vocabulary that is learnt from captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

import ldm.nn._torchvision  # noqa: F401  must come before transformers
from ldm.nn.text import build_clip_vocab

from tokenizers.pre_tokenizers import ByteLevel  # isort: skip
from tokenizers.trainers import BpeTrainer  # isort: skip
from transformers import (  # isort: skip
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)


def build_clip(
    text_config: Mapping[str, Any], vision_config: Mapping[str, Any], projection_dim: int, tokenizer: CLIPTokenizer
) -> CLIPModel:
    """Both towers of CLIP (Radford et al. 2021), random, the text tower for this tokenizer's vocabulary."""
    words = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": projection_dim,
    }
    config = CLIPConfig(
        text_config={**text_config, **words},
        vision_config={**vision_config, "projection_dim": projection_dim},
        projection_dim=projection_dim,
    )
    # eager attention: on a CPU the flash kernel's backward pass takes half of a step at these lengths
    return CLIPModel._from_config(config, attn_implementation="eager")


def compute_clip_embeddings(clip: CLIPModel, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, H, W] in [-1, 1] and token ids [B, T] as vectors of length one, [B, D] each."""
    pictures = clip.visual_projection(clip.vision_model(images).pooler_output)
    captions = clip.text_projection(clip.text_model(ids).pooler_output)
    return normalize(pictures, dim=-1), normalize(captions, dim=-1)


def split_clip(clip: CLIPModel) -> dict[str, PreTrainedModel]:
    """The trained towers as transformers' own classes, by the name of the folder that holds each."""
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    image = CLIPVisionModelWithProjection(clip.config.vision_config)
    image.vision_model.load_state_dict(clip.vision_model.state_dict())
    image.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    return {"text_encoder": text, "image_encoder": image}


def load_image_encoder(folder: Path) -> Callable[[Tensor], Tensor]:
    """The image tower in an `image_encoder/` folder: pictures [B, 3, H, W] in [-1, 1] to vectors of length one, [B, D].

    Pictures are reduced to the tower's size by averages over areas, as picto's tower learnt to see them.
    """
    tower = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    side = tower.config.image_size

    @torch.inference_mode()
    def see(pictures: Tensor) -> Tensor:
        return normalize(tower(interpolate(pictures, (side, side), mode="area")).image_embeds, dim=-1)

    return see


def train_tokenizer(captions: Iterable[str], size: int, context_length: int) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's own form (section 2.4), learnt from captions: `size` tokens at most."""
    alphabet = sorted(ByteLevel.alphabet())
    learner = CLIPTokenizer().backend_tokenizer
    learner.train_from_iterator(
        captions,
        BpeTrainer(
            vocab_size=size - len(alphabet) - 2,  # the trainer counts plain bytes, and not those that end a word
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [(a, b) for a, b in json.loads(learner.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=build_clip_vocab(merges), merges=merges, model_max_length=context_length)
