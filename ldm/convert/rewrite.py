"""Weights written again in the layout that they have: pickles as safetensors, real numbers in another dtype."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.tensors import SafetensorsWriter, open_safetensors
from ldm.convert.unpickle import is_pickle, unpickle_weights
from ldm.files import read_json, write_json

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
COPIED_SUFFIXES = (".json", ".txt", ".md")  # of a folder: configurations, tokenizers, licences


def rewrite_weights(src: Path, draft: Path, dtype: torch.dtype | None, trust: bool) -> dict[str, Any]:
    """A file or folder again, its weights as safetensors under the names of those; pickles only if they are trusted."""
    if not src.is_dir():
        count, dropped = _rewrite_file(src, draft, dtype, trust)
        return {"layout": "file", "tensors": count, "dropped": {src.name: dropped} if dropped else {}}
    report: dict[str, Any] = {"layout": "folder", "tensors": 0, "dropped": {}, "left_out": {}}
    found = list_source_files(src)
    for file in found:
        name = str(file.relative_to(src))
        new = file.with_name(_safetensors_name(file.name))
        place = draft / new.relative_to(src)
        place.parent.mkdir(parents=True, exist_ok=True)
        if new != file and new in found:
            report["left_out"][name] = "it is there as safetensors too"
        elif file.suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
            count, dropped = _rewrite_file(file, place, dtype, trust)
            report["tensors"] += count
            report["dropped"] |= {name: dropped} if dropped else {}
        elif file.name.endswith(".index.json"):
            _rewrite_index(file, place)
        elif file.suffix in COPIED_SUFFIXES:
            shutil.copyfile(file, place)
        else:
            report["left_out"][name] = "neither weights nor a configuration"
    if not report["tensors"]:
        raise ValueError(f"{src}: no weights in it")
    return report


def list_source_files(path: Path) -> list[Path]:
    """The files of a folder and of those below it, but for hidden ones; a file itself."""
    if not path.is_dir():
        return [path]
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _rewrite_file(src: Path, dst: Path, dtype: torch.dtype | None, trust: bool) -> tuple[int, list[str]]:
    """One file of weights; the number of tensors, and what was dropped."""
    if trust and is_pickle(src):
        report = unpickle_weights(src, dst, dtype)
        return report["tensors"], report["dropped"]
    file = open_safetensors(src)
    with SafetensorsWriter(dst, file.meta_tensors(), file.metadata, dtype) as writer:
        for name, tensor in file.iter_tensors():
            writer.write(name, tensor)
    return len(file.tensor_infos), []


def _rewrite_index(src: Path, dst: Path) -> None:
    """The index of a network's shards, with their new names."""
    index = read_json(src)
    if not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{src}: no weight_map")
    write_json(
        {**index, "weight_map": {name: _safetensors_name(str(file)) for name, file in index["weight_map"].items()}}, dst
    )


def _safetensors_name(name: str) -> str:
    """The name of a file of pickled weights, or of their index, as safetensors; any other name as it is.

    transformers calls weights `pytorch_model` where they are pickled, `model` where they are not.
    """
    stem, *rest = name.split(".")
    if not any(f".{part}" in PICKLE_SUFFIXES for part in rest):
        return name
    stem = stem.replace("pytorch_model", "model") if stem.startswith("pytorch_model") else stem
    return ".".join([stem, *(SAFETENSORS_SUFFIX[1:] if f".{part}" in PICKLE_SUFFIXES else part for part in rest)])
