"""Grids equal diffusers' timesteps, and descend from noise to the clean image."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import AysSchedules

from ldm.diffusion.samplers import SAMPLERS, sample
from ldm.diffusion.sde import CLEAN_LEVEL, VPSDE, scaled_linear_alphas_cumprod
from ldm.diffusion.timesteps import AYS_SIGMAS, MIN_LOG_SNR, SPACINGS, end_at_lowest, truncate_grid
from ldm.errors import choose
from tests.diffusion.gaussian import GAUSSIAN

SD = VPSDE.tabulated(scaled_linear_alphas_cumprod(0.00085, 0.012, 1000))
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def timesteps(grid):
    return torch.tensor([SD.timestep(point.t) for point in grid[:-1]])


@pytest.mark.parametrize("name", ["linspace", "leading", "trailing"])
def test_discrete_grids_are_diffusers_timesteps(name):
    options = {"offset": 1} if name == "leading" else {}
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing=name, steps_offset=1 if options else 0)
    for n in [*range(2, 64), 96, 100, 144, 192, 333, 500, 999]:
        scheduler.set_timesteps(n)
        theirs = scheduler.timesteps[:n]  # trailing rounds itself one more, timestep -1, at n = 61
        torch.testing.assert_close(timesteps(SPACINGS[name](SD, n, **options)), theirs, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_offset_shifts_leading(scheduler, offset):
    scheduler = scheduler(**BETAS, timestep_spacing="leading", steps_offset=offset)
    for n in (7, 30, 50, 96):
        scheduler.set_timesteps(n)
        ours = timesteps(SPACINGS["leading"](SD, n, offset=offset))
        torch.testing.assert_close(ours, scheduler.timesteps.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["linspace", "trailing"])
def test_ddim_rounds_the_same_timesteps(name):
    scheduler = DDIMScheduler(**BETAS, timestep_spacing=name)
    for n in (2, 7, 20, 50, 64, 333):
        scheduler.set_timesteps(n)
        assert torch.equal(timesteps(SPACINGS[name](SD, n)).round().long(), scheduler.timesteps)


@pytest.mark.parametrize("make", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler])
@pytest.mark.parametrize("name, offset", [("linspace", 0), ("leading", 0), ("leading", 1), ("trailing", 0)])
def test_multistep_classes_of_diffusers_take_the_sgm_grids(make, name, offset):
    """The first n of n + 1 points, save for trailing: same timesteps."""
    ours_by_name = {"linspace": "sgm_linspace", "leading": "sgm_leading", "trailing": "trailing"}
    scheduler = make(**BETAS, timestep_spacing=name, steps_offset=offset)
    for n in (2, 7, 8, 10, 20, 30, 50, 64, 333):
        scheduler.set_timesteps(n)
        ours = timesteps(SPACINGS[ours_by_name[name]](SD, n, **({"offset": offset} if name == "leading" else {})))
        assert torch.equal(ours.round().long(), scheduler.timesteps)
        torch.testing.assert_close(ours, ours.round(), rtol=0, atol=1e-9)


def test_exponential_and_polyexponential_are_log_snr():
    assert SPACINGS["exponential"](SD, 25) == SPACINGS["polyexponential"](SD, 25) == SPACINGS["log_snr"](SD, 25)


def test_align_your_steps_is_the_published_table():
    """diffusers' `AysSchedules` for ten steps; their timesteps are these sigmas' to rounding."""
    for name, prefix in (("ays", "StableDiffusion"), ("ays_sdxl", "StableDiffusionXL")):
        grid = SPACINGS[name](SD, 10)
        sigmas = [point.sigma_over_alpha for point in grid]
        assert sigmas == pytest.approx(AysSchedules[f"{prefix}Sigmas"], rel=1e-4)
        assert timesteps(grid).tolist() == pytest.approx(AysSchedules[f"{prefix}Timesteps"], abs=1.6)


@pytest.mark.parametrize("n", [4, 20, 33])
def test_align_your_steps_is_interpolated_as_its_authors_do(n):
    """Their notebook: np.interp of the reversed logarithms over [0, 1], reversed; the last sigma is replaced by 0."""
    table = AYS_SIGMAS["ays"]
    ends = [np.linspace(0, 1, length) for length in (len(table), n + 1)]
    sigmas = np.exp(np.interp(ends[1], ends[0], np.log(table[::-1])))[::-1]
    ours = [point.sigma_over_alpha for point in SPACINGS["ays"](SD, n)[:-1]]
    assert ours == pytest.approx(sigmas[:-1].tolist(), rel=1e-4)


@pytest.mark.parametrize("n", [1, 4, 7, 20, 30])
def test_grids_of_comfyui(n):
    """By its formulas: sigmas[-(1 + int(i N / n))]; linspace(999, 0, n + 1)[:-1]; tan of equally spaced angles."""
    table = torch.tensor([SD.level_at_timestep(k).sigma_over_alpha for k in range(1000)], dtype=torch.float64)
    picked = [table[-(1 + int(i * (1000 / n)))].item() for i in range(n)]
    assert [point.sigma_over_alpha for point in SPACINGS["simple"](SD, n)[:-1]] == pytest.approx(picked, rel=1e-9)
    uniform = torch.linspace(999, 0, n + 1)[:-1]
    torch.testing.assert_close(timesteps(SPACINGS["sgm_uniform"](SD, n)), uniform, rtol=0, atol=1e-3)
    share = torch.arange(n, dtype=torch.float64) / max(n - 1, 1)
    angles = share * table[0].atan() + (1 - share) * table[-1].atan()
    ours = torch.tensor([point.sigma_over_alpha for point in SPACINGS["kl_optimal"](SD, n)[:-1]], dtype=torch.float64)
    torch.testing.assert_close(ours, angles.tan(), rtol=1e-6, atol=0)


def test_beta_indices_are_quantiles_of_the_beta_distribution():
    for n in (1, 10, 50):
        quantiles = scipy.stats.beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), 0.6, 0.6)
        torch.testing.assert_close(timesteps(SPACINGS["beta"](SD, n)), torch.tensor(999 * quantiles).float())


def test_uniform_is_trailing_where_the_steps_divide():
    for n in (1, 8, 50, 1000):
        for ours, theirs in zip(SPACINGS["uniform"](SD, n), SPACINGS["trailing"](SD, n), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-12)
    assert [point.t for point in SPACINGS["uniform"](SD, 7)] == pytest.approx([1 - i / 7 for i in range(8)])


@pytest.mark.parametrize("sde", [SD, VPSDE.linear(), VPSDE.cosine()], ids=["table", "linear", "cosine"])
def test_log_snr_is_uniform_and_starts_at_the_last_time_or_at_the_floor(sde):
    grid = SPACINGS["log_snr"](sde, 9)
    log_snr = torch.tensor([2 * math.log(p.alpha / p.sigma) for p in grid[:-1]])
    torch.testing.assert_close(log_snr.diff(), log_snr.diff().mean().expand(8), rtol=1e-4, atol=0)
    start = sde.log_snr(torch.tensor(1.0)).item()
    assert log_snr[0].item() == pytest.approx(max(start, MIN_LOG_SNR), rel=1e-6)
    assert grid[-2].t == pytest.approx(1 / sde.num_train_timesteps)


@pytest.mark.parametrize("name", SPACINGS)
@pytest.mark.parametrize("sde", [SD, VPSDE.cosine()], ids=["table", "cosine"])
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_every_grid_descends_from_noise_to_the_clean_image(name, sde, n):
    if (name, n) == ("leading", 1) or (name == "beta_sigmas" and sde is not SD):
        with pytest.raises(ValueError, match=f"{name!r} spacing"):
            SPACINGS[name](sde, n)
        return
    grid = SPACINGS[name](sde, n)
    sigma = torch.tensor([point.sigma for point in grid], dtype=torch.float64)
    assert len(grid) == n + 1 and grid[-1] == CLEAN_LEVEL
    assert (sigma.diff() < 0).all()
    assert all(point == sde.level(point.t) for point in grid)


@pytest.mark.parametrize("name", SPACINGS)
def test_less_than_one_step_is_refused(name):
    with pytest.raises(ValueError, match="at least 1"):
        SPACINGS[name](SD, 0)


@pytest.mark.parametrize("name", ["leading", "trailing", "uniform"])
def test_more_steps_than_the_table_has_are_refused(name):
    """`uniform` has times for more, but networks know none below timestep 0."""
    assert SD.timestep(SPACINGS[name](SD, 1000 if name != "leading" else 999)[-2].t) >= 0
    with pytest.raises(ValueError, match="has at most 1000, the model's training timesteps"):
        SPACINGS[name](SD, 1001)


@pytest.mark.parametrize("make", [LCMScheduler, TCDScheduler])
def test_lcm_takes_the_timesteps_of_distillation(make):
    scheduler = make()
    for n in [*range(1, 26), 50]:
        scheduler.set_timesteps(n)
        assert torch.equal(timesteps(SPACINGS["lcm"](SD, n)).round().long(), scheduler.timesteps)
    with pytest.raises(ValueError, match="51 steps: 'lcm' spacing has at most 50, those of distillation"):
        SPACINGS["lcm"](SD, 51)


@pytest.mark.parametrize("name, field", [("karras", "karras"), ("exponential", "exponential"), ("beta_sigmas", "beta")])
@pytest.mark.parametrize("n", [5, 25])
def test_grids_of_sigmas_are_diffusers_sigmas(name, field, n):
    scheduler = EulerDiscreteScheduler(**BETAS, **{f"use_{field}_sigmas": True})
    scheduler.set_timesteps(n)
    ours = torch.tensor([point.sigma / point.alpha for point in SPACINGS[name](SD, n)])
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name, n, options", [("leading", 1, {}), ("leading", 1, {"offset": 7})])
def test_a_grid_that_does_not_start_from_noise_is_refused(name, n, options):
    with pytest.raises(ValueError, match=r"1 step: 'leading' spacing starts at t = 0\.00., not in noise"):
        SPACINGS[name](SD, n, **options)


def test_a_grid_that_ends_at_the_lowest_level_takes_no_step_of_no_length():
    lowest = SD.level_at_timestep(0)
    trailing, karras = (end_at_lowest(SPACINGS[name](SD, 20)) for name in ("trailing", "karras"))
    assert trailing == (*SPACINGS["trailing"](SD, 20)[:-1], lowest)
    assert karras == (*SPACINGS["karras"](SD, 20)[:-2], lowest)


def test_cut_keeps_the_last_part_of_the_grid():
    grid = SPACINGS["leading"](SD, 50)
    assert truncate_grid(grid, 1) == grid
    assert truncate_grid(grid, 0) == (CLEAN_LEVEL,)
    assert truncate_grid(grid, 0.6) == grid[20:]
    with pytest.raises(ValueError, match="between 0 and 1"):
        truncate_grid(grid, 1.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        truncate_grid(grid, math.nan)


@pytest.mark.parametrize("name", SPACINGS)
def test_cut_takes_the_steps_of_diffusers_image_to_image(name):
    for n in (2, 7, 50):
        grid = SPACINGS[name](SD, n)
        for strength in (0.0, 0.15, 0.3, 0.5, 0.8, 1.0):
            begin = max(n - min(int(n * strength), n), 0)  # get_timesteps of its StableDiffusionImg2ImgPipeline
            begin = min(begin, n - 1) if strength else begin  # which fails without a step
            part = truncate_grid(grid, strength)
            assert part == grid[begin:] and part.sde is grid.sde


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", [name for name in SPACINGS if name not in ("lcm", "exponential", "polyexponential")])
def test_every_ode_solver_follows_the_flow_on_every_grid_and_on_what_is_cut_from_it(name, strength):
    x = torch.tensor([[0.3, -1.1], [1.4, 0.2]], dtype=torch.float64)
    for solver in SAMPLERS.values():
        if not solver.stochastic:
            grid = truncate_grid(SPACINGS[name](SD, 200), strength)
            end = sample(solver.function, GAUSSIAN.denoise, x, grid, None)
            torch.testing.assert_close(end, GAUSSIAN.probability_flow(x, grid[0], CLEAN_LEVEL), rtol=0, atol=0.022)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="spacing 'sigmoid': choose from linspace, leading, trailing"):
        choose(SPACINGS, "sigmoid", "spacing")
