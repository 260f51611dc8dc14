"""Moving averages of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

EMARate = Callable[[int], float]  # how far the average moves towards the weights after `step` updates


def exponential_ema_rate(decay: float) -> EMARate:
    """1 - d with d = min(decay, (1 + step) / (10 + step)): the young forget faster."""
    return lambda step: 1 - min(decay, (1 + step) / (10 + step))


def power_ema_rate(sigma_rel: float) -> EMARate:
    """1 - (1 - 1 / step)^(gamma + 1): the weights of step tau count as tau^gamma (Karras et al. 2024, eqs. 2 and 3)."""
    exponent = sigma_rel_to_gamma(sigma_rel) + 1
    return lambda step: 1 - (1 - 1 / step) ** exponent


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The power whose profile has the deviation sigma_rel, as a share of the training's length.

    sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, its largest root (Karras et al. 2024, eq. 6 and algorithm 2).
    ValueError outside (0, 0.2887), the deviation of the plain mean.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel {sigma_rel}: must lie between 0 and {12**-0.5:.4f}, the plain mean's")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class EMAModel:
    """theta' <- theta' + rate(step) (theta - theta'), beside a model that learns."""

    def __init__(self, model: nn.Module, rate: EMARate) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.rate = rate

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the weights after `step` updates; buffers are copied."""
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), self.rate(step))
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
