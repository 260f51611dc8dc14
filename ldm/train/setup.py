"""From a recipe to its task."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress

from ldm.config import AutoencoderObjective, ClipObjective, DiffusionObjective, Recipe, FinetuneObjective
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import ClipTask
from ldm.train.diffusion import DiffusionTask
from ldm.train.processes import get_partial_state
from ldm.train.task import TrainingTask
from ldm.train.tune import EncodingProgress, FinetuneTask


def create_task(recipe: Recipe) -> TrainingTask:
    """The task that a recipe's objective names.

    Latents are encoded here where they are not cached yet: by the first process of a machine, before the others look.
    """
    console = Console(stderr=True)
    with (
        get_partial_state().local_main_process_first(),
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        encoding = bar.add_task("encoding", total=None)
        return _create_task(recipe, lambda done, total: bar.update(encoding, completed=done, total=total))


def _create_task(recipe: Recipe, on_progress: EncodingProgress) -> TrainingTask:
    match recipe.objective:
        case AutoencoderObjective() as objective:
            return AutoencoderTask(recipe, objective)
        case ClipObjective() as objective:
            return ClipTask(recipe, objective)
        case DiffusionObjective() as objective:
            return DiffusionTask(recipe, objective, lambda done: on_progress(done, recipe.scene_data.latents))
        case FinetuneObjective() as objective:
            return FinetuneTask(recipe, objective, on_progress)
