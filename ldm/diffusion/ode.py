"""Integrators of ODEs in the angle phi of the SDE, alpha = cos phi and sigma = sin phi.

In phi the probability flow is dx/dphi = v = (alpha x - E[x_0 | x]) / sigma (Salimans & Ho 2022, appendix D), which is
bounded from the clean image to zero SNR. `dopri5_step` is a coroutine, as samplers are: who drives it evaluates the
network. The two `integrate_` functions drive it, or classic Runge-Kutta steps, themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from ldm.diffusion.sde import VPSDE, NoiseLevel, NoiseLevels, alpha_sigma, append_dims

Drift = Callable[[Tensor, NoiseLevels], Tensor]  # (x [B, ...], one level or one per row) -> dx/dphi
Result = TypeVar("Result")
Levels = TypeVar("Levels", bound=NoiseLevels)

# Dormand & Prince 1980, table 2, RK5(4)7M: k_i = f(phi + NODES_i h, x + h sum_j MATRIX_ij k_j), k_0 = f(phi, x). The
# last x is the result, of order 5; h sum_j ERROR_j k_j is its difference to order 4; the last k is the next step's
# first.
DOPRI5_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
DOPRI5_MATRIX = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DOPRI5_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
MIN_ANGLE_STEP = 1e-5  # shorter steps see nothing but rounding


def velocity(x: Tensor, x0: Tensor, levels: NoiseLevels) -> Tensor:
    """v = (alpha x - x0) / sigma, the drift of the probability flow in phi.

    The target of v-prediction (diffusers' `get_velocity`) is in `ldm.diffusion.prediction`.
    """
    if isinstance(levels, NoiseLevel):
        return (levels.alpha * x - x0) / levels.sigma
    alpha, sigma = alpha_sigma(levels, x)
    return (alpha * x - x0) / sigma


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum_j w_j tensor_j, from left to right."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def drive(coroutine: Generator[tuple, Tensor, Result], evaluate: Callable[..., Tensor]) -> Result:
    """Send `evaluate(*what it yields)` back to a coroutine until it returns; its result."""
    try:
        yielded = next(coroutine)
        while True:
            yielded = coroutine.send(evaluate(*yielded))
    except StopIteration as end:
        return end.value


def dopri5_step(
    x: Tensor,
    slope: Tensor,
    h: float | Tensor,
    levels: Sequence[Levels],
    to_slope: Callable[[Tensor, Tensor, Levels], Tensor] = lambda x, slope, levels: slope,
) -> Generator[tuple[Tensor, Levels], Tensor, tuple[Tensor, Tensor, Tensor]]:
    """A step h (or one per row, shaped like x) from x, where the slope is known; `levels` are those of the nodes.

    Yields (x, levels); `to_slope(x, value, levels)` turns the value that is sent into dx/dphi. Returns x and the slope
    at the end of the step, and the error estimate.
    """
    slopes, y = [slope], x
    for row, level in zip(DOPRI5_MATRIX, levels, strict=True):
        y = x + h * weighted_sum(row, slopes)
        slopes.append(to_slope(y, (yield y, level), level))
    return y, slopes[-1], h * weighted_sum(DOPRI5_ERROR, slopes)


def integrate_adaptive(
    drift: Drift, x: Tensor, sde: VPSDE, start: NoiseLevel, end: NoiseLevel, rtol: float, atol: float
) -> Tensor:
    """x [B, ...] carried from one noise level to another, up or down, by dx/dphi = drift; float64.

    Dormand & Prince's steps, of each row's own length: the root mean square of a step's error over atol + rtol |x|
    stays below 1 (Hairer et al. 1993, section II.4). `drift` gets one level per row. ValueError for tolerances that are
    not positive or that no step keeps, and for a drift that is not finite.
    """
    if not (0 < rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"rtol {rtol}, atol {atol}: must be above 0")
    goal, x = end.angle, x.double()
    phi = torch.full((len(x),), start.angle, dtype=torch.float64)
    longest = abs(goal - start.angle) / 10  # longer steps fool the error estimate
    step = torch.full_like(phi, (goal - start.angle) / 20)
    slope = drift(x, sde.levels_at_angles(phi.tolist()))
    nodes = torch.tensor(DOPRI5_NODES, dtype=torch.float64)[:, None]
    while (step != 0).any():
        rows = sde.levels_at_angles((phi + step * nodes).flatten().tolist())  # [6 B]
        levels = [rows[k * len(x) : (k + 1) * len(x)] for k in range(len(nodes))]
        y, end_slope, error = drive(dopri5_step(x, slope, append_dims(step, x), levels), drift)
        scaled = error / (atol + rtol * torch.maximum(x.abs(), y.abs()))
        size = scaled.square().flatten(1).mean(1).sqrt().cpu()  # the one wait for the device: may the step stand?
        if not size.isfinite().all():
            raise ValueError(f"the denoiser's output is not finite near t = {levels[0][0].t:.4f}")
        if ((size > 1) & (step.abs() < MIN_ANGLE_STEP)).any():
            raise ValueError(f"no step near t = {levels[0][0].t:.4f} keeps within rtol {rtol:g} and atol {atol:g}")
        accepted = append_dims(size <= 1, x) > 0
        x, slope = torch.where(accepted, y, x), torch.where(accepted, end_slope, slope)
        phi = torch.where(size <= 1, phi + step, phi)
        left = torch.where((goal - phi).abs() < 1e-12, 0, goal - phi).abs().clamp(max=longest)
        step = (step * (0.9 * size.clamp(min=1e-9) ** -0.2).clamp(0.2, 5)).clamp(-left, left)
    return x


def integrate_rk4(drift: Drift, x: Tensor, sde: VPSDE, levels: Sequence[NoiseLevel]) -> Tensor:
    """x [B, ...] carried along noise levels by dx/dphi = drift, with a classic Runge-Kutta step between each two."""
    angles = [level.angle for level in levels]
    middles = sde.levels_at_angles([(a + b) / 2 for a, b in pairwise(angles)])
    for (level, next_level), (a, b), middle in zip(pairwise(levels), pairwise(angles), middles, strict=True):
        h = b - a
        k1 = drift(x, level)
        k2 = drift(x + h / 2 * k1, middle)
        k3 = drift(x + h / 2 * k2, middle)
        k4 = drift(x + h * k3, next_level)
        x = x + h / 6 * (k1 + 2 * (k2 + k3) + k4)
    return x
