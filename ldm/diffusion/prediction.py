"""Predictions: what a network's output means. Told once, for sampling and for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """A linear change of variables between the network's output and x_0, given x = alpha x_0 + sigma noise.

        to_x0(output, x, alpha, sigma) -> x0
        target(x0, noise, alpha, sigma) -> output
        jacobian(alpha, sigma) -> d x0 / d output

    alpha and sigma broadcast against x. |x0' - x0|^2 is jacobian^2 |output - target|^2.
    """

    to_x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    jacobian: Callable[[Tensor, Tensor], Tensor]


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(  # Ho et al. 2020, eq. 15; says nothing about x0 where alpha = 0
        to_x0=lambda eps, x, alpha, sigma: (x - sigma * eps) / alpha,
        target=lambda x0, noise, alpha, sigma: noise,
        jacobian=lambda alpha, sigma: -sigma / alpha,
    ),
    "v": Prediction(  # Salimans & Ho 2022, appendix D: v = alpha noise - sigma x0
        to_x0=lambda v, x, alpha, sigma: alpha * x - sigma * v,
        target=lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
        jacobian=lambda alpha, sigma: -sigma,
    ),
    "x0": Prediction(
        to_x0=lambda output, x, alpha, sigma: output,
        target=lambda x0, noise, alpha, sigma: x0,
        jacobian=lambda alpha, sigma: torch.ones_like(alpha),
    ),
}
