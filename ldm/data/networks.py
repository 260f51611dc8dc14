"""The model that a recipe tunes, by its configurations: weights are not loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldm.checkpoints.blueprint import Blueprint
from ldm.checkpoints.formats import CPU, FORMATS, PICTO, check, locate
from ldm.checkpoints.networks import Source, fill
from ldm.config import Recipe, TuneObjective
from ldm.nn.prompts import Words
from ldm.nn.text import CLIPTokenizer
from ldm.nn.vae import AutoencoderKL, downscale


@dataclass(frozen=True)
class Networks:
    """A pretrained model, on the meta device; the tokenizer that reads captions for it, and the words to be learnt."""

    model: Blueprint
    tokenizer: CLIPTokenizer
    words: Words

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, without weights until `load_vae` gives it some."""
        return self.model.networks["vae"]

    @property
    def downscale(self) -> int:
        """Pixels a side for each latent."""
        return downscale(self.vae)

    def load_vae(self) -> AutoencoderKL:
        """The autoencoder with its weights, float32 on the CPU; no other network's are read."""
        groups = [[_of("vae", source) for source in group] for group in self.model.groups]
        fill({"vae": self.vae}, [[s for s in group if s.entries] for group in groups], CPU, {"vae": torch.float32})
        return self.vae


def _of(folder: str, source: Source) -> Source:
    return Source(source.file, {name: entry for name, entry in source.entries.items() if entry.folder == folder})


def networks_of(recipe: Recipe) -> Networks:
    """A recipe's model; ValueError names the file that is missing or wrong, or the objective that tunes none."""
    objective = recipe.objective
    if not isinstance(objective, TuneObjective):
        raise ValueError(f"objective {objective.kind} does not learn from folders of pictures: tune does")
    path = locate(objective.pretrained_model_name_or_path or PICTO, objective.revision, None, objective.variant)
    options = {"variant": objective.variant} if path.is_dir() and objective.variant else {}
    model = FORMATS["folder" if path.is_dir() else "single file"].read(path, **options)
    check(model, path)
    name, make = next(iter(model.towers.items()))
    learnt = objective.placeholder_token if objective.method == "textual_inversion" else None
    words = {learnt: tuple(range(objective.num_vectors))} if learnt else {}
    return Networks(model, make(model.networks[name]).tokenizer, words)
