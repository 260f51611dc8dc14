"""Samplers have the order and sample the law that they claim, and equal diffusers' on the same grid."""

import math
from functools import cache, partial

import pytest
import torch

from tests.diffusion.gaussian import GAUSSIAN, GAUSSIAN_MIXTURE, MU, NOTHING, Gaussian, S

# isort: split
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser, NFECounter
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.samplers import SAMPLERS, check_finite, sample
from ldm.diffusion.sde import (
    CLEAN_LEVEL,
    VPSDE,
    cosine_alphas_cumprod,
    linear_alphas_cumprod,
    rescale_zero_terminal_snr,
    scaled_linear_alphas_cumprod,
)
from ldm.diffusion.singlestep import ddim, rk45
from ldm.diffusion.stochastic import ddpm, euler_maruyama, langevin, predictor_corrector
from ldm.diffusion.timesteps import SPACINGS, TimeGrid
from ldm.nn.unet import UNet, UNetConfig
from ldm.rng import Noise
from tests.diffusion.oracle import (
    NoOpNoise,
    convergence_order,
    full_schedule_grid,
    mid_snr_grid,
    ode_errors,
    sampler_moments,
    strong_errors,
    weak_errors,
)

TABLE = scaled_linear_alphas_cumprod(0.00085, 0.012, 1000)
SD = VPSDE.tabulated(TABLE)
COSINE_TABLE = VPSDE.tabulated(cosine_alphas_cumprod(1e-4, 0.02, 1000))
SDES = {
    "linear": VPSDE.linear(),
    "linear table": VPSDE.tabulated(linear_alphas_cumprod(1e-4, 0.02, 1000)),
    "scaled linear table": SD,
    "cosine": VPSDE.cosine(),
}
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
FIXED = [name for name, solver in SAMPLERS.items() if not solver.adaptive]
DETERMINISTIC = [name for name in FIXED if not SAMPLERS[name].stochastic]
STOCHASTIC = [name for name in FIXED if SAMPLERS[name].stochastic and not SAMPLERS[name].consistency]
AFFINE = [name for name in STOCHASTIC if name != "predictor_corrector"]  # whose steps depend on the length of x
FUNCTIONS = {name: solver.function for name, solver in SAMPLERS.items()}
TIGHT = {**FUNCTIONS, "rk45": partial(rk45, atol=1e-10, rtol=1e-10)}
X = torch.tensor([[0.3, -1.1], [1.4, 0.2]], dtype=torch.float64)
SAME = "exponential", "polyexponential", "simple", "sgm_linspace", "ays_sdxl"  # as others, or nearly


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


@cache
def doublings(make_grid, sde, first, count):
    """Grids of first, 2 first, 4 first, ... steps."""
    return [make_grid(sde, first * 2**k) for k in range(count + 1)]


@pytest.mark.parametrize("problem", [GAUSSIAN, GAUSSIAN_MIXTURE], ids=["gaussian", "mixture"])
@every_sde
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name, sde, problem):
    """Over five doublings, from log-SNR 0 to 2, where x0 forms: a multistep method's start is seen there soonest.

    36 steps, of which a singlestep method makes whole blocks.
    """
    errors = ode_errors(FUNCTIONS[name], problem, X, doublings(mid_snr_grid, sde, 36, 5))
    assert convergence_order(errors) == pytest.approx(SAMPLERS[name].order, abs=0.15)


@every_sde
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_over_the_whole_schedule_no_solver_is_slower_than_it_claims(name, sde):
    errors = ode_errors(FUNCTIONS[name], GAUSSIAN, X, doublings(full_schedule_grid, sde, 128, 2))
    assert convergence_order(errors) > SAMPLERS[name].order - 0.15


