"""scheduler_config.json: the SDE and prediction that a checkpoint was trained with, and its recommended sampler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ldm.checkpoints.families import ModelFamily, build_from_config, get_config_number
from ldm.checkpoints.scheduler_classes import (
    ALGORITHM_ALIASES,
    ALLOWED_VALUES,
    DIFFUSERS_SCHEDULERS,
    IGNORED_FIELDS,
    PLAIN_SPACINGS,
    SIGMA_FLAG_SPACINGS,
    UNSUPPORTED_SCHEDULERS,
    SchedulerSpec,
)
from ldm.diffusion.prediction import PREDICTIONS, Prediction
from ldm.diffusion.sde import BETA_SCHEDULES, VPSDE, rescale_zero_terminal_snr
from ldm.diffusion.timesteps import FINAL_SIGMAS_TYPES
from ldm.errors import choose, warn_of_input

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names: ours
DIFFUSERS_PREDICTION_TYPES = {name: diffusers_name for diffusers_name, name in PREDICTION_TYPES.items()}
MAX_TRAIN_TIMESTEPS = 100_000
# Fields that files keep from another class, whose value says little of what is wanted.
QUIET_FIELDS = frozenset().union(*(kind.field_names for kind in DIFFUSERS_SCHEDULERS.values())) - {*SIGMA_FLAG_SPACINGS}


class SchedulerSettings(NamedTuple):
    """The content of a scheduler's configuration."""

    sde: VPSDE
    prediction: Prediction
    sampler: str
    spacing: str
    final_sigmas_type: str = "zero"

    @property
    def generation_defaults(self) -> dict[str, str]:
        """The settings of a request that they stand for."""
        final = {} if self.final_sigmas_type == "zero" else {"final_sigmas_type": self.final_sigmas_type}
        return {"sampler": self.sampler, "spacing": self.spacing, **final}


def load_scheduler_config(path: Path, **overrides: Any) -> SchedulerSettings:
    """The settings in a scheduler_config.json, with some fields overridden; ValueError names the file.

    What is not read and would change diffusers' images is one warning.
    """

    def build(config: dict[str, Any]) -> SchedulerSettings:
        settings = parse_scheduler_config({**config, **overrides})
        if notes := list_ignored_fields({**config, **overrides}, quiet=False):
            warn_of_input(f"{path}: ignored: {'; '.join(notes)}")
        return settings

    return build_from_config(path, build)


def parse_scheduler_config(config: Mapping[str, Any]) -> SchedulerSettings:
    """The SDE through a configuration's alphas_cumprod, its prediction, and the sampler and spacing of its class.

    Fields that the class does not have are not read, as in diffusers, but for `rescale_betas_zero_snr`: what the
    network learnt. ValueError names the first field that is not supported.
    """
    kind = _resolve_class(config)
    read = {name: value for name, value in config.items() if name.startswith("_") or name in kind.field_names}
    for name in ALLOWED_VALUES.keys() & read.keys():
        if read[name] not in ALLOWED_VALUES[name]:
            allowed = " or ".join(map(repr, ALLOWED_VALUES[name]))
            raise ValueError(f"scheduler config: {name} = {read[name]!r} is not supported, only {allowed}")
    prediction = choose(PREDICTION_TYPES, read.get("prediction_type", "epsilon"), "prediction_type")
    sampler = _resolve_solver(read, kind) if kind.solvers else kind.sampler
    sampler = next((name for flag, name in kind.flags.items() if read.get(flag)), sampler)
    sde = VPSDE.tabulated(compute_alphas_cumprod(config))
    spacing, final = _resolve_spacing(read, kind), _resolve_final(read, kind)
    return SchedulerSettings(sde, PREDICTIONS[prediction], sampler, spacing, final)


def list_ignored_fields(config: Mapping[str, Any], quiet: bool = True) -> list[str]:
    """The fields of a configuration that are not read although their values ask for something else, with the reasons.

    Not `quiet`: without those that Stable Diffusion's own files have, which change an image by about its rounding.
    """
    kind, notes = _resolve_class(config), []
    for name, value in config.items():
        reason, is_quiet = _why_ignored(config, kind, name)
        if reason and (quiet or not is_quiet):
            notes.append(f"{name} = {value!r:.60} ({reason})")
    if quiet and not kind.exact:
        notes.append(f"_class_name = {config['_class_name']!r} (sampled by {kind.sampler}, the nearest of ours)")
    return notes


def _why_ignored(config: Mapping[str, Any], kind: SchedulerSpec, name: str) -> tuple[str, bool]:
    """Why a field is not read, or "", and whether that is quiet."""
    value, has_flag = config[name], any(config.get(flag) for flag in SIGMA_FLAG_SPACINGS)
    if name.startswith("_") or name == "rescale_betas_zero_snr":
        return "", True
    if name not in kind.field_names:
        return (f"{config['_class_name']} has no such field", name in QUIET_FIELDS) if value else ("", True)
    if name == "timestep_spacing" and has_flag and value != "linspace" and kind.spacings is PLAIN_SPACINGS:
        return "our grids of sigmas span the whole schedule", False
    reason, values, is_quiet = IGNORED_FIELDS.get(name, ("", (), True))
    leads = config.get("timestep_spacing", kind.spacing) == "leading"
    has_effect = has_flag if name in ("sigma_min", "sigma_max") else leads or name != "steps_offset"
    return (reason, is_quiet) if has_effect and values and value not in values else ("", True)


def _resolve_class(config: Mapping[str, Any]) -> SchedulerSpec:
    name = config.get("_class_name", "")
    if name in UNSUPPORTED_SCHEDULERS:
        raise ValueError(f"scheduler _class_name {name!r} is not supported: {UNSUPPORTED_SCHEDULERS[name]}")
    return choose(DIFFUSERS_SCHEDULERS, name, "scheduler _class_name")


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


def _resolve_final(config: Mapping[str, Any], scheduler: SchedulerSpec) -> str:
    """Where the grid ends: `Request.final_sigmas_type`."""
    value = config.get(scheduler.final_field)
    if value is None:
        return scheduler.final
    if scheduler.final_field == "set_alpha_to_one":
        return "zero" if value else "sigma_min"
    return choose({name: name for name in FINAL_SIGMAS_TYPES}, value, scheduler.final_field)


def compute_alphas_cumprod(config: Mapping[str, Any]) -> torch.Tensor:
    """alphas_cumprod [num_train_timesteps], float64, by the fields and defaults of diffusers' schedulers."""
    usual, start, end = DIFFUSERS_SCHEDULERS.get(config.get("_class_name", ""), SchedulerSpec("")).betas
    steps = get_config_number(config, "num_train_timesteps", 1000)
    if not (isinstance(steps, int) and 3 <= steps <= MAX_TRAIN_TIMESTEPS):
        raise ValueError(f"num_train_timesteps {steps}: must be a whole number from 3 to {MAX_TRAIN_TIMESTEPS}")
    if (trained := config.get("trained_betas")) is not None:
        if not isinstance(trained, list) or len(trained) != steps:
            raise ValueError(f"trained_betas: a list of num_train_timesteps = {steps} numbers is needed")
        betas = [get_config_number({"trained_betas": beta}, "trained_betas", 0) for beta in trained]
        alphas = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    else:
        schedule = choose(BETA_SCHEDULES, config.get("beta_schedule", usual), "beta_schedule")
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
