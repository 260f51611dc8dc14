"""Problems with a known answer, Gaussians and their mixtures, and what samplers make of them, measured exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor

from ldm.diffusion.denoiser import NoiseLevels
from ldm.diffusion.samplers import sample
from ldm.diffusion.sde import VPSDE, NoiseLevel
from ldm.diffusion.steps import Sampler
from ldm.diffusion.timesteps import SPACINGS, TimeGrid
from ldm.rng import Noise


class AnalyticData(Protocol):
    """Data whose denoiser and probability flow are known; x [B, D], float64."""

    def denoise(self, x: Tensor, level: NoiseLevels) -> Tensor: ...

    def probability_flow(self, x: Tensor, start: NoiseLevel, end: NoiseLevel) -> Tensor: ...


@dataclass(frozen=True)
class Gaussian:
    """Data N(mu, cov): denoiser, score and flow in closed form."""

    mu: Tensor
    cov: Tensor

    def marginal_cov(self, level: NoiseLevel) -> Tensor:
        return level.alpha**2 * self.cov + level.sigma**2 * torch.eye(len(self.mu), dtype=self.cov.dtype)

    def score(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return torch.linalg.solve(self.marginal_cov(level), (level.alpha * self.mu - x).T).T

    def denoise(self, x: Tensor, level: NoiseLevels) -> Tensor:
        """E[x_0 | x] = mu + alpha S C^-1 (x - alpha mu), C the covariance of x."""
        assert isinstance(level, NoiseLevel)
        return self.mu - level.alpha * self.score(x, level) @ self.cov

    def probability_flow(self, x: Tensor, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        """The probability flow: along each axis of S, x stays as many deviations from the mean."""
        variance, axes = torch.linalg.eigh(self.cov)
        ratio = (end.alpha**2 * variance + end.sigma**2) / (start.alpha**2 * variance + start.sigma**2)
        return end.alpha * self.mu + ((x - start.alpha * self.mu) @ axes * ratio.sqrt()) @ axes.T


@dataclass(frozen=True)
class GaussianMixture:
    """Data drawn from K Gaussians N(mu_k, cov_k): shares [K], which sum to 1, mu [K, D], cov [K, D, D]."""

    weights: Tensor
    mu: Tensor
    cov: Tensor

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.cov)  # variances [K, D], axes [K, D, D]

    def _components(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """log(share_k N(x; alpha mu_k, C_k)) [B, K], and E[x_0 | x, k] = mu_k + alpha S_k C_k^-1 (x - alpha mu_k)."""
        variance, axes = self._eigh
        spread = level.alpha**2 * variance + level.sigma**2
        away = torch.einsum("bkd,kde->bke", x[:, None] - level.alpha * self.mu, axes)
        answers = self.mu + torch.einsum("bke,kde->bkd", level.alpha * variance / spread * away, axes)
        return self.weights.log() - (away**2 / spread + (2 * math.pi * spread).log()).sum(-1) / 2, answers

    def log_density(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """log p_t(x) [B]."""
        return self._components(x, level)[0].logsumexp(1)

    def denoise(self, x: Tensor, level: NoiseLevels) -> Tensor:
        """E[x_0 | x]: the parts' answers, each weighted by its posterior probability."""
        assert isinstance(level, NoiseLevel)
        log_density, answers = self._components(x, level)
        return (log_density.softmax(1)[..., None] * answers).sum(1)

    def score(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return (level.alpha * self.denoise(x, level) - x) / level.sigma**2

    def probability_flow(self, x: Tensor, start: NoiseLevel, end: NoiseLevel, steps: int = 512) -> Tensor:
        """The probability flow dx/dphi = (alpha x - x0) / sigma by the classical Runge-Kutta method of order 4."""
        phi, last = start.angle, end.angle
        h = (last - phi) / steps

        def v(x: Tensor, angle: float) -> Tensor:
            alpha, sigma = math.cos(angle), math.sin(angle)
            return (alpha * x - self.denoise(x, NoiseLevel(math.nan, alpha, sigma))) / sigma

        for k in range(steps):
            angle = phi + k * h
            k1 = v(x, angle)
            k2 = v(x + h / 2 * k1, angle + h / 2)
            k3 = v(x + h / 2 * k2, angle + h / 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + v(x + h * k3, angle + h))
        return x


_S = torch.tensor([[0.8, 0.3], [0.3, 0.25]], dtype=torch.float64)
_I = torch.eye(2, dtype=torch.float64)
GAUSSIAN = Gaussian(torch.tensor([0.7, -0.4], dtype=torch.float64), _S)
GAUSSIAN_MIXTURE = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[1.0, 0.5], [-0.8, 0.9], [-0.2, -1.1]], dtype=torch.float64),
    torch.stack([0.2 * _S, 0.1 * _I, 0.3 * _I - 0.2 * _S]),
)


def mid_snr_grid(sde: VPSDE, n: int) -> TimeGrid:
    """n equal steps of t from log-SNR 0 to 2: a schedule alters the steps, not the ends."""
    start, end = sde.time_at_log_snr(torch.tensor([0, 2], dtype=torch.float64)).tolist()
    return TimeGrid(sde, (sde.level(start + (end - start) * i / n) for i in range(n + 1)))


def full_schedule_grid(sde: VPSDE, n: int) -> TimeGrid:
    """n equal steps of log-SNR from t = 1 to 1 / steps: a last step, into CLEAN, would refine nothing."""
    return TimeGrid(sde, SPACINGS["log_snr"](sde, n + 1)[:-1])


