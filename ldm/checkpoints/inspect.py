"""What a file or folder of weights is, with the evidence, and what each of its tensors is for.

Headers alone are read, but for the hash and for the one question to the U-Net.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints import detect, formats, keys, lora
from ldm.checkpoints.dialects import dialect, place
from ldm.checkpoints.directory import INDEX, component, family_of, read_directory, read_index
from ldm.checkpoints.families import FAMILIES, Family
from ldm.checkpoints.files import read_json, sha256
from ldm.checkpoints.schedule import PREDICTION_TYPES, schedule_of
from ldm.checkpoints.single import scheduler_config
from ldm.checkpoints.tensors import Slot, TensorFile, open_tensors
from ldm.diffusion.prediction import PREDICTIONS

CPU = torch.device("cpu")
SCHEDULE = (  # fields of a scheduler's configuration that make its SDE
    "beta_schedule",
    "beta_start",
    "beta_end",
    "num_train_timesteps",
    "trained_betas",
)


def report(
    source: str | Path, probe: bool = True, revision: str | None = None, variant: str | None = None
) -> dict[str, Any]:
    """What a model on this machine or the hub is, as values of JSON; `table` has them for people.

    `probe` asks the U-Net what it predicts, which loads the model; without it, a file that does not say it has
    `prediction` None. What is no model is described by its kind. ValueError, in one line that names the file, for what
    cannot be read, and for a single file that contradicts itself.
    """
    path = formats.locate(source, revision, None, variant)
    found = _folder(path, variant) if path.is_dir() else _file(path)
    if probe and "prediction" in found:
        _measure(path, found, variant)
    return {"source": str(source), **found}


def table(report: Mapping[str, Any]) -> str:
    """A report in lines."""
    return "\n".join(
        escaped(f"{name:14} {line}".rstrip()) for name, value in report.items() for name, line in _lines(name, value)
    )


def escaped(line: str) -> str:
    """A line without control characters and halves of characters, which names of tensors may hold."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _lines(name: str, value: Any) -> Iterable[tuple[str, str]]:
    """A value of a report as names and lines, the name said once."""
    lines: list[str]
    match value:
        case {"tensors": _}:
            lines = [_sized(value)]
        case dict() if all(isinstance(part, dict) for part in value.values()):
            lines = [f"{key:15} {_sized(part)}" for key, part in value.items()]
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


def _sized(part: Mapping[str, Any]) -> str:
    """Tensors in a line."""
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in part["dtypes"].items())
    return f"{part['tensors']} tensors, {part['parameters']:,} parameters, {part['bytes'] / 1e6:,.1f} MB ({kinds})"


def size(slots: Iterable[Slot]) -> dict[str, Any]:
    """How much tensors are."""
    some = list(slots)
    return {
        "tensors": len(some),
        "parameters": sum(torch.Size(slot.shape).numel() for slot in some),
        "bytes": sum(slot.end - slot.start for slot in some),
        "dtypes": dict(Counter(str(slot.dtype).removeprefix("torch.") for slot in some)),
    }


def _file(path: Path) -> dict[str, Any]:
    """A file by its header."""
    file = open_tensors(path)
    tensors = file.meta()
    hashed = {"sha256": sha256(path)}
    if other := detect.stranger(tensors):
        return {
            "format": "safetensors",
            "kind": other,
            **_adapter(file),
            "content": size(file.slots.values()),
            **hashed,
        }
    try:
        fitting = detect.families_of(tensors)
        prediction, said = detect.told(tensors, file.metadata)
        zero, why = detect.ends_in_zero(tensors, file.metadata, fitting[0])
        name = detect.predicting(fitting, prediction)
        uses = _uses(file, FAMILIES[name])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = scheduler_config(FAMILIES[name], prediction or detect.usual(name), zero)
    return {
        "format": "single file",
        "family": name if prediction or len(fitting) == 1 else " or ".join(fitting),
        "prediction": prediction,
        "zero_snr": zero,
        "evidence": [detect.of_shapes(tensors, fitting), *said, why],
        **_drawn(config, **FAMILIES[name].defaults),
        **uses,
        "ema": any(name.startswith(keys.EMA_PREFIX) for name in tensors),
        **hashed,
    }


def _uses(file: TensorFile, family: Family) -> dict[str, Any]:
    """What the tensors of a single file are for: those of each network, the superfluous, the unknown, the missing."""
    wanted = {entry.single: entry for entry in keys.layout(family)}
    reasons = {name: reason for name in file.slots if (reason := keys.ignored(name, family))}
    names = keys.canonical((name for name in file.slots if name not in reasons), keys.SINGLE_ALIASES)
    folders: dict[str, list[Slot]] = {}
    for name, entry in wanted.items():
        if name in names:
            folders.setdefault(entry.folder, []).append(file.slots[names[name]])
    return {
        "components": {folder: size(slots) for folder, slots in folders.items()},
        "ignored": dict(Counter(reasons.values())),
        "unknown": [given for name, given in names.items() if name not in wanted],
        "missing": sorted({e.folder for e in wanted.values()} - folders.keys())
        + [name for name, entry in wanted.items() if entry.folder in folders and name not in names],
        "faults": _faults(file, family),
    }


