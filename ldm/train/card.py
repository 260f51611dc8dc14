"""The model card of a fine-tuned model, a README.md for the hub, and curves of training logs as SVG."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from PIL import Image

from ldm.checkpoints.formats import is_hub_source
from ldm.checkpoints.hub import LORA_WEIGHT_NAME_SAFE, TEXT_INVERSION_NAME_SAFE
from ldm.config import FinetuneObjective, Recipe
from ldm.data.image_dataset import ImageDataset
from ldm.errors import one_line, printable
from ldm.files import atomic_write
from ldm.image_io import contact_sheet
from ldm.train.model_spec import find_date, find_trigger_phrase
from ldm.train.progress import read_log

PLOT_WIDTH, PLOT_HEIGHT, PLOT_MARGIN = 420, 220, 44
PLOT_COLORS = ("#2a6fbb", "#d1495b", "#3a7d44")

METHOD_TAGS = {"lora": ["lora", "template:sd-lora"], "textual_inversion": ["textual_inversion"], "full": []}
FAMILY_TAGS = {  # by the part of a family's name before "-"
    "sd1": ["stable-diffusion", "stable-diffusion-diffusers"],
    "sd2": ["stable-diffusion", "stable-diffusion-diffusers"],
    "sdxl": ["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
}
LOAD_BASE = (
    "from diffusers import AutoPipelineForText2Image",
    "",
    'pipe = AutoPipelineForText2Image.from_pretrained("{base}")',
)
USES = {
    "lora": (*LOAD_BASE, f'pipe.load_lora_weights("path/to/this/folder", weight_name="{LORA_WEIGHT_NAME_SAFE}")'),
    "textual_inversion": (*LOAD_BASE, f'pipe.load_textual_inversion("path/to/this/folder/{TEXT_INVERSION_NAME_SAFE}")'),
    "full": (*LOAD_BASE[:2], 'pipe = AutoPipelineForText2Image.from_pretrained("path/to/this/folder")'),
}

Curve = list[tuple[float, float]]  # (step, value)


def write_model_card(
    recipe: Recipe,
    objective: FinetuneObjective,
    family: str | None,
    dataset: ImageDataset,
    samples: Mapping[str, Sequence[Image.Image]],
    folder: Path,
) -> None:
    """Write README.md, as the hub shows it, about the recipe and the data, with curves.svg and images of `samples`.

    `samples` are images of the recipe's validation prompts, by the name of their contact sheet; those of "after" are
    written one by one too, as the hub's examples.
    """
    widget = save_widget_images(recipe.validation_prompts, samples.get("after", ()), folder)
    parts = [
        f"---\n{card_data(recipe, objective, family, widget).to_yaml()}\n---",
        *describe_model(recipe, objective, family),
    ]
    options = recipe.model_dump(mode="json", exclude_defaults=True)
    parts.append(f"## Recipe\n\n```yaml\n{yaml.safe_dump(options, sort_keys=False)}```")
    parts.append(f"## Images\n\n{summarize_dataset(dataset)}")
    log = recipe.output_dir / "log.jsonl"
    curves = {name: read_curve(log, key) for name, key in (("training", "loss"), ("held out", "val_loss"))}
    if curves := {name: curve for name, curve in curves.items() if curve}:
        (folder / "curves.svg").write_text(render_figure({"loss (log scale)": curves}), encoding="utf-8")
        parts.append("## Curves\n\n![curves](curves.svg)")
    for name, images in samples.items():
        contact_sheet(images, recipe.validation_prompts).save(folder / f"{name}.png")
        parts.append(f"## {name.capitalize()}\n\n![{name}]({name}.png)")
    with atomic_write(folder / "README.md") as draft:
        text = "\n".join(printable(line) for line in "\n\n".join(parts).split("\n"))
        draft.write_text(text + "\n", encoding="utf-8")


def card_data(
    recipe: Recipe, objective: FinetuneObjective, family: str | None, widget: list[dict[str, Any]]
) -> ModelCardData:
    """The front matter by which the hub files a model; `base_model` is a hub id, the license only what is known."""
    base = objective.pretrained_model_name_or_path
    version = (family or "").split("-")[0]
    tags = ["text-to-image", "diffusers", *METHOD_TAGS[objective.method], *FAMILY_TAGS.get(version, ())]
    return ModelCardData(
        base_model=base if isinstance(base, str) and is_hub_source(base) else None,
        instance_prompt=find_trigger_phrase(recipe, objective),
        library_name="diffusers",
        license=recipe.card.license,
        pipeline_tag="text-to-image",
        tags=[*tags, "diffusers-training", *recipe.card.tags],
        widget=widget or None,
        ignore_metadata_errors=True,
    )


def describe_model(recipe: Recipe, objective: FinetuneObjective, family: str | None) -> list[str]:
    """Title, what it was made from, trigger words, and how it is used."""
    card, trigger, date = recipe.card, find_trigger_phrase(recipe, objective), find_date(recipe)
    base = objective.pretrained_model_name_or_path or "picto"
    made = [f"{objective.method.replace('_', ' ')} of {base}" + (f" ({family})" if family else "")]
    made += [f"by {card.author}"] * bool(card.author) + [f"on {date}"] * bool(date)
    parts = [f"# {card.title or recipe.output_dir.name}", ", ".join(made) + "."]
    parts += [card.description] if card.description else []
    parts += [f"## Trigger words\n\nWrite {format_code_span(trigger)} in the prompt."] if trigger else []
    lines = "\n".join(line.format(base=base) for line in USES[objective.method])
    return [*parts, f"## Use\n\n```python\n{lines}\n```"]


def save_widget_images(prompts: Sequence[str], images: Sequence[Image.Image], folder: Path) -> list[dict[str, Any]]:
    """Write images into `samples/`, and return the hub's widget entries of them."""
    widget = []
    for k, (prompt, image) in enumerate(zip(prompts, images, strict=True) if images else ()):
        path = folder / "samples" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        widget.append({"text": prompt, "output": {"url": f"samples/{k}.png"}})
    return widget


def summarize_dataset(dataset: ImageDataset) -> str:
    """The number of images of each shape after cropping, as a table, and the first captions, as a list."""
    shapes = Counter(info.placement.bucket for info in dataset.image_infos)
    rows = [f"| {width} x {height} | {count} |" for (width, height), count in sorted(shapes.items())]
    captions = [*dict.fromkeys(sample.caption for sample in dataset.samples)]
    items = [f"- {format_code_span(caption)}" for caption in captions[:5]]
    more = [f"- and {len(captions) - 5} others"] if len(captions) > 5 else []
    left = [f"- {format_code_span(f'{issue.key}: {issue.what}')}" for issue in dataset.notices]
    notices = ["", f"Left out, or used otherwise than it is: {len(left)}", "", *left[:20]] if left else []
    return "\n".join(["| shape | images |", "|---|---|", *rows, "", "Captions:", "", *items, *more, *notices])


def format_code_span(text: str) -> str:
    """Text of others as it stands, in Markdown: one line between more backticks than it has in a row."""
    text = one_line(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if text.startswith("`") or text.endswith("`") else f"{fence}{text}{fence}"


def read_curve(log: Path, key: str) -> Curve:
    """(step, value) of every line of a `log.jsonl` that has the key."""
    return [(line["step"], line[key]) for line in read_log(log) if key in line]


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
