"""The model that a recipe tunes, by its configurations: weights are not loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldm.checkpoints.families import LoadOptions
from ldm.checkpoints.formats import CPU_DEVICE, PICTO_PATH, read_model_spec
from ldm.checkpoints.networks import ModelSpec, WeightFile, load_weights
from ldm.config import FinetuneObjective, Recipe
from ldm.nn.prompts import PlaceholderTokens
from ldm.nn.text_encoders import CLIPTokenizer
from ldm.nn.vae import AutoencoderKL, vae_scale_factor


@dataclass(frozen=True)
class ModelConfig:
    """A pretrained model, on the meta device; the tokenizer that reads captions for it, and the words to be learnt."""

    spec: ModelSpec
    tokenizer: CLIPTokenizer
    placeholder_tokens: PlaceholderTokens

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, without weights until `load_vae` gives it some."""
        return self.spec.networks["vae"]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a side for each latent."""
        return vae_scale_factor(self.vae)

    def load_vae(self) -> AutoencoderKL:
        """The autoencoder with its weights, float32 on the CPU; no other network's are read."""
        groups = [[_select_folder("vae", source) for source in group] for group in self.spec.shard_groups]
        load_weights(
            {"vae": self.vae},
            [[s for s in group if s.key_mappings] for group in groups],
            CPU_DEVICE,
            {"vae": torch.float32},
        )
        return self.vae


def _select_folder(folder: str, source: WeightFile) -> WeightFile:
    return WeightFile(
        source.file, {name: entry for name, entry in source.key_mappings.items() if entry.component == folder}
    )


def load_model_config(recipe: Recipe) -> ModelConfig:
    """A recipe's model; ValueError names the file that is missing or wrong, or the objective that tunes none."""
    objective = recipe.objective
    if not isinstance(objective, FinetuneObjective):
        raise ValueError(f"objective {objective.kind} does not learn from folders of pictures: tune does")
    options = LoadOptions(revision=objective.revision, variant=objective.variant)
    model = read_model_spec(objective.pretrained_model_name_or_path or PICTO_PATH, options)
    name, make = next(iter(model.text_encoder_factories.items()))
    learnt = objective.placeholder_token if objective.method == "textual_inversion" else None
    words = {learnt: tuple(range(objective.num_vectors))} if learnt else {}
    return ModelConfig(model, make(model.networks[name]).tokenizer, words)