def _faults(file: TensorFile, family: Family) -> list[str]:
    """Why a single file is not a whole model of its family, in a line."""
    try:
        keys.plan(file.meta(), family)
    except ValueError as error:
        return [str(error)]
    return []


def _folder(path: Path, variant: str | None = None) -> dict[str, Any]:
    """A folder by its configurations and headers; its tensors are compared with its networks, strictly."""
    if not (path / INDEX).exists() and (part := _part(path)):
        return part
    index, model = read_index(path), read_directory(path, variant)
    config = read_json(path / "scheduler" / "scheduler_config.json") | {"_class_name": index["scheduler"][1]}
    prediction = PREDICTION_TYPES[config.get("prediction_type", "epsilon")]
    zero = bool(config.get("rescale_betas_zero_snr"))
    groups = dict(zip(model.networks, model.groups, strict=True))
    left = [n for group in model.groups for source in group for n in source.file.slots if n not in source.entries]
    said = {name: config.get(name, "nothing, its default") for name in ("prediction_type", "rescale_betas_zero_snr")}
    return {
        "format": f"folder of {index['_class_name']} ({INDEX})",
        "family": family_of(model.networks["unet"].config, PREDICTIONS[prediction]),
        "prediction": prediction,
        "zero_snr": zero,
        "evidence": [f"scheduler_config.json: {name} = {value}" for name, value in said.items()],
        **_drawn(config, **model.defaults),
        "classes": {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]},
        "components": {
            name: size(slot for source in group for slot in source.file.slots.values())
            for name, group in groups.items()
        },
        "files": [str(source.file.path.relative_to(path)) for group in model.groups for source in group],
        "ignored": {"position ids, the numbers 0 to 76": len(left)} if left else {},
        "unknown": [],
        "missing": [],
        "faults": [],
        "ema": False,
        "sha256": {str(s.file.path.relative_to(path)): sha256(s.file.path) for group in model.groups for s in group},
    }


def _part(path: Path) -> dict[str, Any] | None:
    """A folder of an adapter or an autoencoder; None for another."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if "latent_channels" in config and config.get("_class_name", "AutoencoderKL") == "AutoencoderKL":
        files = [source.file for source in component(path, "vae")[1]]
        kind: dict[str, Any] = {"format": "folder of AutoencoderKL", "kind": detect.VAE}
    elif lora.in_folder(path):
        files = [open_tensors(file) for file in lora.files(path)]
        kind = {"format": "folder of an adapter", "kind": detect.LORA, **_adapter(files[0])}
    else:
        return None
    content = size(slot for file in files for slot in file.slots.values())
    return {**kind, "content": content, "sha256": {str(f.path.relative_to(path)): sha256(f.path) for f in files}}


def _drawn(config: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """The schedule of a scheduler's configuration, and how its makers draw."""
    own = schedule_of(config)
    return {
        "schedule": {name: config[name] for name in SCHEDULE if config.get(name) is not None},
        "defaults": {"sampler": own.sampler, "spacing": own.spacing, **defaults},
    }


def _adapter(file: TensorFile) -> dict[str, Any]:
    """The dialect, kinds, ranks and targets of an adapter's file; nothing of another."""
    places = {name: at for name in file.slots if (at := place(name))}
    if not places:
        return {}
    ranks = Counter(file.slots[name].shape[0] for name, at in places.items() if at.part in lora.CONTEXT)
    try:
        family = lora.made_for(file.path)
    except ValueError:
        family = None
    modules = {(at.folder or "unet", at.module) for at in places.values()}
    return {
        "dialect": dialect(places),
        "family": family,
        "kinds": sorted({at.part[0].__name__ for at in places.values() if at.part[0]}),
        "rank": [f"{rank} ({count} modules)" for rank, count in sorted(ranks.items())],
        "targets": dict(Counter(folder for folder, _ in sorted(modules))),
        "unknown": [name for name in file.slots if name not in places],
    }


def _measure(path: Path, found: dict[str, Any], variant: str | None) -> None:
    """Ask the U-Net; write into the report what it predicts where nothing said so, and the evidence."""
    try:
        # said, so that `load` does not ask
        options: dict[str, Any] = {"variant": variant} if path.is_dir() else {"prediction": "eps", "zero_snr": False}
        model = formats.load(path, CPU, torch.bfloat16, **options)
        kind, line = detect.judged(formats.asked(model.unet, model.towers, model.sde))
    except ValueError as error:
        why = str(error).removesuffix(detect.ADVICE) if found["prediction"] else str(error)
        found["evidence"].append(f"prediction not measured: {why}")
        return
    against = found["prediction"] not in (None, kind)
    found["evidence"].append(f"{line}{', against what is said' if against else ''}")
    found["prediction"] = found["prediction"] or kind
    if found["family"] and " or " in found["family"]:
        found["family"] = detect.predicting(found["family"].split(" or "), kind)
