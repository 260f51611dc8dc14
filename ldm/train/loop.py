"""The training loop: one for every task."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from ldm.checkpoints.files import place
from ldm.config import Recipe
from ldm.files import publish
from ldm.train import state
from ldm.train.ema import EMA
from ldm.train.optimizers import OPTIMIZERS
from ldm.train.progress import Progress
from ldm.train.task import Batch, Task


def train(recipe: Recipe, task: Task) -> Path:
    """Train to `max_train_steps`, from the newest checkpoint on; returns the folder of the exported weights.

    SIGTERM and Ctrl-C save a checkpoint and leave by KeyboardInterrupt: the same call again goes on from there.
    All randomness is a function of (seed, step): an interrupted training ends with the bits of an undisturbed one.
    """
    folder = recipe.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {folder}: {error.strerror}") from None
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    place(task.model, accelerator.device).train()
    ema = EMA(task.model, recipe.ema_decay)
    optimizer = OPTIMIZERS[recipe.optimizer](task.model, recipe)
    step = state.resume(folder, task.model, ema, optimizer)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    record_recipe(recipe)

    with Progress(folder / "log.jsonl", step, recipe) as progress, Interrupt() as interrupt:
        for batch in batches(task, step, recipe):
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate(step, recipe)
            loss, figures = task.loss(model, batch, generator)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            ema.update(task.model, step)
            progress.step(step, {"loss": loss, "gradient_norm": norm, **figures})
            last = step == recipe.max_train_steps
            if step % recipe.validation_steps == 0 or last:
                progress.log(step, {f"val_{k}": v for k, v in task.validate(ema.model).items()})
            if step % recipe.checkpointing_steps == 0 or last or interrupt.asked:
                state.save(folder, step, task.model, ema, optimizer.optimizer, recipe.checkpoints_total_limit)
            if interrupt.asked:
                raise KeyboardInterrupt

    with publish(folder / "export") as draft:
        task.export(ema.model, draft)
    return folder / "export"


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate's factor: linear warm-up, constant, half a cosine to zero over the last `lr_decay`."""
    warmup = min(1.0, (step + 1) / max(1, recipe.lr_warmup_steps))
    falling = max(1.0, recipe.lr_decay * recipe.max_train_steps)
    left = min(1.0, (recipe.max_train_steps - step) / falling)
    return warmup * 0.5 * (1 - math.cos(math.pi * left))


class _Batches(Dataset):
    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, k: int) -> Batch:
        return self.task.batch(k)


def batches(task: Task, start: int, recipe: Recipe) -> Iterator[Batch]:
    """Batches `start`, `start + 1`, ... to the last step, made ahead by worker processes."""
    workers = recipe.dataloader_num_workers
    steps = range(start, recipe.max_train_steps)
    return iter(
        DataLoader(_Batches(task), None, sampler=steps, num_workers=workers, worker_init_fn=_deaf if workers else None)
    )


def _deaf(worker: int) -> None:
    """Leave signals to the loop: Ctrl-C reaches every process of the terminal, and a dead worker would end the run."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def record_recipe(recipe: Recipe) -> None:
    """Write the resolved recipe beside what it makes."""
    with publish(recipe.output_dir / "recipe.json") as draft:
        draft.write_text(json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n")


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
