"""Samplers: coroutines that evaluate the denoiser by `x0 = yield x, level` and return the sample.

The deterministic ones move x to the next noise level as the probability-flow ODE does for a fixed x0,

    x' = sigma'/sigma x + alpha' (1 - rho) x0,      rho = (sigma'/alpha') / (sigma/alpha) = exp(-h),

where h is half the gain of log-SNR, and differ in their estimate of x0. The exact step uses the mean of x0 over it,
weighted by e^s, s = the gain of log(alpha/sigma) since its start, or by e^(2 s) for the reverse SDE (Lu et al. 2022
(DPM-Solver++), proposition 4.1 and, for SDEs, section 5). Both from zero SNR (alpha = 0) and to the clean image (sigma'
= 0) rho is 0 and all formulas are finite; such steps take x0 as it is. Coefficients are host floats, and x keeps its
dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.ode import DOPRI5_NODES, dopri5_step, drive, velocity, weighted_sum
from ldm.diffusion.sde import CLEAN_LEVEL, NoiseLevel
from ldm.diffusion.timesteps import TimeGrid
from ldm.rng import Noise

HEUN_MIN_RHO = 0.2  # longer steps, to a fifth of sigma/alpha or less, are no business of a line in sigma/alpha
MAX_EXTRAPOLATED_H = 2.2  # nor are steps to a ninth of it any of outputs before them: x0 is taken as it is
MAX_EULER_STEP = 0.5  # of the reverse SDE, as a share of the variance of the noise in x: longer ones overshoot
# yields (x, level), is sent E[x_0 | x], returns x
SamplerCoroutine = Generator[tuple[Tensor, NoiseLevel], Tensor, Tensor]
Sampler = Callable[[Tensor, TimeGrid, Noise], SamplerCoroutine]
History = list[tuple[NoiseLevel, Tensor]]  # (level, denoiser output), the newest first


def sample(sampler: Sampler, denoise: Denoise, x: Tensor, grid: TimeGrid, noise: Noise) -> Tensor:
    """Run a sampler on a batch x [B, ...] through a grid; ValueError for a denoiser output that is not finite.

    For text-to-image x is N(0, I) whatever the first level. (diffusers' Euler and Heun scale it by their
    first sigma with linspace and trailing spacing: by .9977 for Stable Diffusion.)
    """
    return drive(check_finite(sampler)(x, grid, noise), denoise)


def check_finite(sampler: Sampler) -> Sampler:
    """The same sampler, with a ValueError that names the first denoiser output that is not finite.

    Each output leaves one flag on its device; the host reads all flags at once, after the last step.
    """

    def steps(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
        levels, finite = [], []
        inner = sampler(x, grid, noise)
        try:
            x, level = next(inner)
            while True:
                x0 = yield x, level
                levels.append(level)
                finite.append(x0.flatten(1).isfinite().all(1))
                x, level = inner.send(x0)
        except StopIteration as end:
            x = end.value
        if finite and not (good := torch.stack(finite)).all():
            k, row = (~good).nonzero()[0].tolist()
            where = f"row {row}: the denoiser's output {k + 1} of {len(levels)}, at t = {levels[k].t:.4g},"
            raise ValueError(f"{where} is not finite")
        return x

    return steps


def _rho(level: NoiseLevel, next_level: NoiseLevel) -> float:
    return (level.alpha / level.sigma) * (next_level.sigma / next_level.alpha)


def _h(level: NoiseLevel, next_level: NoiseLevel) -> float:
    rho = _rho(level, next_level)
    return -math.log(rho) if rho > 0 else math.inf


def _ode_step(x: Tensor, x0: Tensor, level: NoiseLevel, next_level: NoiseLevel) -> Tensor:
    return next_level.sigma / level.sigma * x + next_level.alpha * (1 - _rho(level, next_level)) * x0


def _ddim_step(
    x: Tensor, x0: Tensor, level: NoiseLevel, next_level: NoiseLevel, noise: Noise, eta: float = 1.0
) -> Tensor:
    """DDIM's step: `_ode_step` with the share eta of the noise in x replaced by fresh noise."""
    fresh = eta * math.sqrt(1 - _rho(level, next_level) ** 2)
    kept = math.sqrt(1 - fresh**2) * next_level.sigma / level.sigma
    x = kept * x + (next_level.alpha - kept * level.alpha) * x0
    if fresh * next_level.sigma > 0:
        x = x + fresh * next_level.sigma * noise.between(x, level.sigma, next_level.sigma)
    return x


