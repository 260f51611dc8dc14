"""The training of picto's CLIP (Radford et al. 2021): text and image encoders for a vocabulary built from captions."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from ldm.checkpoints.tensors import TRANSFORMERS_WEIGHTS_NAME, save_module, save_tensors
from ldm.config import ClipObjective, Recipe
from ldm.data.batch_sampler import SampleKey
from ldm.hardware import autocast
from ldm.image_io import from_uint8
from ldm.nn.text_encoders import tokenize_captions, warn_about_truncation
from ldm.nn.tokenizer import BOS, EOS, CLIPTokenizer, build_bpe, build_clip_vocab, save_clip_tokenizer
from ldm.picto.scenes import SceneDataset, make_scene_dataset
from ldm.rng import torch_seed
from ldm.train.task import Batch, Metrics, TrainingTask

NUM_VALIDATION_PAIRS = 512
MAX_LOGIT_SCALE = 4.6052  # ln 100, the cap on the temperature of Radford et al. 2021, section 2.5


def train_tokenizer(captions: Iterable[str], size: int, context_length: int) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's own form (section 2.4) trained on captions: at most `size` tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = build_bpe({BOS: 0, EOS: 1}, [])
    tokenizer.train_from_iterator(
        captions,
        BpeTrainer(
            vocab_size=size - len(alphabet) - 2,  # the trainer counts plain bytes, and not those that end a word
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [(a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]]
    return CLIPTokenizer(build_clip_vocab(merges), merges, model_max_length=context_length)


def build_clip(
    text_config: Mapping[str, Any], vision_config: Mapping[str, Any], projection_dim: int, tokenizer: CLIPTokenizer
) -> CLIPModel:
    """CLIP with random weights, its text encoder for this tokenizer's vocabulary."""
    vocabulary = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": projection_dim,
    }
    vision = {**vision_config, "projection_dim": projection_dim}
    config = CLIPConfig(text_config={**text_config, **vocabulary}, vision_config=vision, projection_dim=projection_dim)
    # eager attention: on a CPU the flash kernel's backward pass takes half of a step at these lengths
    return CLIPModel._from_config(config, attn_implementation="eager")


def split_clip(clip: CLIPModel) -> dict[str, PreTrainedModel]:
    """The trained encoders as transformers' own classes, by the names of their folders."""
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    image = CLIPVisionModelWithProjection(clip.config.vision_config)
    image.vision_model.load_state_dict(clip.vision_model.state_dict())
    image.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    return {"text_encoder": text, "image_encoder": image}


def load_image_encoder(folder: Path) -> Callable[[Tensor], Tensor]:
    """The encoder in an `image_encoder/` folder: images [B, 3, H, W] in [-1, 1] to unit vectors [B, D].

    Images are reduced to the encoder's size by averages over areas, as in picto's training.
    """
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    side = encoder.config.image_size

    @torch.inference_mode()
    def encode(images: Tensor) -> Tensor:
        return F.normalize(encoder(F.interpolate(images, (side, side), mode="area")).image_embeds, dim=-1)

    return encode


class CLIPDualEncoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] and token ids [B, T] to unit vectors [B, D] each, and log(1 / temperature)."""

    def __init__(self, clip_model: CLIPModel) -> None:
        super().__init__()
        self.clip = clip_model

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = self.clip.visual_projection(self.clip.vision_model(images).pooler_output)
        text = self.clip.text_projection(self.clip.text_model(ids).pooler_output)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1), self.clip.logit_scale


class ClipTask(TrainingTask):
    """The symmetric contrastive loss (Radford et al. 2021, figure 3); all pairs of equal captions are positives."""

    supports_accumulation = False
    model: CLIPDualEncoder

    def __init__(self, recipe: Recipe, objective: ClipObjective) -> None:
        self.recipe, self.objective = recipe, objective
        self.scenes = make_scene_dataset(recipe.scene_data, recipe.seed)
        captions = list(iterate_tokenizer_corpus(self.scenes))
        self.tokenizer = train_tokenizer(captions, objective.vocab_size, objective.context_length)
        warn_about_truncation(self.tokenizer, captions)
        torch.manual_seed(torch_seed(recipe.seed))  # the initial weights
        clip = build_clip(objective.text, objective.vision, objective.projection_dim, self.tokenizer)
        self.model = CLIPDualEncoder(clip).train()
        self.pool_size = recipe.scene_data.size // objective.vision["image_size"]
        held_out = make_scene_dataset(recipe.scene_data, recipe.seed, "held-out")
        self.validation_batch = self._collate(held_out, range(NUM_VALIDATION_PAIRS))

    def make_batch(self, step: int, rows: range) -> Batch:
        start = step * self.recipe.train_batch_size
        return self._collate(self.scenes, range(start + rows.start, start + rows.stop))

    def _collate(self, dataset: SceneDataset, indices: range) -> Batch:
        scenes = [dataset[i] for i in indices]
        captions = [scene.caption for scene in scenes]
        return {
            "sample_keys": [SampleKey(i, 0) for i in indices],
            "images": np.stack([scene.image for scene in scenes]),
            "ids": tokenize_captions(self.tokenizer, captions, longest=True),
            "same": np.array([zlib.crc32(c.encode()) for c in captions], np.int64),
        }

    def _encode_batch(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        device = next(model.parameters()).device
        images = F.avg_pool2d(from_uint8(batch["images"]).to(device), self.pool_size)
        return model(images, batch["ids"].to(device))

    def compute_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        image, text, scale = self._encode_batch(model, batch)
        logits = scale.clamp(max=MAX_LOGIT_SCALE).exp() * image.float() @ text.float().T
        targets = contrastive_targets(batch).to(logits)
        losses = [F.cross_entropy(side, targets, reduction="none") for side in (logits, logits.T)]
        return (losses[0] + losses[1]) / 2, {"scale": scale.detach().exp().expand(len(logits))}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The fractions of held-out images whose own caption is the nearest of all, and among the five nearest."""
        with autocast(next(self.model.parameters()).device):
            image, text, _ = self._encode_batch(self.model, self.validation_batch)
        ranked = (image.float() @ text.float().T).argsort(1, descending=True).cpu()
        hits = contrastive_targets(self.validation_batch).gather(1, ranked)
        return {f"top{k}": (hits[:, :k] > 0).any(1).float().mean().item() for k in (1, 5)}

    def export(self, folder: Path) -> None:
        """Write `tokenizer/`, `text_encoder/` (CLIPTextModel) and `image_encoder/` (CLIPVisionModelWithProjection).

        The text projection, which diffusion does not use, is `image_encoder/text_projection.safetensors`.
        """
        save_clip_tokenizer(self.tokenizer, folder / "tokenizer")
        for name, encoder in split_clip(self.model.clip).items():
            save_module(encoder, encoder.config.to_diff_dict(), folder / name, TRANSFORMERS_WEIGHTS_NAME)
        projection = self.model.clip.text_projection.state_dict()
        save_tensors(projection, folder / "image_encoder" / "text_projection.safetensors")


def contrastive_targets(batch: Batch) -> Tensor:
    """Rows that sum to one over the equal captions of a batch, [B, B]."""
    same = torch.as_tensor(batch["same"])
    equal = (same[:, None] == same[None, :]).float()
    return equal / equal.sum(1, keepdim=True)


def iterate_tokenizer_corpus(scenes: SceneDataset, num_captions: int = 4000) -> Iterator[str]:
    """What the vocabulary is trained on: captions, and every name and tag of the sprites."""
    for k in range(num_captions):
        yield scenes[k].caption
    for sprite in scenes.sprites:
        yield from (sprite.concept, *sprite.names, *sprite.tags)
