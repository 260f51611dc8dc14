"""scheduler_config.json: the SDE and the prediction that a checkpoint was trained with, and how its makers draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.checkpoints.configs import ConfigSchema, build_from_config, get_config_number
from ldm.diffusion.prediction import PREDICTIONS, Prediction
from ldm.diffusion.sde import BETA_SCHEDULES, VPSDE, rescale_zero_terminal_snr
from ldm.errors import choose

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names: ours
DIFFUSERS_PREDICTION_TYPES = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
MAX_TRAIN_TIMESTEPS = 100_000


class SchedulerSpec(NamedTuple):
    """A class of diffusers in our words: the sampler that draws as it does, and its own defaults."""

    sampler: str
    spacing: str = "linspace"
    beta_range: tuple[float, float] = (1e-4, 0.02)


class SchedulerSettings(NamedTuple):
    """What a scheduler's configuration says."""

    sde: VPSDE
    prediction: Prediction
    sampler: str
    spacing: str


DIFFUSERS_SCHEDULERS = {
    "DDIMScheduler": SchedulerSpec("ddim", "leading"),
    "DDPMScheduler": SchedulerSpec("ddpm", "leading"),
    "PNDMScheduler": SchedulerSpec("dpmpp_2m", "leading"),  # a linear multistep method; here the usual one of order two
    "EulerDiscreteScheduler": SchedulerSpec("euler"),
    "EulerAncestralDiscreteScheduler": SchedulerSpec("euler_ancestral"),
    "HeunDiscreteScheduler": SchedulerSpec("heun", beta_range=(0.00085, 0.012)),
    "LMSDiscreteScheduler": SchedulerSpec("lms"),
    "DPMSolverMultistepScheduler": SchedulerSpec("dpmpp_2m"),
    "DPMSolverSinglestepScheduler": SchedulerSpec("dpmpp_2s"),
    "UniPCMultistepScheduler": SchedulerSpec("unipc"),
    "DEISMultistepScheduler": SchedulerSpec("dpmpp_2m"),  # exponential integrators alike
    "KDPM2DiscreteScheduler": SchedulerSpec(
        "heun", beta_range=(0.00085, 0.012)
    ),  # of the second order, one step at a time
    "KDPM2AncestralDiscreteScheduler": SchedulerSpec("euler_ancestral", beta_range=(0.00085, 0.012)),
}
DPM_SOLVER_SAMPLERS = {  # algorithm_type and solver_order where they choose another sampler than the class does
    ("dpmsolver++", 1): "ddim",
    ("dpmsolver++", 3): "dpmpp_3m",
    ("sde-dpmsolver++", 1): "euler_ancestral",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 3): "dpmpp_3m_sde",
}
SIGMA_FLAG_SPACINGS = {  # a field that is true: the spacing
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "log_snr",
}
SCHEDULER_CONFIG_SCHEMA = ConfigSchema(
    "scheduler",
    """num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr prediction_type
    timestep_spacing algorithm_type solver_order use_karras_sigmas use_exponential_sigmas use_beta_sigmas
    use_lu_lambdas""",
    {
        "thresholding": (False,),
        "timestep_type": ("discrete",),  # a network that is told log sigma is another
        "use_flow_sigmas": (False, None),
        "use_dynamic_shifting": (False,),
        "shift_terminal": (None,),
        "predict_x0": (True,),
        "sigma_min": (None, 0),
        "sigma_max": (None, 0),
        "variance_type": (None, "fixed_small", "fixed_small_log"),  # the posterior's own: none that is learnt
    },
    {
        "never, as diffusers' pipelines set it, whatever a file says": "clip_sample clip_sample_range",
        "1, as diffusers' pipelines set it, whatever a file says": "steps_offset",
        "here the last step ends in the clean picture": """set_alpha_to_one final_sigmas_type euler_at_final
        lower_order_final""",
        "here the table is smooth between its numbers": "interpolation_type",
        "here the steps begin where the schedule does": "lambda_min_clipped",
        "SAMPLERS says how each solver goes": """solver_type skip_prk_steps disable_corrector solver_p
        noise_sampler_seed""",
        "of thresholding alone, which is refused": "dynamic_thresholding_ratio sample_max_value",
        "of flow matching alone, which is refused": "flow_shift time_shift_type",
    },
)


