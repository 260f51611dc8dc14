"""The latent U-Net's training: the score of captioned latents under the VP-SDE."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoints.formats import MODEL_INDEX, load_component
from ldm.checkpoints.layouts import load_checked_tokenizer
from ldm.checkpoints.schedule import build_scheduler_config, parse_scheduler_config
from ldm.checkpoints.tensors import save_module
from ldm.conditioning import Conditioning
from ldm.config import DiffusionObjective, Recipe
from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.samplers import dpmpp_2m, sample
from ldm.diffusion.timesteps import trailing
from ldm.errors import choose
from ldm.files import write_json
from ldm.hardware import autocast, best_device, preferred_dtype, to_device
from ldm.image_io import contact_sheet, to_pil
from ldm.nn.text_encoders import TextEncoder, tokenize_captions, warn_about_truncation
from ldm.nn.unet import UNet, UNetConfig
from ldm.nn.vae import decode_latents
from ldm.picto.scene_latents import cache_scene_latents
from ldm.picto.scenes import make_scene_dataset
from ldm.rng import Noise
from ldm.train.score_matching import (
    NUM_VALIDATION_LEVELS,
    ScoreMatchingLoss,
    sample_uniform,
    standard_error,
    summarize_level_losses,
)
from ldm.train.task import Batch, Metrics, SampleKey

NUM_VALIDATION_LATENTS = 512


class DiffusionTask:
    """Denoising score matching on cached latents (Rombach et al. 2022, eq. 3), captions dropped for guidance."""

    supports_accumulation = True

    def __init__(self, recipe: Recipe, objective: DiffusionObjective, on_progress: Callable[[int], None]) -> None:
        device = best_device()
        self.recipe, self.objective = recipe, objective
        self.tokenizer = load_checked_tokenizer(objective.text / "tokenizer")
        text = load_component(objective.text / "text_encoder", "text_encoder").to(device, preferred_dtype(device)).eval()
        self.text_encoder = TextEncoder(text, self.tokenizer)
        self.vae = to_device(load_component(objective.vae, "vae"), device, preferred_dtype(device)).eval()
        self.model = initialize_unet(objective, recipe.seed)
        self.scheduler_config = training_scheduler_config(objective)
        self.sde = parse_scheduler_config(self.scheduler_config).sde
        prediction = choose(PREDICTIONS, objective.prediction, "prediction")
        self.score_matching = ScoreMatchingLoss(recipe.seed, objective, self.sde, prediction)
        cache = recipe.output_dir.parent / "cache"
        train, held_out = (make_scene_dataset(recipe.scene_data, recipe.seed, split) for split in ("train", "held-out"))
        self.latents = cache_scene_latents(train, recipe.scene_data.latents, objective.vae, cache, device, on_progress)
        self.validation_latents = cache_scene_latents(held_out, NUM_VALIDATION_LATENTS, objective.vae, cache, device)
        warn_about_truncation(self.tokenizer, [*self.latents.captions, *self.validation_latents.captions])

    def make_batch(self, step: int, rows: range) -> Batch:
        seed, size = self.recipe.seed, self.recipe.train_batch_size
        whole = shuffle_sample_keys(len(self.latents), seed, step * size, size)
        visits = whole[rows.start : rows.stop]
        mean, std = self.latents.posterior(np.array([visit.sample_id for visit in visits]))
        drawn = self.score_matching.sample_noise_and_times(whole, rows, mean.shape[1:])
        dropped = sample_uniform(seed, visits, "caption") < self.objective.caption_dropout
        captions = ["" if d else self.latents.captions[int(v.sample_id)] for d, v in zip(dropped, visits, strict=True)]
        return {**drawn, "x0": mean + std * drawn["posterior"], "ids": tokenize_captions(self.tokenizer, captions)}

    @torch.no_grad()
    def _encode_text(self, ids: Tensor) -> Conditioning:
        states, _ = self.text_encoder.encode_ids(ids)
        return Conditioning(states)

    def compute_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        x0 = batch["x0"].to(next(model.parameters()).device, memory_format=torch.channels_last)
        return self.score_matching.compute_losses(model, x0, self._encode_text(batch["ids"]), batch), {}

    @torch.no_grad()
    def validate(self, model: UNet) -> dict[str, float]:
        """The unweighted loss on held-out pictures at fixed noise: over all, and in the middle of each eighth.

        Each with its standard error `_se`: sqrt(var / n) of a level's n pictures, and of the mean of the levels.
        """
        rows = [
            self._validation_losses(model, rows)
            for rows in np.array_split(np.arange(NUM_VALIDATION_LATENTS), NUM_VALIDATION_LATENTS // 64)
        ]
        losses = torch.cat(rows).unflatten(0, (-1, NUM_VALIDATION_LEVELS)).double()  # [pictures of a level, LEVELS]
        error = standard_error(losses).square().sum().sqrt() / NUM_VALIDATION_LEVELS
        return {"loss": losses.mean().item(), "loss_se": error.item(), **summarize_level_losses(losses)}

    def _validation_losses(self, model: UNet, rows: np.ndarray) -> Tensor:
        """The losses of some held-out pictures [B], row i at level i mod LEVELS, noise by the picture's number."""
        x0 = self.validation_latents.posterior(rows).mean.to(next(model.parameters()).device)
        ids = tokenize_captions(self.tokenizer, [self.validation_latents.captions[row] for row in rows])
        return self.score_matching.compute_level_losses(model, x0, self._encode_text(ids), rows.tolist())

    @torch.no_grad()
    def generate_samples(self, model: UNet) -> Image.Image | None:
        """A grid of the recipe's prompts, one seed each."""
        prompts = self.recipe.validation_prompts
        if not prompts:
            return None
        device = next(model.parameters()).device
        with autocast(device):
            cond, uncond = (
                self._encode_text(tokenize_captions(self.tokenizer, p)) for p in (prompts, [""] * len(prompts))
            )
            denoise = classifier_free_guidance(
                self.score_matching.make_denoiser(model), cond, uncond, self.recipe.validation_guidance
            )
            noise = Noise(range(len(prompts)))
            x = noise(torch.zeros(len(prompts), *self.latents.mean.shape[1:])).to(device)
            x = sample(dpmpp_2m, denoise, x, trailing(self.sde, 20), noise)
            return contact_sheet(to_pil(decode_latents(self.vae, x)), prompts, 10)

    def export(self, model: UNet, folder: Path) -> None:
        """The whole model in diffusers' directory layout."""
        objective = self.objective
        for name in ("tokenizer", "text_encoder", "image_encoder"):
            if (objective.text / name).is_dir():
                shutil.copytree(objective.text / name, folder / name)
        shutil.copytree(objective.vae, folder / "vae")
        save_module(model, self.model.config.to_dict(), folder / "unet")
        (folder / "scheduler").mkdir()
        write_json(self.scheduler_config, folder / "scheduler" / "scheduler_config.json")
        own = {"num_inference_steps": 30, "guidance_scale": self.recipe.validation_guidance}
        write_json({**own, "sampler": "dpmpp_2m", "spacing": "trailing"}, folder / "generation_config.json")
        write_json(MODEL_INDEX, folder / "model_index.json")


