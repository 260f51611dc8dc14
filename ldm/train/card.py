"""The model card of a fine-tuned model, and curves of training logs as SVG."""

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
from ldm.files import atomic_write
from ldm.image_io import contact_sheet

PLOT_WIDTH, PLOT_HEIGHT, PLOT_MARGIN = 420, 220, 44
PLOT_COLORS = ("#2a6fbb", "#d1495b", "#3a7d44")

Curve = list[tuple[float, float]]  # (step, value)


def write_model_card(
    recipe: Recipe,
    dataset: ImageDataset,
    samples: Mapping[str, Sequence[Image.Image]],
    folder: Path,
) -> None:
    """Write MODEL_CARD.md about the recipe and the data, with curves.svg and a contact sheet of each of `samples`.

    `samples` are images of the recipe's validation prompts, by the name of their sheet.
    """
    options = recipe.model_dump(mode="json", exclude_defaults=True)
    parts = [f"# {recipe.output_dir.name}", f"## Recipe\n\n```yaml\n{yaml.safe_dump(options, sort_keys=False)}```"]
    parts.append(f"## Images\n\n{summarize_dataset(dataset)}")
    log = recipe.output_dir / "log.jsonl"
    curves = {name: read_curve(log, key) for name, key in (("training", "loss"), ("held out", "val_loss"))}
    if curves := {name: curve for name, curve in curves.items() if curve}:
        (folder / "curves.svg").write_text(render_figure({"loss (log scale)": curves}), encoding="utf-8")
        parts.append("## Curves\n\n![curves](curves.svg)")
    for name, images in samples.items():
        contact_sheet(images, recipe.validation_prompts, 8).save(folder / f"{name}.png")
        parts.append(f"## {name.capitalize()}\n\n![{name}]({name}.png)")
    with atomic_write(folder / "MODEL_CARD.md") as draft:
        draft.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def summarize_dataset(dataset: ImageDataset) -> str:
    """The number of images of each shape after cropping, as a table, and the first captions, as a list."""
    shapes = Counter(info.placement.bucket for info in dataset.image_infos)
    rows = [f"| {width} x {height} | {count} |" for (width, height), count in sorted(shapes.items())]
    captions = [*dict.fromkeys(sample.caption for sample in dataset.samples)]
    items = [f"- {caption}" for caption in captions[:5]]
    more = [f"- and {len(captions) - 5} others"] if len(captions) > 5 else []
    left = [f"- {issue.key}: {issue.what}" for issue in dataset.notices]
    notices = ["", f"Left out, or used otherwise than it is: {len(left)}", "", *left[:20]] if left else []
    return "\n".join(["| shape | images |", "|---|---|", *rows, "", "Captions:", "", *items, *more, *notices])


def read_curve(log: Path, key: str) -> Curve:
    """(step, value) of every line of a `log.jsonl` that has the key."""
    lines = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line[key]) for line in lines if key in line]


def render_figure(panels: Mapping[str, Mapping[str, Curve]]) -> str:
    """Panels side by side as one SVG document: named curves by title; "(log scale)" in it gives a logarithmic axis."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{PLOT_WIDTH * len(panels)}" height="{PLOT_HEIGHT}"'
    parts = [render_panel(title, curves, k * PLOT_WIDTH) for k, (title, curves) in enumerate(panels.items())]
    return "\n".join([f'{head} font-family="sans-serif" font-size="12">', *parts, "</svg>\n"])


def render_panel(title: str, curves: Mapping[str, Curve], x_offset: int) -> str:
    """A pair of axes with a few curves, as SVG elements `x_offset` pixels from the left."""
    log_scale = "(log scale)" in title
    to_scale = math.log10 if log_scale else float
    points = [point for curve in curves.values() for point in curve]
    last_step = max(step for step, _ in points)
    low, high = min(to_scale(v) for _, v in points), max(to_scale(v) for _, v in points)
    width, height = PLOT_WIDTH - 2 * PLOT_MARGIN, PLOT_HEIGHT - 2 * PLOT_MARGIN
    left, bottom, span = x_offset + PLOT_MARGIN, PLOT_HEIGHT - PLOT_MARGIN, (high - low) or 1.0

    def place(step: float, value: float) -> str:
        return f"{left + step / last_step * width:.1f},{bottom - (to_scale(value) - low) / span * height:.1f}"

    def text(x: float, y: float, label: str, anchor: str = "start", color: str = "#333") -> str:
        return f'<text x="{x_offset + x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{color}">{label}</text>'

    frame = f'x="{left}" y="{PLOT_MARGIN}" width="{width}" height="{height}"'
    parts = [f'<rect {frame} fill="none" stroke="#bbb"/>', text(PLOT_WIDTH / 2, 18, title, "middle")]
    for level in (low, high):
        value = 10**level if log_scale else level
        parts.append(text(PLOT_MARGIN - 5, bottom - (level - low) / span * height + 4, f"{value:.3g}", "end"))
    parts.append(text(PLOT_WIDTH - PLOT_MARGIN, bottom + 16, f"step {last_step:.0f}", "end"))
    for k, (name, curve) in enumerate(curves.items()):
        line = " ".join(place(step, value) for step, value in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{PLOT_COLORS[k]}" stroke-width="1.3"/>')
        parts.append(text(PLOT_MARGIN + 110 * k, PLOT_HEIGHT - 8, name, color=PLOT_COLORS[k]))
    return "\n".join(parts)
