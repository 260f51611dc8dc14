"""Scheduler configurations mean what they mean in diffusers, or are refused."""

import inspect
import json
import math
import warnings
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from ldm.checkpoints.schedule import (
    compute_alphas_cumprod,
    list_ignored_fields,
    load_scheduler_config,
    parse_scheduler_config,
)
from ldm.checkpoints.scheduler_classes import DIFFUSERS_SCHEDULERS, IGNORED_FIELDS, UNSUPPORTED_SCHEDULERS
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.samplers import SAMPLERS, sample
from ldm.diffusion.singlestep import HEUN_MIN_RHO
from ldm.diffusion.steps import MAX_EXTRAPOLATED_H
from ldm.diffusion.timesteps import SPACINGS, end_at_lowest


@pytest.mark.parametrize(
    "name, config",
    [
        ("PNDMScheduler", {}),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
        ("DDPMScheduler", {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "timestep_spacing": "leading"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "timestep_spacing": "linspace"}),
        ("UniPCMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "use_beta_sigmas": True}),
    ],
)
def test_a_scheduler_config_is_read_as_diffusers_reads_it(name, config):
    theirs = getattr(diffusers, name)(**config)
    drawn = {"PNDMScheduler": "pndm", "DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"}
    drawn |= {"HeunDiscreteScheduler": "heun", "UniPCMultistepScheduler": "unipc"}
    expected = drawn.get(name, "dpmpp_3m_published" if "solver_order" in config else "dpmpp_2m_sde")
    spacings = {"use_karras_sigmas": "karras", "use_lu_lambdas": "log_snr", "use_beta_sigmas": "beta_sigmas"}
    asked = [spacings[field] for field in config if field in spacings]
    schedule = parse_scheduler_config({"_class_name": name, **theirs.config})
    assert schedule.sampler == expected and schedule.prediction is PREDICTIONS["eps"]
    spacing = DIFFUSERS_SCHEDULERS[name].spacings[theirs.config.timestep_spacing]
    assert schedule.spacing == (asked[0] if asked else spacing)
    t = (torch.arange(len(theirs.alphas_cumprod), dtype=torch.float64) + 1) / len(theirs.alphas_cumprod)
    alphas = torch.exp(2 * schedule.sde.log_alpha(t))
    torch.testing.assert_close(alphas.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", DIFFUSERS_SCHEDULERS)
def test_every_field_of_a_scheduler_is_supported(name):
    """As diffusers itself makes it, with all its fields; and a class's own defaults are its."""
    theirs = getattr(diffusers, name)()
    schedule = parse_scheduler_config({"_class_name": name, **theirs.config})
    assert schedule == parse_scheduler_config({"_class_name": name})._replace(sde=schedule.sde)
    assert torch.equal(compute_alphas_cumprod({"_class_name": name}), compute_alphas_cumprod(theirs.config))
    assert schedule.spacing == DIFFUSERS_SCHEDULERS[name].spacings[theirs.config.get("timestep_spacing", "linspace")]
    assert schedule.sampler in SAMPLERS


# Longer steps of sigma/alpha are taken otherwise: by these samplers, and by multistep ones of `MAX_EXTRAPOLATED_H`.
ANY_STEPS = ("ddim", "ddpm", "euler", "euler_ancestral", "plms", "pndm", "deis", "deis_3", "lcm", "tcd")
MIN_RHO = {**dict.fromkeys(ANY_STEPS, 0.0), "heun": HEUN_MIN_RHO, "dpm_2": 0.2025, "dpm_2_ancestral": 0.62}
CLASSES_WITH_ORDERS = [name for name, spec in DIFFUSERS_SCHEDULERS.items() if "solver_order" in spec.field_names]
OTHER_VALUES = {  # of every field that diffusers' classes have: no one of these is the default of all
    "num_train_timesteps": [500],
    "beta_start": [0.001],
    "beta_end": [0.015],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "nonsense"],
    "trained_betas": [[0.0005 + 1e-5 * k for k in range(1000)]],
    "prediction_type": ["epsilon", "sample", "flow_prediction"],
    "rescale_betas_zero_snr": [True],
    "timestep_spacing": ["linspace", "leading", "trailing", "nonsense"],
    "steps_offset": [0, 7],
    "clip_sample": [True],
    "clip_sample_range": [2.0],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [2.0],
    "set_alpha_to_one": [False],
    "skip_prk_steps": [False],
    "final_sigmas_type": ["sigma_min"],
    "euler_at_final": [True],
    "lower_order_final": [False],
    "interpolation_type": ["log_linear"],
    "timestep_type": ["continuous"],
    "sigma_min": [0.1],
    "sigma_max": [10.0],
    "variance_type": ["fixed_small_log", "fixed_large", "learned_range"],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "use_flow_sigmas": [True],
    "flow_shift": [2.0],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["linear"],
    "shift_terminal": [0.1],
    "solver_order": [1, 2, 3, 7, "2", True],
    "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2", "nonsense"],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis", "nonsense"],
    "predict_x0": [False],
    "disable_corrector": [[0]],
    "solver_p": ["UniPCMultistepScheduler"],
    "lambda_min_clipped": [-5.1],
    "original_inference_steps": [25],
    "timestep_scaling": [1.0],
    "predictor_order": [1],
    "corrector_order": [1],
    "tau_func": ["a function"],
}
NEUTRAL = {  # of the fields above that diffusers' pipelines set, and steps to sigma = 0, as ours are
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
STRIDED = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
)  # step by N // n, whatever the grid: another test's subject
CASES = [
    (name, field, value)
    for name in DIFFUSERS_SCHEDULERS
    for field in inspect.signature(getattr(diffusers, name)).parameters
    for value in OTHER_VALUES.get(field, ["no value: add one"])
]


def network(x, t):
    """A small network that tells every timestep and level from others."""
    return 0.6 * torch.tanh(1.3 * x) - 0.3 * x.flip(1) + 0.2 * torch.sin(t / 150)


class White:
    """Noise in the order of one generator, as diffusers draws it."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(8)

    def __call__(self, like, *_):
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)

    between = __call__


X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
N = 10


def their_evaluations(name, config):
    """(timestep, x) of each network evaluation of diffusers' scheduler, then (-1, its sample), and alphas_cumprod."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(N)
    x, seen, options = X, [], {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(8)
    if name.startswith(("Euler", "Heun", "LMS", "KDPM2")):
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        seen.append((t.item(), scaled))
        x = scheduler.step(network(scaled, t), t, x, **options).prev_sample
    return [*seen, (-1, x)], scheduler.alphas_cumprod


def our_evaluations(settings):
    seen = []

    def record(x, t, cond):
        seen.append((t[0].item(), x))
        return network(x, t.view(-1, 1, 1, 1))

    denoiser = Denoiser(record, settings.sde, settings.prediction)
    function = SAMPLERS[settings.sampler].function
    end = sample(function, lambda x, level: denoiser(x, level, None), X, grid_of(settings), White())
    return [*seen, (-1, end)]


def grid_of(settings):
    grid = SPACINGS[settings.spacing](settings.sde, N)
    return grid if settings.final_sigmas_type == "zero" else end_at_lowest(grid)


def test_every_field_of_diffusers_is_known():
    for name, kind in DIFFUSERS_SCHEDULERS.items():
        theirs = inspect.signature(getattr(diffusers, name)).parameters.keys()
        assert kind.field_names == theirs and theirs <= OTHER_VALUES.keys(), name


@pytest.mark.parametrize("name, field, value", CASES)
@pytest.mark.filterwarnings("ignore")
def test_every_field_of_every_class_is_honoured_refused_or_ignored_with_a_reason(name, field, value):
    """Generated from diffusers' signatures. Honoured: its network evaluations, timesteps and inputs, and its sample are
    ours."""
    own = inspect.signature(getattr(diffusers, name)).parameters
    config = {key: neutral for key, neutral in NEUTRAL.items() if key in own} | {field: value}
    if name == "PNDMScheduler" and field != "prediction_type":
        config["prediction_type"] = "epsilon"  # of v's it takes the mean before it makes noise of it with the last x
    if value == "deis" and "DPM" in name:
        config["final_sigmas_type"] = "sigma_min"  # it asks for that
    ours = {"_class_name": name, **config}
    try:
        settings = parse_scheduler_config(ours)
    except ValueError as error:
        assert field in str(error)
        return
    if field in IGNORED_FIELDS:
        assert (
            not IGNORED_FIELDS[field].values
            or any(field in note for note in list_ignored_fields(ours))
            or (
                field in ("steps_offset", "sigma_min", "sigma_max")
                and settings
                == parse_scheduler_config({"_class_name": name, **config, field: NEUTRAL.get(field)})._replace(
                    sde=settings.sde
                )
            )
        )
        return
    try:
        expected, alphas_cumprod = their_evaluations(name, config)
    except (NotImplementedError, ValueError):
        return  # they have no such scheduler
    if settings.prediction is PREDICTIONS["eps"] and alphas_cumprod[-1] < 1e-6:
        return
    if any(math.isnan(t) for t, _ in expected):
        return
    grid = grid_of(settings)
    no_length = N + 1 - len(grid)  # a last step from the lowest level to itself, for which they evaluate the network
    if no_length and settings.final_sigmas_type == "sigma_min":
        torch.testing.assert_close(expected[-1][1], expected[-2][1], rtol=1e-3, atol=1e-3)
        del expected[-2]
    theirs = [float(t) for t, _ in expected]
    rounding = (
        1.01 if field in ("use_exponential_sigmas", "use_beta_sigmas") else 0.51
    )  # some classes cut fractions off
    for level in grid[:-1]:
        assert min(abs(settings.sde.timestep(level.t) - t) for t in theirs) < rounding
    if not DIFFUSERS_SCHEDULERS[name].exact or (name in STRIDED and value == "linspace"):
        return
    evaluations = our_evaluations(settings)
    assert [t for t, _ in evaluations] == pytest.approx(theirs, abs=rounding)
    tolerance = 0.03 if field.startswith(("use_", "rescale")) else 2e-3  # rounded timesteps; SNR(1) of 2^-24
    multistep = settings.sampler.startswith(("dpmpp_2m", "dpmpp_3m", "unipc"))
    stages = 1 + (settings.sampler in ("heun", "dpm_2", "dpm_2_ancestral"))
    min_rho = MIN_RHO.get(settings.sampler, math.exp(-MAX_EXTRAPOLATED_H))  # ours go on otherwise after longer steps
    lengths = enumerate(pairwise(level.sigma_over_alpha for level in grid))
    long = next((k for k, (a, b) in lengths if 0 < b < min_rho * a and (k or not multistep)), len(expected))
    count = stages * (long + 1)
    if no_length and name == "DEISMultistepScheduler":
        count = len(expected) - 1  # of fewer than 15 steps they count that one too as one of lower order
    for (_, x), (_, their_x) in list(zip(evaluations, expected, strict=True))[:count]:
        torch.testing.assert_close(x, their_x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "name, config, sampler",
    [
        ("UniPCMultistepScheduler", {"solver_order": 1}, "unipc_1"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc_3"),
        ("DPMSolverSinglestepScheduler", {"solver_order": 1}, "ddim"),
        ("DEISMultistepScheduler", {"solver_order": 3}, "deis_3"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}, "dpmpp_2m"),
        ("DDIMParallelScheduler", {}, "ddim"),
        ("DDPMParallelScheduler", {}, "ddpm"),
    ],
)
def test_solver_orders_and_sibling_classes_have_their_samplers(name, config, sampler):
    assert parse_scheduler_config({"_class_name": name, **config}).sampler == sampler


@pytest.mark.parametrize("name", CLASSES_WITH_ORDERS)
@pytest.mark.parametrize(
    "config", [{"solver_order": 7}, {"algorithm_type": "nonsense"}, {"algorithm_type": "sde-dpmsolver"}]
)
def test_a_solver_that_there_is_not_is_refused_by_name(name, config):
    field = next(iter(config))
    if name != "UniPCMultistepScheduler" or field == "solver_order":
        with pytest.raises(ValueError, match=f"{name} {field}"):
            parse_scheduler_config({"_class_name": name, **config})


@pytest.mark.parametrize("name", UNSUPPORTED_SCHEDULERS)
def test_schedulers_of_other_kinds_of_model_are_refused_with_the_reason(name):
    assert hasattr(diffusers, name)
    with pytest.raises(ValueError, match=f"{name}.*networks"):
        parse_scheduler_config({"_class_name": name})


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "AScheduler"},
        {"prediction_type": "flow_prediction"},
        {"timestep_type": "continuous"},
        {"beta_start": "0.1"},
        {"beta_end": float("inf")},
        {"num_train_timesteps": 2},
        {"num_train_timesteps": 10**9},
        {"trained_betas": [0.1, 0.2]},
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
    ],
)
def test_unsupported_scheduler_fields_are_refused(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        parse_scheduler_config({"_class_name": "EulerDiscreteScheduler", **config})


PUBLISHED = {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}


@pytest.mark.parametrize(
    "config, loud, quiet",
    [
        ({"_class_name": "PNDMScheduler", **PUBLISHED}, [], []),  # SD 1.5's own
        ({"_class_name": "EulerDiscreteScheduler", "a_field_of_the_future": 1}, ["a_field_of_the_future"], []),
        ({"_class_name": "EulerDiscreteScheduler", "thresholding": True, "solver_order": 2}, [], ["thresh", "solver"]),
        ({"_class_name": "DDIMScheduler", "use_karras_sigmas": True}, ["use_karras_sigmas"], []),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, ["clip_sample"], []),
        ({"_class_name": "DDIMScheduler", "steps_offset": 0}, ["steps_offset"], []),
        ({"_class_name": "EulerDiscreteScheduler", "steps_offset": 0, "sigma_min": 0.1}, [], []),  # of no effect
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "timestep_spacing": "leading"},
            ["timestep_spacing"],
            [],
        ),
    ],
)
def test_what_is_not_read_is_said(config, loud, quiet, tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = load_scheduler_config(path)
    said = " ".join(str(warning.message) for warning in caught)
    assert len(caught) == bool(loud) and all(f"{path}: ignored: {field} = " in said for field in loud)
    notes = " ".join(list_ignored_fields(config))
    assert all(field in notes for field in [*loud, *quiet]) and bool(notes) == bool([*loud, *quiet])
    flag = config.get("use_karras_sigmas") and config["_class_name"] != "DDIMScheduler"
    assert (settings.spacing == "karras") == bool(flag)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    ],
)
def test_alphas_cumprod_equals_diffusers(config):
    expected = DDIMScheduler.from_config(config).alphas_cumprod
    torch.testing.assert_close(compute_alphas_cumprod(config).float(), expected, rtol=1e-4, atol=1e-7)