def test_a_parabola_in_log_snr_is_averaged_exactly():
    """x0 = l^2, l = log(alpha/sigma): the flow gains e^l (l^2 - 2 l + 2) in x/sigma. diffusers' step does not: like the
    published code it halves the curvature, h^3/6 for h^3/3, so that a local error of third order is left."""
    levels = [SD.level_at_timestep(k) for k in (699, 599, 499, 399)]
    log_ratio = [math.log(p.alpha / p.sigma) for p in levels]
    gain = [math.exp(value) * (value**2 - 2 * value + 2) for value in log_ratio]
    exact = levels[3].sigma * (gain[3] - gain[2])

    def increment(questions, end):
        return (end - levels[3].sigma / levels[2].sigma * questions[-1]).item()

    asked = []

    def denoise(x, point):
        asked.append(x)
        return torch.full_like(x, math.log(point.alpha / point.sigma) ** 2)

    end = sample(FUNCTIONS["dpmpp_3m"], denoise, torch.zeros(1, 1, dtype=torch.float64), TimeGrid(SD, levels), nothing)
    assert increment(asked, end) == pytest.approx(exact, rel=1e-12)

    scheduler = DPMSolverMultistepScheduler(
        **BETAS, solver_order=3, prediction_type="sample", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(3)
    x, theirs = torch.zeros(1, 1), []
    for t, value in zip(scheduler.timesteps[3:6], log_ratio, strict=False):
        theirs.append(x)
        x = scheduler.step(torch.full_like(x, value**2), t, x).prev_sample
    h = log_ratio[3] - log_ratio[2]
    curvature = levels[3].alpha * (h**2 - 2 * h + 2 - 2 * math.exp(-h))  # the integral of e^(s - h) s^2
    assert increment(theirs, x) == pytest.approx(exact - curvature / 2, rel=1e-4)


@every_sde
@pytest.mark.parametrize("name", [name for name in STOCHASTIC if SAMPLERS[name].order])
def test_order_in_law(name, sde):
    """Weak order of mean and covariance, each computed exactly, without Monte Carlo."""
    function = partial(predictor_corrector, r=0.0) if name == "predictor_corrector" else FUNCTIONS[name]
    grids = doublings(mid_snr_grid, sde, 16, 5)
    of_mean, of_cov = weak_errors(function, GAUSSIAN, grids)
    assert convergence_order(of_cov) == pytest.approx(SAMPLERS[name].order, abs=0.15)
    assert of_mean.max() < 1e-12 or convergence_order(of_mean) == pytest.approx(SAMPLERS[name].order, abs=0.15)


def test_euler_and_maruyama_have_strong_order_one_on_one_brownian_path():
    """One, not the half of a general SDE: the noise does not depend on x."""
    errors = strong_errors(euler_maruyama, GAUSSIAN, doublings(mid_snr_grid, SD, 8, 5))
    assert convergence_order(errors) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", AFFINE)
def test_every_stochastic_solver_has_the_data_s_mean_and_covariance_in_the_limit(name):
    mean, cov = sampler_moments(FUNCTIONS[name], GAUSSIAN, SPACINGS["log_snr"](SD, 800))
    torch.testing.assert_close(mean, MU, rtol=0, atol=0.02)
    torch.testing.assert_close(cov, S, rtol=0, atol=0.02)


@pytest.fixture(scope="module")
def limit():
    return sample(TIGHT["rk45"], GAUSSIAN_MIXTURE.denoise, X, full_schedule_grid(SD, 2), nothing)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_deterministic_solver_agrees_in_the_limit(name, limit):
    end = sample(FUNCTIONS[name], GAUSSIAN_MIXTURE.denoise, X, full_schedule_grid(SD, 700), nothing)
    torch.testing.assert_close(end, limit, rtol=0, atol=0.01 if SAMPLERS[name].order == 1 else 1e-4)


def crowd(sampler, grid, count, noise):
    """Generates [count, 2] from the law at grid[0], as one image of many points, through the sampler."""
    root = torch.linalg.cholesky(GAUSSIAN.marginal_cov(grid[0]))
    x = grid[0].alpha * MU + noise(torch.empty(1, count, 2, dtype=torch.float64)) @ root.T
    (end,) = sample(sampler, lambda x, point: GAUSSIAN.denoise(x[0], point)[None], x, grid, noise)
    return end


def assert_drawn_from(end, mean, cov):
    """Mean and covariance within four standard errors of Monte Carlo."""
    assert ((end.mean(0) - mean).abs() < 4 * (cov.diag() / len(end)).sqrt()).all()
    error_of_cov = ((cov**2 + torch.outer(cov.diag(), cov.diag())) / len(end)).sqrt()
    assert ((end.T.cov() - cov).abs() < 4 * error_of_cov).all()


@pytest.mark.parametrize("name, sampler", [*((n, FUNCTIONS[n]) for n in STOCHASTIC), ("eta", partial(ddim, eta=0.5))])
def test_a_crowd_has_the_data_s_mean_and_covariance(name, sampler):
    assert_drawn_from(crowd(sampler, SPACINGS["log_snr"](SD, 400), 10000, White(1)), MU, S)


@pytest.mark.parametrize("name", AFFINE)
def test_real_noise_gives_the_exact_moments_within_its_error(name):
    """The picture's own Brownian path: what is drawn is what `moments` computes, also with few steps."""
    grid = TimeGrid(SD, SPACINGS["log_snr"](SD, 9)[:-1])
    assert_drawn_from(
        crowd(FUNCTIONS[name], grid, 10000, Noise([5])), *sampler_moments(FUNCTIONS[name], GAUSSIAN, grid)
    )


@every_sde
def test_rk45_keeps_its_tolerance_and_has_order_five(sde):
    """Each digit costs 10^(1/5) times the questions: error falls with their fifth power."""
    grid = SPACINGS["log_snr"](sde, 20)[:-1]
    exact = GAUSSIAN_MIXTURE.probability_flow(X, grid[0], grid[-1])
    errors, questions = [], []
    for tolerance in [1e-4, 1e-6, 1e-8, 1e-10]:
        denoise = NFECounter(GAUSSIAN_MIXTURE.denoise)
        end = sample(partial(rk45, atol=tolerance, rtol=tolerance), denoise, X, TimeGrid(sde, grid), nothing)
        errors.append((end - exact).abs().max().item())
        questions.append(denoise.nfe)
        assert errors[-1] < 30 * tolerance
    assert math.log(errors[0] / errors[-1]) / math.log(questions[-1] / questions[0]) > 4.5
    assert questions[0] < 100


def test_the_signal_to_noise_rule_is_song_et_al_s():
    """r = |eps score| / |sqrt(2 eps) z| of each image; what is left is the predictor of their algorithm 3."""
    now, middle, to = SD.level_at_timestep(600), SD.level_at_timestep(500), SD.level_at_timestep(400)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []

    def denoise(x, point):
        seen.append((x, point))
        return torch.tanh(x)

    noise = White(4)
    sample(FUNCTIONS["predictor_corrector"], denoise, x, TimeGrid(SD, (now, middle, to)), noise)
    (_, _), (predicted, _), (corrected, _) = seen
    first, z = (White(4), White(4))
    kept = now.alpha / middle.alpha
    score = (now.alpha * torch.tanh(x) - x) / now.sigma**2
    torch.testing.assert_close(
        predicted, (2 - kept) * x + (1 - kept**2) * score + math.sqrt(1 - kept**2) * first.between(x, 1, 0)
    )
    z(x)
    z = z(x)
    score = (middle.alpha * torch.tanh(predicted) - predicted) / middle.sigma**2
    eps = 2 * (0.16 * z.norm(dim=1) / score.norm(dim=1)).square()[:, None]
    torch.testing.assert_close(corrected, predicted + eps * score + (2 * eps).sqrt() * z)


def test_ddpm_is_the_posterior_of_ho_et_al():
    now, to = SD.level_at_timestep(500), SD.level_at_timestep(480)
    x, x0 = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step_alpha = (now.alpha / to.alpha) ** 2  # their alpha_t = 1 - beta_t, between grid points
    mean = to.alpha * (1 - step_alpha) / now.sigma**2 * x0 + step_alpha**0.5 * to.sigma**2 / now.sigma**2 * x
    spread = ((1 - step_alpha) * to.sigma**2 / now.sigma**2) ** 0.5
    z = torch.arange(4, dtype=torch.float64)
    white = White(0)
    white.between = lambda *_: z
    end = sample(ddpm, lambda x, point: x0, x, TimeGrid(SD, (now, to)), white)
    torch.testing.assert_close(end, mean + spread * z)


@pytest.mark.parametrize(
    "name", [*DETERMINISTIC, "rk45", *(name for name in STOCHASTIC if name != "langevin")]
)  # that moves x towards a law only
@pytest.mark.parametrize(
    "sde", [VPSDE.cosine(), VPSDE.tabulated(rescale_zero_terminal_snr(TABLE))], ids=["cosine", "table"]
)
def test_from_zero_snr_the_first_step_is_the_exact_one_for_a_fixed_x0(name, sde):
    grid = TimeGrid(sde, (sde.level(1.0), sde.level(0.9)))
    x, x0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = Noise([0, 1, 2])
    end = sample(TIGHT[name], lambda x, point: x0, x, grid, noise)
    kept = Noise([0, 1, 2]).between(x, grid[0].sigma, grid[1].sigma) if SAMPLERS[name].stochastic else x
    torch.testing.assert_close(end, grid[1].alpha * x0 + grid[1].sigma * kept)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_known_image_is_reached_exactly(name, n):
    """The last step ends in the denoiser's answer, whatever the grid; zero terminal SNR included."""
    target = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    grid = SPACINGS["trailing"](VPSDE.cosine(), n)
    x = Noise([0, 1])(target)
    end = sample(SAMPLERS[name].function, lambda x, point: target, x, grid, Noise([2, 3]))
    torch.testing.assert_close(end, target, rtol=0, atol=1e-6)


def test_an_empty_grid_gives_the_image_back():
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    for solver in SAMPLERS.values():
        assert sample(solver.function, nothing, x, TimeGrid(SD, (CLEAN_LEVEL,)), nothing) is x


@pytest.mark.parametrize("name", FIXED)
def test_rows_do_not_know_each_other(name):
    """An image is bit for bit the same alone and in a batch: noise and coefficients are its own."""

    def denoise(x, point):
        return torch.tanh(x * point.alpha)

    grid, like = SPACINGS["karras"](SD, 7), torch.empty(3, 4, 8, 8)
    noise = Noise([4, 5, 6])
    batch = sample(SAMPLERS[name].function, denoise, noise(like), grid, noise)
    for i, seed in enumerate([4, 5, 6]):
        noise = Noise([seed])
        alone = sample(SAMPLERS[name].function, denoise, noise(like[:1]), grid, noise)
        assert torch.equal(alone, batch[i : i + 1])


BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
THEIR_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
ORACLES = {
    "ddpm": partial(DDPMScheduler, clip_sample=False),
    "ddim": partial(DDIMScheduler, set_alpha_to_one=True, clip_sample=False),
    "ddim, eta 1": partial(DDIMScheduler, set_alpha_to_one=True, clip_sample=False),
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "unipc": UniPCMultistepScheduler,
    "dpmpp_3m_published": partial(DPMSolverMultistepScheduler, solver_order=3),
    "unipc_3": partial(UniPCMultistepScheduler, solver_order=3),
}
IN_UNITS_OF_ALPHA = (
    EulerDiscreteScheduler
    | EulerAncestralDiscreteScheduler
    | HeunDiscreteScheduler
    | LMSDiscreteScheduler
    | KDPM2DiscreteScheduler
    | KDPM2AncestralDiscreteScheduler
)
# On the grid of the class, to 1e-5 (PNDM's: 1e-4): the class, our grid, and the level at which it ends.
LOWEST = SD.level_at_timestep(0)
MORE_ORACLES = {
    "plms": (partial(PNDMScheduler, skip_prk_steps=True, steps_offset=1), "leading", LOWEST),
    "plms, to 0": (partial(PNDMScheduler, skip_prk_steps=True, set_alpha_to_one=True), "leading, 0", CLEAN_LEVEL),
    "pndm": (partial(PNDMScheduler, steps_offset=1), "leading", LOWEST),
    "deis": (DEISMultistepScheduler, "sgm_linspace", LOWEST),
    "deis_3": (partial(DEISMultistepScheduler, solver_order=3), "sgm_linspace", LOWEST),
    "dpm_2": (partial(KDPM2DiscreteScheduler, timestep_spacing="trailing"), "trailing", CLEAN_LEVEL),
    "dpm_2_ancestral": (partial(KDPM2AncestralDiscreteScheduler, timestep_spacing="trailing"), "trailing", CLEAN_LEVEL),
    "dpmpp_singlestep": (DPMSolverSinglestepScheduler, "sgm_linspace", CLEAN_LEVEL),
    "dpmpp_singlestep_3": (partial(DPMSolverSinglestepScheduler, solver_order=3), "sgm_linspace", CLEAN_LEVEL),
    "lcm": (LCMScheduler, "lcm", CLEAN_LEVEL),
    "tcd": (TCDScheduler, "lcm", LOWEST),
    "ddim": (partial(DDIMScheduler, set_alpha_to_one=False, clip_sample=False, steps_offset=1), "leading", LOWEST),
    "euler": (
        partial(EulerDiscreteScheduler, timestep_spacing="trailing", final_sigmas_type="sigma_min"),
        "trailing",
        LOWEST,
    ),
    "dpmpp_2m": (partial(DPMSolverMultistepScheduler, final_sigmas_type="sigma_min"), "sgm_linspace", LOWEST),
    "unipc": (partial(UniPCMultistepScheduler, final_sigmas_type="sigma_min"), "sgm_linspace", LOWEST),
}


@pytest.fixture(scope="module")
def unet():
    """A random U-Net in eight channels, told nothing but the time."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    model = UNet(UNetConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks)).eval()
    with torch.inference_mode():
        yield lambda x, t: model(x, t.expand(len(x)), Conditioning(torch.zeros(len(x), 1, 1)))


def their_end(scheduler, network, x, n, **options):
    """x through a scheduler of diffusers, some of which want x/alpha."""
    scheduler.set_timesteps(n)
    if isinstance(scheduler, IN_UNITS_OF_ALPHA):
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.float()[None])
        x = scheduler.step(output, t, x, **options).prev_sample
    if isinstance(scheduler, EulerDiscreteScheduler) and scheduler.sigmas[-1] > 0:
        x = x / (scheduler.sigmas[-1] ** 2 + 1) ** 0.5  # it leaves that out, as if sigma were 0
    return x


@pytest.mark.parametrize("n", [5, 10, 20, 50])
@pytest.mark.parametrize("name", MORE_ORACLES)
def test_the_samples_of_these_classes_are_diffusers_to_their_last_level(name, n, unet):
    """PNDM's halves of a step are theirs where a step is of an even number of timesteps; DEIS' closed forms of three
    slopes are float32's there; UniPC takes the last of 15 steps and more by order 1 there."""
    make, spacing, end = MORE_ORACLES[name]
    name = name.split(",")[0]
    options = {"generator": torch.Generator().manual_seed(8)} if SAMPLERS[name].stochastic else {}
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = their_end(make(**BETAS), unet, x, n, **options)
    denoiser = Denoiser(lambda x, t, cond: unet(x, t), SD, PREDICTIONS["eps"])
    spacing, _, offset = spacing.partition(", ")
    grid = SPACINGS[spacing](SD, n, **({"offset": 0} if offset else {}))
    grid = TimeGrid(SD, (*grid[:-1], end))
    ours = sample(FUNCTIONS[name], lambda x, point: denoiser(x, point, NOTHING), x, grid, White(8))
    error = (ours - expected).abs().max() / expected.abs().max()
    tolerances = {"plms": 1e-4, "pndm": 1e-4, "unipc": 2e-4, "deis_3": 4e-5}
    if name != "dpm_2_ancestral" or n > 10:  # or its steps are too long for a slope
        assert error < tolerances.get(name, 1e-5)


@pytest.mark.parametrize("n", [5, 20, 50])
@pytest.mark.parametrize("prediction", THEIR_PREDICTIONS)
@pytest.mark.parametrize("name", ORACLES)
def test_trajectories_are_diffusers_trajectories(name, prediction, n, unet):
    sampler = partial(ddim, eta=1.0) if name == "ddim, eta 1" else FUNCTIONS[name]
    theirs, network = THEIR_PREDICTIONS[prediction], unet
    if prediction == "x0" and name in ("euler_ancestral", "heun", "lms"):
        theirs = "epsilon"  # they refuse x0, or LMS reads it in units of alpha: tell them the noise in it

        def network(x, t):
            point = SD.level_at_timestep(t.item())
            return (x - point.alpha * unet(x, t)) / point.sigma

    options = {"eta": 1.0} if name == "ddim, eta 1" else {}
    if name in STOCHASTIC or options:
        options["generator"] = torch.Generator().manual_seed(8)
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = their_end(
        ORACLES[name](**BETAS, prediction_type=theirs, timestep_spacing="trailing"), network, x, n, **options
    )
    denoiser = Denoiser(lambda x, t, cond: unet(x, t), SD, PREDICTIONS[prediction])
    grid = SPACINGS["trailing"](SD, n)
    ours = sample(sampler, lambda x, point: denoiser(x, point, NOTHING), x, grid, White(8))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, spacing, n", [("euler", "linspace", 20), ("heun", "linspace", 80), ("ddim", "leading", 20)]
)
def test_other_spacings_are_diffusers_too(name, spacing, n, unet):
    """Heun's last step, to timestep 0, is longer than `HEUN_MIN_RHO` allows with fewer."""
    offset = {"steps_offset": 1} if spacing == "leading" else {}
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = their_end(
        ORACLES[name](**BETAS, **offset, prediction_type="v_prediction", timestep_spacing=spacing), unet, x, n
    )
    denoiser = Denoiser(lambda x, t, cond: unet(x, t), SD, PREDICTIONS["v"])
    grid = SPACINGS[spacing](SD, n)
    ours = sample(FUNCTIONS[name], lambda x, point: denoiser(x, point, NOTHING), x, grid, nothing)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(DDIMScheduler, set_alpha_to_one=True, clip_sample=False),
        partial(PNDMScheduler, set_alpha_to_one=True, skip_prk_steps=True),
    ],
    ids=["DDIM", "PNDM"],
)
def test_where_diffusers_steps_by_the_wrong_stride_ours_is_the_gaussian_s_flow(scheduler):
    """Both step by 1000 // n under every spacing: with trailing spacing and n = 150, 300, 600 by 6, 3, 1 where the grid
    has 6.67, 3.33, 1.67. They leave noise in the image, the more so the more steps."""

    def network(x, t):
        point = SD.level_at_timestep(t.item())
        return ((x - point.alpha * GAUSSIAN.denoise(x.double(), point)) / point.sigma).float()

    exact = GAUSSIAN.probability_flow(X, SD.level(1.0), CLEAN_LEVEL)
    theirs, ours = [], []
    for n in [150, 300, 600]:
        end = their_end(scheduler(**BETAS, timestep_spacing="trailing"), network, X.float(), n)
        theirs.append((end - exact).norm())
        end = sample(ddim, GAUSSIAN.denoise, X, SPACINGS["trailing"](SD, n), nothing)
        ours.append((end - exact).norm())
    assert convergence_order(torch.stack(ours)) > 0.8 and ours[-1] < 0.02
    assert convergence_order(torch.stack(theirs)) < 0


