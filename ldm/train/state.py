"""Checkpoints: the complete state of a training as `checkpoint-<step>/`, whole or absent."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.config import FinetuneObjective, Recipe
from ldm.files import atomic_write, file_sha256, remove_path
from ldm.hardware import resolve_frozen_dtype, resolve_mixed_precision
from ldm.train.ema import EMAModel
from ldm.train.processes import get_partial_state

IMMUTABLE_RECIPE_KEYS = (
    "objective",
    "data",
    "seed",
    "train_batch_size",
    "optimizer",
)  # with another value it is another training
MUTABLE_RECIPE_KEYS = ("objective.attention",)
OPTIMIZER_FILE = "optimizer.safetensors"
CHECKSUMS_FILE = "sha256.json"  # of every other file


class Stateful(Protocol):
    """A gradient scaler, or whatever else has a state of plain numbers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainState:
    """All that `step` updates have made: `averages` by their files' names, `figures` that wait for a log line."""

    model: nn.Module
    ema_models: Mapping[str, EMAModel]
    optimizer: torch.optim.Optimizer
    scaler: Stateful | None = None
    step: int = 0
    pending_metrics: list[dict[str, float]] = field(default_factory=list)

    def modules_by_file(self) -> dict[str, nn.Module]:
        """What is saved as tensors of its own, by file name."""
        return {"model": self.model, **{name: average.model for name, average in self.ema_models.items()}}


def save_checkpoint(state: TrainState, recipe: Recipe) -> None:
    """Publish the state, then remove all but the newest `checkpoints_total_limit`."""
    with atomic_write(recipe.output_dir / f"checkpoint-{state.step}") as draft:
        draft.mkdir()
        for name, module in state.modules_by_file().items():
            save_file(_clone_shared_tensors(module.state_dict()), draft / f"{name}.safetensors")
        tensors: dict[str, Tensor] = {}
        record = {
            "step": state.step,
            "recipe": select_immutable_options(recipe),
            "optimizer": tree_to_json(state.optimizer.state_dict(), tensors),
            "scaler": state.scaler and state.scaler.state_dict(),
            "figures": state.pending_metrics,
        }
        save_file(_clone_shared_tensors(tensors), draft / OPTIMIZER_FILE)
        (draft / "state.json").write_text(json.dumps(record) + "\n")
        (draft / CHECKSUMS_FILE).write_text(
            json.dumps({file.name: file_sha256(file) for file in sorted(draft.iterdir())}) + "\n"
        )
    for old in list_checkpoints(recipe.output_dir)[: -recipe.checkpoints_total_limit]:
        remove_path(old)


def resume_from_checkpoint(state: TrainState, recipe: Recipe) -> None:
    """Load the newest whole checkpoint of this recipe; nothing without one.

    One that is torn, damaged or another training's is passed over with a warning that names it and what is wrong.
    ValueError where all are.
    """
    found, refused = list_checkpoints(recipe.output_dir), []
    for path in reversed(found):
        try:
            _load_checkpoint(state, path, recipe)
            return
        except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
            refused.append(f"{path}: not a checkpoint of this recipe ({str(error).strip().splitlines()[0]})")
            warnings.warn(refused[-1], stacklevel=2)
    if refused:
        raise ValueError(f"{refused[0]}, nor is any other there: give another output_dir, or move them away")


def list_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def select_immutable_options(recipe: Recipe) -> dict[str, Any]:
    """What may not change in the middle of a training: the options of `IMMUTABLE_RECIPE_KEYS`, by dotted names."""
    values = resolve_recipe(recipe).model_dump(mode="json")
    flat = {name: value for key in IMMUTABLE_RECIPE_KEYS for name, value in _flatten_options(values[key], key)}
    return {name: value for name, value in flat.items() if name not in MUTABLE_RECIPE_KEYS}


def resolve_recipe(recipe: Recipe) -> Recipe:
    """The recipe with what its automatic precisions mean on this machine."""
    device, objective = get_partial_state().device, recipe.objective
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
    """Read all of a checkpoint, then take it over."""
    _verify_checksums(path)
    record = json.loads((path / "state.json").read_text())
    asked = select_immutable_options(recipe)
    for name, value in record.get("recipe", {}).items():  # none: written before they were recorded
        if name in asked and asked[name] != value:
            raise ValueError(f"its {name} is {value!r}, the recipe's {asked[name]!r}")
    files = {name: load_file(path / f"{name}.safetensors") for name in state.modules_by_file()}
    tensors = load_file(path / OPTIMIZER_FILE)
    for name, module in state.modules_by_file().items():
        module.load_state_dict(files[name])
    if "optimizer" in record:
        state.optimizer.load_state_dict(tree_from_json(record["optimizer"], tensors))
    else:
        _load_legacy_optimizer(state.model, state.optimizer, tensors)
    _restore_memory_format(state.optimizer)
    if state.scaler and record.get("scaler"):
        state.scaler.load_state_dict(record["scaler"])
    state.pending_metrics, state.step = record.get("figures", []), record["step"]


def _verify_checksums(path: Path) -> None:
    """ValueError for the first file of a checkpoint whose bytes are not those that were written."""
    if not (path / CHECKSUMS_FILE).exists():  # written before they were recorded
        return
    for name, digest in json.loads((path / CHECKSUMS_FILE).read_text()).items():
        if file_sha256(path / name) != digest:
            raise ValueError(f"{name} is damaged: its SHA-256 is not the one in {CHECKSUMS_FILE}")


def tree_to_json(tree: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A nest of dicts and lists as JSON, its tensors put into `get_tensor_fields` under the names of their places."""
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


def _clone_shared_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors takes: no strides, and no memory shared between two names."""
    seen: set[int] = set()
    ready = {}
    for name, value in tensors.items():
        value = value.detach().contiguous()
        ready[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
        seen.add(ready[name].untyped_storage().data_ptr())
    return ready


def _restore_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give every moment of a parameter the parameter's own memory layout, which safetensors does not keep."""
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _load_legacy_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The optimizer's tensors under `<parameter>:<moment>`, as checkpoints without a recorded recipe hold them."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(":")
        like = parameters[parameter]
        optimizer.state[like][key] = value.to(like.device) if value.dim() else value
