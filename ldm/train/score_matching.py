"""Denoising score matching: the noise and times of a batch, its loss, and the loss at each noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.config import ScoreMatchingObjective
from ldm.data.batch_sampler import SampleKey
from ldm.diffusion.denoiser import Denoiser, Network
from ldm.diffusion.objective import TIME_SAMPLERS, WEIGHTINGS, diffusion_loss, min_snr_weighting
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.sde import VPSDE, append_dims
from ldm.errors import choose
from ldm.hardware import autocast
from ldm.rng import Noise, derive_seed, derive_uniform
from ldm.train.task import Batch

NUM_VALIDATION_LEVELS = 8  # noise levels of the validation loss


def sample_normal(seed: int, sample_keys: Sequence[SampleKey], purpose: str, shape: Sequence[int]) -> Tensor:
    """N(0, I) for each key, [B, *shape], float32 on the host."""
    return Noise([derive_seed(seed, *key, purpose) for key in sample_keys])(torch.empty(len(sample_keys), *shape))


def sample_uniform(seed: int, sample_keys: Sequence[SampleKey], purpose: str) -> Tensor:
    """A number in [0, 1) for each key, [B], float64 on the host."""
    return torch.tensor([derive_uniform(seed, *key, purpose) for key in sample_keys], dtype=torch.float64)


class ScoreMatchingLoss:
    """Denoising score matching under an SDE (Rombach et al. 2022, eq. 3), with the options of an objective."""

    def __init__(self, seed: int, objective: ScoreMatchingObjective, sde: VPSDE, prediction: Prediction) -> None:
        self.seed, self.objective, self.sde, self.prediction = seed, objective, sde, prediction
        gamma = objective.snr_gamma
        self.weighting = min_snr_weighting(gamma) if gamma else choose(WEIGHTINGS, objective.weighting, "weighting")
        self.time_sampler = choose(TIME_SAMPLERS, objective.times, "times")

    def sample_noise_and_times(
        self, all_keys: Sequence[SampleKey], rows: range, shape: Sequence[int]
    ) -> dict[str, Any]:
        """Times and noise of some rows of a batch, latents of a shape [C, h, w], and `posterior`, the VAE's noise.

        A time may depend on the place of its row in the whole batch, whose keys are `all_keys`.
        """
        seed, objective, row_slice = self.seed, self.objective, slice(rows.start, rows.stop)
        keys = all_keys[row_slice]
        t, importance = self.time_sampler(self.sde, sample_uniform(seed, all_keys, "time"))
        noise, perturbation = sample_normal(seed, keys, "noise", shape), torch.zeros(1)
        if objective.noise_offset:
            noise = noise + objective.noise_offset * sample_normal(seed, keys, "offset", (shape[0], 1, 1))
        if objective.input_perturbation:
            perturbation = objective.input_perturbation * sample_normal(seed, keys, "perturbation", shape)
        posterior = sample_normal(seed, keys, "posterior", shape)
        values = {"noise": noise, "perturbation": perturbation, "posterior": posterior}
        return {"sample_keys": keys, "t": t[row_slice], "importance": importance[row_slice], **values}

    def compute_losses(
        self, network: Network, x0: Tensor, cond: Conditioning, batch: Batch, loss_mask: Tensor | None = None
    ) -> Tensor:
        """The loss of each row [B] of a batch with the values of `sample_noise_and_times`."""
        denoiser, t = Denoiser(network, self.sde, self.prediction), batch["t"]
        noise = batch["noise"].to(x0, memory_format=torch.channels_last)
        perturbation = batch["perturbation"].to(x0.device)
        losses = diffusion_loss(denoiser, x0, cond, t, noise, self.weighting, perturbation, loss_mask)
        return losses * append_dims(batch["importance"], losses)

    def compute_level_losses(self, network: Network, x0: Tensor, cond: Conditioning, seeds: Sequence[int]) -> Tensor:
        """The unweighted losses [B] of rows with noise of fixed seeds.

        Row i has t = (i mod L + 1/2) / L, L = `NUM_VALIDATION_LEVELS`.
        """
        t = (torch.arange(len(x0)) % NUM_VALIDATION_LEVELS + 0.5) / NUM_VALIDATION_LEVELS
        with autocast(x0.device):
            return diffusion_loss(Denoiser(network, self.sde, self.prediction), x0, cond, t, Noise(seeds)(x0)).cpu()


def summarize_level_losses(losses: Tensor, independent: bool) -> dict[str, float]:
    """The mean of losses [n, L] over all and at each level, each with its standard error `_se`.

    `independent`: all losses are of different samples; else the levels of a row are one sample's.
    """
    errors = standard_error(losses)
    total = errors.square().sum().sqrt() / losses.shape[1] if independent else standard_error(losses.mean(1))
    levels = {f"loss_{i}": value for i, value in enumerate(losses.mean(0).tolist())}
    level_errors = {f"loss_{i}_se": value for i, value in enumerate(errors.tolist())}
    return {"loss": losses.mean(1).mean().item(), "loss_se": total.item(), **levels, **level_errors}


def standard_error(values: Tensor) -> Tensor:
    """The standard error of the mean over the first dimension: sqrt(var / n)."""
    return (values.var(0) / len(values)).sqrt()
