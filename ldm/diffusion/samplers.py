"""Samplers: coroutines that ask `x0 = yield x, point` and answer with the picture.

The deterministic ones move x to the next noise level as the probability-flow ODE does for a fixed x0,

    x' = sigma'/sigma x + alpha' (1 - rho) x0,      rho = (sigma'/alpha') / (sigma/alpha) = exp(-h),

where h is half the gain of log-SNR, and differ in the estimate of x0 that they put there. rho is 0, and all
formulas are finite, both from zero SNR (alpha = 0) and into the clean picture (sigma' = 0). Coefficients
are host floats, and x keeps its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.sde import Point
from ldm.diffusion.spacing import Grid
from ldm.rng import Noise

Steps = Generator[tuple[Tensor, Point], Tensor, Tensor]  # yields (x, point), is sent E[x_0 | x], returns x
Sampler = Callable[[Tensor, Grid, Noise], Steps]


def sample(sampler: Sampler, denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """Drive one group of pictures x [B, ...] through a grid.

    For text-to-image x is N(0, I) whatever the first point. (diffusers' Euler and Heun scale it by their
    first sigma with linspace and trailing spacing: by .9977 for Stable Diffusion.)
    """
    steps = sampler(x, grid, noise)
    try:
        question = next(steps)
        while True:
            question = steps.send(denoise(*question))
    except StopIteration as end:
        return end.value


def _rho(now: Point, to: Point) -> float:
    return (now.alpha / now.sigma) * (to.sigma / to.alpha)


def _flow(x: Tensor, x0: Tensor, now: Point, to: Point) -> Tensor:
    return to.sigma / now.sigma * x + to.alpha * (1 - _rho(now, to)) * x0


def ddim(x: Tensor, grid: Grid, noise: Noise, eta: float = 0.0) -> Steps:
    """x' = alpha' x0 + sigma' (sqrt(1 - f^2) e + f z), f = eta sqrt(1 - rho^2).

    Song et al. 2021 (DDIM), eqs. 12 and 16. Fresh noise z ~ N(0, I) replaces a share of the noise in x,
    e = (x - alpha x0) / sigma; none for eta = 0. `partial(ddim, eta=.5)` is a sampler; eta lies in [0, 1].
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        fresh = eta * math.sqrt(1 - _rho(now, to) ** 2)
        kept = math.sqrt(1 - fresh**2) * to.sigma / now.sigma
        x = kept * x + (to.alpha - kept * now.alpha) * x0
        if fresh * to.sigma > 0:
            x = x + fresh * to.sigma * noise.between(x, now.sigma, to.sigma)
    return x


def ddpm(x: Tensor, grid: Grid, noise: Noise) -> Steps:
    """Ancestral sampling, x' ~ q(x' | x, x0): Ho et al. 2020, algorithm 2, eqs. 6 and 7.

    The variance is that posterior's (beta-tilde): it lacks the spread of x_0 given x, to first order in the
    step. The last step adds no noise. This is DDIM with eta = 1.
    """
    return ddim(x, grid, noise, eta=1.0)


def euler(x: Tensor, grid: Grid, noise: Noise) -> Steps:
    """Euler's step in x/alpha, sigma/alpha (Karras et al. 2022, algorithm 1 without the correction).

    The slope there is DDIM's noise estimate (x - alpha x0) / sigma, and the step is DDIM's, exactly.
    """
    return ddim(x, grid, noise)


def heun(x: Tensor, grid: Grid, noise: Noise) -> Steps:
    """Heun's step in x/alpha, sigma/alpha (Karras et al. 2022, algorithm 1); two questions a step.

    The mean of both ends' slopes is Euler's step with x0 + (x0_ahead - x0) / (2 rho) for x0. From infinite
    sigma/alpha or into zero (rho = 0) one of the slopes is missing: Euler.
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        rho = _rho(now, to)
        if rho > 0:
            x0_ahead = yield _flow(x, x0, now, to), to
            x0 = x0 + (x0_ahead - x0) / (2 * rho)
        x = _flow(x, x0, now, to)
    return x


def dpmpp_2m(x: Tensor, grid: Grid, noise: Noise) -> Steps:
    """x0 extrapolated to the middle of the step in log-SNR: x0 + h / (2 h_before) (x0 - x0_before).

    Lu et al. 2022 (DPM-Solver++), algorithm 2. The first step, the one after zero SNR (h_before infinite)
    and the last (h infinite) take x0 as it is.
    """
    before, h_before = x, math.inf
    for now, to in pairwise(grid):
        x0 = yield x, now
        rho = _rho(now, to)
        h = -math.log(rho) if rho > 0 else math.inf
        lean = h / (2 * h_before) if h < math.inf else 0.0
        x = _flow(x, x0 + lean * (x0 - before), now, to)
        before, h_before = x0, h
    return x


class Solver(NamedTuple):
    """A sampler, its order of convergence (in law if stochastic), and its source."""

    function: Sampler
    order: int
    stochastic: bool
    source: str


SAMPLERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm, 1, True, "Ho et al. 2020, algorithm 2"),
    "ddim": Solver(ddim, 1, False, "Song et al. 2021 (DDIM), eq. 12"),
    "euler": Solver(euler, 1, False, "Karras et al. 2022, algorithm 1, first order"),
    "heun": Solver(heun, 2, False, "Karras et al. 2022, algorithm 1"),
    "dpmpp_2m": Solver(dpmpp_2m, 2, False, "Lu et al. 2022 (DPM-Solver++), algorithm 2"),
}
