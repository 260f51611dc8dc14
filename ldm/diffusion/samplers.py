"""Samplers: coroutines that evaluate the denoiser by `x0 = yield x, level` and return the sample; their table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.multistep import (
    deis,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_published,
    dpmpp_3m_sde,
    lms,
    plms,
    pndm,
    unipc,
)
from ldm.diffusion.ode import drive
from ldm.diffusion.singlestep import (
    ddim,
    dpm_2,
    dpm_2_ancestral,
    dpmpp_2s,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    dpmpp_singlestep,
    euler,
    heun,
    rk45,
    with_churn,
)
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

    Order 0 is none: Langevin steps follow no SDE, and leave an error that more levels and repeats reduce. `options` are
    the fields of a request that it reads, with its own defaults. An `adaptive` sampler chooses its steps by the whole
    batch: an image is independent of others only in a batch of one. Those of `consistency` are for distilled networks.
    With fewer than `min_steps` there is no image yet.
    """

    function: Callable[..., SamplerCoroutine]  # a `Sampler` that takes the options too
    order: int
    stochastic: bool
    source: str
    options: Mapping[str, float] = {}
    adaptive: bool = False
    consistency: bool = False
    min_steps: int = 1

    def with_options(self, values: Mapping[str, float | None]) -> Sampler:
        """The sampler with the options that are given; others are not read."""
        given = {name: values[name] for name in self.options if values.get(name) is not None}
        return partial(self.function, **given) if given else self.function


CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
ANCESTRAL = {"eta": 1.0, "s_noise": 1.0}
LU = "Lu et al. 2022 (DPM-Solver++)"
ZHAO = "Zhao et al. 2023 (UniPC), algorithms 1 and 2"
SAMPLERS: dict[str, SamplerSpec] = {
    "ddpm": SamplerSpec(ddpm, 1, True, "Ho et al. 2020, algorithm 2"),
    "ddim": SamplerSpec(ddim, 1, False, "Song et al. 2021 (DDIM), eq. 12", {"eta": 0.0, "s_noise": 1.0}),
    "euler": SamplerSpec(
        partial(with_churn, euler), 1, False, "Karras et al. 2022, algorithms 1 (first order) and 2", CHURN
    ),
    "euler_ancestral": SamplerSpec(euler_ancestral, 1, True, "k-diffusion, sample_euler_ancestral", ANCESTRAL),
    "euler_maruyama": SamplerSpec(euler_maruyama, 1, True, "Song et al. 2021, eq. 6"),
    "heun": SamplerSpec(partial(with_churn, heun), 2, False, "Karras et al. 2022, algorithms 1 and 2", CHURN),
    "dpm_2": SamplerSpec(partial(with_churn, dpm_2), 2, False, "k-diffusion, sample_dpm_2", CHURN),
    "dpm_2_ancestral": SamplerSpec(dpm_2_ancestral, 2, True, "k-diffusion, sample_dpm_2_ancestral", ANCESTRAL),
    "lms": SamplerSpec(lms, 2, False, "k-diffusion, sample_lms"),
    "plms": SamplerSpec(plms, 2, False, "Liu et al. 2022 (PNDM); diffusers, PNDMScheduler with skip_prk_steps"),
    "pndm": SamplerSpec(pndm, 2, False, "Liu et al. 2022 (PNDM), algorithm 2"),
    "deis": SamplerSpec(deis, 2, False, "Zhang & Chen 2023 (DEIS), tAB in log rho, order 2"),
    "deis_3": SamplerSpec(partial(deis, order=3), 2, False, "Zhang & Chen 2023 (DEIS), tAB in log rho, order 3"),
    "dpmpp_2s": SamplerSpec(dpmpp_2s, 2, False, f"{LU}, algorithm 1"),
    "dpmpp_2s_ancestral": SamplerSpec(dpmpp_2s_ancestral, 2, True, "k-diffusion, sample_dpmpp_2s_ancestral", ANCESTRAL),
    "dpmpp_sde": SamplerSpec(dpmpp_sde, 2, True, "k-diffusion, sample_dpmpp_sde", ANCESTRAL),
    "dpmpp_singlestep": SamplerSpec(dpmpp_singlestep, 2, False, "diffusers, DPMSolverSinglestepScheduler"),
    "dpmpp_singlestep_3": SamplerSpec(
        partial(dpmpp_singlestep, order=3), 3, False, "diffusers, DPMSolverSinglestepScheduler, order 3"
    ),
    "dpmpp_2m": SamplerSpec(dpmpp_2m, 2, False, f"{LU}, algorithm 2"),
    "dpmpp_3m": SamplerSpec(dpmpp_3m, 3, False, f"{LU}, multistep 3M of the authors' code"),
    "dpmpp_3m_published": SamplerSpec(
        dpmpp_3m_published, 2, False, "diffusers, DPMSolverMultistepScheduler, solver_order 3"
    ),
    "dpmpp_2m_sde": SamplerSpec(dpmpp_2m_sde, 2, True, f"{LU}, SDE-DPM-Solver++(2M)", ANCESTRAL),
    "dpmpp_3m_sde": SamplerSpec(dpmpp_3m_sde, 2, True, "k-diffusion, sample_dpmpp_3m_sde", ANCESTRAL),
    "unipc_1": SamplerSpec(partial(unipc, order=1), 2, False, f"{ZHAO}, p = 1"),
    "unipc": SamplerSpec(unipc, 3, False, f"{ZHAO}, p = 2"),
    "unipc_3": SamplerSpec(partial(unipc, order=3), 3, False, f"{ZHAO}, p = 3"),
    "lcm": SamplerSpec(lcm, 0, True, "Luo et al. 2023 (LCM)", consistency=True),
    "tcd": SamplerSpec(tcd, 0, True, "Zheng et al. 2024 (TCD), algorithm 4", {"eta": 0.3}, consistency=True),
    "rk45": SamplerSpec(rk45, 5, False, "Dormand & Prince 1980, RK5(4)7M", adaptive=True),
    "predictor_corrector": SamplerSpec(predictor_corrector, 1, True, "Song et al. 2021, algorithms 3 and 5"),
    "langevin": SamplerSpec(langevin, 0, True, "Song & Ermon 2019, algorithm 1", min_steps=10),
}
