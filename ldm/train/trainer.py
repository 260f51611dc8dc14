"""The training loop: one for every task."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from ldm.config import Recipe
from ldm.files import atomic_write, remove_path
from ldm.hardware import resolve_mixed_precision
from ldm.train import processes, state
from ldm.train.ema import SIGMA_RELS, save_ema_snapshot
from ldm.train.learner import Trainer
from ldm.train.progress import (
    MetricLogger,
    filter_installed_trackers,
    log_sample_image,
    log_to_trackers,
    start_trackers,
)
from ldm.train.task import Batch, TrainingTask


def train_model(recipe: Recipe, task: TrainingTask) -> Path:
    """Train to `max_train_steps`, from the newest whole checkpoint on; returns the folder of the exported weights.

    SIGTERM and Ctrl-C save a checkpoint and leave by KeyboardInterrupt: the same call again goes on from there. All
    randomness is keyed by (seed, sample, visit): an interrupted training ends with the bits of an undisturbed one, and
    one split over processes, each of which calls this, with the same weights to rounding. Only the main one writes.
    """
    accelerator = setup_accelerator(recipe)
    try:
        learner = Trainer(recipe, task, accelerator)
        state.resume_from_checkpoint(learner.state, recipe)
        learner.prepare()
        if accelerator.is_main_process:
            prepare_output_dir(recipe)
        training_loop(recipe, learner)
        export = recipe.output_dir / "export"
        if accelerator.is_main_process:
            with atomic_write(export) as draft:
                task.export(learner.state.ema_models["ema"].model, draft)
        return export
    finally:
        accelerator.end_training()


def setup_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate for a recipe, in a folder that is there; ValueError where it cannot be made."""
    folder = recipe.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {folder}: {error.strerror}") from None
    trackers = filter_installed_trackers(recipe.report_to) or None
    precision = resolve_mixed_precision(recipe.mixed_precision, processes.get_partial_state().device)
    return processes.create_accelerator(mixed_precision=precision, log_with=trackers, project_dir=folder)


def training_loop(recipe: Recipe, learner: Trainer) -> None:
    """All steps that are left, and what is due between them."""
    accelerator, now = learner.accelerator, learner.state
    writes = accelerator.is_main_process
    start_trackers(accelerator, now.step)

    def tell(figures: Any, step: int) -> None:
        log_to_trackers(accelerator, figures, step)

    with (
        MetricLogger(recipe.output_dir / "log.jsonl", now.step, recipe, tell, writes) as progress,
        InterruptHandler() as interrupt,
    ):
        for parts in iterate_batches(learner.task, now.step, recipe, learner.row_ranges):
            stop = learner.train_step(parts, interrupt.stop_requested)
            progress.update_progress(now.step)
            if now.step % recipe.logging_steps == 0:
                progress.log_metrics(now.step, average_metrics(now.pending_metrics))
                now.pending_metrics.clear()
            if is_due(now.step, recipe.validation_steps, recipe) and writes:
                log_validation(learner, progress)
            if is_due(now.step, recipe.posthoc_steps, recipe) and writes:
                save_ema_snapshots(learner)
            if is_due(now.step, recipe.checkpointing_steps, recipe) or stop:
                if writes:
                    state.save_checkpoint(now, recipe)
                accelerator.wait_for_everyone()  # a launcher ends the others where one leaves
            if stop:
                raise KeyboardInterrupt


def is_due(step: int, interval: int, recipe: Recipe) -> bool:
    """Is it time for what happens every so many steps (0: never), and after the last?"""
    return interval > 0 and (step % interval == 0 or step == recipe.max_train_steps)


def average_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over some steps."""
    return {name: sum(f[name] for f in metrics) / len(metrics) for name in metrics[0]}


def log_validation(learner: Trainer, progress: MetricLogger) -> None:
    """Judge the averaged weights on held-out data, and draw with them."""
    model, step = learner.state.ema_models["ema"].model, learner.state.step
    progress.write_metrics(step, {f"val_{k}": v for k, v in learner.task.validate(model).items()}, force_print=True)
    if (picture := learner.task.generate_samples(model)) is not None:
        with atomic_write(learner.recipe.output_dir / "samples.png") as draft:
            picture.save(draft, "PNG")
        log_sample_image(learner.accelerator, picture, step)


def save_ema_snapshots(learner: Trainer) -> None:
    """Snapshots of the power-function averages."""
    recipe, now = learner.recipe, learner.state
    for sigma_rel in SIGMA_RELS:
        average = now.ema_models[f"average-{sigma_rel:.3f}"]
        save_ema_snapshot(recipe.output_dir, now.step, sigma_rel, average.model, getattr(torch, recipe.posthoc_dtype))


class _BatchDataset(Dataset):
    def __init__(self, task: TrainingTask) -> None:
        self.task = task

    def __getitem__(self, part: tuple[int, range]) -> Batch:
        return self.task.make_batch(*part)


def iterate_batches(
    task: TrainingTask, start_step: int, recipe: Recipe, row_ranges: Sequence[range]
) -> Iterator[list[Batch]]:
    """A process's parts of the batches `start_trackers`, `start + 1`, ... to the last, made ahead by worker processes."""
    workers = recipe.dataloader_num_workers
    steps = range(start_step, recipe.max_train_steps)
    order: Any = ((k, part) for k in steps for part in row_ranges)
    made = iter(
        DataLoader(
            _BatchDataset(task),
            None,
            sampler=order,
            num_workers=workers,
            worker_init_fn=_ignore_signals if workers else None,
        )
    )
    for _ in steps:
        yield [next(made) for _ in row_ranges]


def _ignore_signals(worker_id: int) -> None:
    """Leave signals to the loop: Ctrl-C reaches every process of the terminal, and a dead worker would end the run."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def prepare_output_dir(recipe: Recipe) -> None:
    """Write the resolved recipe beside what it makes; remove drafts that a killed run has left."""
    for pattern in (".*.part", ".*.old", "averages/.*.part"):
        for draft in recipe.output_dir.glob(pattern):
            remove_path(draft)
    with atomic_write(recipe.output_dir / "recipe.json") as draft:
        draft.write_text(json.dumps(state.resolve_recipe(recipe).model_dump(mode="json"), indent=2) + "\n")


class InterruptHandler:
    """While entered, SIGTERM and SIGINT set `probe_unet` and nothing else: the loop leaves between two steps."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> InterruptHandler:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[number] = signal.signal(number, self._request_stop)
        return self

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self.stop_requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
