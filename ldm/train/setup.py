"""From a recipe to its task."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress

from ldm.config import AutoencoderObjective, ClipObjective, DiffusionObjective, Recipe
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import ClipTask
from ldm.train.diffusion import DiffusionTask
from ldm.train.processes import process
from ldm.train.task import Task


def task_for(recipe: Recipe) -> Task:
    """The task that a recipe's objective names.

    Latents are encoded here where they are not cached yet: by the first process of a machine, before the others look.
    """
    with process().local_main_process_first():
        return _task(recipe)


def _task(recipe: Recipe) -> Task:
    match recipe.objective:
        case AutoencoderObjective() as objective:
            return AutoencoderTask(recipe, objective)
        case ClipObjective() as objective:
            return ClipTask(recipe, objective)
        case DiffusionObjective() as objective:
            console = Console(stderr=True)
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
                task = bar.add_task("encoding", total=recipe.data.latents)
                return DiffusionTask(recipe, objective, lambda done: bar.update(task, completed=done))
