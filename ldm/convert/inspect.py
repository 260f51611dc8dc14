"""`ldm inspect`: what a file or folder of weights is, with the evidence, and what each of its tensors is for.

Only headers are read, but for the hash and for probing the U-Net.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.adapters import lora_loading
from ldm.adapters.lora_keys import BASE_MODEL_VERSIONS, DOWN_FIELDS, detect_lora_format, parse_lora_keys
from ldm.adapters.textual_inversion import has_bundled_embeddings, parse_embedding_keys
from ldm.checkpoints import detect, formats, keys, layouts
from ldm.checkpoints.families import FAMILIES, LoadOptions, ModelFamily
from ldm.checkpoints.hub import PEFT_LORA_NAME
from ldm.checkpoints.schedule import (
    PREDICTION_TYPES,
    family_scheduler_config,
    list_ignored_fields,
    parse_scheduler_config,
)
from ldm.checkpoints.single_file import find_structure_changes, open_single_file, with_unet_structure
from ldm.checkpoints.tensors import SafetensorsFile, TensorInfo, open_safetensors
from ldm.diffusion.prediction import PREDICTIONS
from ldm.files import file_sha256, read_json

SDE_CONFIG_FIELDS = "beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "trained_betas"


def inspect_model(source: str | Path, probe: bool = True, options: LoadOptions = LoadOptions()) -> dict[str, Any]:
    """A JSON report of a model here or on the hub; `format_report` makes text of it.

    `probe` runs the U-Net once to tell what it predicts, which loads the model; without it `prediction` is None if
    the file does not state it. Other files than models are described by their kind. ValueError, in one line that names
    the file, for what cannot be read, and for a single file that contradicts itself.
    """
    path = formats.locate_weights(source, options)
    report = _inspect_folder(path, options) if path.is_dir() else _inspect_file(path)
    if probe and "prediction" in report:
        _probe_prediction(path, report, options)
    return {"source": str(source), **report}


def format_report(report: Mapping[str, Any]) -> str:
    """A report as text without control characters or lone surrogates, which names of tensors may hold."""
    pairs = ((name, line) for key, value in report.items() for name, line in _format_value(key, value))
    lines = (f"{name:14} {line}".rstrip() for name, line in pairs)
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def _format_value(name: str, value: Any) -> Iterable[tuple[str, str]]:
    """A value of a report as names and lines, with the name before the first line only."""
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


def _format_tensor_summary(summary: Mapping[str, Any]) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in summary["dtypes"].items())
    counts = f"{summary['tensors']} tensors, {summary['parameters']:,} parameters"
    return f"{counts}, {summary['bytes'] / 1e6:,.1f} MB ({dtypes})"


def summarize_tensors(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    """The number of tensors, of their values and of their bytes, and the number of tensors by dtype."""
    infos = list(infos)
    return {
        "tensors": len(infos),
        "parameters": sum(torch.Size(info.shape).numel() for info in infos),
        "bytes": sum(info.end - info.start for info in infos),
        "dtypes": dict(Counter(str(info.dtype).removeprefix("torch.") for info in infos)),
    }


def _inspect_file(path: Path) -> dict[str, Any]:
    file, notes = open_single_file(path)
    tensors = file.meta_tensors()
    sha256 = file_sha256(path)
    if kind := detect.unsupported_reason(tensors):
        original = open_safetensors(path)
        content, adapter = summarize_tensors(file.tensor_infos.values()), _inspect_adapter([original])
        if kind == detect.LORA_DESCRIPTION and (reason := lora_loading.find_unsupported_reason(original)):
            kind = f"a LoRA file, {reason}"
        elif kind == detect.LORA_DESCRIPTION and not adapter:
            kind = f"a LoRA whose names are no known tool's, as {next(iter(original.tensor_infos))}"
        return {"format": "safetensors", "kind": kind, **adapter, "content": content, "sha256": sha256}
    try:
        families = detect.detect_families(tensors)
        prediction, evidence = detect.detect_prediction(tensors, file.metadata)
        zero_snr, zero_snr_evidence = detect.detect_zero_snr(tensors, file.metadata, families[0])
        name = detect.select_family(families, prediction)
        changes = find_structure_changes(FAMILIES[name].unet, tensors)
        uses = _classify_keys(file, with_unet_structure(FAMILIES[name], tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = family_scheduler_config(FAMILIES[name], prediction or detect.family_prediction(name), zero_snr)
    return {
        "format": "single file",
        "family": name if prediction or len(families) == 1 else " or ".join(families),
        "prediction": prediction,
        "zero_snr": zero_snr,
        "evidence": [
            detect.describe_family_evidence(tensors, families),
            *evidence,
            zero_snr_evidence,
            *(f"U-Net of another structure: {field} = {value}" for field, value in changes.items()),
            *notes,
        ],
        **_schedule_and_defaults(config, FAMILIES[name].generation_defaults),
        **uses,
        "ema": any(name.startswith(keys.EMA_PREFIX) for name in tensors),
        "sha256": sha256,
    }


def _classify_keys(file: SafetensorsFile, family: ModelFamily) -> dict[str, Any]:
    """What the tensors of a single file are for: those of each network, the ignored, the unknown, the missing."""
    expected = {mapping.original_key: mapping for mapping in keys.build_key_mappings(family)}
    reasons = {name: reason for name in file.tensor_infos if (reason := keys.ignored_reason(name, family))}
    needed = (name for name in file.tensor_infos if name not in reasons)
    names = keys.resolve_key_aliases(needed, keys.SINGLE_FILE_KEY_ALIASES)
    components: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, mapping in expected.items():
        if name in names:
            components[mapping.component].append(file.tensor_infos[names[name]])
    faults = []
    try:
        keys.map_single_file_keys(file.meta_tensors(), family)
    except ValueError as error:
        faults.append(str(error))
    return {
        "components": {component: summarize_tensors(infos) for component, infos in components.items()},
        "ignored": dict(Counter(reasons.values())),
        "unknown": [k for n, k in names.items() if n not in expected and math.prod(file.tensor_infos[k].shape) > 1],
        "missing": sorted({mapping.component for mapping in expected.values()} - components.keys())
        + [name for name, mapping in expected.items() if mapping.component in components and name not in names],
        "faults": faults,
    }


def _inspect_folder(path: Path, options: LoadOptions) -> dict[str, Any]:
    """A folder by its configurations and headers; ValueError unless its tensors are exactly those of its networks."""
    if not (path / layouts.MODEL_INDEX_NAME).exists() and (report := _inspect_component_folder(path)):
        return report
    index, model = layouts.read_model_index(path), layouts.read_directory(path, options)
    config = read_json(path / "scheduler" / "scheduler_config.json") | {"_class_name": index["scheduler"][1]}
    prediction = PREDICTION_TYPES[config.get("prediction_type", "epsilon")]
    stated = {name: config.get(name, "nothing, its default") for name in ("prediction_type", "rescale_betas_zero_snr")}
    files = {str(file.path.relative_to(path)): file for file, _ in model.weight_files}
    num_ignored = sum(name not in mappings for file, mappings in model.weight_files for name in file.tensor_infos)
    return {
        "format": f"folder of {index['_class_name']} ({layouts.MODEL_INDEX_NAME})",
        "family": layouts.find_family_by_unet(model.networks["unet"].config, PREDICTIONS[prediction]),
        "prediction": prediction,
        "zero_snr": bool(config.get("rescale_betas_zero_snr")),
        "evidence": [f"scheduler_config.json: {name} = {value}" for name, value in stated.items()],
        **_schedule_and_defaults(config, model.generation_defaults),
        "classes": {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]},
        "components": {
            name: summarize_tensors(info for file, _ in group for info in file.tensor_infos.values())
            for name, group in zip(model.networks, model.shard_groups, strict=True)
        },
        "files": [*files],
        "ignored": {
            **({"position ids, other parts of CLIP, scales, single numbers": num_ignored} if num_ignored else {}),
            **{f"scheduler_config.json: {note}": 1 for note in list_ignored_fields(config)},
        },
        "unknown": [],
        "missing": [],
        "faults": [],
        "ema": False,
        "sha256": {name: file_sha256(file.path) for name, file in files.items()},
    }


def _inspect_component_folder(path: Path) -> dict[str, Any] | None:
    """A folder of an adapter or an autoencoder; None for another."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "latent_channels" in config and config.get("_class_name", "AutoencoderKL") == "AutoencoderKL":
        files = [source.file for source in layouts.read_component(path, "vae")[1]]
        report: dict[str, Any] = {"format": "folder of AutoencoderKL", "kind": detect.VAE_DESCRIPTION}
    elif lora_loading.list_adapter_files(path):
        files = [open_safetensors(file) for file in lora_loading.find_adapter_files(path)]
        report = {"format": "folder of an adapter", "kind": detect.LORA_DESCRIPTION, **_inspect_adapter(files)}
    else:
        return None
    content = summarize_tensors(info for file in files for info in file.tensor_infos.values())
    hashes = {str(file.path.relative_to(path)): file_sha256(file.path) for file in files}
    return {**report, "content": content, "sha256": hashes}


