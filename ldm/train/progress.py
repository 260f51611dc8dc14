"""Progress of a training: a bar on stderr, every figure as a line of `log.jsonl`, and trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ldm.config import Recipe

Tell = Callable[[Mapping[str, float], int], None]  # (figures, step): a tracker


class Progress:
    """Logs the mean of steps' figures; lines past `start` are cut first, so that a resumed log is an undisturbed one.

    `tell` hears every line too. Where `writes` is false (not the main process) all is silence.
    """

    def __init__(self, path: Path, start: int, recipe: Recipe, tell: Tell, writes: bool = True) -> None:
        self.path, self.recipe, self.tell, self.writes = path, recipe, tell, writes
        self.console = Console(stderr=True, quiet=not writes)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=self.console, disable=not (writes and self.console.is_terminal))
        self.task = self.bar.add_task("training", total=recipe.max_train_steps, completed=start)
        self._start_clock(start)
        if writes:
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]
            path.write_text("".join(line + "\n" for line in kept))

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _start_clock(self, step: int) -> None:
        self.since, self.clock = step, time.monotonic()

    def step(self, step: int) -> None:
        """One more is done."""
        self.bar.update(self.task, completed=step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append a line of the steps' figures with the images per second since the last line."""
        images = (step - self.since) * self.recipe.train_batch_size
        speed = images / (time.monotonic() - self.clock)
        self.bar.update(self.task, description=f"loss {figures['loss']:.4f}  {speed:.3g} images/s")
        self.write(step, {**figures, "images_per_second": speed})

    def write(self, step: int, figures: Mapping[str, float], always: bool = False) -> None:
        """Append a line, and say it where no bar shows (or `always`); the clock starts anew."""
        rounded = {"step": step, **{k: float(f"{v:.5g}") for k, v in figures.items()}}
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(rounded) + "\n")
            self.tell(figures, step)
        if always or not self.console.is_terminal:
            self.console.print(" ".join(f"{k} {v:g}" for k, v in rounded.items()), highlight=False, soft_wrap=True)
        self._start_clock(step)


def _lines(path: Path) -> list[str]:
    """Whole lines of a log; a last one that was cut off is dropped."""
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")
    return whole
