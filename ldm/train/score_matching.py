"""What is drawn for the rows of a batch, keyed by (seed, sample, visit, purpose): no row depends on another.

Matching a score: what a batch of latents is given by chance, its loss, and its loss at each noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.config import ScoreMatchingObjective
from ldm.diffusion.denoiser import Denoiser, Network
from ldm.diffusion.objective import TIME_SAMPLERS, WEIGHTINGS, diffusion_loss
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.sde import VPSDE, append_dims
from ldm.errors import choose
from ldm.hardware import autocast
from ldm.rng import Noise, derive_seed, derive_uniform
from ldm.train.task import Batch, SampleKey


def sample_normal(seed: int, sample_keys: Sequence[SampleKey], purpose: str, shape: Sequence[int]) -> Tensor:
    """N(0, I) for each visit, [B, *shape], float32 on the host."""
    return Noise([derive_seed(seed, *visit, purpose) for visit in sample_keys])(torch.empty(len(sample_keys), *shape))


def sample_uniform(seed: int, sample_keys: Sequence[SampleKey], purpose: str) -> Tensor:
    """A number in [0, 1) for each visit, [B], float64 on the host."""
    return torch.tensor([derive_uniform(seed, *visit, purpose) for visit in sample_keys], dtype=torch.float64)


NUM_VALIDATION_LEVELS = 8  # the noise levels of the validation loss


class ScoreMatchingLoss:
    """Denoising score matching (Rombach et al. 2022, eq. 3) as an objective says, under an SDE."""

    def __init__(self, seed: int, objective: ScoreMatchingObjective, sde: VPSDE, prediction: Prediction) -> None:
        self.seed, self.objective, self.sde, self.prediction = seed, objective, sde, prediction
        self.weighting = choose(WEIGHTINGS, objective.weighting, "weighting")
        self.time_sampler = choose(TIME_SAMPLERS, objective.times, "times")

    def sample_noise_and_times(
        self, all_keys: Sequence[SampleKey], rows: range, shape: Sequence[int]
    ) -> dict[str, Any]:
        """Times and noise of some rows of a batch, keyed; a time may depend on its row's place in the whole batch."""
        t, importance = self.time_sampler(self.sde, sample_uniform(self.seed, all_keys, "time"))
        visits, here = all_keys[rows.start : rows.stop], slice(rows.start, rows.stop)
        noise, extra = self._sample_noise(visits, shape)
        return {
            "visits": visits,
            "noise": noise,
            "perturbation": extra,
            "posterior": sample_normal(self.seed, visits, "posterior", shape),
            "t": t[here],
            "importance": importance[here],
        }

    def _sample_noise(self, sample_keys: Sequence[SampleKey], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The noise that is predicted, and what more of it the network sees; of an offset, one number a channel."""
        seed, offset, more = self.seed, self.objective.noise_offset, self.objective.input_perturbation
        noise = sample_normal(seed, sample_keys, "noise", shape)
        if offset:
            noise = noise + offset * sample_normal(seed, sample_keys, "offset", (shape[0], 1, 1))
        return noise, more * sample_normal(seed, sample_keys, "perturbation", shape) if more else torch.zeros(1)

    def make_denoiser(self, network: Network) -> Denoiser:
        return Denoiser(network, self.sde, self.prediction)

    def compute_losses(
        self, network: Network, x0: Tensor, cond: Conditioning, batch: Batch, loss_mask: Tensor | None = None
    ) -> Tensor:
        """The loss of each row of a batch that `drawn` made, [B]."""
        noise = batch["noise"].to(x0, memory_format=torch.channels_last)
        extra, t = batch["perturbation"].to(x0.device), batch["t"]
        losses = diffusion_loss(self.make_denoiser(network), x0, cond, t, noise, self.weighting, extra, loss_mask)
        return losses * append_dims(batch["importance"], losses)

    def compute_level_losses(self, network: Network, x0: Tensor, cond: Conditioning, seeds: Sequence[int]) -> Tensor:
        """The unweighted losses [B] of rows whose noise is fixed by seeds, row i in the middle of eighth i mod 8."""
        t = (torch.arange(len(x0)) % NUM_VALIDATION_LEVELS + 0.5) / NUM_VALIDATION_LEVELS
        with autocast(x0.device):
            return diffusion_loss(self.make_denoiser(network), x0, cond, t, Noise(seeds)(x0)).cpu()


def summarize_level_losses(losses: Tensor) -> dict[str, float]:
    """The means of losses [n, LEVELS] and their standard errors `_se`, sqrt(var / n), level by level."""
    mean, error = losses.mean(0), standard_error(losses)
    return {
        **{f"loss_{i}": value for i, value in enumerate(mean.tolist())},
        **{f"loss_{i}_se": value for i, value in enumerate(error.tolist())},
    }


def standard_error(values: Tensor) -> Tensor:
    """Of the mean over the first dimension: sqrt(var / n)."""
    return (values.var(0) / len(values)).sqrt()
