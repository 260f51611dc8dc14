"""Inversion: from a picture to its noise and back, along the probability-flow ODE or by an exactly reversible scheme.

The flow is integrated in the angle phi, alpha = cos phi, sigma = sin phi, where its drift is the network's v:

    dx/dphi = v = (alpha x - E[x_0 | x]) / sigma

(Salimans & Ho 2022, appendix D), bounded from the clean picture to zero SNR. States are float64, whatever the network's
dtype: the way back then sees the numbers of the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.ode import DOPRI5_ERROR_WEIGHTS, DOPRI5_MATRIX, DOPRI5_NODES
from ldm.diffusion.sde import VPSDE, NoiseLevel, append_dims
from ldm.diffusion.timesteps import TimeGrid

InversionState = tuple[Tensor, ...]  # the noise, then whatever else the way back needs

# The exact scheme's states are whole multiples of QUANTUM below LARGEST: float64 adds and subtracts them without error.
FIXED_POINT_STEP = 2.0**-40
FIXED_POINT_MAX = 2.0**12

MIN_ANGLE_STEP = 1e-5  # step of phi: where one is too long still, rounding is what it sees


def solve_probability_flow(
    denoise: Denoise, x: Tensor, sde: VPSDE, start: NoiseLevel, end: NoiseLevel, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """x [B, ...] carried from one noise level to another, up or down, by the probability-flow ODE; float64.

    Dormand & Prince 1980, 5(4), in phi, with steps of each image's own: the root mean square of a step's error over
    atol + rtol |x| stays below 1 (Hairer et al. 1993, section II.4). Below the lowest level that networks learn,
    t = 1/steps, v is that level's: an error O(sigma^2) there. `denoise` is asked about one level per row. Raises
    ValueError for tolerances that are not positive or that no step can keep, and where an answer is not finite.
    """
    if not (0 < rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"rtol {rtol}, atol {atol}: must be above 0")
    begin, goal = start.angle, end.angle
    x, phi = x.double(), torch.full((len(x),), begin, dtype=torch.float64)
    longest = abs(goal - begin) / 10  # longer steps fool the error's estimate
    step = torch.full_like(phi, (goal - begin) / 20)
    slope = flow_velocity(denoise, x, _clamped_levels_at_angles(sde, phi))
    while (step != 0).any():
        y, ahead, error = dopri5_step(denoise, x, slope, sde, phi, step)
        scaled = error / (atol + rtol * torch.maximum(x.abs(), y.abs()))
        size = scaled.square().flatten(1).mean(1).sqrt().cpu()  # the one question to the device: may the step stand?
        if not size.isfinite().all():
            raise ValueError(
                f"the denoiser's answer is not finite near t = {_clamped_levels_at_angles(sde, phi)[0].t:.4f}"
            )
        if ((size > 1) & (step.abs() < MIN_ANGLE_STEP)).any():
            raise ValueError(
                f"no step near t = {_clamped_levels_at_angles(sde, phi)[0].t:.4f} keeps within rtol {rtol:g} and atol {atol:g}"
            )
        good = append_dims(size <= 1, x) > 0
        x, slope = torch.where(good, y, x), torch.where(good, ahead, slope)
        phi = torch.where(size <= 1, phi + step, phi)
        left = torch.where((goal - phi).abs() < 1e-12, 0, goal - phi).abs().clamp(max=longest)
        step = (step * (0.9 * size.clamp(min=1e-9) ** -0.2).clamp(0.2, 5)).clamp(-left, left)
    return x


def dopri5_step(
    denoise: Denoise, x: Tensor, slope: Tensor, sde: VPSDE, phi: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of each row from phi [B], where its slope is known: x there, the slope there, the error's estimate."""
    h, slopes, y = append_dims(step, x), [slope], x
    rows = _clamped_levels_at_angles(
        sde, (phi + step * torch.tensor(DOPRI5_NODES, dtype=torch.float64)[:, None]).flatten()
    )  # [6 B]
    for k, stage in enumerate(DOPRI5_MATRIX):
        y = x + h * _weighted_sum(stage, slopes)
        slopes.append(flow_velocity(denoise, y, rows[k * len(x) : (k + 1) * len(x)]))
    return y, slopes[-1], h * _weighted_sum(DOPRI5_ERROR_WEIGHTS, slopes)


def _weighted_sum(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * k for w, k in zip(weights, slopes, strict=True)]).sum(0)


def _clamped_levels_at_angles(sde: VPSDE, phi: Tensor) -> list[NoiseLevel]:
    """The noise levels at angles phi [B], none below t = 1/steps."""
    lowest = sde.level_at_timestep(0)
    return [max(point, lowest) for point in sde.levels_at_angles(phi.tolist())]


