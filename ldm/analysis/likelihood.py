"""Likelihood: the log-probability of an image under the model, exactly by the flow and from below by the ELBO.

The model starts from x ~ N(0, I) at the first noise level, whatever its SNR, as `samplers.sample` does, and follows its
flow or its reverse SDE to the data. All densities are of the denoiser's x (latents), in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, NFECounter
from ldm.diffusion.ode import Drift, integrate_adaptive, integrate_rk4, velocity
from ldm.diffusion.sde import CLEAN_LEVEL, VPSDE, NoiseLevels, alpha_sigma, clamp_levels
from ldm.diffusion.timesteps import TimeGrid

WhiteNoise = Callable[[Tensor], Tensor]  # like Noise: N(0, I) of the argument's shape, row i from image i's own seed
LogProb = Callable[[Tensor], Tensor]  # x [B, ...] -> nats [B], float64


@dataclass(frozen=True)
class LikelihoodEstimate:
    """Nats of each image from k independent samples: their mean, and its standard error.

    `samples` [B, k] float64; `dim` numbers an image has; `nfe` denoiser evaluations. An exact result has one sample.
    The difference of two estimates that share their noise is taken sample by sample, so that what is common cancels.
    """

    samples: Tensor
    dim: int
    nfe: int

    @property
    def nats(self) -> Tensor:
        return self.samples.mean(1)

    @property
    def standard_error(self) -> Tensor:
        """Of `nats` [B]; NaN for one sample."""
        return self.samples.std(1) / math.sqrt(self.samples.shape[1])

    @property
    def bits_per_dim(self) -> Tensor:
        """-nats / (dim log 2): a code length, lower is better."""
        return -self.nats / (self.dim * math.log(2))

    def to_records(self) -> list[dict[str, Any]]:
        """One record of JSON values for each image."""
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


class TraceEstimator(NamedTuple):
    """`estimate(f(x) with its graph, x)` [B, ...] gives k independent estimates of tr df/dx, [B, k]."""

    estimate: Callable[[Tensor, Tensor], Tensor]
    num_estimates: int


def _exact_trace(y: Tensor, x: Tensor) -> Tensor:
    """tr dy/dx by one gradient for each dimension: for few dimensions."""
    columns = y.flatten(1).unbind(1)
    diagonal = [_vjp(c, x, torch.ones_like(c)).flatten(1)[:, i] for i, c in enumerate(columns)]
    return torch.stack(diagonal, 1).double().sum(1, keepdim=True)


exact_trace = TraceEstimator(_exact_trace, 1)


def rademacher_probe(z: Tensor) -> Tensor:
    """+-1 with the signs of z ~ N(0, I), the probes of least variance (Hutchinson 1990)."""
    return torch.ones_like(z).copysign(z)


TRACE_PROBES: dict[str, Callable[[Tensor], Tensor]] = {"rademacher": rademacher_probe, "gaussian": lambda z: z}


def hutchinson_trace(
    noise: WhiteNoise, num_probes: int = 1, probe: Callable[[Tensor], Tensor] = rademacher_probe
) -> TraceEstimator:
    """tr J = E[e^T J e], e with mean 0 and covariance I, k times over (Hutchinson 1990; Song et al. 2021, eq. 40).

    Each evaluation samples new probes, so that their errors cancel along the flow; adaptive steps need a smooth
    integrand: `freeze_noise(noise)`.
    """

    def trace(y: Tensor, x: Tensor) -> Tensor:
        probes = probe(noise(x.new_empty(len(x), num_probes, *x.shape[1:]))).unbind(1)
        return torch.stack([(e * _vjp(y, x, e)).flatten(1).double().sum(1) for e in probes], 1)

    return TraceEstimator(trace, num_probes)


def freeze_noise(noise: WhiteNoise) -> WhiteNoise:
    """Noise that repeats its first sample."""
    first: list[Tensor] = []

    def repeat(like: Tensor) -> Tensor:
        if not first:
            first.append(noise(like))
        return first[0]

    return repeat


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

    Classic Runge-Kutta steps, order 4, from the image x [B, ...] up to grid[0]; four evaluations each. `prior` is
    N(0, I), from which sampling starts; the law of data diffused to a positive SNR differs a little.
    """
    counter = NFECounter(denoise)
    drift, state = _augmented_flow(counter, x, grid.sde, trace)
    return _estimate(x, integrate_rk4(drift, state, grid.sde, grid[::-1]), prior, counter)


def log_likelihood_adaptive(
    denoise: Denoise,
    x: Tensor,
    sde: VPSDE,
    trace: TraceEstimator = exact_trace,
    prior: LogProb = standard_normal_log_prob,
    tolerance: float = 1e-4,
) -> LikelihoodEstimate:
    """`log_likelihood` of x [B, ...] by `integrate_adaptive`, to a tolerance, relative and absolute."""
    counter = NFECounter(denoise)
    drift, state = _augmented_flow(counter, x, sde, trace)
    end = integrate_adaptive(drift, state, sde, CLEAN_LEVEL, sde.level(1.0), tolerance, tolerance)
    return _estimate(x, end, prior, counter)


