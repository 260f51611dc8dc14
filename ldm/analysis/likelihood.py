"""Likelihood: how probable a picture is under the model, exactly by the flow and from below by the ELBO.

The model draws x ~ N(0, I) at the first noise level, whatever its SNR, as `samplers.sample` does, and follows its
flow or its reverse SDE to the data. All densities are of the x that the denoiser knows (latents), in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ldm.diffusion.denoiser import CountNFE, Denoise
from ldm.diffusion.sde import CLEAN_LEVEL, VPSDE, NoiseLevel
from ldm.diffusion.timesteps import TimeGrid

WhiteNoise = Callable[
    [Tensor], Tensor
]  # like Noise: N(0, I) of the shape of its argument, row i from image i's own seed
TraceEstimator = Callable[
    [Tensor, Tensor], Tensor
]  # (f(x) with its graph, x) [B, ...] -> k estimates of tr df/dx, [B, k]
LogProb = Callable[[Tensor], Tensor]  # x [B, ...] -> nats [B], float64
DriftAndDivergence = Callable[
    [Tensor, NoiseLevel], tuple[Tensor, Tensor]
]  # (x, level) -> dx/dphi [B, ...], its divergence [B, k]


@dataclass(frozen=True)
class LikelihoodEstimate:
    """Nats of each image, drawn k times independently: their mean estimates, their spread tells how well.

    `draws` [B, k] float64; `dim` numbers an image has; `evaluations` of the denoiser. An exact result has one draw.
    The difference of two estimates that share their noise is taken draw by draw, so that what is common cancels.
    """

    samples: Tensor
    dim: int
    nfe: int

    @property
    def nats(self) -> Tensor:
        return self.samples.mean(1)

    @property
    def standard_error(self) -> Tensor:
        """Of `nats` [B]; NaN where one draw cannot tell."""
        return self.samples.std(1) / math.sqrt(self.samples.shape[1])

    @property
    def bits_per_dim(self) -> Tensor:
        """-nats / (dim log 2): a code's length, for which less is better."""
        return -self.nats / (self.dim * math.log(2))

    def to_records(self) -> list[dict[str, Any]]:
        """One for each image, as JSON values."""
        errors, bit = self.standard_error, self.dim * math.log(2)
        columns = {
            "nats": self.nats,
            "standard_error": errors,
            "bits_per_dim": self.bits_per_dim,
            "bits_per_dim_error": errors / bit,
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [{**dict(zip(columns, row, strict=True)), "evaluations": self.nfe} for row in rows]

    def __sub__(self, other: LikelihoodEstimate) -> LikelihoodEstimate:
        return LikelihoodEstimate(self.samples - other.samples, self.dim, self.nfe + other.nfe)


def exact_trace(y: Tensor, x: Tensor) -> Tensor:
    """tr dy/dx by one gradient for each dimension: for small ones."""
    columns = y.flatten(1).unbind(1)
    diagonal = [_vjp(c, x, torch.ones_like(c)).flatten(1)[:, i] for i, c in enumerate(columns)]
    return torch.stack(diagonal, 1).double().sum(1, keepdim=True)


def rademacher_probe(z: Tensor) -> Tensor:
    """+-1 with the signs of z ~ N(0, I): of all probes those with the least variance (Hutchinson 1990)."""
    return torch.ones_like(z).copysign(z)


TRACE_PROBES: dict[str, Callable[[Tensor], Tensor]] = {"rademacher": rademacher_probe, "gaussian": lambda z: z}


def hutchinson_trace(
    noise: WhiteNoise, num_probes: int = 1, probe: Callable[[Tensor], Tensor] = rademacher_probe
) -> TraceEstimator:
    """tr J = E[e^T J e], e with mean 0 and covariance I, k times over (Hutchinson 1990; Song et al. 2021, eq. 40).

    Probes are drawn afresh at each level, so that their errors cancel along the flow; adaptive steps, which need
    a smooth integrand, take `frozen(noise)`.
    """

    def trace(y: Tensor, x: Tensor) -> Tensor:
        probes = probe(noise(x.new_empty(len(x), num_probes, *x.shape[1:]))).unbind(1)
        return torch.stack([(e * _vjp(y, x, e)).flatten(1).double().sum(1) for e in probes], 1)

    return trace


def freeze_noise(noise: WhiteNoise) -> WhiteNoise:
    """The first draw, again and again."""
    drawn: list[Tensor] = []

    def again(like: Tensor) -> Tensor:
        if not drawn:
            drawn.append(noise(like))
        return drawn[0]

    return again


def _vjp(y: Tensor, x: Tensor, vector: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, vector, retain_graph=True)[0]


def standard_normal_log_prob(x: Tensor) -> Tensor:
    """log N(x; 0, I)."""
    return -0.5 * (x.flatten(1).double().square() + math.log(2 * math.pi)).sum(1)


def log_likelihood(
    denoise: Denoise,
    x: Tensor,
    grid: TimeGrid,
    trace: TraceEstimator = exact_trace,
    prior: LogProb = standard_normal_log_prob,
) -> LikelihoodEstimate:
    """log p(x) = log prior(x_1) + int_0^phi_1 div v dphi: Song et al. 2021, eq. 39, in the angle phi.

    With alpha = cos phi and sigma = sin phi the probability flow is dx/dphi = v = (alpha x - E[x_0 | x]) / sigma,
    bounded even at zero SNR. Classic Runge-Kutta steps, order 4, from the picture x [B, ...] up to grid[0];
    four evaluations each. `prior` is N(0, I), what sampling starts from; data diffused to a positive SNR are
    distributed a little otherwise.
    """
    counted = CountNFE(denoise)
    slope = _drift_and_divergence(counted, grid.sde, trace)
    levels = grid[::-1]
    angles = [p.angle for p in levels]
    middles = grid.sde.levels_at_angles([(a + b) / 2 for a, b in pairwise(angles)])
    y, gained = x, torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
    for (now, to), (start, end), middle in zip(pairwise(levels), pairwise(angles), middles, strict=True):
        h = end - start
        v1, d1 = slope(y, now)
        v2, d2 = slope(y + h / 2 * v1, middle)
        v3, d3 = slope(y + h / 2 * v2, middle)
        v4, d4 = slope(y + h * v3, to)
        y = y + h / 6 * (v1 + 2 * (v2 + v3) + v4)
        gained = gained + h / 6 * (d1 + 2 * (d2 + d3) + d4)
    return LikelihoodEstimate(prior(y)[:, None] + gained, x[0].numel(), counted.nfe)


def log_likelihood_adaptive(
    denoise: Denoise,
    x: Tensor,
    sde: VPSDE,
    trace: TraceEstimator = exact_trace,
    prior: LogProb = standard_normal_log_prob,
    tolerance: float = 1e-4,
) -> LikelihoodEstimate:
    """`log_likelihood` by Dormand & Prince's adaptive steps (scipy's RK45), each to a tolerance, relative and absolute.

    One image at a time, x [1, ...], for its steps are its own. ValueError for more, and where no step is small enough.
    """
    if len(x) != 1:
        raise ValueError(f"{len(x)} images: adaptive steps take one at a time")
    counted = CountNFE(denoise)
    slope, dim, last = _drift_and_divergence(counted, sde, trace), x.numel(), sde.level(1.0).angle

    def derivative(angle: float, state: np.ndarray) -> np.ndarray:
        (level,) = sde.levels_at_angles([angle])
        return _flatten_state(*slope(torch.from_numpy(state[:dim]).to(x).view_as(x), level))

    _, nothing = slope(x, CLEAN_LEVEL)  # 0 for each probe
    end = solve_ivp(derivative, (0, last), _flatten_state(x, nothing), t_eval=[last], rtol=tolerance, atol=tolerance)
    if not end.success:
        raise ValueError(f"tolerance {tolerance:g}: no step of the flow is small enough ({end.message})")
    y, gained = (torch.from_numpy(part.T).to(x.device) for part in (end.y[:dim], end.y[dim:]))
    return LikelihoodEstimate(prior(y.view_as(x))[:, None] + gained, dim, counted.nfe)


def _flatten_state(x: Tensor, divergence: Tensor) -> np.ndarray:
    return torch.cat([x.flatten().double(), divergence.flatten()]).cpu().numpy()


def _drift_and_divergence(denoise: Denoise, sde: VPSDE, trace: TraceEstimator) -> DriftAndDivergence:
    """v and its divergence. Below the level where t = 1/steps, the lowest that the network knows, v falls with sigma.

    There v = -sigma/alpha (x + grad log p) nearly, which is 0 at the data: the picture needs no noise to begin.
    """
    lowest = sde.level_at_timestep(0)

    def slope(x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        asked = lowest if level.t < lowest.t else level
        share = level.sigma / asked.sigma
        with torch.inference_mode(False):  # this also turns gradients on
            x = x.detach().clone().requires_grad_()
            v = (asked.alpha * x - denoise(x, asked)) / asked.sigma
            divergence = trace(v, x)
        return share * v.detach(), share * divergence

    return slope


@dataclass(frozen=True)
class Elbo:
    """The bound and what it consists of, nats of each image: -(prior + sum of diffusion + reconstruction).

    `diffusion` [B, n] belongs to the n steps between `log_snr` [n + 1]; `prior`, `sigma_vae_log_prob` [B].
    """

    bound: LikelihoodEstimate
    log_snr: Tensor
    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor

    def to_records(self) -> list[dict[str, Any]]:
        """The terms of each image, as JSON values."""
        edges = self.log_snr.tolist()
        return [
            {"prior": prior, "log_snr": edges, "diffusion": diffusion, "reconstruction": reconstruction}
            for prior, diffusion, reconstruction in zip(
                self.prior.tolist(), self.diffusion.tolist(), self.reconstruction.tolist(), strict=True
            )
        ]


ElboTimeSampler = Callable[
    [TimeGrid, Tensor], tuple[Tensor, Tensor]
]  # (grid, u [B, n] in [0, 1]) -> t, weight of |x0 - x0'|^2


def discrete_elbo_times(grid: TimeGrid, u: Tensor) -> tuple[Tensor, Tensor]:
    """The chain of the grid's own steps, 1/2 (SNR' - SNR) each: Kingma et al. 2021, eq. 13; Ho et al. 2020, eq. 5."""
    t = torch.tensor([p.t for p in grid[:-1]], dtype=torch.float64)
    return t[:-1].expand_as(u), (grid.sde.log_snr(t).exp().diff() / 2).expand_as(u)


def continuous_elbo_times(grid: TimeGrid, u: Tensor) -> tuple[Tensor, Tensor]:
    """Infinitely many steps, 1/2 int SNR |x0 - x0'|^2 dlog-SNR: Kingma et al. 2021, eq. 15.

    Times are uniform in log-SNR within each of the grid's steps: where they differ, they are strata alone.
    """
    log_snr = grid.sde.log_snr(torch.tensor([p.t for p in grid[:-1]], dtype=torch.float64))
    if not log_snr.isfinite().all():
        raise ValueError("the continuous ELBO cannot start at zero SNR: choose spacing karras or log_snr")
    at = torch.lerp(log_snr[:-1], log_snr[1:], u)
    return grid.sde.time_at_log_snr(at), at.exp() * log_snr.diff() / 2


@torch.no_grad()
def estimate_elbo(
    denoise: Denoise,
    x: Tensor,
    grid: TimeGrid,
    noise: WhiteNoise,
    num_samples: int = 1,
    time_sampler: ElboTimeSampler = continuous_elbo_times,
) -> Elbo:
    """log p(x) >= -KL(q(x_1 | x) | N(0, I)) - sum w E|x - E[x_0 | x_t]|^2 + E log p(x | x_lowest).

    Kingma et al. 2021, eqs. 11 to 15. The last step to x is N(E[x_0 | x_lowest], (sigma/alpha)^2 I) at the grid's
    lowest level, the continuous decoder of Ho et al. 2020 (section 3.3). x [B, ...]; every draw takes its own noise
    for each of the len(grid) - 1 levels. ValueError for a grid of one step.
    """
    if len(grid) < 3:
        raise ValueError("the ELBO needs a grid of 2 steps or more")
    dim, (first, lowest) = x[0].numel(), (grid[0], grid[-2])
    prior = (first.alpha * x.flatten(1).double()).square().sum(1) - dim * (first.alpha**2 + 2 * math.log(first.sigma))
    constant = dim / 2 * math.log(2 * math.pi * (lowest.sigma / lowest.alpha) ** 2)
    counted = CountNFE(denoise)
    terms = torch.stack(
        [_elbo_terms(counted, x, grid, noise, time_sampler) for _ in range(num_samples)]
    )  # [draws, B, n + 1]
    total = -(prior / 2 + constant + terms.sum(2)).T
    log_snr = grid.sde.log_snr(torch.tensor([p.t for p in grid[:-1]], dtype=torch.float64))
    mean = terms.mean(0)
    bound = LikelihoodEstimate(total, dim, counted.nfe)
    return Elbo(bound, log_snr, prior / 2, mean[:, :-1], constant + mean[:, -1])


def _elbo_terms(
    denoise: Denoise, x: Tensor, grid: TimeGrid, noise: WhiteNoise, time_sampler: ElboTimeSampler
) -> Tensor:
    """w |x - x0'|^2 at one time within each step, and at the lowest level, [B, n + 1]; float64."""
    u = torch.special.ndtr(noise(x.new_empty(len(x), len(grid) - 2)).double()).cpu()
    t, weight = time_sampler(grid, u)
    lowest = grid[-2]
    t = torch.cat([t, torch.full((len(x), 1), lowest.t, dtype=torch.float64)], 1)
    weight = torch.cat([weight, torch.full((len(x), 1), (lowest.alpha / lowest.sigma) ** 2 / 2)], 1)
    errors = []
    for column in t.unbind(1):
        levels = [grid.sde.level(time) for time in column.tolist()]
        x0 = denoise(grid.sde.perturb(x, noise(x), column), levels)
        errors.append((x - x0).flatten(1).double().square().sum(1))
    return weight.to(x.device) * torch.stack(errors, 1)


def gaussian_entropy(std: Tensor) -> Tensor:
    """Nats of a diagonal Gaussian of standard deviations [B, ...]: sum log(std sqrt(2 pi e)), [B]."""
    return (std.flatten(1).double().log() + 0.5 * math.log(2 * math.pi * math.e)).sum(1)


def sigma_vae_log_prob(x: Tensor, mean: Tensor) -> Tensor:
    """max over s of log N(x; mean, s^2 I) = -dim/2 (1 + log(2 pi s^2)), s^2 the mean squared error, [B].

    The sigma-VAE's decoder, its variance fitted to the image itself: Rybkin et al. 2021, section 3.2.
    """
    variance = (x - mean).flatten(1).double().square().mean(1)
    return -x[0].numel() / 2 * (1 + (2 * math.pi * variance).log())
