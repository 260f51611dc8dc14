"""scheduler_config.json: the SDE and the prediction that a checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.files import read_json
from ldm.diffusion.prediction import PREDICTIONS, Prediction
from ldm.diffusion.sde import SCHEDULES, VPSDE, zero_terminal_snr
from ldm.diffusion.spacing import choose

PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' names: ours


def load_schedule(path: Path) -> tuple[VPSDE, Prediction]:
    """The SDE through a configuration's table, and its prediction; ValueError names the file.

    Which sampler and spacing to use is the caller's choice: those fields are not read.
    """
    config = read_json(path)
    try:
        kind = choose(PREDICTION_TYPES, config.get("prediction_type", "epsilon"), "prediction_type")
        return VPSDE.tabulated(table(config)), PREDICTIONS[kind]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def table(config: Mapping[str, Any]) -> torch.Tensor:
    """alphas_cumprod, by the fields and defaults of diffusers' schedulers."""
    if config.get("trained_betas") is not None:
        alphas = torch.cumprod(1 - torch.tensor(config["trained_betas"], dtype=torch.float64), 0)
    else:
        schedule = choose(SCHEDULES, config.get("beta_schedule", "linear"), "beta_schedule")
        alphas = schedule(
            config.get("beta_start", 1e-4),
            config.get("beta_end", 0.02),
            config.get("num_train_timesteps", 1000),
        )
    return zero_terminal_snr(alphas) if config.get("rescale_betas_zero_snr") else alphas


def schedule_config(schedule: str, prediction: str) -> dict[str, Any]:
    """A scheduler_config.json for weights trained on a schedule of `SCHEDULES` without parameters of its own."""
    kinds = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": schedule,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": choose(kinds, prediction, "prediction"),
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }
