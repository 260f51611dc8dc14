"""scheduler_config.json: the SDE and prediction that a checkpoint was trained with, and its recommended sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.checkpoints.families import ConfigSchema, ModelFamily, build_from_config, get_config_number
from ldm.diffusion.prediction import PREDICTIONS, Prediction
from ldm.diffusion.sde import BETA_SCHEDULES, VPSDE, rescale_zero_terminal_snr
from ldm.errors import choose

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names: ours
DIFFUSERS_PREDICTION_TYPES = {name: diffusers_name for diffusers_name, name in PREDICTION_TYPES.items()}
MAX_TRAIN_TIMESTEPS = 100_000


class SchedulerSpec(NamedTuple):
    """A scheduler class of diffusers: the sampler that computes the same, and the class's own defaults.

    `solvers` are the samplers by `algorithm_type` and `solver_order` where the class has these, `solver_types` the
    values of `solver_type` that leave them as they are, and `spacings` its grids.
    """

    sampler: str
    spacing: str = "linspace"
    beta_range: tuple[float, float] = (1e-4, 0.02)
    solvers: Mapping[tuple[str, int], str] = {}
    solver_types: tuple[str, ...] = ()
    spacings: Mapping[str, str] = {"leading": "leading", "linspace": "linspace", "trailing": "trailing"}


class SchedulerSettings(NamedTuple):
    """The content of a scheduler's configuration."""

    sde: VPSDE
    prediction: Prediction
    sampler: str
    spacing: str


