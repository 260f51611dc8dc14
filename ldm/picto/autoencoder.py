"""The autoencoder's training: pictures to a small Gaussian latent and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoints.tensors import save_module
from ldm.config import AutoencoderObjective, Recipe
from ldm.hardware import autocast
from ldm.image_io import from_uint8
from ldm.nn import vae
from ldm.picto.scenes import SceneDataset
from ldm.rng import derive_seed
from ldm.train.score_matching import sample_normal
from ldm.train.task import Batch, Metrics, SampleKey

NUM_VALIDATION_IMAGES = 256  # pictures


class ReconstructionModel(nn.Module):
    """Pictures and noise to (reconstruction, posterior mean and std): the forward pass that a parallel wrapper sees."""

    def __init__(self, autoencoder: vae.AutoencoderKL) -> None:
        super().__init__()
        self.vae = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = vae.encode_unscaled(self.vae, images)
        return vae.decode_unscaled(self.vae, posterior.sample(noise)), *posterior


class AutoencoderTask:
    """L1 + w2 squared error + wg L1 of image gradients + wk KL(q(z|x) || N(0, I)) (Rombach et al. 2022, 3.1)."""

    supports_accumulation = True

    def __init__(self, recipe: Recipe, objective: AutoencoderObjective) -> None:
        self.recipe, self.objective = recipe, objective
        torch.manual_seed(recipe.seed)  # the initial weights
        self.model = ReconstructionModel(vae.build_vae(objective.model))
        vae.init_weights(self.model.vae)
        data = recipe.scene_data
        self.scenes = SceneDataset(data.sprites, size=data.size, seed=recipe.seed)
        others = SceneDataset(data.sprites, size=data.size, seed=recipe.seed, split="held-out")
        self.validation_images = np.stack([others[k].image for k in range(NUM_VALIDATION_IMAGES)])

    def make_batch(self, step: int, rows: range) -> Batch:
        scenes = [step * self.recipe.train_batch_size + i for i in rows]
        visits = [SampleKey(i, 0) for i in scenes]
        images = np.stack([self._random_crop(v, self.scenes[i].image) for v, i in zip(visits, scenes, strict=True)])
        shape = vae.latent_shape(self.model.vae, *images.shape[1:3])
        return {
            "visits": visits,
            "images": images,
            "noise": sample_normal(self.recipe.seed, visits, "posterior", shape),
        }

    def _random_crop(self, sample_key: SampleKey, image: np.ndarray) -> np.ndarray:
        side = self.objective.crop
        if side is None:
            return image
        rng = np.random.Generator(np.random.Philox(key=derive_seed(self.recipe.seed, *sample_key, "crop")))
        y, x = rng.integers(0, np.array(image.shape[:2]) - side + 1)
        return image[y : y + side, x : x + side]

    def compute_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        device = next(model.parameters()).device
        images = from_uint8(batch["images"]).to(device)
        output, mean, std = model(images, batch["noise"].to(device))
        w, error = self.objective, (output.float() - images) / 2  # of pictures in [0, 1]
        squared = mean_per_image(error.square())
        kl = 0.5 * mean_per_image(mean.float() ** 2 + std.float() ** 2 - 1 - 2 * std.float().clamp(min=1e-9).log())
        loss = (
            mean_per_image(error.abs())
            + w.squared_weight * squared
            + w.gradient_weight * image_gradient_loss(error)
            + w.kl_weight * kl
        )
        return loss, {"mse": squared.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def validate(self, model: ReconstructionModel) -> dict[str, float]:
        """Mean PSNR in dB over held-out pictures, from the posterior's mean, and the deviation of the latents."""
        ratios, latents = [], []
        device = next(model.parameters()).device
        for pixels in np.array_split(self.validation_images, len(self.validation_images) // 16):
            images = from_uint8(pixels).to(device).contiguous(memory_format=torch.channels_last)
            with autocast(device):
                mean, _ = vae.encode_unscaled(model.vae, images)
                output = vae.decode_unscaled(model.vae, mean).float().clamp(-1, 1)
            mse = ((output - images) / 2).square().flatten(1).mean(1)
            ratios.append(-10 * mse.log10())
            latents.append(mean.float())
        return {"psnr": torch.cat(ratios).mean().item(), "latent_std": torch.cat(latents).std().item()}

    def generate_samples(self, model: ReconstructionModel) -> None:
        return None

    def export(self, model: ReconstructionModel, folder: Path) -> None:
        """A `vae/` folder whose scaling_factor gives the latents unit variance (Rombach et al. 2022, appendix G)."""
        std = self.validate(model)["latent_std"]
        config = {**vae.get_vae_config(model.vae), "scaling_factor": round(1 / std, 5)}
        save_module(model.vae, config, folder)


def mean_per_image(values: Tensor) -> Tensor:
    """The mean of every image's numbers, [B]."""
    return values.flatten(1).mean(1)


def image_gradient_loss(error: Tensor, num_scales: int = 2) -> Tensor:
    """L1 of the differences between neighbouring pixels of `error` [B, C, H, W], at full, half, ... size: [B].

    It stands in for a perceptual loss without a pretrained network: blurred outlines cost what they look like.
    """
    total = error.new_zeros(len(error))
    for _ in range(num_scales):
        total = total + mean_per_image(error.diff(dim=2).abs()) + mean_per_image(error.diff(dim=3).abs())
        error = F.avg_pool2d(error, 2)
    return total / num_scales