@pytest.mark.parametrize("name", FIXED)
def test_no_step_asks_the_device_anything(name):
    """On the meta device there are no numbers to ask for: fifty steps run, and `checked` asks when all are done."""
    grid, x = SPACINGS["trailing"](VPSDE.cosine(), 50), torch.empty(2, 4, 8, 8, device="meta")
    denoise = NFECounter(lambda x, point: x)
    steps = FUNCTIONS[name](x, grid, NoOpNoise())
    question = next(steps)
    with pytest.raises(StopIteration):
        while True:
            question = steps.send(denoise(*question))
    once = NFECounter(lambda x, point: x)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        sample(FUNCTIONS[name], once, x, grid, NoOpNoise())
    assert once.nfe == denoise.nfe >= 50


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_answer_that_is_not_finite_ends_in_one_error_that_names_the_step(name):
    grid = SPACINGS["trailing"](SD, 10)
    broken = lambda x, point: x * (math.nan if point.t < 0.45 else 0.5)
    with pytest.raises(
        ValueError, match=r"rk45: no step from t = 0\." if name == "rk45" else r"t = 0\.4, is not finite"
    ):
        sample(FUNCTIONS[name], broken, torch.ones(1, 4), grid, White(0))


def test_the_check_changes_nothing():
    grid, x = SPACINGS["trailing"](SD, 10), X.float()
    ends = [sample(s, lambda x, point: torch.tanh(x), x, grid, Noise([1, 2])) for s in (ddpm, check_finite(ddpm))]
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", SAMPLERS)
def test_x_keeps_its_dtype(name):
    x = torch.ones(1, 4, dtype=torch.float64)
    seen = []

    def denoise(x, point):
        seen.append(x.dtype)
        return 0.5 * x

    sample(FUNCTIONS[name], denoise, x, SPACINGS["trailing"](VPSDE.cosine(), 6), White(0))
    assert set(seen) == {torch.float64}


