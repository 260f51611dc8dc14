"""Samplers have the order and sample the law that they claim, and equal diffusers' on the same grid."""

from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from gaussian import GAUSSIAN, MU, NOTHING, S

import ldm.nn._torchvision  # noqa: F401
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, euler, heun, sample
from ldm.diffusion.sde import CLEAN, VPSDE, scaled_linear_table, zero_terminal_snr
from ldm.diffusion.spacing import SPACINGS, Grid
from ldm.rng import Noise

TABLE = scaled_linear_table(0.00085, 0.012, 1000)
SD = VPSDE.tabulated(TABLE)
DETERMINISTIC = [name for name, solver in SAMPLERS.items() if not solver.stochastic]


def nothing(*_):
    raise AssertionError("a deterministic sampler drew noise, or an empty grid asked a question")


class White:
    """Noise that does not refine: every draw is new, in the order of one generator (diffusers' SDE)."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, like):
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)

    def between(self, like, sigma, to_sigma):
        return self(like)


def uniform_in_t(sde, n):
    return Grid(sde, (sde.at(1 - 0.9 * i / n) for i in range(n + 1)))


def in_log_snr(sde, n):
    return Grid(
        sde, SPACINGS["log_snr"](sde, n + 1)[:-1]
    )  # to t = 1/1000: the step into the clean picture is no refinement


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize(
    "sde, make_grid",
    [
        (VPSDE.linear(), uniform_in_t),
        (VPSDE.scaled_linear(), uniform_in_t),
        (SD, in_log_snr),
        (VPSDE.cosine(), in_log_snr),
    ],
)
def test_order_of_convergence(name, sde, make_grid):
    x = torch.tensor([[0.3, -1.1], [1.4, 0.2]], dtype=torch.float64)
    errors = []
    for n in [64, 128, 256, 512, 1024]:
        grid = make_grid(sde, n)
        end = sample(SAMPLERS[name].function, GAUSSIAN.denoise, x, grid, nothing)
        errors.append((end - GAUSSIAN.flow(x, grid[0], grid[-1])).norm())
    slopes = -torch.stack(errors).log2().diff()
    torch.testing.assert_close(slopes, torch.full_like(slopes, SAMPLERS[name].order), rtol=0, atol=0.2)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_ancestral_sampling_gives_the_data_s_mean_and_covariance(eta):
    grid, count = SPACINGS["log_snr"](SD, 400), 20000
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    end = sample(partial(ddim, eta=eta), GAUSSIAN.denoise, x, grid, White(1))
    error_of_mean = (S.diag() / count).sqrt()
    error_of_cov = ((S**2 + torch.outer(S.diag(), S.diag())) / count).sqrt()
    assert ((end.mean(0) - MU).abs() < 4 * error_of_mean).all()
    assert ((end.T.cov() - S).abs() < 4 * error_of_cov).all()


def test_ddpm_is_the_posterior_of_ho_et_al():
    now, to = SD.step(500), SD.step(480)
    x, x0 = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step_alpha = (now.alpha / to.alpha) ** 2  # their alpha_t = 1 - beta_t, between grid points
    mean = to.alpha * (1 - step_alpha) / now.sigma**2 * x0 + step_alpha**0.5 * to.sigma**2 / now.sigma**2 * x
    spread = ((1 - step_alpha) * to.sigma**2 / now.sigma**2) ** 0.5
    z = torch.arange(4, dtype=torch.float64)
    white = White(0)
    white.between = lambda *_: z
    end = sample(ddpm, lambda x, point: x0, x, Grid(SD, (now, to)), white)
    torch.testing.assert_close(end, mean + spread * z)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sde", [VPSDE.cosine(), VPSDE.tabulated(zero_terminal_snr(TABLE))], ids=["cosine", "table"])
def test_from_zero_snr_the_first_step_is_the_exact_one_for_a_fixed_x0(name, sde):
    grid = Grid(sde, (sde.at(1.0), sde.at(0.9)))
    x, x0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = Noise([0, 1, 2])
    end = sample(SAMPLERS[name].function, lambda x, point: x0, x, grid, noise)
    kept = Noise([0, 1, 2]).between(x, grid[0].sigma, grid[1].sigma) if SAMPLERS[name].stochastic else x
    torch.testing.assert_close(end, grid[1].alpha * x0 + grid[1].sigma * kept)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_known_picture_is_reached_exactly(name, n):
    """The last step ends in the denoiser's answer, whatever the grid; zero terminal SNR included."""
    target = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    grid = SPACINGS["trailing"](VPSDE.cosine(), n)
    x = Noise([0, 1])(target)
    end = sample(SAMPLERS[name].function, lambda x, point: target, x, grid, Noise([2, 3]))
    torch.testing.assert_close(end, target, rtol=0, atol=1e-6)


