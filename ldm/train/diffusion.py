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

from ldm.checkpoints.directory import load_tokenizer
from ldm.checkpoints.files import place, save_module, write_json
from ldm.checkpoints.formats import MODEL_INDEX, load_text, load_unet, load_vae
from ldm.checkpoints.schedule import schedule_config, schedule_of
from ldm.conditioning import Conditioning
from ldm.config import DiffusionObjective, Recipe
from ldm.data.cache import latents
from ldm.data.scenes import open_scenes
from ldm.diffusion.guidance import guide
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.samplers import dpmpp_2m, sample
from ldm.diffusion.spacing import choose, trailing
from ldm.hardware import autocast, best_device, working
from ldm.images import contact_sheet, to_pil
from ldm.nn.text import Tower, tokens, warn_of_cuts
from ldm.nn.unet import UNet, UNetConfig
from ldm.nn.vae import decode
from ldm.rng import Noise
from ldm.train.draws import draw_uniform
from ldm.train.score import LEVELS, Matching, by_level, standard_error
from ldm.train.task import Batch, Figures, Visit

HELD_OUT = 512


class DiffusionTask:
    """Denoising score matching on cached latents (Rombach et al. 2022, eq. 3), captions dropped for guidance."""

    divisible = True

    def __init__(self, recipe: Recipe, objective: DiffusionObjective, said: Callable[[int], None]) -> None:
        device = best_device()
        self.recipe, self.objective = recipe, objective
        self.tokenizer = load_tokenizer(objective.text / "tokenizer")
        text = load_text(objective.text / "text_encoder").to(device, working(device)).eval()
        self.tower = Tower(text, self.tokenizer)
        self.vae = place(load_vae(objective.vae), device, working(device)).eval()
        self.model = initial(objective, recipe.seed)
        self.schedule = noise_schedule(objective)
        self.sde = schedule_of(self.schedule).sde
        prediction = choose(PREDICTIONS, objective.prediction, "prediction")
        self.matching = Matching(recipe.seed, objective, self.sde, prediction)
        cache = recipe.output_dir.parent / "cache"
        train, held_out = (open_scenes(recipe.scenes, recipe.seed, split) for split in ("train", "held-out"))
        self.latents = latents(train, recipe.scenes.latents, objective.vae, cache, device, said)
        self.held_out = latents(held_out, HELD_OUT, objective.vae, cache, device)
        warn_of_cuts(self.tokenizer, [*self.latents.captions, *self.held_out.captions])

    def batch(self, k: int, rows: range) -> Batch:
        seed, size = self.recipe.seed, self.recipe.train_batch_size
        whole = visited(len(self.latents), seed, k * size, size)
        visits = whole[rows.start : rows.stop]
        mean, std = self.latents.posterior(np.array([visit.sample for visit in visits]))
        drawn = self.matching.drawn(whole, rows, mean.shape[1:])
        dropped = draw_uniform(seed, visits, "caption") < self.objective.caption_dropout
        captions = ["" if d else self.latents.captions[int(v.sample)] for d, v in zip(dropped, visits, strict=True)]
        return {**drawn, "x0": mean + std * drawn["posterior"], "ids": tokens(self.tokenizer, captions)}

    @torch.no_grad()
    def _text(self, ids: Tensor) -> Conditioning:
        states, _ = self.tower.states(ids)
        return Conditioning(states)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        x0 = batch["x0"].to(next(model.parameters()).device, memory_format=torch.channels_last)
        return self.matching.losses(model, x0, self._text(batch["ids"]), batch), {}

    @torch.no_grad()
    def validate(self, model: UNet) -> dict[str, float]:
        """The unweighted loss on held-out pictures at fixed noise: over all, and in the middle of each eighth.

        Each with its standard error `_se`: sqrt(var / n) of a level's n pictures, and of the mean of the levels.
        """
        rows = [self._held_out_losses(model, rows) for rows in np.array_split(np.arange(HELD_OUT), HELD_OUT // 64)]
        losses = torch.cat(rows).unflatten(0, (-1, LEVELS)).double()  # [pictures of a level, LEVELS]
        error = standard_error(losses).square().sum().sqrt() / LEVELS
        return {"loss": losses.mean().item(), "loss_se": error.item(), **by_level(losses)}

    def _held_out_losses(self, model: UNet, rows: np.ndarray) -> Tensor:
        """The losses of some held-out pictures [B], row i at level i mod LEVELS, noise by the picture's number."""
        x0 = self.held_out.posterior(rows).mean.to(next(model.parameters()).device)
        ids = tokens(self.tokenizer, [self.held_out.captions[row] for row in rows])
        return self.matching.at_levels(model, x0, self._text(ids), rows.tolist())

    @torch.no_grad()
    def samples(self, model: UNet) -> Image.Image | None:
        """A grid of the recipe's prompts, one seed each."""
        prompts = self.recipe.validation_prompts
        if not prompts:
            return None
        device = next(model.parameters()).device
        with autocast(device):
            cond, uncond = (self._text(tokens(self.tokenizer, p)) for p in (prompts, [""] * len(prompts)))
            denoise = guide(self.matching.denoiser(model), cond, uncond, self.recipe.validation_guidance)
            noise = Noise(range(len(prompts)))
            x = noise(torch.zeros(len(prompts), *self.latents.mean.shape[1:])).to(device)
            x = sample(dpmpp_2m, denoise, x, trailing(self.sde, 20), noise)
            return contact_sheet(to_pil(decode(self.vae, x)), prompts, 10)

    def export(self, model: UNet, folder: Path) -> None:
        """The whole model in diffusers' directory layout."""
        objective = self.objective
        for name in ("tokenizer", "text_encoder", "image_encoder"):
            if (objective.text / name).is_dir():
                shutil.copytree(objective.text / name, folder / name)
        shutil.copytree(objective.vae, folder / "vae")
        save_module(model, self.model.config.to_dict(), folder / "unet")
        (folder / "scheduler").mkdir()
        write_json(self.schedule, folder / "scheduler" / "scheduler_config.json")
        own = {"num_inference_steps": 30, "guidance_scale": self.recipe.validation_guidance}
        write_json({**own, "sampler": "dpmpp_2m", "spacing": "trailing"}, folder / "generation_config.json")
        write_json(MODEL_INDEX, folder / "model_index.json")


def initial(objective: DiffusionObjective, seed: int) -> UNet:
    """The U-Net to begin with: that of a folder, or random weights by the seed."""
    if isinstance(objective.unet, Path):
        unet = load_unet(objective.unet)
        unet.attention = objective.attention
        return unet
    torch.manual_seed(seed)
    return UNet(UNetConfig.from_dict(objective.unet), attention=objective.attention)


def noise_schedule(objective: DiffusionObjective) -> dict[str, Any]:
    """The scheduler_config.json of what is trained; ValueError where zero terminal SNR leaves nothing to learn."""
    config = schedule_config(objective.schedule, objective.prediction)
    if objective.rescale_betas_zero_snr and objective.prediction == "eps":
        raise ValueError(
            "rescale_betas_zero_snr: noise predicted from pure noise says nothing: choose prediction v or x0"
        )
    return {**config, "rescale_betas_zero_snr": True} if objective.rescale_betas_zero_snr else config


def visited(count: int, seed: int, start: int, size: int) -> list[Visit]:
    """The visits `start` .. `start + size - 1` to `count` items: each item once an epoch, in an order of its own."""
    places = (divmod(visit, count) for visit in range(start, start + size))
    return [Visit(int(_order(count, seed, epoch)[place]), epoch) for epoch, place in places]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(count)
