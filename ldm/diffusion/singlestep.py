"""Samplers of the probability flow whose steps know nothing of those before them, and the adaptive one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.ode import DOPRI5_NODES, dopri5_step, velocity
from ldm.diffusion.sde import NoiseLevel
from ldm.diffusion.steps import (
    MAX_EXTRAPOLATED_H,
    History,
    Sampler,
    SamplerCoroutine,
    ddim_step,
    h_of,
    mean_of_interpolant,
    ode_step,
    rho_of,
)
from ldm.diffusion.timesteps import TimeGrid
from ldm.rng import Noise

HEUN_MIN_RHO = 0.2  # longer steps, to a fifth of sigma/alpha or less, are no business of a line in sigma/alpha
MIDPOINT_SIGMA = 0.6  # sigma/alpha where an image forms, and above


def ddim(x: Tensor, grid: TimeGrid, noise: Noise, eta: float = 0.0, s_noise: float = 1.0) -> SamplerCoroutine:
    """x' = alpha' x0 + sigma' (sqrt(1 - f^2) e + f z), f = eta sqrt(1 - rho^2).

    Song et al. 2021 (DDIM), eqs. 12 and 16. Fresh noise z ~ N(0, I) replaces a share of the noise in x,
    e = (x - alpha x0) / sigma; none for eta = 0. `partial(ddim, eta=.5)` is a sampler; eta lies in [0, 1].
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        x = ddim_step(x, x0, now, to, noise, eta, s_noise)
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


def middle_levels(grid: TimeGrid, eta: float) -> list[NoiseLevel | None]:
    """For each step the middle in log-SNR of what the flow covers: down to u_down = sqrt(1 - f^2) u' (`ddim_step`).

    None from zero SNR and to u_down = 0. One bisection for all steps.
    """
    u = [level.sigma_over_alpha for level in grid]
    downs = [b * math.sqrt(1 - eta**2 * (1 - (b / a) ** 2)) for a, b in pairwise(u)]
    finite = [k for k, down in enumerate(downs) if down > 0 and u[k] < math.inf]
    middles: list[NoiseLevel | None] = [None] * len(downs)
    levels = grid.sde.levels_at_sigmas([math.sqrt(u[k] * downs[k]) for k in finite])
    for k, level in zip(finite, levels, strict=True):
        middles[k] = level
    return middles


def two_stage(
    x: Tensor,
    grid: TimeGrid,
    noise: Noise,
    eta: float = 0.0,
    s_noise: float = 1.0,
    weight: Callable[[NoiseLevel, NoiseLevel], float] = lambda now, middle: 1.0,
) -> SamplerCoroutine:
    """x0 + w (x0_middle - x0) for x0 in DDIM's step; the middle is reached by the flow with x0 of the step's start.

    With eta, the flow goes to the noise scale that is left before fresh noise is added. From zero SNR and to the clean
    image the step is DDIM's.
    """
    for (now, to), middle in zip(pairwise(grid), middle_levels(grid, eta), strict=True):
        x0 = yield x, now
        if middle is not None:
            x0_middle = yield ode_step(x, x0, now, middle), middle
            w = weight(now, middle)
            x0 = x0_middle if w == 1 else x0 + w * (x0_middle - x0)
        x = ddim_step(x, x0, now, to, noise, eta, s_noise)
    return x


