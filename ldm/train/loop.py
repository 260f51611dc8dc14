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
from ldm.files import publish, remove
from ldm.hardware import mixed
from ldm.train import processes, state, tracking
from ldm.train.learner import Learner
from ldm.train.posthoc import SIGMA_RELS, snapshot
from ldm.train.progress import Progress
from ldm.train.task import Batch, Task


def train(recipe: Recipe, task: Task) -> Path:
    """Train to `max_train_steps`, from the newest whole checkpoint on; returns the folder of the exported weights.

    SIGTERM and Ctrl-C save a checkpoint and leave by KeyboardInterrupt: the same call again goes on from there. All
    randomness is keyed by (seed, sample, visit): an interrupted training ends with the bits of an undisturbed one, and
    one split over processes, each of which calls this, with the same weights to rounding. Only the main one writes.
    """
    accelerator = begin(recipe)
    try:
        learner = Learner(recipe, task, accelerator)
        state.resume(learner.state, recipe)
        learner.prepare()
        if accelerator.is_main_process:
            tidy(recipe)
        run(recipe, learner)
        export = recipe.output_dir / "export"
        if accelerator.is_main_process:
            with publish(export) as draft:
                task.export(learner.state.averages["ema"].model, draft)
        return export
    finally:
        accelerator.end_training()


def begin(recipe: Recipe) -> Accelerator:
    """accelerate for a recipe, in a folder that is there; ValueError where it cannot be made."""
    folder = recipe.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {folder}: {error.strerror}") from None
    trackers = tracking.installed(recipe.report_to) or None
    precision = mixed(recipe.mixed_precision, processes.process().device)
    return processes.accelerator(mixed_precision=precision, log_with=trackers, project_dir=folder)


def run(recipe: Recipe, learner: Learner) -> None:
    """All steps that are left, and what is due between them."""
    accelerator, now = learner.accelerator, learner.state
    writes = accelerator.is_main_process
    tracking.start(accelerator, now.step)

    def tell(figures: Any, step: int) -> None:
        tracking.tell(accelerator, figures, step)

    with (
        Progress(recipe.output_dir / "log.jsonl", now.step, recipe, tell, writes) as progress,
        Interrupt() as interrupt,
    ):
        for parts in batches(learner.task, now.step, recipe, learner.rows):
            stop = learner.step(parts, interrupt.asked)
            progress.step(now.step)
            if now.step % recipe.logging_steps == 0:
                progress.log(now.step, means(now.figures))
                now.figures.clear()
            if due(now.step, recipe.validation_steps, recipe) and writes:
                look(learner, progress)
            if due(now.step, recipe.posthoc_steps, recipe) and writes:
                remember(learner)
            if due(now.step, recipe.checkpointing_steps, recipe) or stop:
                if writes:
                    state.save(now, recipe)
                accelerator.wait_for_everyone()  # a launcher ends the others where one leaves
            if stop:
                raise KeyboardInterrupt


def due(step: int, every: int, recipe: Recipe) -> bool:
    """Is it time for what happens every so many steps (0: never), and after the last?"""
    return every > 0 and (step % every == 0 or step == recipe.max_train_steps)


def means(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over some steps."""
    return {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}


def look(learner: Learner, progress: Progress) -> None:
    """Judge the averaged weights on held-out data, and draw with them."""
    model, step = learner.state.averages["ema"].model, learner.state.step
    progress.write(step, {f"val_{k}": v for k, v in learner.task.validate(model).items()}, always=True)
    if (picture := learner.task.samples(model)) is not None:
        with publish(learner.recipe.output_dir / "samples.png") as draft:
            picture.save(draft, "PNG")
        tracking.show(learner.accelerator, picture, step)


def remember(learner: Learner) -> None:
    """Snapshots of the power-function averages."""
    recipe, now = learner.recipe, learner.state
    for sigma_rel in SIGMA_RELS:
        average = now.averages[f"average-{sigma_rel:.3f}"]
        snapshot(recipe.output_dir, now.step, sigma_rel, average.model, getattr(torch, recipe.posthoc_dtype))


class _Parts(Dataset):
    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, part: tuple[int, range]) -> Batch:
        return self.task.batch(*part)


def batches(task: Task, start: int, recipe: Recipe, rows: Sequence[range]) -> Iterator[list[Batch]]:
    """A process's parts of the batches `start`, `start + 1`, ... to the last, made ahead by worker processes."""
    workers = recipe.dataloader_num_workers
    steps = range(start, recipe.max_train_steps)
    order: Any = ((k, part) for k in steps for part in rows)
    made = iter(
        DataLoader(_Parts(task), None, sampler=order, num_workers=workers, worker_init_fn=_deaf if workers else None)
    )
    for _ in steps:
        yield [next(made) for _ in rows]


def _deaf(worker: int) -> None:
    """Leave signals to the loop: Ctrl-C reaches every process of the terminal, and a dead worker would end the run."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def tidy(recipe: Recipe) -> None:
    """Write the resolved recipe beside what it makes; remove drafts that a killed run has left."""
    for pattern in (".*.part", ".*.old", "averages/.*.part"):
        for draft in recipe.output_dir.glob(pattern):
            remove(draft)
    with publish(recipe.output_dir / "recipe.json") as draft:
        draft.write_text(json.dumps(state.resolved(recipe).model_dump(mode="json"), indent=2) + "\n")


class Interrupt:
    """While entered, SIGTERM and SIGINT set `asked` and nothing else: the loop leaves between two steps."""

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