def ode_errors(sampler: Sampler, problem: AnalyticData, x: Tensor, grids: Sequence[TimeGrid]) -> Tensor:
    """The distance of the sampler's end from the exact flow's on each grid, all with the same two ends."""
    exact = problem.probability_flow(x, grids[0][0], grids[0][-1])
    ends = [sample(sampler, problem.denoise, x, grid, cast(Noise, None)) for grid in grids]
    return torch.stack([(end - exact).norm() for end in ends])


def convergence_order(errors: Tensor) -> float:
    """The mean of log2(error / error with twice the steps), for errors at each doubling."""
    return -errors.log2().diff().mean().item()


@dataclass
class BasisNoise:
    """Noise whose k-th draw is a unit vector in rows of its own, `first` + k D onwards, and 0 elsewhere.

    Of the Brownian path each value is the one before plus a new draw, so that steps which overlap share noise.
    """

    first: int
    num_calls: int = 0
    path: dict[float, Tensor] = field(default_factory=dict)  # by sigma

    def __call__(self, like: Tensor) -> Tensor:
        z = torch.zeros_like(like)
        row = self.first + self.num_calls * like.shape[1]
        block = z[row : row + like.shape[1]]
        block.copy_(torch.eye(like.shape[1], dtype=like.dtype)[: len(block)])
        self.num_calls += 1
        return z

    def between(self, like: Tensor, sigma: float, to_sigma: float) -> Tensor:
        ends = [self.value_at(like, scale) for scale in (sigma, to_sigma)]
        return (ends[1] - ends[0]) / math.sqrt(1 / to_sigma**2 - 1 / sigma**2)

    def value_at(self, like: Tensor, sigma: float) -> Tensor:
        if sigma not in self.path:
            last = min(self.path, default=sigma)
            before = self.path.get(last, torch.zeros_like(like))
            gain = 1 / sigma**2 - 1 / last**2
            assert gain >= 0
            self.path[sigma] = before + math.sqrt(gain) * self(like) if gain else before
        return self.path[sigma]


def sampler_moments(sampler: Sampler, problem: Gaussian, grid: TimeGrid) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of the sampler's end, exactly, from the exact law at grid[0].

    For a Gaussian each step is affine in (x, z_1, ..., z_n), so the end is: its coefficients are the ends of the
    unit vectors, less the end of 0. Not for samplers whose step lengths depend on x.
    """
    d = len(problem.mu)
    counting = BasisNoise(first=0)
    sample(sampler, problem.denoise, torch.zeros(1, d, dtype=torch.float64), grid, cast(Noise, counting))
    x = torch.zeros(1 + d + counting.num_calls * d, d, dtype=torch.float64)
    x[1 : 1 + d] = torch.eye(d)
    ends = sample(sampler, problem.denoise, x, grid, cast(Noise, BasisNoise(first=1 + d)))
    offset, linear, noisy = ends[0], ends[1 : 1 + d] - ends[0], ends[1 + d :] - ends[0]
    mean = offset + grid[0].alpha * problem.mu @ linear
    return mean, linear.T @ problem.marginal_cov(grid[0]) @ linear + noisy.T @ noisy


def weak_errors(sampler: Sampler, problem: Gaussian, grids: Sequence[TimeGrid]) -> tuple[Tensor, Tensor]:
    """The errors of the mean and of the covariance on each grid (weak errors), without Monte Carlo."""
    of_mean, of_cov = [], []
    for grid in grids:
        mean, cov = sampler_moments(sampler, problem, grid)
        of_mean.append((mean - grid[-1].alpha * problem.mu).norm())
        of_cov.append((cov - problem.marginal_cov(grid[-1])).norm())
    return torch.stack(of_mean), torch.stack(of_cov)


def strong_errors(sampler: Sampler, problem: Gaussian, grids: Sequence[TimeGrid], num_paths: int = 1000) -> Tensor:
    """The root mean square distance between the ends on each grid and the next finer one, on one Brownian path."""
    x = Noise([0])(torch.empty(1, num_paths, len(problem.mu), dtype=torch.float64))

    def denoise(x: Tensor, point: NoiseLevels) -> Tensor:
        return problem.denoise(x[0], point)[None]

    ends = [sample(sampler, denoise, x, grid, Noise([1])) for grid in grids]
    return torch.stack([(a - b).square().mean().sqrt() for a, b in pairwise(ends)])


class NoOpNoise:
    """Noise that costs nothing and touches no device."""

    def __call__(self, like: Tensor) -> Tensor:
        return like

    def between(self, like: Tensor, sigma: float, to_sigma: float) -> Tensor:
        return like


def measure_step_overhead(sampler: Sampler, grid: TimeGrid, repeats: int = 20) -> float:
    """Seconds of processor time that a sampler spends on each step of a grid with a free denoiser: its own overhead.

    On single numbers, so that next to nothing is computed.
    """
    x = torch.ones(1, 1)

    def run() -> float:
        steps = sampler(x, grid, cast(Noise, NoOpNoise()))
        begun = time.process_time()
        with suppress(StopIteration):
            asked, _ = next(steps)
            while True:
                asked, _ = steps.send(asked)
        return time.process_time() - begun

    return min(run() for _ in range(repeats)) / (len(grid) - 1)