def test_an_empty_grid_gives_the_picture_back():
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    for solver in SAMPLERS.values():
        assert sample(solver.function, nothing, x, (CLEAN,), nothing) is x


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_do_not_know_each_other(name):
    """A picture is bit for bit the same alone and in a batch: noise and coefficients are its own."""

    def denoise(x, point):
        return torch.tanh(x * point.alpha)

    grid, like = SPACINGS["karras"](SD, 7), torch.empty(3, 4, 8, 8)
    noise = Noise([4, 5, 6])
    batch = sample(SAMPLERS[name].function, denoise, noise(like), grid, noise)
    for i, seed in enumerate([4, 5, 6]):
        noise = Noise([seed])
        alone = sample(SAMPLERS[name].function, denoise, noise(like[:1]), grid, noise)
        assert torch.equal(alone, batch[i : i + 1])


def smooth_network(x, t, cond):
    """A small random smooth function of the picture and the timestep."""
    mix = torch.randn(x[0].numel(), x[0].numel(), generator=torch.Generator().manual_seed(7)) / 8
    angle = (x.flatten(1) @ mix.to(x)) + (t / 400)[:, None]
    return (0.8 * x.flatten(1) + 0.5 * torch.sin(angle)).view_as(x)


def diffusers_end(scheduler, x, n):
    """x through a scheduler of diffusers, which may want x/alpha instead at the first point."""
    scheduler.set_timesteps(n)
    if not isinstance(scheduler, DDIMScheduler | DPMSolverMultistepScheduler):
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        output = smooth_network(scheduler.scale_model_input(x, t), t.float().expand(len(x)), NOTHING)
        x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize("prediction, theirs", [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize(
    "sampler, scheduler, spacing, n",
    [
        (
            ddim,
            partial(DDIMScheduler, steps_offset=1, set_alpha_to_one=True, clip_sample=False),
            "leading",
            20,
        ),
        (ddim, partial(DDIMScheduler, set_alpha_to_one=True, clip_sample=False), "trailing", 10),
        (euler, EulerDiscreteScheduler, "linspace", 28),
        (euler, EulerDiscreteScheduler, "trailing", 13),
        (heun, HeunDiscreteScheduler, "linspace", 28),
        (heun, HeunDiscreteScheduler, "trailing", 13),
        (dpmpp_2m, DPMSolverMultistepScheduler, "trailing", 20),
        (dpmpp_2m, DPMSolverMultistepScheduler, "trailing", 7),
    ],
)
def test_trajectories_are_diffusers_trajectories(sampler, scheduler, spacing, n, prediction, theirs):
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    denoiser = Denoiser(smooth_network, SD, PREDICTIONS[prediction])
    grid = SPACINGS[spacing](SD, n)
    ours = sample(sampler, lambda x, point: denoiser(x, point, NOTHING), x, grid, nothing)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=theirs)
    oracle = diffusers_end(scheduler(**betas, timestep_spacing=spacing), x, n)
    torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-4)


def test_ddpm_steps_are_diffusers_ddpm_steps():
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(20)
    denoiser = Denoiser(smooth_network, SD, PREDICTIONS["eps"])
    grid = SPACINGS["trailing"](SD, 20)
    x = start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(8)
    for t in scheduler.timesteps:
        output = smooth_network(x, t.float().expand(1), NOTHING)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    ours = sample(ddpm, lambda x, point: denoiser(x, point, NOTHING), start, grid, White(8))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
