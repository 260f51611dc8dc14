"""Configurations and tensors as files: read strictly, with faults named in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DIFFUSERS_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS_NAME = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError, as `parse_json` says, names the file."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_json(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text; ValueError where there is none, or a name is given twice, or a NaN."""
    try:
        values = json.loads(text, object_pairs_hook=_reject_duplicate_keys, parse_constant=_parse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


def _reject_duplicate_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object; ValueError where a name is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _parse_constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value")
    return float(name)  # diffusers writes -Infinity for "no limit"


def to_device(module: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The module on its device and in its dtype, with convolutions in channels_last memory."""
    # not module.to: diffusers' own warns of dtypes that it then does not keep
    return nn.Module.to(module, device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def save_module(module: nn.Module, config: Mapping[str, Any], folder: Path, name: str = DIFFUSERS_WEIGHTS_NAME) -> None:
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


def file_sha256(path: Path, offset: int = 0) -> str:
    """The SHA-256 of a file, or of it from a byte on, in hex."""
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.file_digest(file, "sha256").hexdigest()
