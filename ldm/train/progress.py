"""Progress of a training: a bar on stderr, and every figure as a line of `log.jsonl`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from ldm.config import Recipe


class Progress:
    """Collects the figures of steps and logs their mean every `logging_steps`; lines past `start` are cut first."""

    def __init__(self, path: Path, start: int, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept))
        self.figures: list[dict[str, float | Tensor]] = []
        self.clock = time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=recipe.max_train_steps, completed=start)
        self.console = console

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, step: int, figures: Mapping[str, float | Tensor]) -> None:
        """Take one step's figures; the device is asked for them only when a line is written."""
        self.figures.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in figures.items()})
        self.bar.update(self.task, completed=step)
        if step % self.recipe.logging_steps == 0:
            means = {k: sum(float(f[k]) for f in self.figures) / len(self.figures) for k in self.figures[0]}
            seconds = time.monotonic() - self.clock
            means["images_per_second"] = len(self.figures) * self.recipe.train_batch_size / seconds
            self.bar.update(self.task, description=f"loss {means['loss']:.4f}")
            self.log(step, means)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append a line, and say it where no bar shows."""
        rounded = {"step": step, **{k: float(f"{v:.5g}") for k, v in figures.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(rounded) + "\n")
        if not self.console.is_terminal or any(k.startswith("val_") for k in figures):
            self.console.print(" ".join(f"{k} {v:g}" for k, v in rounded.items()), highlight=False, soft_wrap=True)
        self.figures, self.clock = [], time.monotonic()


def _lines(path: Path) -> list[str]:
    """Whole lines of a log; a last one that was cut off is dropped."""
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")
    return whole
