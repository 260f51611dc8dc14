"""The training objective: denoising score matching as a weighted regression on the network's own target.

    int_0^1 lambda(t) E |score' - score|^2 dt = int_0^1 w(t) E |x0' - x0|^2 dt,      w = lambda alpha^2 / sigma^4

(Song et al. 2021, eq. 7). A weighting is defined on x0, and means the same whatever the network predicts; only
`uniform_weighting` is defined on the network's own target.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import PREDICTIONS, Prediction
from ldm.diffusion.sde import VPSDE, append_dims
from ldm.diffusion.timesteps import log_snr_range

TINY_ALPHA = 1e-140  # in place of 0: its square is no denormal number

Weighting = Callable[[Prediction, VPSDE, Tensor], Tensor]  # (prediction, sde, t [B]) -> weight [B]
TimeSampler = Callable[[VPSDE, Tensor], tuple[Tensor, Tensor]]  # (sde, u [B] in [0, 1)) -> t [B] in (0, 1], weight [B]


def uniform_weighting(prediction: Prediction, sde: VPSDE, t: Tensor) -> Tensor:
    """1 on the network's own target."""
    return torch.ones_like(t, dtype=torch.float64)


def snr_weighting(name: str, weight: Callable[[Tensor], Tensor]) -> Weighting:
    """Convert a weight w(SNR) on |x0' - x0|^2 to one on |output - target|^2: w(SNR) (d x0 / d output)^2.

    At zero SNR that is its limit; ValueError names the weighting where there is none, as for `debiased` on eps.
    """

    def on_target(prediction: Prediction, sde: VPSDE, t: Tensor) -> Tensor:
        alpha, sigma = sde.marginal(t)
        alpha = alpha.clamp(min=TINY_ALPHA)  # 0 * inf has no limit
        return _refuse_infinite(name, weight((alpha / sigma) ** 2) * prediction.jacobian(alpha, sigma) ** 2)

    return on_target


def _refuse_infinite(name: str, weight: Tensor) -> Tensor:
    if not (weight < 1 / TINY_ALPHA**0.5).all():
        raise ValueError(f"weighting {name!r} is infinite at zero SNR: choose times truncated or importance")
    return weight


def likelihood_weighting(prediction: Prediction, sde: VPSDE, t: Tensor) -> Tensor:
    """lambda = beta(t), on x0 -dSNR/dt = SNR beta / sigma^2: maximum likelihood (Song et al. 2021b, theorem 1).

    Half the loss, times the dimensions of an image, is the continuous ELBO's (Kingma et al. 2021, eq. 15). The weight
    on eps diverges at both ends: choose time samplers that avoid them. ValueError at zero SNR, where it is infinite.
    """
    weight = WEIGHTINGS["snr"](prediction, sde, t) * sde.beta(t) / sde.marginal(t)[1] ** 2
    return _refuse_infinite("likelihood", weight)


def min_snr_weighting(gamma: float) -> Weighting:
    """min(SNR, gamma): Hang et al. 2023 (min-SNR)."""
    return snr_weighting("min_snr", lambda snr: snr.clamp(max=gamma))


def soft_min_snr_weighting(gamma: float) -> Weighting:
    """1 / (1/SNR + 1/gamma), min-SNR without its corner: Crowson et al. 2024 (HDiT)."""
    return snr_weighting("soft_min_snr", lambda snr: snr * gamma / (snr + gamma))


def p2_weighting(gamma: float, k: float = 1.0) -> Weighting:
    """1 / (k + SNR)^gamma on eps: Choi et al. 2022 (P2)."""
    return snr_weighting("p2", lambda snr: snr / (k + snr) ** gamma)


def edm_weighting(sigma_data: float) -> Weighting:
    """SNR + 1 / sigma_data^2, which is 1 on the target of EDM's preconditioning: Karras et al. 2022, table 1."""
    return snr_weighting("edm", lambda snr: snr + 1 / sigma_data**2)


WEIGHTINGS: dict[str, Weighting] = {
    "uniform": uniform_weighting,
    "snr": snr_weighting("snr", lambda snr: snr),  # lambda = sigma^2: uniform on eps (Ho et al. 2020, eq. 14)
    "likelihood": likelihood_weighting,
    "min_snr": min_snr_weighting(5),
    "soft_min_snr": soft_min_snr_weighting(4),
    "p2": p2_weighting(1),
    "debiased": snr_weighting("debiased", torch.sqrt),  # 1 / sqrt(SNR) on eps: Yu et al. 2023
    "edm": edm_weighting(1),  # the deviation of scaled latents
}