def load_scheduler_config(path: Path, **overrides: Any) -> SchedulerSettings:
    """What a scheduler_config.json says, some of its fields overridden; ValueError names the file."""
    return build_from_config(path, lambda config: parse_scheduler_config({**config, **overrides}))


def parse_scheduler_config(config: Mapping[str, Any]) -> SchedulerSettings:
    """The SDE through a configuration's table, its prediction, and the sampler and spacing of its class.

    ValueError names the first field that would go unheeded.
    """
    SCHEDULER_CONFIG_SCHEMA.validate(config)
    kind = choose(DIFFUSERS_SCHEDULERS, config.get("_class_name", ""), "scheduler _class_name")
    prediction = choose(PREDICTION_TYPES, config.get("prediction_type", "epsilon"), "prediction_type")
    solver = config.get("algorithm_type", "dpmsolver++"), config.get("solver_order", 2)
    sampler = DPM_SOLVER_SAMPLERS.get(solver, kind.sampler) if kind.sampler == "dpmpp_2m" else kind.sampler
    return SchedulerSettings(
        VPSDE.tabulated(compute_alphas_cumprod(config)),
        PREDICTIONS[prediction],
        sampler,
        _resolve_spacing(config, kind),
    )


def _resolve_spacing(config: Mapping[str, Any], scheduler: SchedulerSpec) -> str:
    asked = [spacing for name, spacing in SIGMA_FLAG_SPACINGS.items() if config.get(name)]
    if len(asked) > 1:
        raise ValueError(
            f"{' and '.join(name for name in SIGMA_FLAG_SPACINGS if config.get(name))}: one spacing is needed"
        )
    ways = {name: name for name in ("leading", "linspace", "trailing")}
    named = choose(ways, config.get("timestep_spacing", scheduler.spacing), "timestep_spacing")
    return asked[0] if asked else named


def compute_alphas_cumprod(config: Mapping[str, Any]) -> torch.Tensor:
    """alphas_cumprod, by the fields and defaults of diffusers' schedulers."""
    start, end = DIFFUSERS_SCHEDULERS.get(config.get("_class_name", ""), SchedulerSpec("")).beta_range
    steps = get_config_number(config, "num_train_timesteps", 1000)
    if not (isinstance(steps, int) and 3 <= steps <= MAX_TRAIN_TIMESTEPS):
        raise ValueError(f"num_train_timesteps {steps}: must be a whole number from 3 to {MAX_TRAIN_TIMESTEPS}")
    if (trained := config.get("trained_betas")) is not None:
        if not isinstance(trained, list) or len(trained) != steps:
            raise ValueError(f"trained_betas: a list of num_train_timesteps = {steps} numbers is needed")
        betas = [get_config_number({"trained_betas": beta}, "trained_betas", 0) for beta in trained]
        alphas = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    else:
        schedule = choose(BETA_SCHEDULES, config.get("beta_schedule", "linear"), "beta_schedule")
        ends = get_config_number(config, "beta_start", start), get_config_number(config, "beta_end", end)
        if not 0 < ends[0] <= ends[1] < 1:
            raise ValueError(f"beta_start {ends[0]} and beta_end {ends[1]}: must be 0 < beta_start <= beta_end < 1")
        alphas = schedule(*ends, steps)
    return rescale_zero_terminal_snr(alphas) if config.get("rescale_betas_zero_snr") else alphas


def build_scheduler_config(schedule: str, prediction: str) -> dict[str, Any]:
    """A scheduler_config.json for weights trained on a schedule of `SCHEDULES` without parameters of its own."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": schedule,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": choose(DIFFUSERS_PREDICTION_TYPES, prediction, "prediction"),
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }
