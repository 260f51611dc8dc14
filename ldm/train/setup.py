"""From a recipe to its task.

A run's weights, averaged after it, as an exported model."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from ldm.config import AutoencoderObjective, ClipObjective, DiffusionObjective, FinetuneObjective, Recipe
from ldm.files import atomic_write
from ldm.picto.autoencoder import AutoencoderTask
from ldm.picto.clip import ClipTask
from ldm.train.diffusion import DiffusionTask
from ldm.train.ema import reconstruct_posthoc_ema
from ldm.train.finetune import EncodingProgress, FinetuneTask
from ldm.train.processes import get_partial_state
from ldm.train.task import TrainingTask


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


def export_posthoc_ema(run_dir: Path, sigma_rel: float, out: Path, step: int | None = None) -> Path:
    """Export the average of relative deviation sigma_rel of a run, as `ldm train` exports its own; returns the folder.

    ValueError where the run has no recipe or no snapshots, and where there is something at `out`.
    """
    if out.exists():
        raise ValueError(f"{out}: is there already")
    try:
        recipe = Recipe.model_validate_json((run_dir / "recipe.json").read_bytes())
    except (OSError, ValidationError):
        raise ValueError(f"{run_dir}: not a training's folder (no recipe.json of this version)") from None
    weights = reconstruct_posthoc_ema(run_dir, sigma_rel, step)
    task = create_task(recipe)
    task.model.load_state_dict(weights)
    with atomic_write(out) as draft:
        task.export(task.model, draft)
    return out
