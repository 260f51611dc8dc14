"""Problems with a known answer, Gaussians and their mixtures, and what samplers make of them, measured exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Levels
from ldm.diffusion.samplers import Sampler, sample
from ldm.diffusion.sde import VPSDE, Point
from ldm.diffusion.spacing import SPACINGS, Grid
from ldm.rng import Noise


class Problem(Protocol):
    """Data whose denoiser and probability flow are known; x [B, D], float64."""

    def denoise(self, x: Tensor, point: Levels) -> Tensor: ...

    def flow(self, x: Tensor, start: Point, end: Point) -> Tensor: ...


@dataclass(frozen=True)
class Gaussian:
    """Data N(mu, cov): denoiser, score and flow in closed form."""

    mu: Tensor
    cov: Tensor

    def marginal_cov(self, point: Point) -> Tensor:
        return point.alpha**2 * self.cov + point.sigma**2 * torch.eye(len(self.mu), dtype=self.cov.dtype)

    def score(self, x: Tensor, point: Point) -> Tensor:
        return torch.linalg.solve(self.marginal_cov(point), (point.alpha * self.mu - x).T).T

    def denoise(self, x: Tensor, point: Levels) -> Tensor:
        """E[x_0 | x] = mu + alpha S C^-1 (x - alpha mu), C the covariance of x."""
        assert isinstance(point, Point)
        return self.mu - point.alpha * self.score(x, point) @ self.cov

    def flow(self, x: Tensor, start: Point, end: Point) -> Tensor:
        """The probability flow: along each axis of S, x stays as many deviations from the mean."""
        variance, axes = torch.linalg.eigh(self.cov)
        ratio = (end.alpha**2 * variance + end.sigma**2) / (start.alpha**2 * variance + start.sigma**2)
        return end.alpha * self.mu + ((x - start.alpha * self.mu) @ axes * ratio.sqrt()) @ axes.T


@dataclass(frozen=True)
class Mixture:
    """Data drawn from K Gaussians N(mu_k, cov_k): shares [K], which sum to 1, mu [K, D], cov [K, D, D]."""

    shares: Tensor
    mu: Tensor
    cov: Tensor

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.eigh(self.cov)  # variances [K, D], axes [K, D, D]

    def _parts(self, x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        """log(share_k N(x; alpha mu_k, C_k)) [B, K], and E[x_0 | x, k] = mu_k + alpha S_k C_k^-1 (x - alpha mu_k)."""
        variance, axes = self._axes
        spread = point.alpha**2 * variance + point.sigma**2
        away = torch.einsum("bkd,kde->bke", x[:, None] - point.alpha * self.mu, axes)
        answers = self.mu + torch.einsum("bke,kde->bkd", point.alpha * variance / spread * away, axes)
        return self.shares.log() - (away**2 / spread + (2 * math.pi * spread).log()).sum(-1) / 2, answers

    def log_density(self, x: Tensor, point: Point) -> Tensor:
        """log p_t(x) [B]."""
        return self._parts(x, point)[0].logsumexp(1)

    def denoise(self, x: Tensor, point: Levels) -> Tensor:
        """E[x_0 | x]: the parts' answers, each weighted by its posterior probability."""
        assert isinstance(point, Point)
        log_density, answers = self._parts(x, point)
        return (log_density.softmax(1)[..., None] * answers).sum(1)

    def score(self, x: Tensor, point: Point) -> Tensor:
        return (point.alpha * self.denoise(x, point) - x) / point.sigma**2

    def flow(self, x: Tensor, start: Point, end: Point, steps: int = 512) -> Tensor:
        """The probability flow dx/dphi = (alpha x - x0) / sigma by the classical Runge-Kutta method of order 4."""
        phi, last = start.angle, end.angle
        h = (last - phi) / steps

        def v(x: Tensor, angle: float) -> Tensor:
            alpha, sigma = math.cos(angle), math.sin(angle)
            return (alpha * x - self.denoise(x, Point(math.nan, alpha, sigma))) / sigma

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
MIXTURE = Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[1.0, 0.5], [-0.8, 0.9], [-0.2, -1.1]], dtype=torch.float64),
    torch.stack([0.2 * _S, 0.1 * _I, 0.3 * _I - 0.2 * _S]),
)


def where_x0_forms(sde: VPSDE, n: int) -> Grid:
    """n equal steps of t from log-SNR 0 to 2: a schedule alters the steps, not the ends."""
    start, end = sde.time(torch.tensor([0, 2], dtype=torch.float64)).tolist()
    return Grid(sde, (sde.at(start + (end - start) * i / n) for i in range(n + 1)))


