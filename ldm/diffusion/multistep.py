"""Samplers that estimate x0, or the noise in x, from the outputs of several steps (linear multistep methods)."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.ode import weighted_sum
from ldm.diffusion.sde import CLEAN_LEVEL, NoiseLevel
from ldm.diffusion.singlestep import HEUN_MIN_RHO
from ldm.diffusion.steps import (
    FEW_STEPS,
    HALF_PARABOLA,
    PUBLISHED_PARABOLA,
    WHOLE_PARABOLA,
    History,
    Parabola,
    SamplerCoroutine,
    ddim_step,
    extrapolate_x0,
    h_of,
    is_last_of_few,
    mean_of_interpolant,
    multistep_weights,
    noise_in,
    ode_step,
    rho_of,
    slope_step,
)
from ldm.diffusion.timesteps import TimeGrid
from ldm.rng import Noise


def lms(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """Adams and Bashforth's four-step method in x/alpha, u = sigma/alpha, on any grid: k-diffusion's `sample_lms`.

        x'/alpha' = x/alpha + int_u^u' p,      p the cubic through the last four slopes e = (x - alpha x0) / sigma

    The steps have order 4, but the start is Euler's, so the method is of order 2 overall.
    """
    past: list[tuple[float, Tensor]] = []
    for now, to in pairwise(grid):
        x0 = yield x, now
        e = mean = noise_in(x, x0, now)
        if now.alpha > 0:
            u, change = now.sigma_over_alpha, to.sigma_over_alpha - now.sigma_over_alpha
            past = [(u, e), *past[:3]]
            weights = multistep_weights([v - u for v, _ in past], change, 0.0)
            mean = weighted_sum(weights, [slope for _, slope in past])
        x = slope_step(x0, e, mean, now, to)
    return x


def plms(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """Adams and Bashforth's four-step method for equal steps, as it is, on any grid; the first step is Heun's.

    Liu et al. 2022 (PNDM), F-PNDM with the pseudo improved Euler start of Stable Diffusion's first sampler: "PLMS", and
    diffusers' PNDMScheduler with `skip_prk_steps`. The slopes e are weighted by steps, and moved by DDIM's formula, so
    that the order is 2.
    """
    past: list[Tensor] = []
    for now, to in pairwise(grid):
        x0 = yield x, now
        e = mean = noise_in(x, x0, now)
        if is_too_long(now, to):
            past = []
        elif to.sigma > 0 and not past:
            x_end = ode_step(x, x0, now, to)
            mean = (e + noise_in(x_end, (yield x_end, to), to)) / 2
            past = [e]
        else:
            past = [e, *past[:3]]
            mean = weighted_sum(ADAMS_BASHFORTH[len(past)], past)
        x = slope_step(x0, e, mean, now, to)
    return x


def pndm(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """`plms` after three steps of Runge and Kutta's method, four evaluations each: Liu et al. 2022 (PNDM), eqs. 11-14.

    diffusers' PNDMScheduler without `skip_prk_steps`. Its halves of a step are of timesteps, rounded down.
    """
    past: list[Tensor] = []
    for now, to in pairwise(grid):
        x0 = yield x, now
        e = mean = noise_in(x, x0, now)
        past = [] if is_too_long(now, to) else [e, *past[:3]]
        if 0 < len(past) < 4 and to.sigma > 0:
            middle, slope, slopes = middle_timestep(grid, now, to), e, [e]
            for level in (middle, middle, to):
                y = slope_step(x0, e, slope, now, level)
                slope = noise_in(y, (yield y, level), level)
                slopes.append(slope)
            mean = weighted_sum([1 / 6, 1 / 3, 1 / 3, 1 / 6], slopes)
        elif past:
            mean = weighted_sum(ADAMS_BASHFORTH[len(past)], past)
        x = slope_step(x0, e, mean, now, to)
    return x


# of `is_too_long`: Stable Diffusion's own grids keep within both, from four steps on
MAX_PLMS_SIGMA, PLMS_MIN_RHO = 2.0, 0.05
ADAMS_BASHFORTH = {  # by the number of slopes, the newest first
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def is_too_long(level: NoiseLevel, next_level: NoiseLevel) -> bool:
    """Whether a step is one that no mean of slopes is good for: its slope stays as it is.

    Where there is more noise than image, slopes differ by little, times a change of sigma/alpha that is many times x.
    """
    rho = rho_of(level, next_level)
    return 0 < rho < (PLMS_MIN_RHO if level.sigma_over_alpha < MAX_PLMS_SIGMA else HEUN_MIN_RHO)


def middle_timestep(grid: TimeGrid, level: NoiseLevel, next_level: NoiseLevel) -> NoiseLevel:
    """The level halfway in timesteps, by whole ones where the step is of two or more."""
    start, end = (grid.sde.timestep(p.t) for p in (level, next_level))
    half, whole = (start - end) / 2, round(start - end)
    return grid.sde.level_at_timestep(start - (whole // 2 if whole > 1 and abs(2 * half - whole) < 1e-6 else half))


def deis(x: Tensor, grid: TimeGrid, noise: Noise, order: int = 2) -> SamplerCoroutine:
    """x'/alpha' = x/alpha + int_u^u' p, p the polynomial in log u through the last `order` slopes e, u = sigma/alpha.

    Zhang & Chen 2023 (DEIS), log-rho tAB, as in diffusers: it starts with Euler's step, so the order is 2 at most, and
    ends with lower orders in fewer than 15 steps. Steps from zero SNR and to the clean image are Euler's.
    """
    history: History = []
    for k, (now, to) in enumerate(pairwise(grid), start=1):
        x0 = yield x, now
        e = mean = noise_in(x, x0, now)
        if h_of(now, to) < math.inf:
            history = [(now, e), *history[: order - 1]]
            left = len(grid) - k if len(grid) <= FEW_STEPS else order
            mean = mean_of_interpolant(history[:left], now, to, rate=-1.0)
        x = slope_step(x0, e, mean, now, to)
    return x


def _multistep(
    x: Tensor,
    grid: TimeGrid,
    noise: Noise,
    order: int,
    eta: float = 0.0,
    s_noise: float = 1.0,
    parabola: Parabola = WHOLE_PARABOLA,
) -> SamplerCoroutine:
    """DDIM's step with x0 extrapolated from the last `order` outputs, or as it is from zero SNR and to the end.

    eta scales the noise of the SDE, as in k-diffusion: a share sqrt(1 - e^(-2 eta h)) is fresh.
    """
    history: History = []
    for now, to in pairwise(grid):
        x0 = yield x, now
        if h_of(now, to) < math.inf:
            history = [] if is_last_of_few(grid, to) else history[: order - 1]
            history = [(now, x0), *history]
            x0 = extrapolate_x0(history, now, to, 1 + eta, parabola)
        squared = rho_of(now, to) ** 2
        x = ddim_step(x, x0, now, to, noise, math.sqrt((1 - squared**eta) / (1 - squared)), s_noise)
    return x


def dpmpp_2m(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """x0 extrapolated to the middle of the step in log-SNR: x0 + h / (2 h_before) (x0 - x0_before).

    Lu et al. 2022 (DPM-Solver++), algorithm 2. The first step, the one after zero SNR (h_before infinite)
    and the last (h infinite) take x0 as it is.
    """
    return _multistep(x, grid, noise, 2)


def dpmpp_2m_sde(x: Tensor, grid: TimeGrid, noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> SamplerCoroutine:
    """DPM-Solver++(2M)'s x0 in DDPM's step: Lu et al. 2022's SDE-DPM-Solver++(2M), the midpoint form.

    x' = sigma'/sigma e^-h x + alpha' (1 - e^(-2 h)) m + sigma' sqrt(1 - e^(-2 h)) z,
    m = x0 + h / (2 h_before) (x0 - x0_before)
    """
    return _multistep(x, grid, noise, 2, eta, s_noise)


def dpmpp_3m(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """The mean over the step of the parabola in log-SNR through the last three x0.

    Lu et al. 2022 (DPM-Solver++), 3M of the authors' code. That (and diffusers') halves the parabola's second
    derivative, which leaves order 2; this is the exact mean. The first step is DPM-Solver++(2S)'s.
    """
    history: History = []
    for now, to in pairwise(grid):
        x0 = yield x, now
        if h_of(now, to) < math.inf:
            history = [(now, x0), *history[:2]]
            if len(history) > 1:
                x0 = extrapolate_x0(history, now, to)
            else:
                (middle,) = grid.sde.levels_between([now], [to])
                x0 = yield ode_step(x, x0, now, middle), middle
        x = ode_step(x, x0, now, to)
    return x


def dpmpp_3m_published(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """DPM-Solver++(3M) as its authors' code and diffusers compute it: half the parabola's curvature, so of order 2.

    It starts with DDIM's step and 2M's, and ends with 2M's and DDIM's in fewer than 15 steps.
    """
    history: History = []
    for k, (now, to) in enumerate(pairwise(grid), start=1):
        x0 = yield x, now
        if h_of(now, to) < math.inf:
            history = [(now, x0), *history[:2]]
            most = min(3, len(grid) - k) if len(grid) <= FEW_STEPS else 3
            x0 = extrapolate_x0(history[:most], now, to, parabola=PUBLISHED_PARABOLA)
        x = ode_step(x, x0, now, to)
    return x


def dpmpp_3m_sde(x: Tensor, grid: TimeGrid, noise: Noise, eta: float = 1.0, s_noise: float = 1.0) -> SamplerCoroutine:
    """DPM-Solver++(3M)'s parabola, averaged with the weight of the reverse SDE, in DDPM's step.

    k-diffusion's `sample_dpmpp_3m_sde`, but a line where its parabola is continued too far.
    """
    return _multistep(x, grid, noise, 3, eta, s_noise, HALF_PARABOLA)


def unipc(x: Tensor, grid: TimeGrid, noise: Noise, order: int = 2) -> SamplerCoroutine:
    """Predict with the last `order` x0, and correct the step once x0 at its end is known; one evaluation a step.

    Zhao et al. 2023 (UniPC), algorithms 1 and 2 for x0, with B(h) = e^h - 1: both take the mean over the step of the
    polynomial through the outputs, of which the corrector has one more; the middle of the line through two. The
    corrector lifts UniPC-2 to order 3; UniPC-3 stays at 3: its first step is the trapezoidal rule. The step before the
    one to the clean image is of order 2 at most, as in the authors' code.
    """
    history: History = []
    start = x
    for now, to in pairwise(grid):
        x0 = yield x, now
        if history:
            before, x0_before = history[0]
            use_interpolant = len(history) > 1
            mean = mean_of_interpolant([(now, x0), *history], before, now) if use_interpolant else (x0 + x0_before) / 2
            x = ode_step(start, mean, before, now)
        start = x
        if h_of(now, to) < math.inf:
            order = min(order, 2) if grid[-2:] == (to, CLEAN_LEVEL) else order
            order = 1 if is_last_of_few(grid, to) else order
            history = [(now, x0), *history[: order - 1]]
            x0 = extrapolate_x0(history, now, to)
        x = ode_step(x, x0, now, to)
    return x