def initialize_unet(objective: DiffusionObjective, seed: int) -> UNet:
    """The U-Net to begin with: that of a folder, or random weights by the seed."""
    if isinstance(objective.unet, Path):
        unet = load_component(objective.unet, "unet")
        unet.attention = objective.attention
        return unet
    torch.manual_seed(seed)
    return UNet(UNetConfig.from_dict(objective.unet), attention=objective.attention)


def training_scheduler_config(objective: DiffusionObjective) -> dict[str, Any]:
    """The scheduler_config.json of what is trained; ValueError where zero terminal SNR leaves nothing to learn."""
    config = build_scheduler_config(objective.schedule, objective.prediction)
    if objective.rescale_betas_zero_snr and objective.prediction == "eps":
        raise ValueError(
            "rescale_betas_zero_snr: noise predicted from pure noise says nothing: choose prediction v or x0"
        )
    return {**config, "rescale_betas_zero_snr": True} if objective.rescale_betas_zero_snr else config


def shuffle_sample_keys(num_samples: int, seed: int, start: int, size: int) -> list[SampleKey]:
    """The visits `start_trackers` .. `start + size - 1` to `compose_count` items: each item once an epoch, in an order of its own."""
    places = (divmod(visit, num_samples) for visit in range(start, start + size))
    return [SampleKey(int(_epoch_permutation(num_samples, seed, epoch)[place]), epoch) for epoch, place in places]


@lru_cache(maxsize=2)
def _epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(num_samples)
