"""CLIP's training (Radford et al. 2021): two random towers for a vocabulary that is learnt from captions.

CLIP's training: a text tower and an image tower that find one another."""

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
from torch.nn.functional import interpolate, normalize
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from ldm.checkpoints.tensors import TRANSFORMERS_WEIGHTS_NAME, save_module, save_tensors
from ldm.config import ClipObjective, Recipe
from ldm.hardware import autocast
from ldm.image_io import from_uint8
from ldm.nn import text_encoders
from ldm.nn.text_encoders import build_clip_vocab
from ldm.picto.scenes import SceneDataset
from ldm.train.task import Batch, Metrics, SampleKey


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


NUM_VALIDATION_PAIRS = 512  # pairs
MAX_LOGIT_SCALE = 4.6052  # ln 100, the cap on the temperature of Radford et al. 2021, section 2.5


class CLIPDualEncoder(nn.Module):
    """Pictures and token ids to unit vectors [B, D] each, and the logarithm of the temperature's inverse."""

    def __init__(self, clip_model: CLIPModel) -> None:
        super().__init__()
        self.clip = clip_model

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (*compute_clip_embeddings(self.clip, images, ids), self.clip.logit_scale)


class ClipTask:
    """The symmetric contrastive loss (Radford et al. 2021, figure 3); all pairs of equal captions are positives."""

    supports_accumulation = False

    def __init__(self, recipe: Recipe, objective: ClipObjective) -> None:
        self.recipe, self.objective = recipe, objective
        data = recipe.scene_data
        self.scenes = SceneDataset(data.sprites, size=data.size, seed=recipe.seed)
        captions = list(iterate_tokenizer_corpus(self.scenes))
        self.tokenizer = train_tokenizer(captions, objective.vocab_size, objective.context_length)
        text_encoders.warn_about_truncation(self.tokenizer, captions)
        torch.manual_seed(recipe.seed)  # the initial weights
        self.model = CLIPDualEncoder(
            build_clip(objective.text, objective.vision, objective.projection_dim, self.tokenizer)
        )
        self.pool_size = data.size // objective.vision["image_size"]
        others = SceneDataset(data.sprites, size=data.size, seed=recipe.seed, split="held-out")
        self.validation_batch = self._collate(others, range(NUM_VALIDATION_PAIRS))

    def make_batch(self, step: int, rows: range) -> Batch:
        start = step * self.recipe.train_batch_size
        return self._collate(self.scenes, range(start + rows.start, start + rows.stop))

    def _collate(self, scenes: SceneDataset, indices: range) -> Batch:
        drawn = [scenes[i] for i in indices]
        captions = [scene.caption for scene in drawn]
        return {
            "visits": [SampleKey(i, 0) for i in indices],
            "images": np.stack([scene.image for scene in drawn]),
            "ids": text_encoders.tokenize_captions(self.tokenizer, captions, padding="longest"),
            "same": np.array([zlib.crc32(c.encode()) for c in captions], np.int64),
        }

    def _encode_batch(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        device = next(model.parameters()).device
        images = F.avg_pool2d(from_uint8(batch["images"]).to(device), self.pool_size)
        return model(images, batch["ids"].to(device))

    def compute_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        pictures, captions, scale = self._encode_batch(model, batch)
        logits = scale.clamp(max=MAX_LOGIT_SCALE).exp() * pictures.float() @ captions.float().T
        same = contrastive_targets(batch).to(logits)
        pair = [F.cross_entropy(side, same, reduction="none") for side in (logits, logits.T)]
        return (pair[0] + pair[1]) / 2, {"scale": scale.detach().exp().expand(len(logits))}

    @torch.no_grad()
    def validate(self, model: CLIPDualEncoder) -> dict[str, float]:
        """How many of the held-out pictures find their own caption among those of all the others, first or in five."""
        with autocast(next(model.parameters()).device):
            pictures, captions, _ = self._encode_batch(model, self.validation_batch)
        ranked = (pictures.float() @ captions.float().T).argsort(1, descending=True).cpu()
        hits = contrastive_targets(self.validation_batch).gather(1, ranked)
        return {f"top{k}": (hits[:, :k] > 0).any(1).float().mean().item() for k in (1, 5)}

    def generate_samples(self, model: CLIPDualEncoder) -> None:
        return None

    def export(self, model: CLIPDualEncoder, folder: Path) -> None:
        """`tokenizer/`, `text_encoder/` (CLIPTextModel), `image_encoder/` (CLIPVisionModelWithProjection).

        The text's projection, which diffusion does not use, lies beside the image tower: `text_projection.safetensors`.
        """
        text_encoders.save_clip_tokenizer(self.tokenizer, folder / "tokenizer")
        for name, tower in split_clip(model.clip).items():
            save_module(tower, tower.config.to_diff_dict(), folder / name, TRANSFORMERS_WEIGHTS_NAME)
        save_tensors(model.clip.text_projection.state_dict(), folder / "image_encoder" / "text_projection.safetensors")


def contrastive_targets(batch: Batch) -> Tensor:
    """Rows that sum to one over the equal captions of a batch, [B, B]."""
    same = torch.as_tensor(batch["same"])
    equal = (same[:, None] == same[None, :]).float()
    return equal / equal.sum(1, keepdim=True)


def iterate_tokenizer_corpus(scenes: SceneDataset, num_captions: int = 4000) -> Iterator[str]:
    """What a vocabulary is learnt from: captions, and every name and tag a few times."""
    for k in range(num_captions):
        yield scenes[k].caption
    for sprite in scenes.sprites:
        yield from (sprite.concept, *sprite.names, *sprite.tags)
