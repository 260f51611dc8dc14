"""The latent U-Net's training: the score of captioned latents under the VP-SDE."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints.files import place, save_module, write_json
from ldm.checkpoints.formats import MODEL_INDEX, load_text, load_tokenizer, load_vae
from ldm.checkpoints.schedule import schedule_config
from ldm.conditioning import Conditioning
from ldm.config import DiffusionObjective, Recipe
from ldm.data.cache import Latents, latents
from ldm.data.scenes import open_scenes
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guide
from ldm.diffusion.objective import TIMES, WEIGHTS, diffusion_loss
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.samplers import dpmpp_2m, sample
from ldm.diffusion.sde import SCHEDULES, VPSDE, per_image
from ldm.diffusion.spacing import choose, trailing
from ldm.images import contact_sheet, to_pil
from ldm.nn.text import embed, tokens
from ldm.nn.unet import UNet, UNetConfig
from ldm.nn.vae import decode
from ldm.rng import Noise
from ldm.train.task import Batch, Figures

HELD_OUT = 512
LEVELS = 8  # the noise levels of the validation loss


class DiffusionTask:
    """Denoising score matching on cached latents (Rombach et al. 2022, eq. 3), captions dropped for guidance."""

    def __init__(self, recipe: Recipe, objective: DiffusionObjective, said: Callable[[int], None]) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.recipe, self.objective = recipe, objective
        self.tokenizer = load_tokenizer(objective.text / "tokenizer")
        self.text = load_text(objective.text / "text_encoder").to(device, torch.bfloat16).eval()
        self.vae = place(load_vae(objective.vae), device, torch.bfloat16).eval()
        torch.manual_seed(recipe.seed)  # the initial weights
        self.model = UNet(UNetConfig.from_dict(objective.unet), attention=objective.attention)
        self.sde = VPSDE.tabulated(choose(SCHEDULES, objective.schedule, "schedule")(0, 0, 1000))
        self.prediction = choose(PREDICTIONS, objective.prediction, "prediction")
        self.schedule = schedule_config(objective.schedule, objective.prediction)  # refused now, if not exportable
        self.weight = choose(WEIGHTS, objective.weighting, "weighting")
        self.times = choose(TIMES, objective.times, "times")
        cache = recipe.output_dir.parent / "cache"
        train, held_out = (open_scenes(recipe.data, recipe.seed, split) for split in ("train", "held-out"))
        self.latents = latents(train, recipe.data.latents, objective.vae, cache, device, said)
        self.held_out = latents(held_out, HELD_OUT, objective.vae, cache, device)

    def batch(self, k: int) -> Batch:
        size = self.recipe.train_batch_size
        return self._collate(self.latents, visited(len(self.latents), self.recipe.seed, k * size, size))

    def _collate(self, cached: Latents, rows: np.ndarray) -> Batch:
        captions = [cached.captions[row] for row in rows]
        return {"posterior": cached.posterior(rows), "ids": tokens(self.tokenizer, captions)}

    @torch.no_grad()
    def _text(self, ids: Tensor) -> Conditioning:
        return Conditioning(embed(self.text, ids))

    def _denoiser(self, model: nn.Module) -> Denoiser:
        return Denoiser(model, self.sde, self.prediction)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Figures]:
        device = next(model.parameters()).device
        mean, std = batch["posterior"]
        z, noise = (torch.randn(mean.shape, generator=generator) for _ in range(2))
        dropped = torch.rand(len(mean), generator=generator) < self.objective.caption_dropout
        ids = torch.where(dropped[:, None], tokens(self.tokenizer, [""]), batch["ids"])
        t, importance = self.times(self.sde, torch.rand(len(mean), generator=generator, dtype=torch.float64))
        x0 = (mean + std * z).to(device, memory_format=torch.channels_last)
        noise = noise.to(device, memory_format=torch.channels_last)
        losses = diffusion_loss(self._denoiser(model), x0, self._text(ids), t, noise, self.weight)
        return (losses * per_image(importance, losses)).mean(), {}

    @torch.no_grad()
    def validate(self, model: UNet) -> dict[str, float]:
        """The unweighted loss on held-out pictures at fixed noise: over all, and in the middle of each eighth."""
        losses = torch.zeros(LEVELS)
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16):
            for rows in np.array_split(np.arange(HELD_OUT), HELD_OUT // 64):
                batch = self._collate(self.held_out, rows)
                x0 = batch["posterior"].mean.to(device)
                noise = Noise(rows.tolist())(x0)
                t = (torch.arange(len(rows)) % LEVELS + 0.5) / LEVELS
                loss = diffusion_loss(self._denoiser(model), x0, self._text(batch["ids"]), t, noise).cpu()
                losses += torch.stack([loss[i::LEVELS].mean() for i in range(LEVELS)]) / (HELD_OUT // 64)
        self._draw(model)
        return {
            "loss": losses.mean().item(),
            **{f"loss_{i}": value for i, value in enumerate(losses.tolist())},
        }

    @torch.no_grad()
    def _draw(self, model: nn.Module) -> None:
        """A grid of the recipe's prompts, one seed each, for the eye."""
        prompts = self.recipe.validation_prompts
        if not prompts:
            return
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16):
            cond, uncond = (self._text(tokens(self.tokenizer, p)) for p in (prompts, [""] * len(prompts)))
            denoise = guide(self._denoiser(model), cond, uncond, self.recipe.validation_guidance)
            noise = Noise(range(len(prompts)))
            x = noise(torch.zeros(len(prompts), *self.latents.mean.shape[1:])).to(device)
            x = sample(dpmpp_2m, denoise, x, trailing(self.sde, 20), noise)
            sheet = contact_sheet(to_pil(decode(self.vae, x)), prompts, 10)
            sheet.save(self.recipe.output_dir / "samples.png")

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
        recommended = {"num_inference_steps": 30, "guidance_scale": self.recipe.validation_guidance}
        write_json(recommended, folder / "generation_config.json")
        write_json(MODEL_INDEX, folder / "model_index.json")


def visited(count: int, seed: int, start: int, size: int) -> np.ndarray:
    """Which of `count` items the visits `start` .. `start + size - 1` fall on: each once an epoch, in its own order."""
    visits = np.arange(start, start + size)
    return np.array([_order(count, seed, int(v) // count)[int(v) % count] for v in visits])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(count)
