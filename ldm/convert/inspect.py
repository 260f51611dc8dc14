"""What a file or folder of weights is, with the evidence, and what each of its tensors is for.

Headers alone are read, but for the hash and for the one question to the U-Net.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.adapters import lora_loading
from ldm.adapters.lora_keys import DOWN_FIELDS, detect_lora_format, parse_lora_keys
from ldm.checkpoints import detect, formats, keys
from ldm.checkpoints.families import FAMILIES, LoadOptions, ModelFamily
from ldm.checkpoints.layouts import (
    MODEL_INDEX_NAME,
    family_scheduler_config,
    find_family_by_unet,
    read_component,
    read_directory,
    read_model_index,
)
from ldm.checkpoints.schedule import PREDICTION_TYPES, parse_scheduler_config
from ldm.checkpoints.tensors import SafetensorsFile, TensorInfo, open_safetensors
from ldm.diffusion.prediction import PREDICTIONS
from ldm.files import file_sha256, read_json

PROBE_DEVICE = torch.device("cpu")
SDE_CONFIG_FIELDS = (  # fields of a scheduler's configuration that make its SDE
    "beta_schedule",
    "beta_start",
    "beta_end",
    "num_train_timesteps",
    "trained_betas",
)


def inspect_model(source: str | Path, probe: bool = True, options: LoadOptions = LoadOptions()) -> dict[str, Any]:
    """What a model on this machine or the hub is, as values of JSON; `format_report` has them for people.

    `probe_network` asks the U-Net what it predicts, which loads the model; without it, a file that does not say it has
    `prediction` None. What is no model is described by its kind. ValueError, in one line that names the file, for what
    cannot be read, and for a single file that contradicts itself.
    """
    path = formats.locate_weights(source, options)
    found = _inspect_folder(path, options) if path.is_dir() else _inspect_file(path)
    if probe and "prediction" in found:
        _probe_prediction(path, found, options)
    return {"source": str(source), **found}


def format_report(report: Mapping[str, Any]) -> str:
    """A report in lines."""
    return "\n".join(
        escape_unprintable(f"{name:14} {line}".rstrip())
        for name, value in report.items()
        for name, line in _format_value(name, value)
    )


def escape_unprintable(line: str) -> str:
    """A line without control characters and halves of characters, which names of tensors may hold."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _format_value(name: str, value: Any) -> Iterable[tuple[str, str]]:
    """A value of a report as names and lines, the name said once."""
    lines: list[str]
    match value:
        case {"tensors": _}:
            lines = [_format_tensor_summary(value)]
        case dict() if all(isinstance(part, dict) for part in value.values()):
            lines = [f"{key:15} {_format_tensor_summary(part)}" for key, part in value.items()]
        case dict():
            lines = [f"{key}: {part}" for key, part in value.items()]
        case list():
            lines = [str(part) for part in value]
        case None:
            lines = ["not known"]
        case bool():
            lines = ["yes" if value else "no"]
        case _:
            lines = [str(value)]
    return ((name if k == 0 else "", line) for k, line in enumerate(lines))


def _format_tensor_summary(part: Mapping[str, Any]) -> str:
    """Tensors in a line."""
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in part["dtypes"].items())
    return f"{part['tensors']} tensors, {part['parameters']:,} parameters, {part['bytes'] / 1e6:,.1f} MB ({kinds})"


