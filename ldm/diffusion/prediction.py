"""Predictions: what a network's output means, for sampling and for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.sde import append_dims
from ldm.errors import choose


@dataclass(frozen=True)
class Prediction:
    """A linear change of variables between the network's output and x_0, given x = alpha x_0 + sigma noise.

        to_x0(output, x, alpha, sigma) -> x0
        target(x0, noise, alpha, sigma) -> output
        jacobian(alpha, sigma) -> d x0 / d output

    alpha and sigma broadcast against x. |x0' - x0|^2 is jacobian^2 |output - target|^2. Where the jacobian is infinite
    (eps and score at alpha = 0) the output does not determine x0; where it is 0 (all but x0 at sigma = 0), x0 is x and
    does not determine the output.
    """

    to_x0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    jacobian: Callable[[Tensor, Tensor], Tensor]

    def to_output(self, x0: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The inverse of `to_x0`: the target for the noise (x - alpha x0) / sigma that makes x of x0."""
        return self.target(x0, (x - alpha * x0) / sigma, alpha, sigma)


PREDICTIONS: dict[str, Prediction] = {  # eps, v, x0: diffusers' prediction types epsilon, v_prediction, sample
    "eps": Prediction(  # Ho et al. 2020, eq. 15; does not determine x0 where alpha = 0
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
    "score": Prediction(  # Song et al. 2021, eq. 7; Tweedie's formula, and grad log p(x | x0) = -noise / sigma
        to_x0=lambda score, x, alpha, sigma: (x + sigma**2 * score) / alpha,
        target=lambda x0, noise, alpha, sigma: -noise / sigma,
        jacobian=lambda alpha, sigma: sigma**2 / alpha,
    ),
}


def convert_prediction(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, source: str, target: str) -> Tensor:
    """The output of prediction `target` for the x0 that an output of prediction `source` means.

    output and x [B, ...]; alpha and sigma [B] or [1], on the host. ValueError where one does not determine the other.
    """
    have, want = choose(PREDICTIONS, source, "prediction"), choose(PREDICTIONS, target, "prediction")
    if not have.jacobian(alpha, sigma).isfinite().all():
        raise ValueError(f"prediction {source!r} does not determine x0 at zero SNR (alpha = 0)")
    if not want.jacobian(alpha, sigma).all():
        raise ValueError(f"prediction {target!r} is not determined by x0 in a clean image (sigma = 0)")
    alpha, sigma = append_dims(alpha, x), append_dims(sigma, x)
    return want.to_output(have.to_x0(output, x, alpha, sigma), x, alpha, sigma)
