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

from ldm.checkpoints.files import sha256
from ldm.config import Recipe, TuneObjective
from ldm.files import publish, remove
from ldm.hardware import frozen_dtype, mixed
from ldm.train.ema import Average
from ldm.train.processes import process

SHAPING = ("objective", "data", "seed", "train_batch_size", "optimizer")  # with another value it is another training
FREE = ("objective.attention",)
OPTIMIZER = "optimizer.safetensors"
SUMS = "sha256.json"  # of every other file


class Stateful(Protocol):
    """A gradient scaler, or whatever else has a state of plain numbers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class State:
    """All that `step` updates have made: `averages` by their files' names, `figures` that wait for a log line."""

    model: nn.Module
    averages: Mapping[str, Average]
    optimizer: torch.optim.Optimizer
    scaler: Stateful | None = None
    step: int = 0
    figures: list[dict[str, float]] = field(default_factory=list)

    def modules(self) -> dict[str, nn.Module]:
        """What is saved as tensors of its own, by file name."""
        return {"model": self.model, **{name: average.model for name, average in self.averages.items()}}


def save(state: State, recipe: Recipe) -> None:
    """Publish the state, then remove all but the newest `checkpoints_total_limit`."""
    with publish(recipe.output_dir / f"checkpoint-{state.step}") as draft:
        draft.mkdir()
        for name, module in state.modules().items():
            save_file(_contiguous(module.state_dict()), draft / f"{name}.safetensors")
        tensors: dict[str, Tensor] = {}
        record = {
            "step": state.step,
            "recipe": shape(recipe),
            "optimizer": fold(state.optimizer.state_dict(), tensors),
            "scaler": state.scaler and state.scaler.state_dict(),
            "figures": state.figures,
        }
        save_file(_contiguous(tensors), draft / OPTIMIZER)
        (draft / "state.json").write_text(json.dumps(record) + "\n")
        (draft / SUMS).write_text(json.dumps({file.name: sha256(file) for file in sorted(draft.iterdir())}) + "\n")
    for old in checkpoints(recipe.output_dir)[: -recipe.checkpoints_total_limit]:
        remove(old)


def resume(state: State, recipe: Recipe) -> None:
    """Load the newest whole checkpoint of this recipe; nothing without one.

    One that is torn, damaged or another training's is passed over with a warning that names it and what is wrong.
    ValueError where all are.
    """
    found, refused = checkpoints(recipe.output_dir), []
    for path in reversed(found):
        try:
            _load(state, path, recipe)
            return
        except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
            refused.append(f"{path}: not a checkpoint of this recipe ({str(error).strip().splitlines()[0]})")
            warnings.warn(refused[-1], stacklevel=2)
    if refused:
        raise ValueError(f"{refused[0]}, nor is any other there: give another output_dir, or move them away")


def checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def shape(recipe: Recipe) -> dict[str, Any]:
    """What may not change in the middle of a training: the options of `SHAPING`, by dotted names."""
    values = resolved(recipe).model_dump(mode="json")
    flat = {name: value for key in SHAPING for name, value in _flat(values[key], key)}
    return {name: value for name, value in flat.items() if name not in FREE}


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with what its automatic precisions mean on this machine."""
    device, objective = process().device, recipe.objective
    if isinstance(objective, TuneObjective):
        dtype = str(frozen_dtype(objective.frozen_dtype, device)).removeprefix("torch.")
        objective = objective.model_copy(update={"frozen_dtype": dtype})
    precision = mixed(recipe.mixed_precision, device)
    return recipe.model_copy(update={"objective": objective, "mixed_precision": precision})


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}")
    else:
        yield name, value


def _load(state: State, path: Path, recipe: Recipe) -> None:
    """Read all of a checkpoint, then take it over."""
    _check(path)
    record = json.loads((path / "state.json").read_text())
    asked = shape(recipe)
    for name, value in record.get("recipe", {}).items():  # none: written before they were recorded
        if name in asked and asked[name] != value:
            raise ValueError(f"its {name} is {value!r}, the recipe's {asked[name]!r}")
    files = {name: load_file(path / f"{name}.safetensors") for name in state.modules()}
    tensors = load_file(path / OPTIMIZER)
    for name, module in state.modules().items():
        module.load_state_dict(files[name])
    if "optimizer" in record:
        state.optimizer.load_state_dict(unfold(record["optimizer"], tensors))
    else:
        _load_moments(state.model, state.optimizer, tensors)
    _lay_out(state.optimizer)
    if state.scaler and record.get("scaler"):
        state.scaler.load_state_dict(record["scaler"])
    state.figures, state.step = record.get("figures", []), record["step"]


def _check(path: Path) -> None:
    """ValueError for the first file of a checkpoint whose bytes are not those that were written."""
    if not (path / SUMS).exists():  # written before they were recorded
        return
    for name, digest in json.loads((path / SUMS).read_text()).items():
        if sha256(path / name) != digest:
            raise ValueError(f"{name} is damaged: its SHA-256 is not the one in {SUMS}")


def fold(tree: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A nest of dicts and lists as JSON, its tensors put into `tensors` under the names of their places."""
    match tree:
        case Tensor():
            tensors[name] = tree
            return {"tensor": name}
        case dict():
            return {"dict": [[key, fold(value, tensors, f"{name}/{key}")] for key, value in tree.items()]}
        case list() | tuple():
            return [fold(value, tensors, f"{name}/{k}") for k, value in enumerate(tree)]
    return tree


def unfold(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `fold`; tuples come back as lists."""
    match tree:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": pairs}:
            return {key: unfold(value, tensors) for key, value in pairs}
        case list():
            return [unfold(value, tensors) for value in tree]
    return tree


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors takes: no strides, and no memory shared between two names."""
    seen: set[int] = set()
    ready = {}
    for name, value in tensors.items():
        value = value.detach().contiguous()
        ready[name] = value.clone() if value.untyped_storage().data_ptr() in seen else value
        seen.add(ready[name].untyped_storage().data_ptr())
    return ready


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give every moment of a parameter the parameter's own memory layout, which safetensors does not keep."""
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """The optimizer's tensors under `<parameter>:<moment>`, as checkpoints without a recorded recipe hold them."""
    parameters = dict(model.named_parameters())
    for name, value in saved.items():
        parameter, _, key = name.rpartition(":")
        like = parameters[parameter]
        optimizer.state[like][key] = value.to(like.device) if value.dim() else value
