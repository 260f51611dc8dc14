"""`ldm train`: a recipe to trained weights, and `ldm average`: other averages of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.commands.check import preflight

if TYPE_CHECKING:
    from ldm.config import Recipe
    from ldm.train.task import TrainingTask


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, as in the recipe.")] = None,
) -> None:
    """Train from a recipe; the same command again resumes. Prints the folder of the trained weights."""
    from ldm.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    preflight(loaded)
    from ldm.train.trainer import train_model

    print(train_model(loaded, create_task(loaded)))


def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a training.", show_default=False)],
    sigma_rel: Annotated[float, typer.Option(help="Length of the average, of the training's: 0.05, 0.1, ...")],
    out: Annotated[Path, typer.Option(help="Folder for the weights.", show_default=False)],
    step: Annotated[int | None, typer.Option(help="Up to which step; the default is the last.")] = None,
) -> None:
    """Weights averaged over any length, after the training (posthoc_steps in its recipe). Prints their folder."""
    from pydantic import ValidationError

    from ldm.config import Recipe
    from ldm.train.ema import export_posthoc_ema

    if out.exists():
        raise ValueError(f"{out}: is there already")
    try:
        recipe = Recipe.model_validate_json((run / "recipe.json").read_bytes())
    except (OSError, ValidationError):
        raise ValueError(f"{run}: not a training's folder (no recipe.json of this version)") from None
    export_posthoc_ema(create_task(recipe), run, sigma_rel, out, step)
    print(out)


def create_task(recipe: Recipe) -> TrainingTask:
    """The task of a recipe's objective.

    Latents that are not cached yet are encoded here, by the first process of a machine before the others look.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ldm.config import AutoencoderObjective, ClipObjective, DiffusionObjective, FinetuneObjective
    from ldm.picto.autoencoder import AutoencoderTask
    from ldm.picto.clip import ClipTask
    from ldm.picto.diffusion import SceneDiffusionTask
    from ldm.train.finetune import FinetuneTask
    from ldm.train.trainer import get_partial_state

    console, process = Console(stderr=True), get_partial_state()
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    with process.local_main_process_first(), bar:
        encoding = bar.add_task("encoding", total=None)

        def on_progress(done: int, total: int) -> None:
            bar.update(encoding, completed=done, total=total)

        match recipe.objective:
            case AutoencoderObjective() as objective:
                return AutoencoderTask(recipe, objective)
            case ClipObjective() as objective:
                return ClipTask(recipe, objective)
            case DiffusionObjective() as objective:
                return SceneDiffusionTask(recipe, objective, process.device, on_progress)
            case FinetuneObjective() as objective:
                return FinetuneTask(recipe, objective, process.device, on_progress)