def flow_velocity(denoise: Denoise, x: Tensor, levels_per_row: Sequence[NoiseLevel]) -> Tensor:
    """v = (alpha x - E[x_0 | x]) / sigma, float64, with a level per row."""
    _, alpha, sigma = torch.tensor(levels_per_row, dtype=torch.float64).unbind(1)
    return (append_dims(alpha, x) * x - denoise(x, levels_per_row)) / append_dims(sigma, x)


def ode_encode(denoise: Denoise, x0: Tensor, grid: TimeGrid, rtol: float = 1e-5, atol: float = 1e-5) -> InversionState:
    """(x,) at the grid's first level: Song et al. 2021, section 4.3, by `solve_probability_flow`; only the grid's ends matter."""
    return (solve_probability_flow(denoise, x0, grid.sde, grid[-1], grid[0], rtol, atol),)


def ode_decode(
    denoise: Denoise, state: InversionState, grid: TimeGrid, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """x_0 from the noise of `ode_encode`, as near as the tolerances allow."""
    return solve_probability_flow(denoise, state[0], grid.sde, grid[0], grid[-1], rtol, atol)


def bdia_encode(denoise: Denoise, x0: Tensor, grid: TimeGrid) -> InversionState:
    """(x, x_below): x0 at the grid's first level, and at its second, from which `bdia_decode` returns x0 bit for bit.

    The explicit midpoint rule over pairs of steps, x_above = x_below + leap(x): BDIA (Zhang et al. 2023,
    arXiv 2307.10829) with gamma = 1, of order 2. The first step up has nothing below: Euler, corrected once; whatever
    it does, the way back returns to x0. x0 is rounded to multiples of 2^-40, which bounds the round trip's error by
    2^-41. Raises ValueError where x leaves (-4096, 4096).
    """
    below = round_to_fixed_point(x0.double())
    if len(grid) == 1:
        return below, below
    first = grid[-2]
    x = below
    for _ in range(2):
        x = below + bdia_increment(denoise(x, first), x, grid[-1], first, first)
    for low, now, high in zip(grid[:1:-1], grid[-2:0:-1], grid[-3::-1], strict=True):
        below, x = x, below + bdia_increment(denoise(x, now), x, low, now, high)
    if not (x.abs().amax() < FIXED_POINT_MAX and below.abs().amax() < FIXED_POINT_MAX):
        raise ValueError(
            f"inversion: the picture's noise is not finite, or beyond {FIXED_POINT_MAX:g}: take more steps"
        )
    return x, below


def bdia_decode(denoise: Denoise, state: InversionState, grid: TimeGrid) -> Tensor:
    """x0 from the state of `bdia_encode`: the same leaps, taken back."""
    above, x = state
    for high, now, low in zip(grid, grid[1:], grid[2:], strict=False):
        above, x = x, above - bdia_increment(denoise(x, now), x, low, now, high)
    return x


def bdia_increment(x0: Tensor, x: Tensor, low: NoiseLevel, middle: NoiseLevel, high: NoiseLevel) -> Tensor:
    """The flow's way from low to high for a fixed x0 and noise e = (x - alpha x0) / sigma, in whole quanta.

    (sigma_high - sigma_low) e + (alpha_high - alpha_low) x0
    """
    share = (high.sigma - low.sigma) / middle.sigma
    return round_to_fixed_point(share * x + (high.alpha - low.alpha - share * middle.alpha) * x0.double())


def round_to_fixed_point(x: Tensor) -> Tensor:
    return (x / FIXED_POINT_STEP).round() * FIXED_POINT_STEP


class InversionScheme(NamedTuple):
    """encode(denoise, x0, grid) -> state, decode(denoise, state, grid) -> x0, and their source."""

    encode: Callable[..., InversionState]
    decode: Callable[..., Tensor]
    source: str


INVERSION_SCHEMES: dict[str, InversionScheme] = {
    "exact": InversionScheme(bdia_encode, bdia_decode, "Zhang et al. 2023 (BDIA), gamma = 1"),
    "ode": InversionScheme(ode_encode, ode_decode, "Song et al. 2021, section 4.3; Dormand & Prince 1980"),
}


class RoundTrip(NamedTuple):
    """What a picture became, what came back, and by how much that is off: the worst and the root mean square [B]."""

    state: InversionState
    x0: Tensor
    max_error: Tensor
    rms_error: Tensor


def measure_round_trip(
    scheme: InversionScheme, denoise: Denoise, x0: Tensor, grid: TimeGrid, **options: float
) -> RoundTrip:
    """x0 [B, ...] to its noise and back; `build_variant_options` are the scheme's own. Errors are in units of x0, on the host."""
    state = scheme.encode(denoise, x0, grid, **options)
    back = scheme.decode(denoise, state, grid, **options)
    error = (back - x0).flatten(1)
    return RoundTrip(state, back, error.abs().amax(1).cpu(), error.square().mean(1).sqrt().cpu())