def diffusion_loss(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Conditioning,
    t: Tensor,
    noise: Tensor,
    weighting: Weighting = uniform_weighting,
    perturbation: Tensor | float = 0.0,
    loss_mask: Tensor | None = None,
) -> Tensor:
    """w(t) mean |output(x_t, t) - target|^2 of each image (Ho et al. 2020, eq. 14, generalised).

    x0 and noise [B, ...]; t [B] in (0, 1], on the host. Returns [B], float32; the caller takes the mean.
    `perturbation` is noise that x_t has beyond the target's: x_t = alpha x_0 + sigma (noise + perturbation) (Ning et
    al. 2023, eq. 9). `loss_mask` [B, 1, h, w] weights the squared errors.
    """
    alpha, sigma = denoiser.sde.marginal(t)
    target = denoiser.prediction.target(x0, noise, append_dims(alpha, x0), append_dims(sigma, x0))
    output = denoiser.network_output(denoiser.sde.perturb(x0, noise + perturbation, t), t, cond)
    squares = (output - target.float()).square()
    error = (squares if loss_mask is None else loss_mask * squares).flatten(1).mean(1)
    return error * append_dims(weighting(denoiser.prediction, denoiser.sde, t), error)


def with_unit_weights(sample_times: Callable[[VPSDE, Tensor], Tensor]) -> TimeSampler:
    """A time sampler whose times all have weight 1: their density is part of the objective."""
    return lambda sde, u: (sample_times(sde, u), torch.ones_like(u, dtype=torch.float64))


@with_unit_weights
def stratified_times(sde: VPSDE, u: Tensor) -> Tensor:
    """Uniform, row i within its own stratum (i, i + 1] / B: a batch covers all times evenly."""
    return (torch.arange(len(u)) + 1 - u.double()) / len(u)


@with_unit_weights
def logit_normal_times(sde: VPSDE, u: Tensor) -> Tensor:
    """logit t ~ N(0, 1), by the inverse distribution function (Esser et al. 2024, section 3.1)."""
    return torch.special.ndtri(1 - u.double()).sigmoid()


@with_unit_weights
def discrete_times(sde: VPSDE, u: Tensor) -> Tensor:
    """(k + 1) / N, k uniform in 0..N-1, N = `num_train_timesteps`: the times of a discrete schedule, as DDPM trains."""
    return ((u.double() * sde.num_train_timesteps).floor() + 1) / sde.num_train_timesteps


def truncated_times(sde: VPSDE, u: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform between the ends of `log_snr_range`, away from the poles of the likelihood weighting.

    The weight 1 / p(t), the length of that range, makes the expectation the integral over it.
    """
    start, end = sde.time_at_log_snr(log_snr_range(sde))
    return torch.lerp(start, end, u.double()), (start - end).expand(len(u))


def importance_sampled_times(sde: VPSDE, u: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform in log-SNR: p(t) = (beta / sigma^2) / D, D the range of log-SNR (Song et al. 2021b).

    The weight 1 / p(t) keeps the expectation of `truncated_times`; with the likelihood weighting it is D on eps,
    always.
    """
    start, end = log_snr_range(sde)
    t = sde.time_at_log_snr(torch.lerp(start, end, u.double()))
    return t, sde.marginal(t)[1] ** 2 / sde.beta(t) * (end - start)


TIME_SAMPLERS: dict[str, TimeSampler] = {
    "uniform": with_unit_weights(lambda sde, u: 1 - u.double()),
    "stratified": stratified_times,
    "logit_normal": logit_normal_times,
    "log_normal": logit_normal_times,  # its former name, in older recipes
    "discrete": discrete_times,
    "truncated": truncated_times,
    "importance": importance_sampled_times,
}


def loss_mean_and_variance(
    time_sampler: TimeSampler, weighting: Weighting, sde: VPSDE, error: Callable[[Tensor], Tensor], n: int = 1 << 16
) -> tuple[float, float]:
    """Mean and variance of one sample of the loss over its time alone, exactly: the midpoint rule in u.

    `error(t)` is the mean of |eps' - eps|^2 at t.
    """
    t, weight = time_sampler(sde, (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    losses = weight * weighting(PREDICTIONS["eps"], sde, t) * error(t)
    return losses.mean().item(), losses.var(correction=0).item()