def _score(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    return (level.alpha * x0 - x) / level.sigma**2


GAUSS_NODES, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(24)  # exact to rounding for the steps of any usable grid


def _multistep_weights(nodes: Sequence[float], end: float, rate: float) -> list[float]:
    """w with sum_j w_j p(nodes_j) = the mean of p over [0, end] under e^(rate s), for polynomials p through the nodes.

    The means of Lagrange's basis by Gauss-Legendre quadrature: closed forms in e^-h lose every digit for small steps.
    """
    s = end * (GAUSS_NODES + 1) / 2
    density = GAUSS_WEIGHTS * np.exp(rate * (s - end))
    basis = [np.prod([(s - m) / (n - m) for m in nodes if m != n], axis=0) for n in nodes]
    return [float((density * b).sum() / density.sum()) for b in basis]


def _mean_of_interpolant(history: History, level: NoiseLevel, next_level: NoiseLevel) -> Tensor:
    """The mean over the step of the polynomial in log(alpha/sigma) through the whole history."""
    return weighted_sum(_interpolant_weights(history, level, next_level, 1.0), [x0 for _, x0 in history])


def _interpolant_weights(history: History, level: NoiseLevel, next_level: NoiseLevel, rate: float) -> list[float]:
    return _multistep_weights([_h(level, past) for past, _ in history], _h(level, next_level), rate)


def _half_parabola_weights(history: History, level: NoiseLevel, next_level: NoiseLevel, rate: float) -> list[float]:
    """As the weights of a parabola through three outputs, but with half its second derivative.

    The mean of the parabola and of its tangent at the step's start: what the published codes of 3M compute.
    """
    parabola = _interpolant_weights(history, level, next_level, rate)
    a, b = (_h(level, past) for past, _ in history[1:])
    slopes = [-(a + b) / (a * b), -b / (a * (a - b)), -a / (b * (b - a))]  # of Lagrange's basis at s = 0
    mean = _multistep_weights([0.0, 1.0], _h(level, next_level), rate)[1]  # of s
    return [(w + (j == 0) + mean * slope) / 2 for j, (w, slope) in enumerate(zip(parabola, slopes, strict=True))]


class Parabola(NamedTuple):
    """How x0 is extrapolated from three outputs: weights, the most of their absolute sum, and the longest step.

    Over a step much longer than the last, as grids in t have near the clean image, a parabola ends many times farther
    off than the outputs that it goes through. The sum is 3 + 3 + 1 at the end of a step as long as the last two.
    """

    weights: Callable[[History, NoiseLevel, NoiseLevel, float], list[float]]
    max_weight: float = math.inf
    max_h: float = math.inf


WHOLE_PARABOLA = Parabola(_interpolant_weights, 7.0, 1.5)
HALF_PARABOLA = Parabola(_half_parabola_weights, 4.0, 1.5)  # for SDEs, whose outputs scatter with the noise
PUBLISHED_PARABOLA = Parabola(_half_parabola_weights)


def _extrapolate_x0(
    history: History,
    level: NoiseLevel,
    next_level: NoiseLevel,
    rate: float = 1.0,
    parabola: Parabola = WHOLE_PARABOLA,
) -> Tensor:
    """The mean of x0 over the next step: by the last one, the middle of the line through two, or a parabola.

    The line is taken where the parabola is no good, and the last output where the step is longer than
    `MAX_EXTRAPOLATED_H`. The steps of a refined grid are short and alike, so the order stays.
    """
    x0, h = history[0][1], _h(level, next_level)
    if len(history) == 1 or h > MAX_EXTRAPOLATED_H:
        return x0
    if len(history) > 2 and h <= parabola.max_h:
        weights = parabola.weights(history, level, next_level, rate)
        if sum(map(abs, weights)) <= parabola.max_weight:
            return weighted_sum(weights, [x0 for _, x0 in history])
    before, x0_before = history[1]
    return x0 + h / (2 * _h(before, level)) * (x0 - x0_before)


def ddim(x: Tensor, grid: TimeGrid, noise: Noise, eta: float = 0.0) -> SamplerCoroutine:
    """x' = alpha' x0 + sigma' (sqrt(1 - f^2) e + f z), f = eta sqrt(1 - rho^2).

    Song et al. 2021 (DDIM), eqs. 12 and 16. Fresh noise z ~ N(0, I) replaces a share of the noise in x,
    e = (x - alpha x0) / sigma; none for eta = 0. `partial(ddim, eta=.5)` is a sampler; eta lies in [0, 1].
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        x = _ddim_step(x, x0, now, to, noise, eta)
    return x


def ddpm(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """Ancestral sampling, x' ~ q(x' | x, x0): Ho et al. 2020, algorithm 2, eqs. 6 and 7.

    The variance is that posterior's (beta-tilde): it lacks the spread of x_0 given x, to first order in the
    step. The last step adds no noise. This is DDIM with eta = 1.
    """
    return ddim(x, grid, noise, eta=1.0)


def euler_ancestral(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """Euler's step in u = sigma/alpha to u_down, then noise u_up z: k-diffusion's `sample_euler_ancestral`.

        u_up^2 = u'^2 (u^2 - u'^2) / u^2,      u_down^2 = u'^2 - u_up^2,      x'/alpha' = x0 + u_down e + u_up z

    u_down is rho u', and u_up = sqrt(1 - rho^2) u'. Times alpha' the step is DDPM's, exactly.
    """
    return ddpm(x, grid, noise)


def euler_maruyama(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """Euler and Maruyama's step of the reverse SDE in its own clock: x' = x + tau (x/2 + score) + sqrt(tau) z.

    Song et al. 2021, eq. 6 and section 4.1; tau = int beta dt = 2 log(alpha'/alpha). From zero SNR, where tau is
    infinite, and to the clean image the step is DDPM's.
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        tau = 2 * math.log(to.alpha / now.alpha) if now.alpha > 0 else math.inf
        if tau > MAX_EULER_STEP * now.sigma**2:
            x = _ddim_step(x, x0, now, to, noise)
        else:
            z = noise.between(x, now.sigma, to.sigma)
            x = x + tau * (x / 2 + _score(x, x0, now)) + math.sqrt(tau) * z
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
        rho = _rho(now, to)
        if rho > 0:
            x0_ahead = yield _ode_step(x, x0, now, to), to
            if rho < HEUN_MIN_RHO:
                x0 = _mean_of_interpolant([(to, x0_ahead), (now, x0)], now, to)
            else:
                x0 = x0 + (x0_ahead - x0) / (2 * rho)
        x = _ode_step(x, x0, now, to)
    return x


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
            weights = _multistep_weights([v - u for v, _ in past], change, 0.0)
            mean = weighted_sum(weights, [slope for _, slope in past])
            x = x + to.alpha * change * (mean - e)
    return x


def dpmpp_2s(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """x0 at the middle of the step in log-SNR, reached with x0 of its start; two evaluations a step.

    Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2. From zero SNR and to the clean image: DDIM.
    """
    finite = [(now, to) for now, to in pairwise(grid) if _h(now, to) < math.inf]
    starts, ends = [now for now, _ in finite], [to for _, to in finite]
    middles = dict(zip(finite, grid.sde.levels_between(starts, ends), strict=True))
    for now, to in pairwise(grid):
        x0 = yield x, now
        if (now, to) in middles:
            middle = middles[now, to]
            x0 = yield _ode_step(x, x0, now, middle), middle
        x = _ode_step(x, x0, now, to)
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
        if _h(now, to) < math.inf:
            history = [(now, x0), *history[: order - 1]]
            x0 = _extrapolate_x0(history, now, to, rate, parabola)
        x = _ddim_step(x, x0, now, to, noise, eta)
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
        if _h(now, to) < math.inf:
            history = [(now, x0), *history[:2]]
            if len(history) > 1:
                x0 = _extrapolate_x0(history, now, to)
            else:
                (middle,) = grid.sde.levels_between([now], [to])
                x0 = yield _ode_step(x, x0, now, middle), middle
        x = _ode_step(x, x0, now, to)
    return x


def dpmpp_3m_published(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """DPM-Solver++(3M) as its authors' code and diffusers compute it: half the parabola's curvature, so of order 2.

    It starts with DDIM's step and 2M's, and ends with 2M's in fewer than 15 steps.
    """
    history: History = []
    for k, (now, to) in enumerate(pairwise(grid), start=1):
        x0 = yield x, now
        if _h(now, to) < math.inf:
            history = [(now, x0), *history[:2]]
            use_line = len(grid) <= 15 and k == len(grid) - 2
            x0 = _extrapolate_x0(history[: 2 if use_line else 3], now, to, parabola=PUBLISHED_PARABOLA)
        x = _ode_step(x, x0, now, to)
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
            mean = _mean_of_interpolant([(now, x0), *history], before, now) if use_interpolant else (x0 + x0_before) / 2
            x = _ode_step(start, mean, before, now)
        start = x
        if _h(now, to) < math.inf:
            order = min(order, 2) if grid[-2:] == (to, CLEAN_LEVEL) else order
            history = [(now, x0), *history[: order - 1]]
            x0 = _extrapolate_x0(history, now, to)
        x = _ode_step(x, x0, now, to)
    return x


def predictor_corrector(x: Tensor, grid: TimeGrid, noise: Noise, r: float = 0.16) -> SamplerCoroutine:
    """A Langevin step at each level but the first, then the discretised reverse diffusion; two evaluations a step.

        x  <-  x + eps score + sqrt(2 eps) z,      eps = 2 (r |z| / |score|)^2        |.| of each image
        x' = (2 - sqrt(1 - b)) x + b score + sqrt(b) z,      1 - b = (alpha / alpha')^2

    Song et al. 2021, algorithms 3 and 5. Their factor 1 - b in eps, nearly 1 on their grid, is left out. The order is
    the predictor's; the corrector keeps each level's law up to r^2. The rule is for images of many dimensions: where
    |score| comes near 0 it is unbounded. From zero SNR and to the clean image the second step is DDPM's.
    """
    for k, (now, to) in enumerate(pairwise(grid)):
        x0 = yield x, now
        if k > 0:
            z, score = noise(x), _score(x, x0, now)
            eps = 2 * (r * _image_norm(z) / _image_norm(score)) ** 2
            x = x + eps * score + (2 * eps).sqrt() * z
            x0 = yield x, now
        kept = now.alpha / to.alpha
        b = 1 - kept**2
        if b > MAX_EULER_STEP * now.sigma**2:
            x = _ddim_step(x, x0, now, to, noise)
        else:
            z = noise.between(x, now.sigma, to.sigma)
            x = (2 - kept) * x + b * _score(x, x0, now) + math.sqrt(b) * z
    return x


def _image_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))


def langevin(x: Tensor, grid: TimeGrid, noise: Noise, eps: float = 0.3, steps_per_level: int = 3) -> SamplerCoroutine:
    """Annealed Langevin dynamics: at each level after the first x <- x + eps sigma^2 score + sqrt(2 eps) sigma z.

    Song & Ermon 2019, algorithm 1, `steps_per_level` times a level; sigma^2 is the variance of x given x0, so eps is
    the share of it that one step renews. Returns the denoiser's output at the last level.
    """
    for now, to in pairwise(grid):
        if to.sigma == 0:
            return (yield x, now)
        for _ in range(steps_per_level):
            x0 = yield x, to
            x = x + eps * to.sigma**2 * _score(x, x0, to) + math.sqrt(2 * eps) * to.sigma * noise(x)
    return x


def lcm(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """x' = alpha' x0 + sigma' z: multistep consistency sampling.

    Song et al. 2023 (consistency models), algorithm 1; Luo et al. 2023 (LCM). For networks that were distilled to give
    the end of the flow for x0: others, whose x0 is a mean, lose detail with every step.
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        x = to.alpha * x0 + to.sigma * noise(x) if to.sigma > 0 else x0
    return x


def tcd(x: Tensor, grid: TimeGrid, noise: Noise, gamma: float = 0.3) -> SamplerCoroutine:
    """DDIM's step to timestep s = floor((1 - gamma) k'), then noise up to the next one, k'.

    Zheng et al. 2024 (TCD), algorithm 4 (strategic stochastic sampling), for networks distilled so; gamma is diffusers'
    `eta`. The step to the clean image is DDIM's.
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        if to.sigma == 0:
            return x0
        s = grid.sde.level_at_timestep(math.floor((1 - gamma) * grid.sde.timestep(to.t) + 1e-6))
        kept = to.alpha / s.alpha
        x = kept * _ode_step(x, x0, now, s)
        if (fresh := to.sigma**2 - (kept * s.sigma) ** 2) > 0:
            x = x + math.sqrt(fresh) * noise(x)
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


class SamplerSpec(NamedTuple):
    """A sampler, its order of convergence (in law if stochastic), and its source.

    Order 0 is none: Langevin steps follow no SDE, and leave an error that more levels and repeats reduce. An `adaptive`
    sampler chooses its steps by the whole batch: an image is independent of others only in a batch of one. Those of
    `consistency` are for distilled networks. With fewer than `min_steps` there is no image yet.
    """

    function: Sampler
    order: int
    stochastic: bool
    source: str
    adaptive: bool = False
    consistency: bool = False
    min_steps: int = 1


SAMPLERS: dict[str, SamplerSpec] = {
    "ddpm": SamplerSpec(ddpm, 1, True, "Ho et al. 2020, algorithm 2"),
    "ddim": SamplerSpec(ddim, 1, False, "Song et al. 2021 (DDIM), eq. 12"),
    "euler": SamplerSpec(euler, 1, False, "Karras et al. 2022, algorithm 1, first order"),
    "euler_ancestral": SamplerSpec(euler_ancestral, 1, True, "k-diffusion, sample_euler_ancestral"),
    "euler_maruyama": SamplerSpec(euler_maruyama, 1, True, "Song et al. 2021, eq. 6"),
    "heun": SamplerSpec(heun, 2, False, "Karras et al. 2022, algorithm 1"),
    "lms": SamplerSpec(lms, 2, False, "k-diffusion, sample_lms"),
    "dpmpp_2s": SamplerSpec(dpmpp_2s, 2, False, "Lu et al. 2022 (DPM-Solver++), algorithm 1"),
    "dpmpp_2m": SamplerSpec(dpmpp_2m, 2, False, "Lu et al. 2022 (DPM-Solver++), algorithm 2"),
    "dpmpp_3m": SamplerSpec(dpmpp_3m, 3, False, "Lu et al. 2022 (DPM-Solver++), multistep 3M of the authors' code"),
    "dpmpp_3m_published": SamplerSpec(
        dpmpp_3m_published, 2, False, "diffusers, DPMSolverMultistepScheduler, solver_order 3"
    ),
    "dpmpp_2m_sde": SamplerSpec(dpmpp_2m_sde, 2, True, "Lu et al. 2022 (DPM-Solver++), SDE-DPM-Solver++(2M)"),
    "dpmpp_3m_sde": SamplerSpec(dpmpp_3m_sde, 2, True, "k-diffusion, sample_dpmpp_3m_sde"),
    "unipc_1": SamplerSpec(partial(unipc, order=1), 2, False, "Zhao et al. 2023 (UniPC), algorithms 1 and 2, p = 1"),
    "unipc": SamplerSpec(unipc, 3, False, "Zhao et al. 2023 (UniPC), algorithms 1 and 2, p = 2"),
    "unipc_3": SamplerSpec(partial(unipc, order=3), 3, False, "Zhao et al. 2023 (UniPC), algorithms 1 and 2, p = 3"),
    "lcm": SamplerSpec(lcm, 0, True, "Luo et al. 2023 (LCM)", consistency=True),
    "tcd": SamplerSpec(tcd, 0, True, "Zheng et al. 2024 (TCD), algorithm 4", consistency=True),
    "rk45": SamplerSpec(rk45, 5, False, "Dormand & Prince 1980, RK5(4)7M", adaptive=True),
    "predictor_corrector": SamplerSpec(predictor_corrector, 1, True, "Song et al. 2021, algorithms 3 and 5"),
    "langevin": SamplerSpec(langevin, 0, True, "Song & Ermon 2019, algorithm 1", min_steps=10),
}
