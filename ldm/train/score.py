"""Matching a score: what a batch of latents is given by chance, its loss, and its loss at each noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.config import ScoreObjective
from ldm.diffusion.denoiser import Denoiser, Network
from ldm.diffusion.objective import TIMES, WEIGHTS, diffusion_loss
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.sde import VPSDE, per_image
from ldm.diffusion.spacing import choose
from ldm.hardware import autocast
from ldm.rng import Noise
from ldm.train.draws import draw, draw_uniform
from ldm.train.task import Batch, Visit

LEVELS = 8  # the noise levels of the validation loss


class Matching:
    """Denoising score matching (Rombach et al. 2022, eq. 3) as an objective says, under an SDE."""

    def __init__(self, seed: int, objective: ScoreObjective, sde: VPSDE, prediction: Prediction) -> None:
        self.seed, self.objective, self.sde, self.prediction = seed, objective, sde, prediction
        self.weight = choose(WEIGHTS, objective.weighting, "weighting")
        self.times = choose(TIMES, objective.times, "times")

    def drawn(self, whole: Sequence[Visit], rows: range, shape: Sequence[int]) -> dict[str, Any]:
        """Times and noise of some rows of a batch, keyed; a time may depend on its row's place in the whole batch."""
        t, importance = self.times(self.sde, draw_uniform(self.seed, whole, "time"))
        visits, here = whole[rows.start : rows.stop], slice(rows.start, rows.stop)
        noise, extra = self._noise(visits, shape)
        return {
            "visits": visits,
            "noise": noise,
            "perturbation": extra,
            "posterior": draw(self.seed, visits, "posterior", shape),
            "t": t[here],
            "importance": importance[here],
        }

    def _noise(self, visits: Sequence[Visit], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The noise that is predicted, and what more of it the network sees; of an offset, one number a channel."""
        seed, offset, more = self.seed, self.objective.noise_offset, self.objective.input_perturbation
        noise = draw(seed, visits, "noise", shape)
        if offset:
            noise = noise + offset * draw(seed, visits, "offset", (shape[0], 1, 1))
        return noise, more * draw(seed, visits, "perturbation", shape) if more else torch.zeros(1)

    def denoiser(self, network: Network) -> Denoiser:
        return Denoiser(network, self.sde, self.prediction)

    def losses(
        self, network: Network, x0: Tensor, cond: Conditioning, batch: Batch, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of each row of a batch that `drawn` made, [B]."""
        noise = batch["noise"].to(x0, memory_format=torch.channels_last)
        extra, t = batch["perturbation"].to(x0.device), batch["t"]
        losses = diffusion_loss(self.denoiser(network), x0, cond, t, noise, self.weight, extra, mask)
        return losses * per_image(batch["importance"], losses)

    def at_levels(self, network: Network, x0: Tensor, cond: Conditioning, seeds: Sequence[int]) -> Tensor:
        """The unweighted losses [B] of rows whose noise is fixed by seeds, row i in the middle of eighth i mod 8."""
        t = (torch.arange(len(x0)) % LEVELS + 0.5) / LEVELS
        with autocast(x0.device):
            return diffusion_loss(self.denoiser(network), x0, cond, t, Noise(seeds)(x0)).cpu()


def by_level(losses: Tensor) -> dict[str, float]:
    """The means of losses [n, LEVELS] and their standard errors `_se`, sqrt(var / n), level by level."""
    mean, error = losses.mean(0), standard_error(losses)
    return {
        **{f"loss_{i}": value for i, value in enumerate(mean.tolist())},
        **{f"loss_{i}_se": value for i, value in enumerate(error.tolist())},
    }


def standard_error(values: Tensor) -> Tensor:
    """Of the mean over the first dimension: sqrt(var / n)."""
    return (values.var(0) / len(values)).sqrt()
