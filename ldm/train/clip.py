"""CLIP's training: a text tower and an image tower that find one another."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoints.files import TRANSFORMERS, save_module, save_tensors
from ldm.config import ClipObjective, Recipe
from ldm.data.scenes import Scenes
from ldm.hardware import autocast
from ldm.images import from_uint8
from ldm.nn import clip, text
from ldm.train.task import Batch, Figures, Visit

HELD_OUT = 512  # pairs
MAX_SCALE = 4.6052  # ln 100, the cap on the temperature of Radford et al. 2021, section 2.5


class Towers(nn.Module):
    """Pictures and token ids to unit vectors [B, D] each, and the logarithm of the temperature's inverse."""

    def __init__(self, both: clip.CLIPModel) -> None:
        super().__init__()
        self.clip = both

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (*clip.unit_vectors(self.clip, images, ids), self.clip.logit_scale)


class ClipTask:
    """The symmetric contrastive loss (Radford et al. 2021, figure 3); all pairs of equal captions are positives."""

    divisible = False

    def __init__(self, recipe: Recipe, objective: ClipObjective) -> None:
        self.recipe, self.objective = recipe, objective
        data = recipe.scenes
        self.scenes = Scenes(data.sprites, size=data.size, seed=recipe.seed)
        captions = list(corpus(self.scenes))
        self.tokenizer = clip.learn_vocabulary(captions, objective.vocab_size, objective.context_length)
        text.warn_of_cuts(self.tokenizer, captions)
        torch.manual_seed(recipe.seed)  # the initial weights
        self.model = Towers(
            clip.clip_towers(objective.text, objective.vision, objective.projection_dim, self.tokenizer)
        )
        self.pool = data.size // objective.vision["image_size"]
        others = Scenes(data.sprites, size=data.size, seed=recipe.seed, split="held-out")
        self.held_out = self._collate(others, range(HELD_OUT))

    def batch(self, k: int, rows: range) -> Batch:
        start = k * self.recipe.train_batch_size
        return self._collate(self.scenes, range(start + rows.start, start + rows.stop))

    def _collate(self, scenes: Scenes, indices: range) -> Batch:
        drawn = [scenes[i] for i in indices]
        captions = [scene.caption for scene in drawn]
        return {
            "visits": [Visit(i, 0) for i in indices],
            "images": np.stack([scene.image for scene in drawn]),
            "ids": text.tokens(self.tokenizer, captions, padding="longest"),
            "same": np.array([zlib.crc32(c.encode()) for c in captions], np.int64),
        }

    def _see(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        device = next(model.parameters()).device
        images = F.avg_pool2d(from_uint8(batch["images"]).to(device), self.pool)
        return model(images, batch["ids"].to(device))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        pictures, captions, scale = self._see(model, batch)
        logits = scale.clamp(max=MAX_SCALE).exp() * pictures.float() @ captions.float().T
        same = positives(batch).to(logits)
        pair = [F.cross_entropy(side, same, reduction="none") for side in (logits, logits.T)]
        return (pair[0] + pair[1]) / 2, {"scale": scale.detach().exp().expand(len(logits))}

    @torch.no_grad()
    def validate(self, model: Towers) -> dict[str, float]:
        """How many of the held-out pictures find their own caption among those of all the others, first or in five."""
        with autocast(next(model.parameters()).device):
            pictures, captions, _ = self._see(model, self.held_out)
        ranked = (pictures.float() @ captions.float().T).argsort(1, descending=True).cpu()
        hits = positives(self.held_out).gather(1, ranked)
        return {f"top{k}": (hits[:, :k] > 0).any(1).float().mean().item() for k in (1, 5)}

    def samples(self, model: Towers) -> None:
        return None

    def export(self, model: Towers, folder: Path) -> None:
        """`tokenizer/`, `text_encoder/` (CLIPTextModel), `image_encoder/` (CLIPVisionModelWithProjection).

        The text's projection, which diffusion does not use, lies beside the image tower: `text_projection.safetensors`.
        """
        text.save_tokenizer(self.tokenizer, folder / "tokenizer")
        for name, tower in clip.towers(model.clip).items():
            save_module(tower, tower.config.to_diff_dict(), folder / name, TRANSFORMERS)
        save_tensors(model.clip.text_projection.state_dict(), folder / "image_encoder" / "text_projection.safetensors")


def positives(batch: Batch) -> Tensor:
    """Rows that sum to one over the equal captions of a batch, [B, B]."""
    same = torch.as_tensor(batch["same"])
    equal = (same[:, None] == same[None, :]).float()
    return equal / equal.sum(1, keepdim=True)


def corpus(scenes: Scenes, count: int = 4000) -> Iterator[str]:
    """What a vocabulary is learnt from: captions, and every name and tag a few times."""
    for k in range(count):
        yield scenes[k].caption
    for sprite in scenes.sprites:
        yield from (sprite.concept, *sprite.names, *sprite.tags)
