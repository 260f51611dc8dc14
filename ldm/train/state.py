"""Checkpoints: the complete state of a training as `checkpoint-<step>/`, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.files import publish, remove
from ldm.train.ema import EMA


def save(folder: Path, step: int, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Publish the state after `step` updates, then remove all but the newest `keep`."""
    with publish(folder / f"checkpoint-{step}") as draft:
        draft.mkdir()
        save_file(_tensors(model), draft / "model.safetensors")
        save_file(_tensors(ema.model), draft / "ema.safetensors")
        save_file(_moments(model, optimizer), draft / "optimizer.safetensors")
        (draft / "state.json").write_text(json.dumps({"step": step}) + "\n")
    for old in checkpoints(folder)[:-keep]:
        remove(old)


def resume(folder: Path, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into what is given; the number of updates it holds, 0 without one.

    Raises ValueError where the newest checkpoint is torn or belongs to another model, naming it.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    path = found[-1]
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
        ema.model.load_state_dict(load_file(path / "ema.safetensors"))
        _load_moments(model, optimizer, load_file(path / "optimizer.safetensors"))
        return json.loads((path / "state.json").read_text())["step"]
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: not a checkpoint of this recipe ({reason})") from None


def checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors under `<parameter>:<moment>`."""
    return {
        f"{name}:{key}": torch.as_tensor(value).contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in saved.items():
        parameter, _, key = name.rpartition(":")
        like = parameters[parameter]
        layout = torch.channels_last if value.dim() == 4 else torch.preserve_format
        optimizer.state[like][key] = value.to(like.device, memory_format=layout) if value.dim() else value