def _augmented_flow(denoise: Denoise, x: Tensor, sde: VPSDE, trace: TraceEstimator) -> tuple[Drift, Tensor]:
    """The flow of (x, int div v) as rows [B, dim + k], and its state at the image; float64.

    Below the lowest level that the network knows, t = 1 / num_train_timesteps, v is that level's times sigma /
    sigma_lowest: there v = -sigma/alpha (x + grad log p) nearly, which is 0 at the data, so that the image needs no
    noise to begin.
    """
    lowest, dim = sde.level_at_timestep(0), x[0].numel()

    def drift(state: Tensor, levels: NoiseLevels) -> Tensor:
        known = clamp_levels(levels, lowest)
        with torch.inference_mode(False):  # this also turns gradients on
            y = state[:, :dim].detach().clone().view(x.shape).to(x.dtype).requires_grad_()
            v = velocity(y, denoise(y, known), known)
            divergence = trace.estimate(v, y)
        share = alpha_sigma(levels, state)[1] / alpha_sigma(known, state)[1]
        return share * torch.cat([v.detach().flatten(1).double(), divergence], 1)

    return drift, torch.cat([x.flatten(1).double(), x.new_zeros(len(x), trace.num_estimates).double()], 1)


def _estimate(x: Tensor, state: Tensor, prior: LogProb, counter: NFECounter) -> LikelihoodEstimate:
    dim = x[0].numel()
    return LikelihoodEstimate(prior(state[:, :dim].view(x.shape))[:, None] + state[:, dim:], dim, counter.nfe)


@dataclass(frozen=True)
class Elbo:
    """The bound and its terms, nats of each image: -(prior + sum of diffusion + reconstruction).

    `diffusion` [B, n] belongs to the n steps between `log_snr` [n + 1]; `prior`, `reconstruction` [B].
    """

    bound: LikelihoodEstimate
    log_snr: Tensor
    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor

    def to_records(self) -> list[dict[str, Any]]:
        """The terms of each image, as JSON values, one record each."""
        edges = self.log_snr.tolist()
        return [
            {"prior": prior, "log_snr": edges, "diffusion": diffusion, "reconstruction": reconstruction}
            for prior, diffusion, reconstruction in zip(
                self.prior.tolist(), self.diffusion.tolist(), self.reconstruction.tolist(), strict=True
            )
        ]


ElboTimeSampler = Callable[[TimeGrid, Tensor], tuple[Tensor, Tensor]]  # (grid, u [B, n]) -> t, weight of |x0 - x0'|^2


def discrete_elbo_times(grid: TimeGrid, u: Tensor) -> tuple[Tensor, Tensor]:
    """The chain of the grid's own steps, 1/2 (SNR' - SNR) each: Kingma et al. 2021, eq. 13; Ho et al. 2020, eq. 5."""
    t = torch.tensor([p.t for p in grid[:-1]], dtype=torch.float64)
    return t[:-1].expand_as(u), (grid.sde.log_snr(t).exp().diff() / 2).expand_as(u)


def continuous_elbo_times(grid: TimeGrid, u: Tensor) -> tuple[Tensor, Tensor]:
    """The limit of infinitely many steps, 1/2 int SNR |x0 - x0'|^2 dlog-SNR: Kingma et al. 2021, eq. 15.

    Times are uniform in log-SNR within each of the grid's steps, which are strata.
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

    Kingma et al. 2021, eqs. 11 to 15. The decoder is N(E[x_0 | x_lowest], (sigma/alpha)^2 I) at the grid's lowest
    level. Ho et al. 2020 (section 3.3) decode as N(., beta_1 I); at t = 1/N (sigma/alpha)^2 is beta_1 / (1 - beta_1). x
    [B, ...]; every sample takes its own noise for each of the len(grid) - 1 levels. ValueError for a grid of one step.
    """
    if len(grid) < 3:
        raise ValueError("the ELBO needs a grid of 2 steps or more")
    dim, (first, lowest) = x[0].numel(), (grid[0], grid[-2])
    prior = (first.alpha * x.flatten(1).double()).square().sum(1) - dim * (first.alpha**2 + 2 * math.log(first.sigma))
    constant = dim / 2 * math.log(2 * math.pi * (lowest.sigma / lowest.alpha) ** 2)
    counter = NFECounter(denoise)
    terms = torch.stack(
        [_elbo_terms(counter, x, grid, noise, time_sampler) for _ in range(num_samples)]
    )  # [S, B, n + 1]
    total = -(prior / 2 + constant + terms.sum(2)).T
    log_snr = grid.sde.log_snr(torch.tensor([p.t for p in grid[:-1]], dtype=torch.float64))
    mean = terms.mean(0)
    bound = LikelihoodEstimate(total, dim, counter.nfe)
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
