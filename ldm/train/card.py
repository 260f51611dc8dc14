"""The model card of a tuned model: its recipe, its pictures, its curves, and what it draws before and after.

Curves of a training's log as an SVG picture, for a model card."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from PIL import Image

from ldm.config import Recipe
from ldm.data.image_dataset import ImageDataset
from ldm.image_io import contact_sheet

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


PLOT_WIDTH, PLOT_HEIGHT, PLOT_MARGIN = 420, 220, 44
PLOT_COLORS = ("#2a6fbb", "#d1495b", "#3a7d44")

Curve = list[tuple[float, float]]


def read_curve(log: Path, key: str) -> Curve:
    """(step, value) of every line of a `log.jsonl` that has the key."""
    lines = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line[key]) for line in lines if key in line]


def render_panel(title: str, curves: dict[str, Curve], x_offset: int = 0, log_scale: bool = False) -> str:
    """One pair of axes with a few curves, as SVG elements `left` pixels from the edge."""
    look = math.log10 if log_scale else float
    points = [point for curve in curves.values() for point in curve]
    right = max(step for step, _ in points)
    low, high = min(look(v) for _, v in points), max(look(v) for _, v in points)
    span = (high - low) or 1.0

    def place(step: float, value: float) -> str:
        x = x_offset + PLOT_MARGIN + step / right * (PLOT_WIDTH - 2 * PLOT_MARGIN)
        return f"{x:.1f},{PLOT_HEIGHT - PLOT_MARGIN - (look(value) - low) / span * (PLOT_HEIGHT - 2 * PLOT_MARGIN):.1f}"

    def words(x: float, y: float, text: str, anchor: str = "start", colour: str = "#333") -> str:
        return f'<text x="{x_offset + x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'

    frame = f'x="{x_offset + PLOT_MARGIN}" y="{PLOT_MARGIN}" width="{PLOT_WIDTH - 2 * PLOT_MARGIN}" height="{PLOT_HEIGHT - 2 * PLOT_MARGIN}"'
    parts = [f'<rect {frame} fill="none" stroke="#bbb"/>', words(PLOT_WIDTH / 2, 18, title, "middle")]
    for level in (low, high):
        value = 10**level if log_scale else level
        y = PLOT_HEIGHT - PLOT_MARGIN - (level - low) / span * (PLOT_HEIGHT - 2 * PLOT_MARGIN) + 4
        parts.append(words(PLOT_MARGIN - 5, y, f"{value:.3g}", "end"))
    parts.append(words(PLOT_WIDTH - PLOT_MARGIN, PLOT_HEIGHT - PLOT_MARGIN + 16, f"step {right:.0f}", "end"))
    for k, (name, curve) in enumerate(curves.items()):
        line = " ".join(place(step, value) for step, value in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{PLOT_COLORS[k]}" stroke-width="1.3"/>')
        parts.append(words(PLOT_MARGIN + 110 * k, PLOT_HEIGHT - 8, name, colour=PLOT_COLORS[k]))
    return "\n".join(parts)


def render_figure(panels: Sequence[str]) -> str:
    """Panels side by side as one SVG document."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{PLOT_WIDTH * len(panels)}" height="{PLOT_HEIGHT}"'
    return "\n".join([f'{head} font-family="sans-serif" font-size="12">', *panels, "</svg>\n"])
