"""What an export says about itself in its header: Stability AI's ModelSpec (`modelspec.*`), and kohya's `ss_*`."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from ldm.checkpoints.formats import Checkpoint
from ldm.config import FinetuneObjective, Recipe
from ldm.data.image_dataset import ImageDataset
from ldm.diffusion.prediction import PREDICTIONS

START_FILE = "started.txt"  # of an output folder: the day on which its training began
MODEL_SPEC_VERSION = "1.0.1"
ARCHITECTURES = {  # by a family, or its part before "-"
    "sd1": "stable-diffusion-v1",
    "sd2-v": "stable-diffusion-v2-768-v",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
ADAPTER_SUFFIXES = {"lora": "/lora", "textual_inversion": "/textual-inversion", "full": ""}
PREDICTION_NAMES = {"eps": "epsilon", "v": "v"}
MAX_TAGS = 1000  # the most frequent ones


def record_start(output_dir: Path) -> None:
    """Write the day in UTC into an output folder, unless a training that is resumed wrote it before."""
    path = output_dir / START_FILE
    if not path.exists():
        path.write_text(f"{datetime.now(UTC):%Y-%m-%d}\n")


def find_date(recipe: Recipe) -> str | None:
    """The recipe's date, or the day on which its training began: never that of the export, which is repeated."""
    if recipe.card.date is not None:
        return recipe.card.date.isoformat()
    path = recipe.output_dir / START_FILE
    return path.read_text().strip() if path.is_file() else None


def find_trigger_phrase(recipe: Recipe, objective: FinetuneObjective) -> str | None:
    """What to write in a prompt: the recipe's phrase, the placeholder token, or the one caption of all images."""
    token = objective.placeholder_token if objective.method == "textual_inversion" else None
    return recipe.card.trigger_phrase or token or recipe.image_data.instance_prompt


def find_architecture(family: str | None, method: str) -> str | None:
    """ModelSpec's name for what was trained; None for a model of no known family."""
    names = [] if family is None else [family, family.split("-")[0]]
    name = next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
    return None if name is None else name + ADAPTER_SUFFIXES[method]


def count_tags(recipe: Recipe, dataset: ImageDataset) -> dict[str, dict[str, int]]:
    """How many images have each tag, by the name of their folder, as in kohya's `ss_tag_frequency`."""
    data = recipe.image_data
    first, *others = [path.name for path in data.train_data_dir]
    folders = {str(number): name for number, name in enumerate(others, 2)}
    folders[str(len(folders) + 2)] = ""  # the class's images
    counts = Counter[tuple[str, str]]()
    for sample in dataset.samples:
        number, is_numbered, _ = sample.key.partition(":")
        folder = folders.get(number, first) if is_numbered else first
        counts.update({(folder, tag.strip()) for tag in sample.caption.split(data.caption_separator)})
    frequency: dict[str, dict[str, int]] = {}
    for (folder, tag), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if folder and tag and sum(map(len, frequency.values())) < MAX_TAGS:
            frequency.setdefault(folder, {})[tag] = count
    return frequency


def describe_export(
    recipe: Recipe, objective: FinetuneObjective, model: Checkpoint, dataset: ImageDataset
) -> dict[str, str]:
    """The header's metadata of a trained adapter or embedding; equal trainings have equal ones."""
    card, data, names = recipe.card, recipe.image_data, PREDICTION_NAMES.items()
    spec = {
        "sai_model_spec": MODEL_SPEC_VERSION,
        "architecture": find_architecture(model.family, objective.method),
        "implementation": "diffusers",
        "title": card.title or recipe.output_dir.name,
        "resolution": f"{data.resolution}x{data.resolution}",
        "prediction_type": next((name for p, name in names if PREDICTIONS[p] is model.prediction), None),
        "trigger_phrase": find_trigger_phrase(recipe, objective),
        "date": find_date(recipe),
        "author": card.author,
        "description": card.description,
        "license": card.license,
        "tags": ", ".join(card.tags) or None,
    }
    base = objective.pretrained_model_name_or_path
    kohya = {
        "output_name": recipe.output_dir.name,
        "sd_model_name": None if base is None else Path(base).name,
        "resolution": f"({data.resolution}, {data.resolution})",
        "num_train_images": len(dataset.samples),
        "steps": recipe.max_train_steps,
        "total_batch_size": recipe.train_batch_size,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler": recipe.lr_scheduler,
        "optimizer": recipe.optimizer,
        "seed": recipe.seed,
        "tag_frequency": json.dumps(count_tags(recipe, dataset), ensure_ascii=False),
    }
    pairs = [*((f"modelspec.{k}", v) for k, v in spec.items()), *((f"ss_{k}", v) for k, v in kohya.items())]
    return {name: str(value) for name, value in pairs if value is not None}