def whole_schedule(sde: VPSDE, n: int) -> Grid:
    """n equal steps of log-SNR from t = 1 to 1 / steps: a last step, into CLEAN, would refine nothing."""
    return Grid(sde, SPACINGS["log_snr"](sde, n + 1)[:-1])


def errors_of_flow(sampler: Sampler, problem: Problem, x: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The distance of the sampler's end from the exact flow's on each grid, all with the same two ends."""
    exact = problem.flow(x, grids[0][0], grids[0][-1])
    ends = [sample(sampler, problem.denoise, x, grid, cast(Noise, None)) for grid in grids]
    return torch.stack([(end - exact).norm() for end in ends])


def order(errors: Tensor) -> float:
    """The mean of log2(error / error with twice the steps), for errors at each doubling."""
    return -errors.log2().diff().mean().item()


@dataclass
class Basis:
    """Noise whose k-th draw is a unit vector in rows of its own, `first` + k D onwards, and 0 elsewhere."""

    first: int
    draws: int = 0

    def __call__(self, like: Tensor) -> Tensor:
        z = torch.zeros_like(like)
        row = self.first + self.draws * like.shape[1]
        block = z[row : row + like.shape[1]]
        block.copy_(torch.eye(like.shape[1], dtype=like.dtype)[: len(block)])
        self.draws += 1
        return z

    def between(self, like: Tensor, sigma: float, to_sigma: float) -> Tensor:
        return self(like)


def moments(sampler: Sampler, problem: Gaussian, grid: Grid) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of the sampler's end, exactly, from the exact law at grid[0].

    For a Gaussian each step is affine in (x, z_1, ..., z_n), so the end is: its coefficients are the ends of the
    unit vectors, less the end of 0. Not for samplers whose step lengths depend on x.
    """
    d = len(problem.mu)
    counting = Basis(first=0)
    sample(sampler, problem.denoise, torch.zeros(1, d, dtype=torch.float64), grid, cast(Noise, counting))
    x = torch.zeros(1 + d + counting.draws * d, d, dtype=torch.float64)
    x[1 : 1 + d] = torch.eye(d)
    ends = sample(sampler, problem.denoise, x, grid, cast(Noise, Basis(first=1 + d)))
    offset, linear, noisy = ends[0], ends[1 : 1 + d] - ends[0], ends[1 + d :] - ends[0]
    mean = offset + grid[0].alpha * problem.mu @ linear
    return mean, linear.T @ problem.marginal_cov(grid[0]) @ linear + noisy.T @ noisy


def errors_in_law(sampler: Sampler, problem: Gaussian, grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
    """The errors of the mean and of the covariance on each grid (weak errors), without Monte Carlo."""
    of_mean, of_cov = [], []
    for grid in grids:
        mean, cov = moments(sampler, problem, grid)
        of_mean.append((mean - grid[-1].alpha * problem.mu).norm())
        of_cov.append((cov - problem.marginal_cov(grid[-1])).norm())
    return torch.stack(of_mean), torch.stack(of_cov)


def strong_errors(sampler: Sampler, problem: Gaussian, grids: Sequence[Grid], size: int = 1000) -> Tensor:
    """The root mean square distance between the ends on each grid and the next finer one, on one Brownian path."""
    x = Noise([0])(torch.empty(1, size, len(problem.mu), dtype=torch.float64))

    def denoise(x: Tensor, point: Levels) -> Tensor:
        return problem.denoise(x[0], point)[None]

    ends = [sample(sampler, denoise, x, grid, Noise([1])) for grid in grids]
    return torch.stack([(a - b).square().mean().sqrt() for a, b in pairwise(ends)])


class Free:
    """Noise that costs nothing and touches no device."""

    def __call__(self, like: Tensor) -> Tensor:
        return like

    def between(self, like: Tensor, sigma: float, to_sigma: float) -> Tensor:
        return like


def python_per_step(sampler: Sampler, grid: Grid, rounds: int = 20) -> float:
    """Seconds of processor time that a sampler spends on each step of a grid with a free denoiser: its own overhead.

    On single numbers, so that next to nothing is computed.
    """
    x = torch.ones(1, 1)

    def run() -> float:
        steps = sampler(x, grid, cast(Noise, Free()))
        begun = time.process_time()
        with suppress(StopIteration):
            asked, _ = next(steps)
            while True:
                asked, _ = steps.send(asked)
        return time.process_time() - begun

    return min(run() for _ in range(rounds)) / (len(grid) - 1)
