"""Writes models as directories of diffusers: converted from a single file, or copied with weights as safetensors.

Tensors stream from file to file: at most one tensor, and what it is split into, is in memory.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import detect, formats, keys, layouts
from ldm.checkpoints.families import FAMILIES, LoadOptions, ModelFamily
from ldm.checkpoints.schedule import family_scheduler_config
from ldm.checkpoints.single_file import read_single_file, with_unet_structure
from ldm.checkpoints.tensors import (
    PICKLE_SUFFIXES,
    SafetensorsFile,
    SafetensorsWriter,
    add_dtype,
    is_text_encoder_config,
    open_safetensors,
)
from ldm.files import atomic_write, read_json, write_json
from ldm.nn.tokenizer import build_clip_tokenizer, save_clip_tokenizer

SAFETENSORS_SUFFIX = ".safetensors"
COPIED_SUFFIXES = (".json", ".txt", ".md")  # configurations, tokenizers, licences
DIFFUSERS_VERSION = "0.42.1"  # whose layout is written; its inpainting pipeline reads this field
UnpickleFunction = Callable[[Path, Path, torch.dtype | None], dict[str, Any] | None]


def save_as_directory(src: Path, dst: Path) -> None:
    """Write a model as a directory with its weights as safetensors, whole or not at all; a single file is converted."""
    with atomic_write(dst) as draft:
        (copy_weights if src.is_dir() else write_directory)(src, draft)


def write_directory(
    src: Path, draft: Path, dtype: torch.dtype | None = None, options: LoadOptions = LoadOptions()
) -> dict[str, Any]:
    """Write a single file as a directory, floating-point tensors in `dtype` (None: each in its own), and report."""
    (((file, key_mappings),),) = read_single_file(src, options).shard_groups
    if not any(mapping.component == "vae" for mapping in key_mappings.values()):
        raise ValueError(f"{src}: no vae in it, and a directory needs one")
    detection = _detect_model(file, options)
    meta = file.meta_tensors()
    family = with_unet_structure(FAMILIES[detection.family], meta)
    components: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, mapping in key_mappings.items():
        components[mapping.component].update(mapping.to_diffusers(meta[name]))
    with ExitStack() as stack:
        writers = {}
        for component, tensors in components.items():
            path = draft / component / f"{layouts.WEIGHT_FILE_STEMS[component]}{SAFETENSORS_SUFFIX}"
            writers[component] = stack.enter_context(SafetensorsWriter(path, tensors, {"format": "pt"}, dtype))
        for name, tensor in file.iter_tensors():
            if name in key_mappings:
                for part, value in key_mappings[name].to_diffusers(tensor).items():
                    writers[key_mappings[name].component].write(part, value)
    _write_configs(family, detection, draft)
    ignored: dict[str, list[str]] = defaultdict(list)
    for name in sorted(file.tensor_infos.keys() - key_mappings.keys()):
        stray = "a stray number" if meta[name].numel() < 2 else "its moving average is in its place"
        ignored[keys.ignored_reason(name, family) or stray].append(name)
    count = sum(map(len, components.values()))
    return {"layout": "folder", "tensors": count, **asdict(detection), "ignored": dict(ignored)}


def _detect_model(file: SafetensorsFile, options: LoadOptions) -> detect.Detection:
    """The family and prediction of a single file; its U-Net is probed if nothing else tells the prediction."""
    try:
        return detect.detect_model(
            file.meta_tensors(),
            file.metadata,
            lambda: formats.probe_checkpoint(file.path, options),
            family=options.family,
            prediction=options.prediction,
            zero_snr=options.zero_snr,
        )
    except ValueError as error:
        raise ValueError(f"{file.path}: {str(error).removeprefix(f'{file.path}: ')}") from None


def _write_configs(family: ModelFamily, detection: detect.Detection, folder: Path) -> None:
    """Write all of a directory but its weights: configurations, tokenizers, scheduler, index."""
    index: dict[str, Any] = {"_class_name": family.pipeline_class, "_diffusers_version": DIFFUSERS_VERSION}
    for name, config in family.configs.items():
        library, (class_name, *_) = layouts.COMPONENT_CLASSES[name]
        model_class = (
            {"architectures": [class_name], "model_type": "clip_text_model"} if library == "transformers" else {}
        )
        write_json(add_dtype({**config, **model_class}), folder / name / "config.json")
        index[name] = [library, class_name]
    for name, spec in family.text_encoders.items():
        tokenizer = build_clip_tokenizer(spec.pad_token_id)
        save_clip_tokenizer(tokenizer, folder / layouts.TOKENIZER_FOLDERS[name])
        index[layouts.TOKENIZER_FOLDERS[name]] = ["transformers", "CLIPTokenizer"]
    scheduler = family_scheduler_config(family, detection.prediction, detection.zero_snr)
    (folder / "scheduler").mkdir()
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if "text_encoder_2" in family.text_encoders:
        index["force_zeros_for_empty_prompt"] = family.force_zeros_for_empty_prompt
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    write_json(index, folder / layouts.MODEL_INDEX_NAME)


def copy_weights(
    src: Path, draft: Path, dtype: torch.dtype | None = None, unpickle: UnpickleFunction | None = None
) -> dict[str, Any]:
    """Copy a file or directory, its weights as safetensors under their usual names, in `dtype` or their own; report.

    `unpickle(src, dst, dtype)` writes a pickle's tensors and reports, or returns None for what is no pickle; without
    it a pickle is an error.
    """
    if not src.is_dir():
        count, dropped = _copy_weight_file(src, draft, dtype, unpickle)
        return {"layout": "file", "tensors": count, "dropped": {src.name: dropped} if dropped else {}}
    report: dict[str, Any] = {"layout": "folder", "tensors": 0, "dropped": {}, "left_out": {}}
    files = list_source_files(src)
    for file in files:
        name = str(file.relative_to(src))
        new = file.with_name(_safetensors_name(file.name))
        dst = draft / new.relative_to(src)
        dst.parent.mkdir(parents=True, exist_ok=True)
        if new != file and new in files:
            report["left_out"][name] = "it is there as safetensors too"
        elif file.suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
            count, dropped = _copy_weight_file(file, dst, dtype, unpickle)
            report["tensors"] += count
            report["dropped"] |= {name: dropped} if dropped else {}
        elif file.name.endswith(".index.json"):
            index = read_json(file)
            if not isinstance(index.get("weight_map"), dict):
                raise ValueError(f"{file}: no weight_map")
            weight_map = {key: _safetensors_name(str(shard)) for key, shard in index["weight_map"].items()}
            write_json({**index, "weight_map": weight_map}, dst)
        elif file.name == "config.json" and is_text_encoder_config(config := read_json(file)):
            write_json(add_dtype(config), dst)
        elif file.suffix in COPIED_SUFFIXES:
            shutil.copyfile(file, dst)
        else:
            report["left_out"][name] = "neither weights nor a configuration"
    if not report["tensors"]:
        raise ValueError(f"{src}: no weights in it")
    return report


def list_source_files(path: Path) -> list[Path]:
    """A file itself, or all files below a folder that are not hidden."""
    if not path.is_dir():
        return [path]
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _copy_weight_file(
    src: Path, dst: Path, dtype: torch.dtype | None, unpickle: UnpickleFunction | None
) -> tuple[int, list[str]]:
    """Copy one file of weights; the number of tensors, and the names of what was dropped."""
    if unpickle and (report := unpickle(src, dst, dtype)):
        return report["tensors"], report["dropped"]
    file = open_safetensors(src)
    with SafetensorsWriter(dst, file.meta_tensors(), file.metadata, dtype) as writer:
        for name, tensor in file.iter_tensors():
            writer.write(name, tensor)
    return len(file.tensor_infos), []


def _safetensors_name(name: str) -> str:
    """The safetensors name of a file of pickled weights, or of their index; any other name unchanged.

    transformers names weights `pytorch_model` if they are pickled, and `model` otherwise.
    """
    stem, *rest = name.split(".")
    if not any(f".{part}" in PICKLE_SUFFIXES for part in rest):
        return name
    stem = stem.replace("pytorch_model", "model") if stem.startswith("pytorch_model") else stem
    return ".".join([stem, *(SAFETENSORS_SUFFIX[1:] if f".{part}" in PICKLE_SUFFIXES else part for part in rest)])
