"""Trainings by the command lines of other tools: `ldm train --like-diffusers SCRIPT ...`, `--like-kohya SCRIPT ...`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from ldm.config import Recipe, build_recipe
from ldm.data.image_dataset import resolve_num_train_epochs
from ldm.errors import choose, one_line, warn_of_input
from ldm.train.command_lines import ForeignRecipe, nest
from ldm.train.diffusers_scripts import read_diffusers_command
from ldm.train.kohya_scripts import read_kohya_command

READERS: dict[str, Callable[[Sequence[str]], ForeignRecipe]] = {
    "--like-diffusers": read_diffusers_command,
    "--like-kohya": read_kohya_command,
}
FROZEN_DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "auto"}  # which these tools give frozen weights too


def read_foreign_command(option: str, words: Sequence[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of another tool's command line, with `key.path=value` overrides.

    One line on stderr counts and names what is accepted without effect. ValueError, in one line, names an option that
    is unknown, wrong or missing here, and what to write instead.
    """
    try:
        options, notes, epochs = choose(READERS, option, "tool")(words)
        if notes:
            warn_of_input(f"{option}: {len(notes)} without effect: {', '.join(notes)}")
        options = {"objective.frozen_dtype": FROZEN_DTYPES.get(options["mixed_precision"], "auto"), **options}
        recipe = build_recipe(nest(options), overrides, "as a recipe")
        return recipe.model_copy(update=_intervals_in_steps(recipe, epochs)) if epochs else recipe
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _intervals_in_steps(recipe: Recipe, epochs: dict[str, int]) -> dict[str, int]:
    """Intervals that are given in epochs, in optimizer steps; ValueError for those that are not positive."""
    one = recipe.model_copy(update={"num_train_epochs": 1, "max_train_steps": 0})
    steps = resolve_num_train_epochs(one).max_train_steps
    if wrong := [name for name, number in epochs.items() if number < 1]:
        raise ValueError(f"{wrong[0]}: 1 epoch or more")
    return {name: number * steps for name, number in epochs.items()}


def recipe_to_yaml(recipe: Recipe, words: Sequence[str] = ()) -> str:
    """A recipe as a file that `ldm train` reads, below the command that it is made of."""
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
    head = f"# {one_line(shlex.join(words))}\n" if words else ""
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
