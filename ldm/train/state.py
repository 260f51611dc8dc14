"""Checkpoints: the complete state of a training as `checkpoint-<step>/`, whole or absent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.tensors import open_safetensors, save_tensors
from ldm.config import FinetuneObjective, Recipe
from ldm.errors import warn_of_input
from ldm.files import atomic_write, check_own_entries, file_sha256, read_json, remove_path
from ldm.hardware import resolve_frozen_dtype, resolve_mixed_precision
from ldm.train.ema import EMAModel
from ldm.train.task import check_same_shapes, trainable_parameters

IMMUTABLE_RECIPE_KEYS = ("objective", "data", "seed", "optimizer")  # fixed for a training
# folders may be renamed: data are compared by their content
MUTABLE_RECIPE_KEYS = (
    "objective.attention",
    "objective.validation_data_dir",
    "data.train_data_dir",
    "data.skip_broken",
    "data.strict",
)
RUN_FOLDERS = re.compile(r"checkpoint-\d+|averages|events|class-images-[0-9a-f]+")
RUN_FILES = re.compile(
    r"recipe\.json|log\.jsonl|samples\.png|started\.txt|(checkpoint-\d+|averages)/[^/]+\.(safetensors|json)"
    r"|class-images-[0-9a-f]+/[^/]+\.\w+"
)
MAX_NAMED_SAMPLES = 3  # of each kind of change
OPTIMIZER_FILE = "optimizer.safetensors"
CHECKSUMS_FILE = "sha256.json"  # of every other file


class ChangedDataError(ValueError):
    """A checkpoint's images or captions are not those of the recipe."""


@dataclass
class TrainState:
    """Everything that changes from step to step; `ema_models` are named after their files.

    The batch of a step is number `step + batch_offset`: a resumed training with another batch size keeps its position
    in samples. `sample_digests` are the task's.
    """

    model: nn.Module
    ema_models: Mapping[str, EMAModel]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None = None
    step: int = 0
    batch_offset: int = 0
    sample_digests: Mapping[str, str] = field(default_factory=dict)
    pending_metrics: list[dict[str, float]] = field(default_factory=list)  # of the steps since the last line of the log

    def tensors_by_file(self) -> dict[str, Mapping[str, Tensor]]:
        """The trained weights and their averages, by the name of the file that holds them."""
        averages = {name: ema.tensors for name, ema in self.ema_models.items()}
        return {"model": trainable_parameters(self.model), **averages}


def save_checkpoint(state: TrainState, recipe: Recipe) -> None:
    """Publish the state, then remove all but the newest `checkpoints_total_limit`."""
    with atomic_write(recipe.output_dir / f"checkpoint-{state.step}") as draft:
        draft.mkdir()
        for name, tensors in state.tensors_by_file().items():
            save_tensors(tensors, draft / f"{name}.safetensors", None)
        optimizer_tensors: dict[str, Tensor] = {}
        record = {
            "step": state.step,
            "batch_offset": state.batch_offset,
            "train_batch_size": recipe.train_batch_size,
            "samples": dict(state.sample_digests),
            "recipe": select_immutable_options(recipe),
            "optimizer": tree_to_json(state.optimizer.state_dict(), optimizer_tensors),
            "scaler": state.scaler and state.scaler.state_dict(),
            "figures": state.pending_metrics,
        }
        save_tensors(optimizer_tensors, draft / OPTIMIZER_FILE, None)
        (draft / "state.json").write_text(json.dumps(record) + "\n")
        checksums = {file.name: file_sha256(file) for file in sorted(draft.iterdir())}
        (draft / CHECKSUMS_FILE).write_text(json.dumps(checksums) + "\n")
    for old in list_checkpoints(recipe.output_dir)[: -recipe.checkpoints_total_limit]:
        remove_path(old)


