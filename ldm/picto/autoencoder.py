"""The training of picto's autoencoder: images to a small Gaussian latent and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoints.tensors import save_module
from ldm.config import AutoencoderObjective, Recipe
from ldm.data.batch_sampler import SampleKey
from ldm.hardware import autocast
from ldm.image_io import from_uint8
from ldm.nn import vae
from ldm.picto.scenes import make_scene_dataset
from ldm.rng import derive_seed, torch_seed
from ldm.train.score_matching import sample_normal
from ldm.train.task import Batch, Metrics, TrainingTask

NUM_VALIDATION_IMAGES = 256


class ReconstructionModel(nn.Module):
    """Images and noise to (reconstruction, posterior mean and std): the forward pass that a parallel wrapper sees."""

    def __init__(self, autoencoder: vae.AutoencoderKL) -> None:
        super().__init__()
        self.vae = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = vae.encode_unscaled(self.vae, images)
        return vae.decode_unscaled(self.vae, posterior.sample(noise)), *posterior


class AutoencoderTask(TrainingTask):
    """L1 + w2 squared error + wg L1 of image gradients + wk KL(q(z|x) || N(0, I)) (Rombach et al. 2022, 3.1)."""

    supports_accumulation = True
    model: ReconstructionModel

    def __init__(self, recipe: Recipe, objective: AutoencoderObjective) -> None:
        self.recipe, self.objective = recipe, objective
        torch.manual_seed(torch_seed(recipe.seed))  # the initial weights
        self.model = ReconstructionModel(vae.build_vae(objective.model)).train()
        vae.init_weights(self.model.vae)
        self.scenes = make_scene_dataset(recipe.scene_data, recipe.seed)
        held_out = make_scene_dataset(recipe.scene_data, recipe.seed, "held-out")
        self.validation_images = np.stack([held_out[k].image for k in range(NUM_VALIDATION_IMAGES)])

    def make_batch(self, step: int, rows: range) -> Batch:
        keys = [SampleKey(step * self.recipe.train_batch_size + i, 0) for i in rows]
        images = np.stack([self._random_crop(key) for key in keys])
        shape = vae.latent_shape(self.model.vae, *images.shape[1:3])
        noise = sample_normal(self.recipe.seed, keys, "posterior", shape)
        return {"sample_keys": keys, "images": images, "noise": noise}

    def _random_crop(self, key: SampleKey) -> np.ndarray:
        image, side = self.scenes[int(key.sample_id)].image, self.objective.crop
        if side is None:
            return image
        rng = np.random.Generator(np.random.Philox(key=derive_seed(self.recipe.seed, *key, "crop")))
        y, x = rng.integers(0, np.array(image.shape[:2]) - side + 1)
        return image[y : y + side, x : x + side]

    def compute_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        device, w = next(model.parameters()).device, self.objective
        images = from_uint8(batch["images"]).to(device)
        output, mean, std = model(images, batch["noise"].to(device))
        error = (output.float() - images) / 2  # of images in [0, 1]
        squared = mean_per_image(error.square())
        kl = 0.5 * mean_per_image(mean.float() ** 2 + std.float() ** 2 - 1 - 2 * std.float().clamp(min=1e-9).log())
        loss = mean_per_image(error.abs()) + w.squared_weight * squared
        loss = loss + w.gradient_weight * image_gradient_loss(error) + w.kl_weight * kl
        return loss, {"mse": squared.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean PSNR in dB over held-out images, from the posterior's mean, and the latents' standard deviation."""
        psnr, latents, model = [], [], self.model.vae
        for pixels in np.array_split(self.validation_images, len(self.validation_images) // 16):
            images = from_uint8(pixels).to(model.device).contiguous(memory_format=torch.channels_last)
            with autocast(model.device):
                mean, _ = vae.encode_unscaled(model, images)
                output = vae.decode_unscaled(model, mean).float().clamp(-1, 1)
            psnr.append(-10 * mean_per_image(((output - images) / 2).square()).log10())
            latents.append(mean.float())
        return {"psnr": torch.cat(psnr).mean().item(), "latent_std": torch.cat(latents).std().item()}

    def export(self, folder: Path) -> None:
        """Write a `vae/` folder whose scaling_factor gives latents of unit variance (Rombach et al. 2022, app. G)."""
        scaling_factor = round(1 / self.validate()["latent_std"], 5)
        save_module(self.model.vae, {**self.model.vae.config.to_dict(), "scaling_factor": scaling_factor}, folder)


def mean_per_image(values: Tensor) -> Tensor:
    """The mean of each row's numbers, [B]."""
    return values.flatten(1).mean(1)


def image_gradient_loss(error: Tensor, num_scales: int = 2) -> Tensor:
    """L1 of the differences between neighbouring pixels of `error` [B, C, H, W], at full, half, ... size: [B].

    It stands in for a perceptual loss without a pretrained network: it penalises blurred outlines.
    """
    total = error.new_zeros(len(error))
    for _ in range(num_scales):
        total = total + mean_per_image(error.diff(dim=2).abs()) + mean_per_image(error.diff(dim=3).abs())
        error = F.avg_pool2d(error, 2)
    return total / num_scales