def summarize_tensors(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    """How much tensors are."""
    some = list(infos)
    return {
        "tensors": len(some),
        "parameters": sum(torch.Size(slot.shape).numel() for slot in some),
        "bytes": sum(slot.end - slot.start for slot in some),
        "dtypes": dict(Counter(str(slot.dtype).removeprefix("torch.") for slot in some)),
    }


def _inspect_file(path: Path) -> dict[str, Any]:
    """A file by its header."""
    file = open_safetensors(path)
    tensors = file.meta_tensors()
    hashed = {"sha256": file_sha256(path)}
    if other := detect.unsupported_reason(tensors):
        return {
            "format": "safetensors",
            "kind": other,
            **_inspect_adapter(file),
            "content": summarize_tensors(file.tensor_infos.values()),
            **hashed,
        }
    try:
        fitting = detect.detect_families(tensors)
        prediction, said = detect.detect_prediction(tensors, file.metadata)
        zero, why = detect.detect_zero_snr(tensors, file.metadata, fitting[0])
        name = detect.select_family(fitting, prediction)
        uses = _classify_keys(file, FAMILIES[name])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = family_scheduler_config(FAMILIES[name], prediction or detect.family_prediction(name), zero)
    return {
        "format": "single file",
        "family": name if prediction or len(fitting) == 1 else " or ".join(fitting),
        "prediction": prediction,
        "zero_snr": zero,
        "evidence": [detect.describe_family_evidence(tensors, fitting), *said, why],
        **_schedule_and_defaults(config, **FAMILIES[name].generation_defaults),
        **uses,
        "ema": any(name.startswith(keys.EMA_PREFIX) for name in tensors),
        **hashed,
    }


def _classify_keys(file: SafetensorsFile, family: ModelFamily) -> dict[str, Any]:
    """What the tensors of a single file are for: those of each network, the superfluous, the unknown, the missing."""
    wanted = {entry.original_key: entry for entry in keys.build_key_mappings(family)}
    reasons = {name: reason for name in file.tensor_infos if (reason := keys.ignored_reason(name, family))}
    names = keys.resolve_key_aliases(
        (name for name in file.tensor_infos if name not in reasons), keys.SINGLE_FILE_KEY_ALIASES
    )
    folders: dict[str, list[TensorInfo]] = {}
    for name, entry in wanted.items():
        if name in names:
            folders.setdefault(entry.component, []).append(file.tensor_infos[names[name]])
    return {
        "components": {folder: summarize_tensors(slots) for folder, slots in folders.items()},
        "ignored": dict(Counter(reasons.values())),
        "unknown": [given for name, given in names.items() if name not in wanted],
        "missing": sorted({e.component for e in wanted.values()} - folders.keys())
        + [name for name, entry in wanted.items() if entry.component in folders and name not in names],
        "faults": _find_faults(file, family),
    }


def _find_faults(file: SafetensorsFile, family: ModelFamily) -> list[str]:
    """Why a single file is not a whole model of its family, in a line."""
    try:
        keys.map_single_file_keys(file.meta_tensors(), family)
    except ValueError as error:
        return [str(error)]
    return []


def _inspect_folder(path: Path, options: LoadOptions) -> dict[str, Any]:
    """A folder by its configurations and headers; its tensors are compared with its networks, strictly."""
    if not (path / MODEL_INDEX_NAME).exists() and (part := _inspect_component_folder(path)):
        return part
    index, model = read_model_index(path), read_directory(path, options)
    config = read_json(path / "scheduler" / "scheduler_config.json") | {"_class_name": index["scheduler"][1]}
    prediction = PREDICTION_TYPES[config.get("prediction_type", "epsilon")]
    zero = bool(config.get("rescale_betas_zero_snr"))
    groups = dict(zip(model.networks, model.shard_groups, strict=True))
    left = [
        n
        for group in model.shard_groups
        for source in group
        for n in source.file.tensor_infos
        if n not in source.key_mappings
    ]
    said = {name: config.get(name, "nothing, its default") for name in ("prediction_type", "rescale_betas_zero_snr")}
    return {
        "format": f"folder of {index['_class_name']} ({MODEL_INDEX_NAME})",
        "family": find_family_by_unet(model.networks["unet"].config, PREDICTIONS[prediction]),
        "prediction": prediction,
        "zero_snr": zero,
        "evidence": [f"scheduler_config.json: {name} = {value}" for name, value in said.items()],
        **_schedule_and_defaults(config, **model.generation_defaults),
        "classes": {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]},
        "components": {
            name: summarize_tensors(slot for source in group for slot in source.file.tensor_infos.values())
            for name, group in groups.items()
        },
        "files": [str(source.file.path.relative_to(path)) for group in model.shard_groups for source in group],
        "ignored": {"position ids, the numbers 0 to 76": len(left)} if left else {},
        "unknown": [],
        "missing": [],
        "faults": [],
        "ema": False,
        "sha256": {
            str(s.file.path.relative_to(path)): file_sha256(s.file.path) for group in model.shard_groups for s in group
        },
    }