def resume_from_checkpoint(state: TrainState, recipe: Recipe) -> None:
    """Load the newest whole checkpoint of this recipe; do nothing where there is no checkpoint.

    A checkpoint that is incomplete, damaged or of another training is skipped with a warning that says what is wrong.
    ValueError where all are, or where its data are others and the recipe does not say `resume_changed_data`.
    """
    skipped = []
    for path in reversed(list_checkpoints(recipe.output_dir)):
        try:
            return _load_checkpoint(state, path, recipe)
        except ChangedDataError:
            raise
        except (OSError, RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
            skipped.append(f"{path}: not a checkpoint of this recipe ({' '.join(str(error).split())})")
            warn_of_input(skipped[-1])
    if skipped:
        raise ValueError(f"{skipped[0]}; no other checkpoint fits either: give another output_dir, or move them away")


def check_run_folder(folder: Path) -> None:
    """ValueError where a link, a pipe or the like has the name of a folder or a file of a training: see its message."""
    check_own_entries(folder, RUN_FOLDERS, RUN_FILES)


def list_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    steps = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return [steps[step] for step in sorted(filter(str.isdigit, steps), key=int)]


def select_immutable_options(recipe: Recipe) -> dict[str, Any]:
    """The options of a resolved recipe that may not change within a training, by dotted names."""
    values = recipe.model_dump(mode="json")
    flat = {name: value for key in IMMUTABLE_RECIPE_KEYS for name, value in _flatten_options(values[key], key)}
    return {name: value for name, value in flat.items() if name not in MUTABLE_RECIPE_KEYS}


def resolve_recipe(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with the precisions that `auto` stands for on a device."""
    objective = recipe.objective
    if isinstance(objective, FinetuneObjective):
        dtype = str(resolve_frozen_dtype(objective.frozen_dtype, device)).removeprefix("torch.")
        objective = objective.model_copy(update={"frozen_dtype": dtype})
    precision = resolve_mixed_precision(recipe.mixed_precision, device)
    return recipe.model_copy(update={"objective": objective, "mixed_precision": precision})


def _flatten_options(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten_options(inner, f"{name}.{key}")
    else:
        yield name, value


def _load_checkpoint(state: TrainState, path: Path, recipe: Recipe) -> None:
    """Check all files of a checkpoint, then copy them into the state, one tensor at a time beside the optimizer's."""
    files = {file.name for file in path.iterdir()}
    for name, digest in read_json(path / CHECKSUMS_FILE).items():
        if name not in files:  # also one outside
            raise ValueError(f"{name} is missing")
        if file_sha256(path / name) != digest:
            raise ValueError(f"{name} is damaged: its SHA-256 is not the one in {CHECKSUMS_FILE}")
    record = read_json(path / "state.json")
    options = select_immutable_options(recipe)
    for name, value in record["recipe"].items():
        if name in options and options[name] != value:
            raise ValueError(f"its {name} is {value!r}, the recipe's {options[name]!r}")
    _check_samples(record.get("samples") or {}, state.sample_digests, path, recipe)
    targets = state.tensors_by_file()
    weights = {name: open_safetensors(path / f"{name}.safetensors") for name in targets}
    for name, target in targets.items():
        check_same_shapes(weights[name].meta_tensors(), target)
    optimizer_tensors = dict(open_safetensors(path / OPTIMIZER_FILE).iter_tensors())
    for name, target in targets.items():
        with torch.no_grad():
            for key, tensor in weights[name].iter_tensors():
                target[key].copy_(tensor)
    state.optimizer.load_state_dict(tree_from_json(record["optimizer"], optimizer_tensors))
    _restore_memory_format(state.optimizer)
    if state.scaler and record["scaler"]:
        state.scaler.load_state_dict(record["scaler"])
    state.pending_metrics, state.step = record["figures"], record["step"]
    num_samples = (state.step + record.get("batch_offset", 0)) * _recorded_batch_size(record, recipe)
    state.batch_offset = num_samples // recipe.train_batch_size - state.step


def _recorded_batch_size(record: Mapping[str, Any], recipe: Recipe) -> int:
    """A checkpoint's batch size; older ones hold it among the options of the recipe."""
    return record.get("train_batch_size") or record["recipe"].get("train_batch_size") or recipe.train_batch_size


def _check_samples(before: Mapping[str, str], now: Mapping[str, str], path: Path, recipe: Recipe) -> None:
    """ChangedDataError, or a warning where the recipe allows it, if samples were added, removed or changed."""
    if not before or not (change := describe_change(before, now)):
        return
    if not recipe.resume_changed_data:
        raise ChangedDataError(f"{path}: the data changed: {change}; --set resume_changed_data=true goes on with them")
    warn_of_input(f"{path}: the data changed: {change}")


def describe_change(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """How many samples were added, removed and changed, with the names of the first; empty where none was."""
    changes = {
        "added": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "changed": sorted(key for key in before.keys() & now.keys() if before[key] != now[key]),
    }
    parts = []
    for verb, keys in changes.items():
        more = ", ..." if len(keys) > MAX_NAMED_SAMPLES else ""
        parts += [f"{len(keys)} {verb} ({', '.join(keys[:MAX_NAMED_SAMPLES])}{more})"] if keys else []
    return ", ".join(parts)


def tree_to_json(tree: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Nested dicts and lists as JSON; their tensors are put into `tensors`, under their paths."""
    match tree:
        case Tensor():
            tensors[name] = tree
            return {"tensor": name}
        case dict():
            return {"dict": [[key, tree_to_json(value, tensors, f"{name}/{key}")] for key, value in tree.items()]}
        case list() | tuple():
            return [tree_to_json(value, tensors, f"{name}/{k}") for k, value in enumerate(tree)]
    return tree


def tree_from_json(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `tree_to_json`; tuples come back as lists."""
    match tree:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": pairs}:
            return {key: tree_from_json(value, tensors) for key, value in pairs}
        case list():
            return [tree_from_json(value, tensors) for value in tree]
    return tree


def _restore_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give each optimizer tensor of a parameter's shape the parameter's strides, which safetensors does not keep."""
    for parameter, tensors in optimizer.state.items():
        for key, value in tensors.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                tensors[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