def test_langevin_is_exact_in_its_limit_of_small_steps():
    """One level, many small steps: the law at that level, from any start."""
    point = SD.level_at_timestep(300)
    grid = TimeGrid(SD, (SD.level_at_timestep(999), point))
    mean, cov = sampler_moments(partial(langevin, eps=0.02, steps_per_level=800), GAUSSIAN, grid)
    torch.testing.assert_close(mean, point.alpha * MU, rtol=0, atol=0.01)
    torch.testing.assert_close(cov, GAUSSIAN.marginal_cov(point), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("n", [5, 10, 20, 30])
@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("spacing", [name for name in SPACINGS if name not in ("beta_sigmas", *SAME)])  # refused there
def test_no_solver_leaves_the_data_on_the_cosine_table(spacing, name, n):
    """diffusers' cosine table begins at sigma/alpha = 20,291, so a first step may divide it by 1,000: whatever the
    sampler and the grid, the end stays within about a deviation of the data from the exact one."""
    grid = SPACINGS[spacing](COSINE_TABLE, n)
    end = sample(FUNCTIONS[name], GAUSSIAN.denoise, X, grid, nothing)
    error = (end - GAUSSIAN.probability_flow(X, grid[0], CLEAN_LEVEL)).square().mean().sqrt().item()
    assert error < (0.6 if n <= 10 else 0.3)


@pytest.mark.parametrize("name", ["dpmpp_3m", "unipc_3"])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_a_third_order_solver_generates_a_line_over_a_step_much_longer_than_the_last(name, spacing):
    """Grids in t end in a step of log-SNR several times the last one, where a parabola shoots far beyond its points."""
    for n in (10, 20, 30):
        grid = SPACINGS[spacing](SD, n)
        exact = GAUSSIAN_MIXTURE.probability_flow(X, grid[0], CLEAN_LEVEL._replace(sigma=1e-6))
        second, third = (
            (sample(FUNCTIONS[k], GAUSSIAN_MIXTURE.denoise, X, grid, nothing) - exact).norm()
            for k in ("dpmpp_2m", name)
        )
        assert third < 2 * second


@pytest.mark.parametrize("spacing", ["karras", "log_snr", "beta", "trailing"])
@pytest.mark.parametrize("n", [5, 10])
def test_few_long_steps_are_about_as_good_as_ddim_s_and_ddpm_s(spacing, n):
    """No extrapolation over a step of sigma/alpha to a ninth, no slope over one to a fifth, and no step of the SDE that
    renews more noise than there is: with 5 steps these made images of noise."""
    grid, x = SPACINGS[spacing](COSINE_TABLE, n), Noise([0])(torch.empty(1, 500, 2, dtype=torch.float64))

    def denoise(x, point):
        return GAUSSIAN_MIXTURE.denoise(x[0], point)[None]

    def end(name, grid):
        return sample(FUNCTIONS[name], denoise, x, grid, Noise([1]))

    fine = SPACINGS["log_snr"](COSINE_TABLE, 200)
    for names, plain, exact in [
        (DETERMINISTIC, "ddim", end("dpmpp_3m", fine)),
        ([name for name in AFFINE if name != "langevin"], "ddpm", end("dpmpp_2m_sde", fine)),
    ]:
        errors = {name: (end(name, grid) - exact).square().mean().sqrt() for name in names}
        assert max(errors.values()) < 1.6 * errors[plain], {k: round(v.item(), 3) for k, v in errors.items()}


def consistency_function(x, level):
    """What a distilled network gives for x0: the end of the flow from x, not a mean."""
    return GAUSSIAN.probability_flow(x, level, CLEAN_LEVEL)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_lcm_has_the_data_s_law_with_a_consistency_function_in_any_number_of_steps(n):
    data = Gaussian(MU, S)
    object.__setattr__(data, "denoise", consistency_function)
    mean, cov = sampler_moments(FUNCTIONS["lcm"], data, SPACINGS["lcm"](SD, n))
    torch.testing.assert_close(mean, MU, rtol=0, atol=1e-6)
    torch.testing.assert_close(cov, S, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma, plain", [(0.0, "ddim"), (1.0, "lcm")])
def test_tcd_is_ddim_without_noise_and_nearly_lcm_with_all(gamma, plain):
    """Timestep 0, where gamma = 1 leads, has a noise of .029."""
    grid = SPACINGS["lcm"](SD, 8)
    ends = [
        sample(sampler, GAUSSIAN_MIXTURE.denoise, X, grid, White(1))
        for sampler in (partial(FUNCTIONS["tcd"], eta=gamma), FUNCTIONS[plain])
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=0.05 if gamma else 1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_seeds_that_share_their_low_32_bits_differ(name):
    grid, like = SPACINGS["trailing"](SD, 10), torch.empty(1, 4, 4, 4)
    ends = []
    for seed in (5, 5 + 2**32):
        noise = Noise([seed])
        ends.append(sample(FUNCTIONS[name], lambda x, point: torch.tanh(x * point.alpha), noise(like), grid, noise))
    assert (ends[0] - ends[1]).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_churn_leaves_the_law_as_it_is(name):
    """Noise up to a level and the flow down from it keep the exact law: the error is of the solver's order."""
    churned = partial(FUNCTIONS[name], s_churn=8.0, s_tmin=0.4, s_tmax=2.0)
    of_mean, of_cov = weak_errors(churned, GAUSSIAN, doublings(mid_snr_grid, SD, 36, 3))
    assert convergence_order(of_cov) == pytest.approx(SAMPLERS[name].order, abs=0.15)
    assert of_mean.max() < 1e-12 or convergence_order(of_mean) == pytest.approx(SAMPLERS[name].order, abs=0.15)


def test_churn_is_karras_et_al_s_algorithm_2():
    """In x/alpha: u_hat = u (1 + gamma), x + s_noise sqrt(u_hat^2 - u^2) z, and Euler's step from u_hat."""
    now, to = SD.level_at_timestep(500), SD.level_at_timestep(400)
    x, z = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, gamma = now.sigma_over_alpha, min(0.3 / 1, math.sqrt(2) - 1)
    u_hat, seen = u * (1 + gamma), []

    def denoise(x, level):
        seen.append((x, level))
        return torch.tanh(x)

    function = partial(FUNCTIONS["euler"], s_churn=0.3, s_noise=1.1)
    end = sample(function, denoise, x, TimeGrid(SD, (now, to)), lambda like: z)
    ((asked, level),) = seen
    y = x / now.alpha + 1.1 * math.sqrt(u_hat**2 - u**2) * z
    assert level.sigma_over_alpha == pytest.approx(u_hat)
    torch.testing.assert_close(asked / level.alpha, y, rtol=1e-6, atol=1e-6)
    slope = (y - torch.tanh(asked)) / u_hat
    torch.testing.assert_close(end / to.alpha, y + (to.sigma_over_alpha - u_hat) * slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FIXED if {"eta"} & SAMPLERS[name].options.keys() and name != "tcd"])
def test_any_eta_has_the_data_s_law_in_the_limit_and_0_is_the_flow(name):
    mean, cov = sampler_moments(partial(FUNCTIONS[name], eta=0.5), GAUSSIAN, SPACINGS["log_snr"](SD, 400))
    torch.testing.assert_close(mean, MU, rtol=0, atol=0.02)
    torch.testing.assert_close(cov, S, rtol=0, atol=0.02)
    grid = SPACINGS["log_snr"](SD, 200)
    end = sample(partial(FUNCTIONS[name], eta=0.0), GAUSSIAN.denoise, X, grid, nothing)
    torch.testing.assert_close(end, GAUSSIAN.probability_flow(X, grid[0], CLEAN_LEVEL), rtol=0, atol=0.02)
