"""Samplers of the probability flow whose steps know nothing of those before them, and the adaptive one."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.ode import DOPRI5_NODES, dopri5_step, velocity
from ldm.diffusion.steps import SamplerCoroutine, ddim_step, h_of, mean_of_interpolant, ode_step, rho_of
from ldm.diffusion.timesteps import TimeGrid
from ldm.rng import Noise

HEUN_MIN_RHO = 0.2  # longer steps, to a fifth of sigma/alpha or less, are no business of a line in sigma/alpha


def ddim(x: Tensor, grid: TimeGrid, noise: Noise, eta: float = 0.0) -> SamplerCoroutine:
    """x' = alpha' x0 + sigma' (sqrt(1 - f^2) e + f z), f = eta sqrt(1 - rho^2).

    Song et al. 2021 (DDIM), eqs. 12 and 16. Fresh noise z ~ N(0, I) replaces a share of the noise in x,
    e = (x - alpha x0) / sigma; none for eta = 0. `partial(ddim, eta=.5)` is a sampler; eta lies in [0, 1].
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        x = ddim_step(x, x0, now, to, noise, eta)
    return x


def euler(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """Euler's step in x/alpha, sigma/alpha (Karras et al. 2022, algorithm 1 without the correction).

    The slope there is DDIM's noise estimate (x - alpha x0) / sigma, and the step is DDIM's, exactly.
    """
    return ddim(x, grid, noise)


def heun(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """Heun's step in x/alpha, sigma/alpha (Karras et al. 2022, algorithm 1); two evaluations a step.

    The mean of both ends' slopes is Euler's step with x0 + (x0_ahead - x0) / (2 rho) for x0. Where rho is below
    `HEUN_MIN_RHO` that extrapolates far beyond both (1e4 times their difference at the start of the cosine table), and
    x0 is the mean over the step of the line in log-SNR through them. From infinite sigma/alpha or into zero (rho = 0)
    one of the slopes is missing: Euler.
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        rho = rho_of(now, to)
        if rho > 0:
            x0_ahead = yield ode_step(x, x0, now, to), to
            if rho < HEUN_MIN_RHO:
                x0 = mean_of_interpolant([(to, x0_ahead), (now, x0)], now, to)
            else:
                x0 = x0 + (x0_ahead - x0) / (2 * rho)
        x = ode_step(x, x0, now, to)
    return x


def dpmpp_2s(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """x0 at the middle of the step in log-SNR, reached with x0 of its start; two evaluations a step.

    Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2. From zero SNR and to the clean image: DDIM.
    """
    finite = [(now, to) for now, to in pairwise(grid) if h_of(now, to) < math.inf]
    starts, ends = [now for now, _ in finite], [to for _, to in finite]
    middles = dict(zip(finite, grid.sde.levels_between(starts, ends), strict=True))
    for now, to in pairwise(grid):
        x0 = yield x, now
        if (now, to) in middles:
            middle = middles[now, to]
            x0 = yield ode_step(x, x0, now, middle), middle
        x = ode_step(x, x0, now, to)
    return x


def rk45(x: Tensor, grid: TimeGrid, noise: Noise, atol: float = 1e-4, rtol: float = 1e-4) -> SamplerCoroutine:
    """The probability flow by Dormand & Prince's 5(4) pair with adaptive steps, from grid[0] to the last noisy level.

    It is integrated in the angle phi, as `ldm.diffusion.ode` says. The local error of every image stays below
    atol + rtol |x|, as a root mean square; so images of one group share their steps, and each step waits for the device
    once, to read its error. The grid's first step is the first one tried. The step to the clean image is DDIM's. Raises
    ValueError where no step is small enough.
    """
    noisy = [level for level in grid if level.sigma > 0]
    if len(noisy) > 1:
        now, (phi, following, *_, end) = noisy[0], (level.angle for level in [*noisy[:2], noisy[-1]])
        h = following - phi
        v = velocity(x, (yield x, now), now)
        while phi - end > 1e-12:
            h = max(h, end - phi)
            levels = grid.sde.levels_at_angles([phi + node * h for node in DOPRI5_NODES])
            y, v_end, error = yield from dopri5_step(x, v, h, levels, velocity)
            error = error / (atol + rtol * torch.maximum(x.abs(), y.abs()))
            worst = error.flatten(1).square().mean(1).max().sqrt().item()
            if not worst < math.inf or abs(h) < 1e-9:
                raise ValueError(
                    f"rk45: no step from t = {levels[-1].t:.4g} keeps within atol {atol:g} and rtol {rtol:g}"
                )
            if worst <= 1:
                x, v, phi = y, v_end, phi + h
            h *= min(5.0, max(0.2, 0.9 * max(worst, 1e-8) ** -0.2))
    if noisy and len(noisy) < len(grid):
        x = yield x, noisy[-1]
    return x
