"""Learning-rate schedules: factors of the rate, in optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable

from ldm.config import Recipe
from ldm.diffusion.spacing import choose


def compute_lr_factor(step: int, recipe: Recipe) -> float:
    """The learning rate's factor for the update after `step` others: linear warm-up times the recipe's schedule."""
    warmup = min(1.0, (step + 1) / max(1, recipe.lr_warmup_steps))
    return warmup * choose(LR_SCHEDULES, recipe.lr_scheduler, "lr_scheduler")(step, recipe)


def _decay_progress(step: int, recipe: Recipe) -> float:
    """The share of the steps after the warm-up that are done, 0 to 1."""
    warmup = recipe.lr_warmup_steps
    return max(0.0, (step - warmup) / max(1, recipe.max_train_steps - warmup))


def _warmup_stable_decay(step: int, recipe: Recipe) -> float:
    """Warm-up, stable, decay: constant, then half a cosine to zero over the last `lr_decay` of the steps."""
    falling = max(1.0, recipe.lr_decay * recipe.max_train_steps)
    left = min(1.0, (recipe.max_train_steps - step) / falling)
    return 0.5 * (1 - math.cos(math.pi * left))


LR_SCHEDULES: dict[str, Callable[[int, Recipe], float]] = {
    "constant": lambda step, recipe: 1.0,
    "linear": lambda step, recipe: 1 - _decay_progress(step, recipe),
    "cosine": lambda step, recipe: 0.5 * (1 + math.cos(math.pi * _decay_progress(step, recipe))),
    "wsd": _warmup_stable_decay,
}
