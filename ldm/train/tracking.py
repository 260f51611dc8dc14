"""Trackers of a training's figures, all through accelerate: TensorBoard, and whatever else it knows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from ldm.diffusion.spacing import choose


def filter_installed_trackers(names: Sequence[str]) -> list[str]:
    """Those of the trackers that can be used here; a warning for each other, ValueError for an unknown name."""
    here = {str(name) for name in get_available_trackers()}
    for name in names:
        choose(LOGGER_TYPE_TO_CLASS, name, "report_to")
        if name not in here:
            cure = "pip install 'ldm[track]'" if name == "tensorboard" else f"pip install {name}"
            warnings.warn(f"report_to {name}: not installed ({cure}); figures go to log.jsonl alone", stacklevel=2)
    return [name for name in names if name in here]


def start_trackers(accelerator: Accelerator, step: int) -> None:
    """Open the trackers; what TensorBoard was told beyond `step`, before a kill, is forgotten."""
    accelerator.init_trackers("events", init_kwargs={"tensorboard": {"purge_step": step + 1}})


def log_to_trackers(accelerator: Accelerator, metrics: Mapping[str, Any], step: int) -> None:
    accelerator.log(dict(metrics), step=step)


def log_sample_image(accelerator: Accelerator, image: Image.Image, step: int) -> None:
    """A picture for TensorBoard."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(image)[None]}, step, dataformats="NHWC")
