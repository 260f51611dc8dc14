"""The model card of a tuned model: its recipe, its pictures, its curves, and what it draws before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from PIL import Image

from ldm.config import Recipe
from ldm.data.pictures import ImageDataset
from ldm.images import contact_sheet
from ldm.train.curves import render_figure, render_panel, read_curve

CARD_GRID_COLUMNS = 8


def write_model_card(
    recipe: Recipe,
    dataset: ImageDataset,
    samples: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[str],
    folder: Path,
) -> None:
    """Write MODEL_CARD.md, beside it curves.svg and, for each of `drawn`, a picture of the prompts drawn."""
    asked = recipe.model_dump(mode="json", exclude_defaults=True)
    parts = [f"# {recipe.output_dir.name}", f"## Recipe\n\n```yaml\n{yaml.safe_dump(asked, sort_keys=False)}```"]
    parts.append(f"## Pictures\n\n{summarize_dataset(dataset)}")
    if curves := render_loss_curves(recipe.output_dir / "log.jsonl"):
        (folder / "curves.svg").write_text(curves, encoding="utf-8")
        parts.append("## Curves\n\n![curves](curves.svg)")
    for name, pictures in samples.items():
        contact_sheet(pictures, prompts, CARD_GRID_COLUMNS).save(folder / f"{name}.png")
        parts.append(f"## {name.capitalize()}\n\n![{name}]({name}.png)")
    (folder / "MODEL_CARD.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def summarize_dataset(dataset: ImageDataset) -> str:
    """The number of pictures, their shapes after cropping, and the first captions, as a table and a list."""
    shapes = Counter(look.placement.bucket for look in dataset.image_infos)
    rows = [f"| {width} x {height} | {count} |" for (width, height), count in sorted(shapes.items())]
    captions = dict.fromkeys(sample.caption for sample in dataset.samples)
    told = [f"- {caption}" for caption in [*captions][:5]]
    more = [f"- and {len(captions) - 5} others"] if len(captions) > 5 else []
    return "\n".join(["| shape | pictures |", "|---|---|", *rows, "", "Captions:", "", *told, *more])


def render_loss_curves(log: Path) -> str:
    """The losses of a log as an SVG picture; nothing where it has none."""
    found = {name: read_curve(log, key) for name, key in (("training", "loss"), ("held out", "val_loss"))}
    drawn = {name: curve for name, curve in found.items() if curve}
    return render_figure([render_panel("loss (log scale)", drawn, log_scale=True)]) if drawn else ""