def dpmpp_2s(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """x0 at the middle of the step in log-SNR, reached with x0 of its start; two evaluations a step.

    Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2. From zero SNR and to the clean image: DDIM.
    """
    return two_stage(x, grid, noise)


def dpmpp_2s_ancestral(
    x: Tensor, grid: TimeGrid, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> SamplerCoroutine:
    """DPM-Solver++(2S) down to u_down, then noise up to u': k-diffusion's `sample_dpmpp_2s_ancestral`.

    Noise added to the exact law at u_down gives that at u', so the order in law is the solver's.
    """
    return two_stage(x, grid, noise, eta, s_noise)


def midpoint_weight(now: NoiseLevel, middle: NoiseLevel, min_rho: tuple[float, float] = (0.2, 0.45)) -> float:
    """u / u_middle: x0 + w (x0_middle - x0) in Euler's step makes it a step with the slope at the middle.

    1 where that is far beyond both outputs: where sigma/alpha falls to less than `min_rho` of itself, which are bounds
    below and above `MIDPOINT_SIGMA`. Stable Diffusion's own grids keep within those here from ten steps on.
    """
    rho = rho_of(now, middle)
    return 1 / rho if rho > min_rho[now.sigma_over_alpha > MIDPOINT_SIGMA] else 1.0


def dpm_2(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """The midpoint rule in x/alpha, u = sigma/alpha, its midpoint the geometric mean: k-diffusion's `sample_dpm_2`.

    Karras et al. 2022, algorithm 3 with alpha = 1/2, but for the midpoint. Two evaluations a step.
    """
    return two_stage(x, grid, noise, weight=midpoint_weight)


def dpm_2_ancestral(
    x: Tensor, grid: TimeGrid, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> SamplerCoroutine:
    """`dpm_2` down to u_down, then noise up to u': k-diffusion's `sample_dpm_2_ancestral`."""
    return two_stage(x, grid, noise, eta, s_noise, partial(midpoint_weight, min_rho=(0.02, 0.62)))


def dpmpp_sde(x: Tensor, grid: TimeGrid, noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> SamplerCoroutine:
    """DDIM's noisy step to the middle in log-SNR, then over the whole step with x0 from there.

    k-diffusion's `sample_dpmpp_sde` (r = 1/2), Lu et al. 2022's SDE-DPM-Solver++(2S); both read one Brownian
    path.
    """
    middles = middle_levels(grid, 0.0)
    for (now, to), middle in zip(pairwise(grid), middles, strict=True):
        x0 = yield x, now
        if middle is not None:
            x0 = yield ddim_step(x, x0, now, middle, noise, eta, s_noise), middle
        x = ddim_step(x, x0, now, to, noise, eta, s_noise)
    return x


def dpmpp_singlestep(x: Tensor, grid: TimeGrid, noise: Noise, order: int = 2) -> SamplerCoroutine:
    """Blocks of `order` steps, each from the block's start, with x0 of the steps so far; one evaluation a step.

    Lu et al. 2022 (DPM-Solver++) with the grid's own levels as inner points, as in diffusers: first DDIM; then, from
    the block's start, the middle of the line through two outputs; then the mean of the line through the first and
    third. To the clean image, from zero SNR and over steps too long for a line a block begins.
    """
    history: History = []
    for now, to in pairwise(grid):
        x0 = yield x, now
        h = h_of(now, to)
        is_long = h > MAX_EXTRAPOLATED_H and (to.sigma == 0 or now.sigma_over_alpha > MIDPOINT_SIGMA)
        if len(history) == order or is_long or (history and history[-1][0].alpha == 0):
            history = []
        if not history:
            start = x
        history = [(now, x0), *history]
        begin, first = history[-1]
        if len(history) == 2:
            x0 = first + h_of(begin, to) / (2 * h_of(begin, now)) * (x0 - first)
        elif len(history) == 3:
            x0 = mean_of_interpolant([history[0], history[-1]], begin, to)
        x = ode_step(start, x0, begin, to)
        if is_long:
            history = []
    return x


def with_churn(
    sampler: Sampler,
    x: Tensor,
    grid: TimeGrid,
    noise: Noise,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> SamplerCoroutine:
    """Before each step that begins at u in [s_tmin, s_tmax], noise of s_noise up to u (1 + gamma); then the sampler.

        gamma = min(s_churn / n, sqrt(2) - 1),      n the number of steps

    Karras et al. 2022, algorithm 2; u = sigma/alpha. Noise is raised to the model's highest level at most.
    """
    if s_churn == 0:
        return (yield from sampler(x, grid, noise))
    gamma = min(s_churn / (len(grid) - 1), math.sqrt(2) - 1)
    churned = [now for now in grid[:-1] if s_tmin <= now.sigma_over_alpha <= s_tmax and now.alpha > 0]
    raised = grid.sde.levels_at_sigmas([now.sigma_over_alpha * (1 + gamma) for now in churned])
    start = dict(zip(churned, raised, strict=True))
    for now, to in pairwise(grid):
        higher = start.get(now, now)
        kept = higher.alpha / now.alpha if higher.t > now.t else 1.0
        if (variance := higher.sigma**2 - (kept * now.sigma) ** 2) > 0:
            x = kept * x + s_noise * math.sqrt(variance) * noise(x)
        x = yield from sampler(x, TimeGrid(grid.sde, (higher, to)), noise)
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
