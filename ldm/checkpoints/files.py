"""Configurations and tensors as files: read strictly, with faults named in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DIFFUSERS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def fill(module: Any, path: Path, prefix: str = "") -> Any:
    """The module with the weights of a file: each tensor used, each parameter given, each shape equal."""
    tensors = {name.removeprefix(prefix): value for name, value in read_tensors(path).items()}
    wanted = module.state_dict()
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    faults += [f"unknown {name}" for name in tensors if name not in wanted]
    faults += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{path}: {', '.join(faults[:3])}{more}")
    module.load_state_dict(tensors)
    return module


def place(module: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The module on its device and in its dtype, with convolutions in channels_last memory."""
    # not module.to: diffusers' own warns of dtypes that it then does not keep
    return nn.Module.to(module, device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_module(module: nn.Module, config: Mapping[str, Any], folder: Path, name: str = DIFFUSERS) -> None:
    """Write `config.json` and the weights of one component to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(module.state_dict(), folder / name)
    write_json(config, folder / "config.json")


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object as people read it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write safetensors with the floating-point tensors in `dtype`."""
    cast = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in tensors.items()
    }
    save_file(cast, path, metadata={"format": "pt"})
