"""From a recipe to its task."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress

from ldm.config import AutoencoderObjective, ClipObjective, DiffusionObjective, Recipe, TuneObjective
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import ClipTask
from ldm.train.diffusion import DiffusionTask
from ldm.train.processes import process
from ldm.train.task import Task
from ldm.train.tune import Said, TuneTask


def task_for(recipe: Recipe) -> Task:
    """The task that a recipe's objective names.

    Latents are encoded here where they are not cached yet: by the first process of a machine, before the others look.
    """
    console = Console(stderr=True)
    with (
        process().local_main_process_first(),
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        encoding = bar.add_task("encoding", total=None)
        return _task(recipe, lambda done, total: bar.update(encoding, completed=done, total=total))


def _task(recipe: Recipe, said: Said) -> Task:
    match recipe.objective:
        case AutoencoderObjective() as objective:
            return AutoencoderTask(recipe, objective)
        case ClipObjective() as objective:
            return ClipTask(recipe, objective)
        case DiffusionObjective() as objective:
            return DiffusionTask(recipe, objective, lambda done: said(done, recipe.scenes.latents))
        case TuneObjective() as objective:
            return TuneTask(recipe, objective, said)