MULTISTEP_SPACINGS = {"leading": "sgm_leading", "linspace": "sgm_uniform", "trailing": "trailing"}  # n of n + 1 points
DPM_SOLVERS = {
    ("dpmsolver++", 1): "ddim",
    ("dpmsolver++", 2): "dpmpp_2m",
    ("dpmsolver++", 3): "dpmpp_3m_published",
    ("sde-dpmsolver++", 1): "euler_ancestral",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 3): "dpmpp_3m_sde",
}
SINGLESTEP_SOLVERS = {("dpmsolver++", 1): "ddim", ("dpmsolver++", 2): "dpmpp_2s"}
UNIPC_SOLVERS = {("", 1): "unipc_1", ("", 2): "unipc", ("", 3): "unipc_3"}  # it has no algorithm_type
DEIS_SOLVERS = {("deis", 1): "ddim", ("deis", 2): "dpmpp_2m", ("deis", 3): "dpmpp_3m"}  # exponential integrators too
ALGORITHM_ALIASES = {  # what a class reads another class's algorithm_type as
    "DPMSolverMultistepScheduler": {"deis": "dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"deis": "dpmsolver++"},
    "DEISMultistepScheduler": {"dpmsolver": "deis", "dpmsolver++": "deis"},
}
DIFFUSERS_SCHEDULERS = {
    "DDIMScheduler": SchedulerSpec("ddim", "leading"),
    "DDIMParallelScheduler": SchedulerSpec("ddim", "leading"),
    "DDPMScheduler": SchedulerSpec("ddpm", "leading"),
    "DDPMParallelScheduler": SchedulerSpec("ddpm", "leading"),
    "PNDMScheduler": SchedulerSpec("dpmpp_2m", "leading"),  # a linear multistep method; ours is of order 2
    "EulerDiscreteScheduler": SchedulerSpec("euler"),
    "EulerAncestralDiscreteScheduler": SchedulerSpec("euler_ancestral"),
    "HeunDiscreteScheduler": SchedulerSpec("heun", beta_range=(0.00085, 0.012)),
    "LMSDiscreteScheduler": SchedulerSpec("lms"),
    "DPMSolverMultistepScheduler": SchedulerSpec(
        "dpmpp_2m",
        solvers=DPM_SOLVERS,
        solver_types=("midpoint", "logrho", "bh1", "bh2"),  # the last three are read as midpoint
        spacings=MULTISTEP_SPACINGS,
    ),
    "DPMSolverSinglestepScheduler": SchedulerSpec(
        "dpmpp_2s",
        solvers=SINGLESTEP_SOLVERS,
        solver_types=("midpoint", "logrho", "bh1", "bh2"),
        spacings=MULTISTEP_SPACINGS,
    ),
    "UniPCMultistepScheduler": SchedulerSpec(
        "unipc",
        solvers=UNIPC_SOLVERS,
        solver_types=("bh2", "midpoint", "heun", "logrho"),  # the last three are read as bh2
        spacings=MULTISTEP_SPACINGS,
    ),
    "DEISMultistepScheduler": SchedulerSpec(
        "dpmpp_2m",
        solvers=DEIS_SOLVERS,
        solver_types=("logrho", "midpoint", "heun", "bh1", "bh2"),
        spacings=MULTISTEP_SPACINGS,
    ),
    "KDPM2DiscreteScheduler": SchedulerSpec("heun", beta_range=(0.00085, 0.012)),  # also second-order, single-step
    "KDPM2AncestralDiscreteScheduler": SchedulerSpec("euler_ancestral", beta_range=(0.00085, 0.012)),
}
SIGMA_FLAG_SPACINGS = {  # spacings by the field that is true
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "log_snr",
}
SCHEDULER_CONFIG_SCHEMA = ConfigSchema(
    "scheduler",
    """num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr prediction_type
    timestep_spacing algorithm_type solver_order solver_type use_karras_sigmas use_exponential_sigmas use_beta_sigmas
    use_lu_lambdas""",
    {
        "thresholding": (False,),
        "timestep_type": ("discrete",),  # "continuous": a network conditioned on log sigma
        "use_flow_sigmas": (False, None),
        "use_dynamic_shifting": (False,),
        "shift_terminal": (None,),
        "predict_x0": (True,),
        "sigma_min": (None, 0),
        "sigma_max": (None, 0),
        "variance_type": (None, "fixed_small", "fixed_small_log"),  # not learned
        "lambda_min_clipped": (None, -math.inf, "-inf"),  # our steps begin where the schedule does
        "disable_corrector": ([], None),
        "solver_p": (None,),
    },
    {
        "False, as diffusers' pipelines set it, whatever a file says": "clip_sample clip_sample_range",
        "1, as diffusers' pipelines set it, whatever a file says": "steps_offset",
        "our last step always ends at sigma = 0": """set_alpha_to_one final_sigmas_type euler_at_final
        lower_order_final""",
        "alphas_cumprod is interpolated smoothly": "interpolation_type",
        "the sampler has its own": "skip_prk_steps noise_sampler_seed",
        "of thresholding alone, which is refused": "dynamic_thresholding_ratio sample_max_value",
        "of flow matching alone, which is refused": "flow_shift time_shift_type",
    },
)


def load_scheduler_config(path: Path, **overrides: Any) -> SchedulerSettings:
    """The settings in a scheduler_config.json, with some fields overridden; ValueError names the file."""
    return build_from_config(path, lambda config: parse_scheduler_config({**config, **overrides}))


def parse_scheduler_config(config: Mapping[str, Any]) -> SchedulerSettings:
    """The SDE through a configuration's alphas_cumprod, its prediction, and the sampler and spacing of its class.

    ValueError names the first field that is not supported.
    """
    SCHEDULER_CONFIG_SCHEMA.validate(config)
    kind = choose(DIFFUSERS_SCHEDULERS, config.get("_class_name", ""), "scheduler _class_name")
    prediction = choose(PREDICTION_TYPES, config.get("prediction_type", "epsilon"), "prediction_type")
    sampler = _resolve_solver(config, kind) if kind.solvers else kind.sampler
    sde = VPSDE.tabulated(compute_alphas_cumprod(config))
    return SchedulerSettings(sde, PREDICTIONS[prediction], sampler, _resolve_spacing(config, kind))


def _resolve_solver(config: Mapping[str, Any], scheduler: SchedulerSpec) -> str:
    """The sampler of a class that has `solver_order`; ValueError names the field whose value has none."""
    name, usual = (
        config["_class_name"],
        next(key for key, value in scheduler.solvers.items() if value == scheduler.sampler),
    )
    types = {value: value for value in scheduler.solver_types}
    choose(types, config.get("solver_type") or scheduler.solver_types[0], f"{name} solver_type")
    stated = config.get("algorithm_type") or usual[0] if usual[0] else ""
    algorithm = ALGORITHM_ALIASES.get(name, {}).get(stated, stated)
    if usual[0]:
        choose({key[0]: key for key in scheduler.solvers}, algorithm, f"{name} algorithm_type")
    orders = {order: sampler for (kind, order), sampler in scheduler.solvers.items() if kind == algorithm}
    order = config.get("solver_order", usual[1])
    if isinstance(order, bool) or not isinstance(order, int) or order not in orders:
        raise ValueError(f"{name} solver_order {order!r}: choose from {', '.join(map(str, orders))}")
    return orders[order]


def _resolve_spacing(config: Mapping[str, Any], scheduler: SchedulerSpec) -> str:
    flags = [name for name in SIGMA_FLAG_SPACINGS if config.get(name)]
    if len(flags) > 1:
        raise ValueError(f"{' and '.join(flags)}: one spacing is needed")
    spacing = choose(scheduler.spacings, config.get("timestep_spacing", scheduler.spacing), "timestep_spacing")
    return SIGMA_FLAG_SPACINGS[flags[0]] if flags else spacing


def compute_alphas_cumprod(config: Mapping[str, Any]) -> torch.Tensor:
    """alphas_cumprod [num_train_timesteps], float64, by the fields and defaults of diffusers' schedulers."""
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
    """A scheduler_config.json for weights trained on a schedule of `BETA_SCHEDULES` with its default parameters."""
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


def family_scheduler_config(family: ModelFamily, prediction: str, zero_snr: bool) -> dict[str, Any]:
    """A family's scheduler_config.json for this prediction; zero terminal SNR needs trailing timesteps."""
    changes = {
        "prediction_type": choose(DIFFUSERS_PREDICTION_TYPES, prediction, "prediction"),
        "rescale_betas_zero_snr": zero_snr,
    }
    return {**family.scheduler, **changes, **({"timestep_spacing": "trailing"} if zero_snr else {})}
