"""Scheduler configurations mean what they mean in diffusers, or are refused."""

import inspect

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from ldm.checkpoints.schedule import DIFFUSERS_SCHEDULERS, compute_alphas_cumprod, parse_scheduler_config
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.samplers import SAMPLERS


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
    drawn = {"PNDMScheduler": "dpmpp_2m", "DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"}
    drawn |= {"HeunDiscreteScheduler": "heun", "UniPCMultistepScheduler": "unipc"}
    expected = drawn.get(name, "dpmpp_3m_published" if "solver_order" in config else "dpmpp_2m_sde")
    spacings = {"use_karras_sigmas": "karras", "use_lu_lambdas": "log_snr", "use_beta_sigmas": "beta"}
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


CLASSES_WITH_ORDERS = [name for name, spec in DIFFUSERS_SCHEDULERS.items() if spec.solvers]
OTHER_VALUES = {  # of fields that steer the steps, none of them the classes' own
    "solver_order": [1, 2, 3, 7, 0, "2", True],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis", "nonsense"],
    "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2", "nonsense"],
    "timestep_spacing": ["linspace", "leading", "trailing", "nonsense"],
    "predict_x0": [False],
    "disable_corrector": [[0]],
    "solver_p": ["UniPCMultistepScheduler"],
    "lambda_min_clipped": [-5.1],
}


@pytest.mark.parametrize("name", DIFFUSERS_SCHEDULERS)
def test_every_field_that_steers_the_steps_is_honoured_or_refused_by_name(name):
    """By diffusers' own signature: another value gives another sampler or spacing, or the one that the class makes of
    it, or an error that names the field."""
    usual = parse_scheduler_config({"_class_name": name})
    for field in OTHER_VALUES.keys() & inspect.signature(getattr(diffusers, name)).parameters.keys():
        own = inspect.signature(getattr(diffusers, name)).parameters[field].default
        for value in OTHER_VALUES[field]:
            try:
                read = parse_scheduler_config({"_class_name": name, field: value})
            except ValueError as error:
                assert field in str(error)
                continue
            if (read.sampler, read.spacing) == (usual.sampler, usual.spacing) and (value, type(value)) != (
                own,
                type(own),
            ):
                end = {"final_sigmas_type": "sigma_min"} if value == "deis" and "DPM" in name else {}  # they ask for it
                theirs = getattr(diffusers, name)(**{field: value}, **end).config[field]
                assert theirs == own or field == "solver_type", f"{field}: {value!r} goes unheeded"


@pytest.mark.parametrize(
    "name, config, sampler",
    [
        ("UniPCMultistepScheduler", {"solver_order": 1}, "unipc_1"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc_3"),
        ("DPMSolverSinglestepScheduler", {"solver_order": 1}, "ddim"),
        ("DEISMultistepScheduler", {"solver_order": 3}, "dpmpp_3m"),
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


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "LCMScheduler"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"prediction_type": "flow_prediction"},
        {"use_flow_sigmas": True},
        {"thresholding": True},
        {"timestep_type": "continuous"},
        {"variance_type": "learned_range"},
        {"beta_start": "0.1"},
        {"beta_end": float("inf")},
        {"num_train_timesteps": 2},
        {"num_train_timesteps": 10**9},
        {"trained_betas": [0.1, 0.2]},
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        {"a_field_of_the_future": 1},
    ],
)
def test_unsupported_scheduler_fields_are_refused(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        parse_scheduler_config({"_class_name": "EulerDiscreteScheduler", **config})


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