def _schedule_and_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The noise schedule of a scheduler's configuration, and the default settings of generation."""
    settings = parse_scheduler_config(config)
    return {
        "schedule": {name: config[name] for name in SDE_CONFIG_FIELDS if config.get(name) is not None},
        "defaults": {**settings.generation_defaults, **defaults},
    }


def _inspect_adapter(files: Sequence[SafetensorsFile]) -> dict[str, Any]:
    """The format, kinds, ranks and targets of an adapter's files; nothing for other files."""
    keys = {(file.path, name): key for file in files for name, key in parse_lora_keys(file.tensor_infos).items()}
    if not keys:
        return {}
    infos = {(file.path, name): info for file in files for name, info in file.tensor_infos.items()}
    ranks = Counter(
        infos[at].shape[0] for at, key in keys.items() if key.delta_field in DOWN_FIELDS and infos[at].shape
    )
    version = next(filter(None, map(lora_loading.detect_base_model_version, files)), None)
    folders = {file.path: lora_loading.folder_component(file.path) or "unet" for file in files}
    modules = {(key.component or folders[path], key.module) for (path, _), key in keys.items()}
    fields = {key.delta_field for key in keys.values()}
    kinds = {"DoRA" if name in ("dora_scale", "magnitude") else kind for kind, name in fields}
    names = [name for _, name in infos]
    embeddings = parse_embedding_keys(names) if has_bundled_embeddings(names) else {}
    return {
        "dialect": "peft" if files[0].path.name == PEFT_LORA_NAME else detect_lora_format(name for _, name in keys),
        "family": version and BASE_MODEL_VERSIONS[version].family,
        "kinds": sorted(filter(None, kinds)),
        "rank": [f"{rank} ({count} modules)" for rank, count in sorted(ranks.items())],
        "targets": dict(Counter(component for component, _ in sorted(modules))),
        "embeddings": sorted({token for token, _ in embeddings.values()}),
        "unknown": [name for path, name in infos if (path, name) not in keys and name not in embeddings],
    }


def _probe_prediction(path: Path, report: dict[str, Any], options: LoadOptions) -> None:
    """Probe the U-Net; add the evidence to the report, and what it predicts if nothing stated it."""
    stated = report["prediction"]
    try:
        prediction, evidence = detect.classify_probe(formats.probe_checkpoint(path, options))
    except ValueError as error:
        reason = str(error).removesuffix(detect.PREDICTION_OPTION_HINT) if stated else str(error)
        report["evidence"].append(f"prediction not measured: {reason}")
        return
    contradicted = stated not in (None, prediction)
    report["evidence"].append(f"{evidence}{', contrary to the configuration' if contradicted else ''}")
    report["prediction"] = stated or prediction
    if report["family"] and " or " in report["family"]:
        report["family"] = detect.select_family(report["family"].split(" or "), prediction)
