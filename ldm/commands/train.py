"""`ldm train`: a recipe to trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, as in the recipe.")] = None,
) -> None:
    """Train from a recipe; the same command again resumes. Prints the folder of the trained weights."""
    from ldm.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from ldm.train.loop import train as run
    from ldm.train.setup import task_for

    print(run(loaded, task_for(loaded)))
