"""Samplers that estimate x0, or the noise in x, from the outputs of several steps (linear multistep methods)."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from ldm.diffusion.ode import weighted_sum
from ldm.diffusion.sde import CLEAN_LEVEL
from ldm.diffusion.steps import (
    HALF_PARABOLA,
    PUBLISHED_PARABOLA,
    WHOLE_PARABOLA,
    History,
    Parabola,
    SamplerCoroutine,
    ddim_step,
    extrapolate_x0,
    h_of,
    mean_of_interpolant,
    multistep_weights,
    ode_step,
)
from ldm.diffusion.timesteps import TimeGrid
from ldm.rng import Noise


def lms(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """Adams and Bashforth's four-step method in x/alpha, u = sigma/alpha, on any grid: k-diffusion's `sample_lms`.

        x'/alpha' = x/alpha + int_u^u' p,      p the cubic through the last four slopes e = (x - alpha x0) / sigma

    The steps have order 4, but the start is Euler's, so the method is of order 2 overall. Written as
    Euler's step and what the mean slope adds to it; from zero SNR nothing is added.
    """
    past: list[tuple[float, Tensor]] = []
    for now, to in pairwise(grid):
        x0 = yield x, now
        e = (x - now.alpha * x0) / now.sigma
        x = to.alpha * x0 + to.sigma * e
        if now.alpha > 0:
            u, change = now.sigma_over_alpha, to.sigma_over_alpha - now.sigma_over_alpha
            past = [(u, e), *past[:3]]
            weights = multistep_weights([v - u for v, _ in past], change, 0.0)
            mean = weighted_sum(weights, [slope for _, slope in past])
            x = x + to.alpha * change * (mean - e)
    return x


def _multistep(
    x: Tensor,
    grid: TimeGrid,
    noise: Noise,
    order: int,
    eta: float = 0.0,
    rate: float = 1.0,
    parabola: Parabola = WHOLE_PARABOLA,
) -> SamplerCoroutine:
    """DDIM's step with x0 extrapolated from the last `order` outputs; steps from zero SNR and to the end take it as it
    is.
    """
    history: History = []
    for now, to in pairwise(grid):
        x0 = yield x, now
        if h_of(now, to) < math.inf:
            history = [(now, x0), *history[: order - 1]]
            x0 = extrapolate_x0(history, now, to, rate, parabola)
        x = ddim_step(x, x0, now, to, noise, eta)
    return x


def dpmpp_2m(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """x0 extrapolated to the middle of the step in log-SNR: x0 + h / (2 h_before) (x0 - x0_before).

    Lu et al. 2022 (DPM-Solver++), algorithm 2. The first step, the one after zero SNR (h_before infinite)
    and the last (h infinite) take x0 as it is.
    """
    return _multistep(x, grid, noise, 2)


def dpmpp_2m_sde(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """DPM-Solver++(2M)'s x0 in DDPM's step: Lu et al. 2022's SDE-DPM-Solver++(2M), the midpoint form.

    x' = sigma'/sigma e^-h x + alpha' (1 - e^(-2 h)) m + sigma' sqrt(1 - e^(-2 h)) z,
    m = x0 + h / (2 h_before) (x0 - x0_before)
    """
    return _multistep(x, grid, noise, 2, eta=1.0)


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

    It starts with DDIM's step and 2M's, and ends with 2M's in fewer than 15 steps.
    """
    history: History = []
    for k, (now, to) in enumerate(pairwise(grid), start=1):
        x0 = yield x, now
        if h_of(now, to) < math.inf:
            history = [(now, x0), *history[:2]]
            use_line = len(grid) <= 15 and k == len(grid) - 2
            x0 = extrapolate_x0(history[: 2 if use_line else 3], now, to, parabola=PUBLISHED_PARABOLA)
        x = ode_step(x, x0, now, to)
    return x


def dpmpp_3m_sde(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """DPM-Solver++(3M)'s parabola, averaged with the weight of the reverse SDE, in DDPM's step.

    k-diffusion's `sample_dpmpp_3m_sde` with eta = 1, but a line where its parabola is continued too far.
    """
    return _multistep(x, grid, noise, 3, eta=1.0, rate=2.0, parabola=HALF_PARABOLA)


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
            history = [(now, x0), *history[: order - 1]]
            x0 = extrapolate_x0(history, now, to)
        x = ode_step(x, x0, now, to)
    return x
