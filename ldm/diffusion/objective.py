"""The training objective: denoising score matching as a weighted regression on the network's own target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.sde import per_image

Weight = Callable[[Prediction, Tensor, Tensor], Tensor]  # (prediction, alpha, sigma [B]) -> weight [B]
Times = Callable[[Tensor], Tensor]  # u [B] uniform in [0, 1) -> t [B] in (0, 1], float64


def uniform(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """1 on the network's own target."""
    return torch.ones_like(alpha)


def on_x0(weight: Callable[[Tensor], Tensor]) -> Weight:
    """The weight of |output - target|^2 that is w(SNR) on |x0' - x0|^2: w(SNR) (d x0 / d output)^2."""

    def on_target(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
        alpha = alpha.clamp(min=1e-8)  # zero terminal SNR: eps has a limit there, but 0 * inf has none
        return weight((alpha / sigma) ** 2) * prediction.jacobian(alpha, sigma) ** 2

    return on_target


WEIGHTS: dict[str, Weight] = {
    "uniform": uniform,
    "snr": on_x0(lambda snr: snr),  # uniform on eps, whatever the network predicts: Ho et al. 2020, eq. 14
    "min_snr": on_x0(lambda snr: snr.clamp(max=5)),  # Hang et al. 2023 (min-SNR), gamma = 5
}


def diffusion_loss(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Conditioning,
    t: Tensor,
    noise: Tensor,
    weight: Weight = uniform,
) -> Tensor:
    """w(t) mean |output(x_t, t) - target|^2 of each image (Ho et al. 2020, eq. 14, generalised).

    x0 and noise [B, ...]; t [B] in (0, 1], on the host. Returns [B], float32; the caller takes the mean.
    """
    alpha, sigma = denoiser.sde.marginal(t)
    target = denoiser.prediction.target(x0, noise, per_image(alpha, x0), per_image(sigma, x0))
    output = denoiser.output(denoiser.sde.perturb(x0, noise, t), t, cond)
    error = (output - target.float()).square().flatten(1).mean(1)
    return error * per_image(weight(denoiser.prediction, alpha, sigma), error)


def stratified(u: Tensor) -> Tensor:
    """Uniform, row i within its own stratum (i, i + 1] / B: a batch covers all times evenly."""
    return (torch.arange(len(u)) + 1 - u.double()) / len(u)


def log_normal(u: Tensor) -> Tensor:
    """logit t ~ N(0, 1), by the inverse distribution function (Esser et al. 2024, section 3.1)."""
    return torch.special.ndtri(1 - u.double()).sigmoid()


def discrete(u: Tensor, steps: int = 1000) -> Tensor:
    """(k + 1) / steps, k uniform in 0..steps-1: the times of a table, as DDPM trains."""
    return ((u.double() * steps).floor() + 1) / steps


TIMES: dict[str, Times] = {
    "uniform": lambda u: 1 - u.double(),
    "stratified": stratified,
    "log_normal": log_normal,
    "discrete": discrete,
}
