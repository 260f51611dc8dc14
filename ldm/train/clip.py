"""CLIP's training: a text tower and an image tower that find one another."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoints.files import TRANSFORMERS_WEIGHTS_NAME, save_module, save_tensors
from ldm.config import ClipObjective, Recipe
from ldm.data.scenes import SceneDataset
from ldm.hardware import autocast
from ldm.images import from_uint8
from ldm.nn import clip, text
from ldm.train.task import Batch, Metrics, SampleKey

NUM_VALIDATION_PAIRS = 512  # pairs
MAX_LOGIT_SCALE = 4.6052  # ln 100, the cap on the temperature of Radford et al. 2021, section 2.5


class CLIPDualEncoder(nn.Module):
    """Pictures and token ids to unit vectors [B, D] each, and the logarithm of the temperature's inverse."""

    def __init__(self, clip_model: clip.CLIPModel) -> None:
        super().__init__()
        self.clip = clip_model

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (*clip.compute_clip_embeddings(self.clip, images, ids), self.clip.logit_scale)


class ClipTask:
    """The symmetric contrastive loss (Radford et al. 2021, figure 3); all pairs of equal captions are positives."""

    supports_accumulation = False

    def __init__(self, recipe: Recipe, objective: ClipObjective) -> None:
        self.recipe, self.objective = recipe, objective
        data = recipe.scene_data
        self.scenes = SceneDataset(data.sprites, size=data.size, seed=recipe.seed)
        captions = list(iterate_tokenizer_corpus(self.scenes))
        self.tokenizer = clip.train_tokenizer(captions, objective.vocab_size, objective.context_length)
        text.warn_about_truncation(self.tokenizer, captions)
        torch.manual_seed(recipe.seed)  # the initial weights
        self.model = CLIPDualEncoder(
            clip.build_clip(objective.text, objective.vision, objective.projection_dim, self.tokenizer)
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
            "ids": text.tokenize_captions(self.tokenizer, captions, padding="longest"),
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
        text.save_clip_tokenizer(self.tokenizer, folder / "tokenizer")
        for name, tower in clip.split_clip(model.clip).items():
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
