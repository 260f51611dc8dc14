"""The training of a U-Net, or of a part of a model, as a denoiser of captioned latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoints.formats import Checkpoint
from ldm.conditioning import Conditioning
from ldm.config import Recipe, ScoreMatchingObjective
from ldm.data.batch_sampler import SampleKey
from ldm.hardware import autocast
from ldm.image_io import contact_sheet, from_uint8
from ldm.nn.prompts import PlaceholderTokens
from ldm.nn.vae import AutoencoderKL, encode_images, latent_shape
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request
from ldm.train.score_matching import NUM_VALIDATION_LEVELS, ScoreMatchingLoss, summarize_level_losses
from ldm.train.task import Batch, Metrics, TrainingTask
from ldm.train.trainable import TokenizedCaptions, encode_captions, tokenize_for_training


class LatentDataset(Protocol):
    """Captioned latents, batch by batch: what a `DiffusionTask` is trained on."""

    independent_levels: bool  # the validation losses of a group of levels are of different samples

    def load_batch(self, step: int, rows: range) -> tuple[Sequence[SampleKey], Batch]:
        """The keys of all samples of a step, and some rows of its batch.

        `captions`, a list of texts; `latents` [B, 2, C, h, w], their posterior's mean and standard deviation, or
        `pixels`, uint8 [B, H, W, 3]; where there are any, `time_ids` [B, 6] of SDXL, `masks` [B, 1, h, w] of the loss,
        and `weights` [B].
        """
        ...

    def validation_batches(self) -> Iterator[tuple[Tensor, Batch, Sequence[int]]]:
        """Held-out latents [B, C, h, w], one of `captions` per row, or one for all rows, and the rows' noise seeds.

        Row i has the noise level i mod `NUM_VALIDATION_LEVELS`.
        """
        ...


class DiffusionTask(TrainingTask):
    """Denoising score matching (Rombach et al. 2022, eq. 3) of a network that is called as (x_t, t, text)."""

    supports_accumulation = True

    def __init__(
        self,
        recipe: Recipe,
        objective: ScoreMatchingObjective,
        model: nn.Module,
        full_model: Checkpoint,
        dataset: LatentDataset,
        encode_text: Callable[[TokenizedCaptions], Any],
        placeholder_tokens: PlaceholderTokens,
    ) -> None:
        """`full_model` is what samples are generated with; `encode_text` makes the network's text input of captions."""
        self.recipe, self.model, self.full_model, self.dataset = recipe, model, full_model, dataset
        self.encode_text, self.placeholder_tokens = encode_text, placeholder_tokens
        self.score_matching = ScoreMatchingLoss(recipe.seed, objective, full_model.sde, full_model.prediction)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def make_batch(self, step: int, rows: range) -> Batch:
        keys, data = self.dataset.load_batch(step, rows)
        vae, latents = self.full_model.vae, data.get("latents")
        shape = latent_shape(vae, *data["pixels"].shape[1:3]) if latents is None else latents.shape[2:]
        noise = self.score_matching.sample_noise_and_times(keys, rows, shape)
        return {**data, **noise, "captions": self.tokenize_captions(data)}

    def tokenize_captions(self, data: Mapping[str, Any]) -> TokenizedCaptions:
        encoders = self.full_model.text_encoders
        return tokenize_for_training(encoders, data["captions"], self.placeholder_tokens, data.get("time_ids"))

    def sample_latents(self, batch: Batch) -> Tensor:
        """x_0 [B, C, h, w] of a batch, on the device: mean + std * noise of the VAE's posterior."""
        if (moments := batch.get("latents")) is None:
            moments = torch.from_numpy(encode_latent_moments(self.full_model.vae, batch["pixels"]))
        mean, std = moments.to(self.device, torch.float32).unbind(1)
        return (mean + std * batch["posterior"].to(mean)).contiguous(memory_format=torch.channels_last)

    def compute_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        x0, text = self.sample_latents(batch), self.encode_text(batch["captions"])
        mask = batch["masks"].to(x0) if "masks" in batch else None
        losses = self.score_matching.compute_losses(model, x0, text, batch, mask)
        return losses * batch["weights"].to(losses) if "weights" in batch else losses, {}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The unweighted loss on held-out samples with fixed noise: over all times, and at each of the fixed levels.

        Each with its standard error `_se` over samples. Nothing where none are held out.
        """
        losses = [self._validation_losses(*batch) for batch in self.dataset.validation_batches()]
        if not losses:
            return {}
        by_level = torch.cat(losses).unflatten(0, (-1, NUM_VALIDATION_LEVELS)).double()
        return summarize_level_losses(by_level, self.dataset.independent_levels)

    def _validation_losses(self, x0: Tensor, data: Batch, seeds: Sequence[int]) -> Tensor:
        text = self.encode_text(self.tokenize_captions(data))
        cond = text if isinstance(text, Conditioning) else encode_captions(self.full_model, text)
        cond = cond[torch.arange(len(x0)) % len(cond)]
        return self.score_matching.compute_level_losses(self.model, x0.to(self.device), cond, seeds)

    @torch.no_grad()
    def generate_samples(self) -> Image.Image | None:
        """A contact sheet of the recipe's prompts, the k-th with seed k."""
        prompts = self.recipe.validation_prompts
        if not prompts:
            return None
        with autocast(self.device):
            return contact_sheet(self.make_pipeline().generate(validation_requests(self.recipe, prompts)), prompts)

    def make_pipeline(self) -> Pipeline:
        """A pipeline with the weights that the model has now."""
        return Pipeline(self.full_model)


def validation_requests(recipe: Recipe, prompts: Sequence[str]) -> list[Request]:
    """Requests for samples of prompts, the k-th with seed k."""
    return [Request(p, seed=k, guidance_scale=recipe.validation_guidance) for k, p in enumerate(prompts)]


@torch.no_grad()
def encode_latent_moments(vae: AutoencoderKL, pixels: np.ndarray | Tensor) -> np.ndarray:
    """Mean and standard deviation of scaled latents, float16 [B, 2, C, h, w], of uint8 [B, H, W, 3]."""
    posterior = encode_images(vae, from_uint8(pixels).to(vae.device))
    return torch.stack(posterior, 1).half().cpu().numpy()
