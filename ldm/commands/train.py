"""`ldm train`: a recipe to trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldm.commands.check import preflight


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, as in the recipe.")] = None,
) -> None:
    """Train from a recipe; the same command again resumes. Prints the folder of the trained weights."""
    from ldm.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    preflight(loaded)
    from ldm.train.setup import create_task
    from ldm.train.trainer import train_model as run

    print(run(loaded, create_task(loaded)))


def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a training.", show_default=False)],
    sigma_rel: Annotated[float, typer.Option(help="Length of the average, of the training's: 0.05, 0.1, ...")],
    out: Annotated[Path, typer.Option(help="Folder for the weights.", show_default=False)],
    step: Annotated[int | None, typer.Option(help="Up to which step; the default is the last.")] = None,
) -> None:
    """Weights averaged over any length, after the training (posthoc_steps in its recipe). Prints their folder."""
    from ldm.train.setup import export_posthoc_ema as averaged

    print(averaged(run, sigma_rel, out, step))
