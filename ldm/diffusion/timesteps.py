"""Time grids (timestep spacings): the noise levels at which a sampler evaluates the network; each is one function of
times. N are the training timesteps (`num_train_timesteps`), n the sampling steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from ldm.diffusion.sde import CLEAN_LEVEL, VPSDE, NoiseLevel
from ldm.errors import list_some

# Where log-SNR(1) is lower (zero terminal SNR: -inf), karras and log_snr start here, a little before t = 1:
# sigma/alpha = 148, as much noise as the linear schedule of Song et al. ends with.
MIN_LOG_SNR = -10.0
MAX_BETA_SIGMA = 50.0
AYS_SIGMAS = {  # sigma/alpha of ten steps, as published
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
LCM_STEPS = 50  # `original_inference_steps` of diffusers
FINAL_SIGMAS_TYPES = "zero", "sigma_min"  # a grid ends at the clean image, or by `end_at_lowest`
MIN_START = 0.5  # x is N(0, I) at a grid's first time


class TimeGrid(tuple[NoiseLevel, ...]):
    """Noise levels of one SDE in descending noise; the last is `CLEAN_LEVEL`."""

    sde: VPSDE

    def __new__(cls, sde: VPSDE, levels: Iterable[NoiseLevel]) -> TimeGrid:
        self = super().__new__(cls, levels)
        self.sde = sde
        return self


Spacing = Callable[..., TimeGrid]  # (sde, n) -> n + 1 levels, for n steps


def make_spacing(times: Callable[..., Tensor]) -> Spacing:
    """A spacing from `times(sde, n)`: t [n], falling within [1/N, 1]; its grids end in `CLEAN_LEVEL`.

    ValueError for n < 1, for more steps than the times can tell apart or than networks know timesteps, and for a grid
    that would take pure noise for a half-clean image (`leading` with one step: for one at t = .002).
    """

    @functools.wraps(times)
    def grid(sde: VPSDE, n: int, **options: int) -> TimeGrid:
        if n < 1:
            raise ValueError(f"{n} steps: at least 1 is needed")
        t = times(sde, n, **options)
        total, name = sde.num_train_timesteps, f"{times.__name__!r} spacing"
        if not (t[0] <= 1 and t[-1] > (1 - 1e-6) / total and (t.diff() < 0).all()):
            raise ValueError(f"{n} steps: {name} has at most {total}, the model's training timesteps")
        if t[0] < MIN_START:
            raise ValueError(f"{n} step: {name} starts at t = {t[0]:.4g}, not in noise: choose trailing or more steps")
        return TimeGrid(sde, (*map(sde.level, t.tolist()), CLEAN_LEVEL))

    return grid


@make_spacing
def linspace(sde: VPSDE, n: int) -> Tensor:
    """Timesteps equally spaced from the last to 0, fractions kept, as in diffusers' Euler, Heun and LMS.

    diffusers' multistep classes (DPM-Solver, UniPC, DEIS) mean `sgm_linspace` by that name.
    """
    return (torch.linspace(sde.num_train_timesteps - 1, 0, n, dtype=torch.float64) + 1) / sde.num_train_timesteps


@make_spacing
def leading(sde: VPSDE, n: int, offset: int = 1) -> Tensor:
    """Every (N // n)-th index from `offset` on, N = `num_train_timesteps` (Song et al. 2021 (DDIM), appendix D.2)."""
    total = sde.num_train_timesteps
    return (torch.arange(n, dtype=torch.float64).flip(0) * (total // n) + offset + 1) / total


@make_spacing
def sgm_uniform(sde: VPSDE, n: int) -> Tensor:
    """The first n of n + 1 timesteps equally spaced from the last to 0, fractions kept: ComfyUI's and the web UI's."""
    total = sde.num_train_timesteps
    return (torch.linspace(total - 1, 0, n + 1, dtype=torch.float64)[:-1] + 1) / total


@make_spacing
def sgm_linspace(sde: VPSDE, n: int) -> Tensor:
    """`sgm_uniform` in whole timesteps: `linspace` of diffusers' multistep classes."""
    total = sde.num_train_timesteps
    return torch.from_numpy(np.linspace(0, total - 1, n + 1).round()[:0:-1] + 1) / total


@make_spacing
def sgm_leading(sde: VPSDE, n: int, offset: int = 1) -> Tensor:
    """The first n of n + 1 indices of `leading`: that spacing in diffusers' multistep classes."""
    total = sde.num_train_timesteps
    return (torch.arange(1, n + 1, dtype=torch.float64).flip(0) * (total // (n + 1)) + offset + 1) / total


@make_spacing
def trailing(sde: VPSDE, n: int) -> Tensor:
    """Indices N (1 - i/n) - 1, rounded: the last one first (Lin et al. 2024, table 2)."""
    total = sde.num_train_timesteps
    stride = (total - total / n) - total  # as numpy.arange computes it, so that .5 rounds as in diffusers
    return torch.tensor([round(total + i * stride) for i in range(n)]).double() / total


@make_spacing
def karras(sde: VPSDE, n: int) -> Tensor:
    """(sigma/alpha)^(1/7) equally spaced, t = 1 to 1/N: Karras et al. 2022, eq. 5 with rho = 7."""
    start, end = torch.exp(-log_snr_range(sde) / 2 / 7).tolist()
    return sde.time_at_log_snr(-2 * 7 * torch.linspace(start, end, n, dtype=torch.float64).log())


@make_spacing
def log_snr(sde: VPSDE, n: int) -> Tensor:
    """log-SNR equally spaced, t = 1 to 1/N: Lu et al. 2022 (DPM-Solver).

    log-SNR = -2 log(sigma/alpha): this is also k-diffusion's `exponential`, sigma/alpha in geometric progression.
    """
    start, end = log_snr_range(sde).tolist()
    return sde.time_at_log_snr(torch.linspace(start, end, n, dtype=torch.float64))


@make_spacing
def simple(sde: VPSDE, n: int) -> Tensor:
    """Every (N / n)-th of the training timesteps from the last one on, rounded up: ComfyUI's "simple"."""
    total = sde.num_train_timesteps
    return torch.tensor([total - int(i * (total / n)) for i in range(n)]).double() / total


@make_spacing
def kl_optimal(sde: VPSDE, n: int) -> Tensor:
    """The angle atan(sigma/alpha) equally spaced, t = 1 to 1/N: Sabour et al. 2024 (Align Your Steps), theorem 3.1."""
    start, end = torch.exp(-log_snr_range(sde) / 2).atan().tolist()
    return sde.time_at_log_snr(-2 * torch.linspace(start, end, n, dtype=torch.float64).tan().log())


@make_spacing
def ays(sde: VPSDE, n: int) -> Tensor:
    """Sabour et al. 2024 (Align Your Steps): their table for Stable Diffusion 1.5 (`AYS_SIGMAS`)."""
    return align_your_steps(sde, n, AYS_SIGMAS["ays"])


@make_spacing
def ays_sdxl(sde: VPSDE, n: int) -> Tensor:
    """`ays`, with the table for Stable Diffusion XL."""
    return align_your_steps(sde, n, AYS_SIGMAS["ays_sdxl"])


def align_your_steps(sde: VPSDE, n: int, table: Sequence[float]) -> Tensor:
    """The first n of n + 1 sigma/alpha on the line through log(table), as its authors interpolate ten steps."""
    positions = np.linspace(0, len(table) - 1, n + 1)[:-1]
    log_sigma = np.interp(positions, np.arange(len(table)), np.log(table))
    return sde.time_at_log_snr(-2 * torch.from_numpy(log_sigma))


@make_spacing
def beta(sde: VPSDE, n: int) -> Tensor:
    """Indices 0 to N - 1 by the quantiles of Beta(.6, .6), dense at both ends: Lee et al. 2024 (Beta Sampling).

    Quantiles 1, 1 - 1/n, ..., 1/n as in ComfyUI; fractions of an index are kept.
    """
    quantile = torch.from_numpy(betaincinv(0.6, 0.6, 1 - np.arange(n) / n))
    return (quantile * (sde.num_train_timesteps - 1) + 1) / sde.num_train_timesteps


@make_spacing
def beta_sigmas(sde: VPSDE, n: int) -> Tensor:
    """sigma/alpha by the quantiles of Beta(.6, .6) between its ends: diffusers' `use_beta_sigmas`.

    Lee et al. 2024 mean `beta`, quantiles of time. ValueError for schedules that start far above Stable Diffusion's
    sigma/alpha of 14.6: most steps would be spent there, and one would be left for the image.
    """
    start, end = torch.exp(-log_snr_range(sde) / 2)
    if start > MAX_BETA_SIGMA:
        raise ValueError(f"'beta_sigmas' spacing: sigma/alpha starts at {start:.4g}, too high for it: choose beta")
    quantile = torch.from_numpy(betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, n)))
    return sde.time_at_log_snr(-2 * (end + quantile * (start - end)).log())


@make_spacing
def lcm_timesteps(sde: VPSDE, n: int) -> Tensor:
    """n of the 50 timesteps that consistency models are distilled at: Luo et al. 2023 (LCM), as in diffusers."""
    if n > LCM_STEPS:
        raise ValueError(f"{n} steps: 'lcm' spacing has at most {LCM_STEPS}, those of distillation")
    total, chosen = sde.num_train_timesteps, np.floor(np.linspace(0, LCM_STEPS, n, endpoint=False))
    return torch.from_numpy((LCM_STEPS - chosen) * (total // LCM_STEPS)) / total


@make_spacing
def uniform(sde: VPSDE, n: int) -> Tensor:
    """t = 1 - i/n: equal steps of time down to the clean image, as in the chain (Ho et al. 2020)."""
    return 1 - torch.arange(n, dtype=torch.float64) / n


def log_snr_range(sde: VPSDE) -> Tensor:
    """log-SNR [2] at t = 1, or `MIN_LOG_SNR`, and at 1/N, the lowest level that networks learn."""
    return sde.log_snr(torch.tensor([1, 1 / sde.num_train_timesteps], dtype=torch.float64)).clamp(min=MIN_LOG_SNR)


def truncate_grid(grid: TimeGrid, strength: float) -> TimeGrid:
    """The last int(strength n) of n steps, one at least, for image-to-image (Meng et al. 2022).

    Strength 0 leaves `CLEAN_LEVEL` alone.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength}: between 0 and 1 is needed")
    steps = len(grid) - 1
    return TimeGrid(grid.sde, grid[steps - max(int(steps * strength), strength > 0) :])


def grid_at_timesteps(sde: VPSDE, timesteps: Sequence[float]) -> TimeGrid:
    """The grid of a network's timesteps, falling (diffusers' `timesteps=`); ValueError for any others."""
    total = sde.num_train_timesteps
    if not timesteps or any(a <= b for a, b in pairwise(timesteps)) or not -1 < timesteps[-1] <= timesteps[0] < total:
        raise ValueError(f"timesteps {list_some(timesteps)}: must fall, from {total - 1} or less to 0 or more")
    return TimeGrid(sde, (*map(sde.level_at_timestep, timesteps), CLEAN_LEVEL))


def grid_at_sigmas(sde: VPSDE, sigmas: Sequence[float]) -> TimeGrid:
    """The grid of falling sigma/alpha (diffusers' and k-diffusion's sigmas), with or without a last 0.

    One beyond the model's own range is the nearer end of that. ValueError for any others.
    """
    noisy = sigmas[:-1] if sigmas and sigmas[-1] == 0 else sigmas
    if not noisy or any(a <= b for a, b in pairwise(noisy)) or not 0 < noisy[-1] <= noisy[0] < math.inf:
        raise ValueError(f"sigmas {list_some(sigmas)}: must fall, and be above 0, but for the last")
    return TimeGrid(sde, (*sde.levels_at_sigmas(noisy), CLEAN_LEVEL))


def end_at_lowest(grid: TimeGrid) -> TimeGrid:
    """The grid with the model's lowest level, timestep 0, in place of the clean image at its end.

    That is diffusers' `final_sigmas_type` "sigma_min", and `set_alpha_to_one` False. Where that is the last level
    anyway, the grid ends there, and not in a step of no length.
    """
    lowest = grid.sde.level_at_timestep(0)
    return TimeGrid(grid.sde, (*(level for level in grid[:-1] if level.t > lowest.t * (1 + 1e-9)), lowest))


def clip_grid(grid: TimeGrid, start: float, end: float) -> TimeGrid:
    """The steps from training timestep N (1 - start) down to N (1 - end): diffusers' `denoising_start`, `_end`.

    A step belongs to the timestep that it begins at. The last level is where the next step would begin.
    """
    if not 0 <= start < end <= 1:
        raise ValueError(f"denoising_start {start} and denoising_end {end}: must be 0 <= start < end <= 1")
    total = grid.sde.num_train_timesteps
    first, last = (round(total - share * total) for share in (start, end))
    kept = [k for k, level in enumerate(grid[:-1]) if last <= round(grid.sde.timestep(level.t), 6) < first]
    return TimeGrid(grid.sde, grid[kept[0] : kept[-1] + 2] if kept else grid[-1:])


SPACINGS: dict[str, Spacing] = {
    "linspace": linspace,
    "leading": leading,
    "trailing": trailing,
    "sgm_uniform": sgm_uniform,
    "sgm_linspace": sgm_linspace,
    "sgm_leading": sgm_leading,
    "karras": karras,
    "log_snr": log_snr,
    "exponential": log_snr,
    "polyexponential": log_snr,  # k-diffusion's, with its rho of 1
    "kl_optimal": kl_optimal,
    "simple": simple,
    "ays": ays,
    "ays_sdxl": ays_sdxl,
    "beta": beta,
    "beta_sigmas": beta_sigmas,
    "lcm": lcm_timesteps,
    "uniform": uniform,
}
