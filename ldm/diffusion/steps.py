"""What samplers share: the step of the probability flow, DDIM's step with fresh noise, and estimates of x0 over a step.

The deterministic samplers move x to the next noise level as the probability-flow ODE does for a fixed x0,

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
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ldm.diffusion.ode import weighted_sum
from ldm.diffusion.sde import NoiseLevel
from ldm.diffusion.timesteps import TimeGrid
from ldm.rng import Noise

MAX_EXTRAPOLATED_H = 2.2  # nor are steps to a ninth of it any of outputs before them: x0 is taken as it is
FEW_STEPS = 15  # with fewer, diffusers' multistep classes lower the order of the last ones
MAX_EULER_STEP = 0.5  # of the reverse SDE, as a share of the variance of the noise in x: longer ones overshoot
# yields (x, level), is sent E[x_0 | x], returns x
SamplerCoroutine = Generator[tuple[Tensor, NoiseLevel], Tensor, Tensor]
Sampler = Callable[[Tensor, TimeGrid, Noise], SamplerCoroutine]
History = list[tuple[NoiseLevel, Tensor]]  # (level, denoiser output), the newest first


def rho_of(level: NoiseLevel, next_level: NoiseLevel) -> float:
    return (level.alpha / level.sigma) * (next_level.sigma / next_level.alpha)


def h_of(level: NoiseLevel, next_level: NoiseLevel) -> float:
    rho = rho_of(level, next_level)
    return -math.log(rho) if rho > 0 else math.inf


def ode_step(x: Tensor, x0: Tensor, level: NoiseLevel, next_level: NoiseLevel) -> Tensor:
    return next_level.sigma / level.sigma * x + next_level.alpha * (1 - rho_of(level, next_level)) * x0


def ddim_step(
    x: Tensor,
    x0: Tensor,
    level: NoiseLevel,
    next_level: NoiseLevel,
    noise: Noise,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Tensor:
    """DDIM's step: `ode_step` with the share eta of the noise in x replaced by fresh noise, times s_noise.

    In x/alpha it is k-diffusion's ancestral step, to u_down = x0 + u_down e and then up: x0 + u_down e + u_up z, with
    u_up = f u', u_down = sqrt(1 - f^2) u', f = eta sqrt(1 - rho^2).
    """
    fresh = eta * math.sqrt(1 - rho_of(level, next_level) ** 2)
    kept = math.sqrt(1 - fresh**2) * next_level.sigma / level.sigma
    x = kept * x + (next_level.alpha - kept * level.alpha) * x0
    if fresh * next_level.sigma > 0:
        x = x + s_noise * fresh * next_level.sigma * noise.between(x, level.sigma, next_level.sigma)
    return x


def noise_in(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """e = (x - alpha x0) / sigma: the noise in x, which is the slope of x/alpha in sigma/alpha."""
    return (x - level.alpha * x0) / level.sigma


def slope_step(x0: Tensor, slope: Tensor, mean_slope: Tensor, level: NoiseLevel, next_level: NoiseLevel) -> Tensor:
    """x'/alpha' = x/alpha + (u' - u) m, with m the mean over the step of the slopes e in u = sigma/alpha.

    Written as the step with the slope at its start and what the mean adds to it; from zero SNR nothing is added.
    """
    x = next_level.alpha * x0 + next_level.sigma * slope
    if level.alpha == 0:
        return x
    change = next_level.sigma_over_alpha - level.sigma_over_alpha
    return x + next_level.alpha * change * (mean_slope - slope)


def score_at(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    return (level.alpha * x0 - x) / level.sigma**2


GAUSS_NODES, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(24)  # exact to rounding for the steps of any usable grid


def multistep_weights(nodes: Sequence[float], end: float, rate: float) -> list[float]:
    """w with sum_j w_j p(nodes_j) = the mean of p over [0, end] under e^(rate s), for polynomials p through the nodes.

    The means of Lagrange's basis by Gauss-Legendre quadrature: closed forms in e^-h lose every digit for small steps.
    """
    s = end * (GAUSS_NODES + 1) / 2
    density = GAUSS_WEIGHTS * np.exp(rate * (s - end))
    basis = [np.prod([(s - m) / (n - m) for m in nodes if m != n], axis=0) for n in nodes]
    return [float((density * b).sum() / density.sum()) for b in basis]


def mean_of_interpolant(history: History, level: NoiseLevel, next_level: NoiseLevel, rate: float = 1.0) -> Tensor:
    """The mean over the step of the polynomial in log(alpha/sigma) through the whole history."""
    return weighted_sum(interpolant_weights(history, level, next_level, rate), [x0 for _, x0 in history])


def interpolant_weights(history: History, level: NoiseLevel, next_level: NoiseLevel, rate: float) -> list[float]:
    return multistep_weights([h_of(level, past) for past, _ in history], h_of(level, next_level), rate)


def half_parabola_weights(history: History, level: NoiseLevel, next_level: NoiseLevel, rate: float) -> list[float]:
    """As the weights of a parabola through three outputs, but with half its second derivative.

    The mean of the parabola and of its tangent at the step's start: what the published codes of 3M compute.
    """
    parabola = interpolant_weights(history, level, next_level, rate)
    a, b = (h_of(level, past) for past, _ in history[1:])
    slopes = [-(a + b) / (a * b), -b / (a * (a - b)), -a / (b * (b - a))]  # of Lagrange's basis at s = 0
    mean = multistep_weights([0.0, 1.0], h_of(level, next_level), rate)[1]  # of s
    return [(w + (j == 0) + mean * slope) / 2 for j, (w, slope) in enumerate(zip(parabola, slopes, strict=True))]


class Parabola(NamedTuple):
    """How x0 is extrapolated from three outputs: weights, the most of their absolute sum, and the longest step.

    Over a step much longer than the last, as grids in t have near the clean image, a parabola ends many times farther
    off than the outputs that it goes through. The sum is 3 + 3 + 1 at the end of a step as long as the last two.
    """

    weights: Callable[[History, NoiseLevel, NoiseLevel, float], list[float]]
    max_weight: float = math.inf
    max_h: float = math.inf


WHOLE_PARABOLA = Parabola(interpolant_weights, 7.0, 1.5)
HALF_PARABOLA = Parabola(half_parabola_weights, 4.0, 1.5)  # for SDEs, whose outputs scatter with the noise
PUBLISHED_PARABOLA = Parabola(half_parabola_weights)


def is_last_of_few(grid: TimeGrid, next_level: NoiseLevel) -> bool:
    """Whether a step is the last of fewer than 15, to the model's lowest level: diffusers takes that by Euler.

    (`lower_order_final`; steps to the clean image are Euler's anyway.)
    """
    return next_level == grid[-1] == grid.sde.level_at_timestep(0) and len(grid) <= FEW_STEPS


def extrapolate_x0(
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
    x0, h = history[0][1], h_of(level, next_level)
    if len(history) == 1 or h > MAX_EXTRAPOLATED_H:
        return x0
    if len(history) > 2 and h <= parabola.max_h:
        weights = parabola.weights(history, level, next_level, rate)
        if sum(map(abs, weights)) <= parabola.max_weight:
            return weighted_sum(weights, [x0 for _, x0 in history])
    before, x0_before = history[1]
    return x0 + h / (2 * h_of(before, level)) * (x0 - x0_before)
