"""Samplers: coroutines that evaluate the denoiser by `x0 = yield x, level` and return the sample; their table."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.multistep import (
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_published,
    dpmpp_3m_sde,
    lms,
    unipc,
)
from ldm.diffusion.ode import drive
from ldm.diffusion.singlestep import ddim, dpmpp_2s, euler, heun, rk45
from ldm.diffusion.steps import Sampler, SamplerCoroutine
from ldm.diffusion.stochastic import (
    ddpm,
    euler_ancestral,
    euler_maruyama,
    langevin,
    lcm,
    predictor_corrector,
    tcd,
)
from ldm.diffusion.timesteps import TimeGrid
from ldm.rng import Noise


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
