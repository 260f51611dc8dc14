"""A run's weights, averaged after it, as an exported model."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from ldm.config import Recipe
from ldm.files import atomic_write
from ldm.train.posthoc import reconstruct_posthoc_ema
from ldm.train.setup import create_task


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
