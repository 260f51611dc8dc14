"""Progress of a training: a bar on stderr, metrics as lines of `log.jsonl`, and accelerate's trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldm.config import Recipe
from ldm.errors import choose, warn_of_input
from ldm.files import atomic_write, read_regular_file
from ldm.installation import install_command

LogMetrics = Callable[[Mapping[str, float], int], None]  # (metrics, step): a tracker


class MetricLogger:
    """Logs means of metrics; lines beyond `start_step` are cut first, so that a resumed log is an undisturbed one.

    Every line goes to `on_log` too. Only the main process writes and prints.
    """

    def __init__(
        self, path: Path, start_step: int, recipe: Recipe, on_log: LogMetrics, is_main_process: bool = True
    ) -> None:
        self.path, self.recipe, self.on_log, self.is_main_process = path, recipe, on_log, is_main_process
        self.console = Console(stderr=True, quiet=not is_main_process)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = not (is_main_process and self.console.is_terminal)
        self.progress_bar = Progress(*columns, console=self.console, disable=hidden)
        self.progress_task = self.progress_bar.add_task("training", total=recipe.max_train_steps, completed=start_step)
        self._reset_clock(start_step)
        if is_main_process:
            kept = [record for record in read_log(path) if record["step"] <= start_step] if path.exists() else []
            with atomic_write(path) as draft:  # another file: a copy of the run may share the old one by a hard link
                draft.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def __enter__(self) -> MetricLogger:
        self.progress_bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress_bar.stop()

    def _reset_clock(self, step: int) -> None:
        self.last_logged_step, self.last_logged_time = step, time.monotonic()

    def update_progress(self, step: int) -> None:
        """Move the bar to a step."""
        self.progress_bar.update(self.progress_task, completed=step)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the means of the last steps' metrics, with the images per second since the last line."""
        images = (step - self.last_logged_step) * self.recipe.train_batch_size
        speed = images / (time.monotonic() - self.last_logged_time)
        self.progress_bar.update(self.progress_task, description=f"loss {metrics['loss']:.4f}  {speed:.3g} images/s")
        self.write_metrics(step, {**metrics, "images_per_second": speed})

    def write_metrics(self, step: int, metrics: Mapping[str, float], force_print: bool = False) -> None:
        """Append a line, print it where there is no bar (or `force_print`), and restart the clock."""
        rounded = {"step": step, **{k: float(f"{v:.5g}") for k, v in metrics.items()}}
        if self.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(rounded) + "\n")
            self.on_log(metrics, step)
        if force_print or not self.console.is_terminal:
            self.console.print(" ".join(f"{k} {v:g}" for k, v in rounded.items()), highlight=False, soft_wrap=True)
        self._reset_clock(step)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl` but for an incomplete last one; ValueError names one that no training wrote."""
    *lines, _ = read_regular_file(path).split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            steps, values = record["step"], record.values()
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            steps, values = None, ()
        if type(steps) is not int or not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"{path}: line {number}: not a line of a training's log")
        records.append(record)
    return records


def start_trackers(accelerator: Accelerator, recipe: Recipe, step: int) -> None:
    """Start a training's trackers, from the step that it is at.

    TensorBoard's files lie in `events/`; the others, which are on servers, have the recipe's project, and the recipe.
    """
    project, options = recipe.tracker_project_name or recipe.output_dir.name, json.loads(recipe.model_dump_json())
    names = accelerator.log_with
    local = [name for name in names if str(name) == "tensorboard"]
    # purge_step: drop events after this step, written before the run was killed
    accelerator.log_with = local
    accelerator.init_trackers("events", init_kwargs={"tensorboard": {"purge_step": step + 1}})
    started, accelerator.trackers = accelerator.trackers, []
    accelerator.log_with = [name for name in names if name not in local]
    accelerator.init_trackers(project, config=options)
    accelerator.trackers, accelerator.log_with = [*started, *accelerator.trackers], names


def filter_installed_trackers(names: Sequence[str]) -> list[str]:
    """The trackers that are installed, with a warning for each other; ValueError for an unknown name. all: these."""
    available = {str(name) for name in get_available_trackers()}
    if "all" in names:
        return sorted(available)
    for name in names:
        choose(LOGGER_TYPE_TO_CLASS, name, "report_to")
        if name not in available:
            command = install_command("track") if name == "tensorboard" else f"pip install {name}"
            warn_of_input(f"report_to {name}: not installed ({command}); metrics go to log.jsonl only")
    return [name for name in names if name in available]


def log_sample_image(accelerator: Accelerator, image: Image.Image, step: int) -> None:
    """Log an image to the trackers that take images."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(image)[None]}, step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [image]}, step)