def _inspect_component_folder(path: Path) -> dict[str, Any] | None:
    """A folder of an adapter or an autoencoder; None for another."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "latent_channels" in config and config.get("_class_name", "AutoencoderKL") == "AutoencoderKL":
        files = [source.file for source in read_component(path, "vae")[1]]
        kind: dict[str, Any] = {"format": "folder of AutoencoderKL", "kind": detect.VAE_DESCRIPTION}
    elif lora_loading.list_adapter_files(path):
        files = [open_safetensors(file) for file in lora_loading.find_adapter_files(path)]
        kind = {"format": "folder of an adapter", "kind": detect.LORA_DESCRIPTION, **_inspect_adapter(files[0])}
    else:
        return None
    content = summarize_tensors(slot for file in files for slot in file.tensor_infos.values())
    return {**kind, "content": content, "sha256": {str(f.path.relative_to(path)): file_sha256(f.path) for f in files}}


def _schedule_and_defaults(config: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """The schedule of a scheduler's configuration, and how its makers draw."""
    own = parse_scheduler_config(config)
    return {
        "schedule": {name: config[name] for name in SDE_CONFIG_FIELDS if config.get(name) is not None},
        "defaults": {"sampler": own.sampler, "spacing": own.spacing, **defaults},
    }


def _inspect_adapter(file: SafetensorsFile) -> dict[str, Any]:
    """The dialect, kinds, ranks and targets of an adapter's file; nothing of another."""
    places = parse_lora_keys(file.tensor_infos)
    if not places:
        return {}
    ranks = Counter(file.tensor_infos[name].shape[0] for name, at in places.items() if at.delta_field in DOWN_FIELDS)
    try:
        family = lora_loading.detect_adapter_family(file.path)
    except ValueError:
        family = None
    modules = {(at.component or "unet", at.module) for at in places.values()}
    return {
        "dialect": detect_lora_format(places),
        "family": family,
        "kinds": sorted({at.delta_field[0].__name__ for at in places.values() if at.delta_field[0]}),
        "rank": [f"{rank} ({count} modules)" for rank, count in sorted(ranks.items())],
        "targets": dict(Counter(folder for folder, _ in sorted(modules))),
        "unknown": [name for name in file.tensor_infos if name not in places],
    }


def _probe_prediction(path: Path, found: dict[str, Any], options: LoadOptions) -> None:
    """Ask the U-Net; write into the report what it predicts where nothing said so, and the evidence."""
    try:
        # a prediction is given, so that `load_checkpoint` does not probe
        known = options if path.is_dir() else LoadOptions(prediction="eps", zero_snr=False)
        model = formats.load_checkpoint(path, PROBE_DEVICE, torch.bfloat16, known)
        kind, line = detect.classify_probe(formats.probe_unet(model.unet, model.text_encoders, model.sde))
    except ValueError as error:
        why = str(error).removesuffix(detect.PREDICTION_OPTION_HINT) if found["prediction"] else str(error)
        found["evidence"].append(f"prediction not measured: {why}")
        return
    against = found["prediction"] not in (None, kind)
    found["evidence"].append(f"{line}{', against what is said' if against else ''}")
    found["prediction"] = found["prediction"] or kind
    if found["family"] and " or " in found["family"]:
        found["family"] = detect.select_family(found["family"].split(" or "), kind)
