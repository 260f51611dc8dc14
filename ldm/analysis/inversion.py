"""Inversion: from an image to its noise and back, along the probability-flow ODE or by an exactly reversible scheme.

States are float64, whatever the network's dtype: the way back then reads the numbers of the way out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.ode import integrate_adaptive, velocity
from ldm.diffusion.sde import VPSDE, NoiseLevel, NoiseLevels, clamp_levels
from ldm.diffusion.timesteps import TimeGrid

InversionState = tuple[Tensor, ...]  # the noise, then whatever else the way back needs

# The exact scheme's states are multiples of FIXED_POINT_STEP below FIXED_POINT_MAX: float64 adds them without error.
FIXED_POINT_STEP = 2.0**-40
FIXED_POINT_MAX = 2.0**12


def solve_probability_flow(
    denoise: Denoise, x: Tensor, sde: VPSDE, start: NoiseLevel, end: NoiseLevel, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """x [B, ...] carried from one noise level to another by the probability-flow ODE, as `integrate_adaptive` says.

    Below the lowest level that networks learn, t = 1 / num_train_timesteps, v is that level's: an error O(sigma^2).
    """
    lowest = sde.level_at_timestep(0)

    def drift(x: Tensor, levels: NoiseLevels) -> Tensor:
        known = clamp_levels(levels, lowest)
        return velocity(x, denoise(x, known), known)

    return integrate_adaptive(drift, x, sde, start, end, rtol, atol)


def ode_encode(denoise: Denoise, x0: Tensor, grid: TimeGrid, rtol: float = 1e-5, atol: float = 1e-5) -> InversionState:
    """(x,) at the grid's first level (Song et al. 2021, section 4.3); only the grid's ends matter."""
    return (solve_probability_flow(denoise, x0, grid.sde, grid[-1], grid[0], rtol, atol),)


def ode_decode(
    denoise: Denoise, state: InversionState, grid: TimeGrid, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """x_0 from the noise of `ode_encode`, to within the tolerances."""
    return solve_probability_flow(denoise, state[0], grid.sde, grid[0], grid[-1], rtol, atol)


def bdia_encode(denoise: Denoise, x0: Tensor, grid: TimeGrid) -> InversionState:
    """(x, x_below): x0 at the grid's first level, and at its second, from which `bdia_decode` returns x0 bit for bit.

    The explicit midpoint rule over pairs of steps, x_above = x_below + `bdia_increment`(x): BDIA (Zhang et al. 2023,
    arXiv 2307.10829) with gamma = 1, of order 2. The first step up has nothing below: Euler's, corrected once; any
    such step is undone by the way back. x0 is rounded to multiples of 2^-40, which bounds the round trip's error by
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
        raise ValueError(f"inversion: the noise is not finite, or beyond {FIXED_POINT_MAX:g}: take more steps")
    return x, below


def bdia_decode(denoise: Denoise, state: InversionState, grid: TimeGrid) -> Tensor:
    """x0 from the state of `bdia_encode`: the same increments, subtracted."""
    above, x = state
    for high, now, low in zip(grid, grid[1:], grid[2:], strict=False):
        above, x = x, above - bdia_increment(denoise(x, now), x, low, now, high)
    return x


def bdia_increment(x0: Tensor, x: Tensor, low: NoiseLevel, middle: NoiseLevel, high: NoiseLevel) -> Tensor:
    """The flow's change from low to high for a fixed x0 and noise e = (x - alpha x0) / sigma, in fixed point.

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
    """The noise of an image, the x0 decoded from it, and its error: maximum and root mean square [B]."""

    state: InversionState
    x0: Tensor
    max_error: Tensor
    rms_error: Tensor


def measure_round_trip(
    scheme: InversionScheme, denoise: Denoise, x0: Tensor, grid: TimeGrid, **options: float
) -> RoundTrip:
    """x0 [B, ...] to its noise and back; `options` are the scheme's own. Errors are in units of x0, on the host."""
    state = scheme.encode(denoise, x0, grid, **options)
    back = scheme.decode(denoise, state, grid, **options)
    error = (back - x0).flatten(1)
    return RoundTrip(state, back, error.abs().amax(1).cpu(), error.square().mean(1).sqrt().cpu())
