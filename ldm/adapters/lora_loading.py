"""Adapters as files: read into changes of the modules of the model at hand, and converted to another dialect.

What a file is, its content decides. Everything in it is used, or is an error.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor, nn

from ldm.adapters.lora import Adapter, LoHa, LoKr, LoRA, ModuleDelta, find_shape_errors, summarize_faults
from ldm.adapters.lora_keys import (
    KOHYA_KEY_SUFFIXES,
    REQUIRED_FACTORS,
    DeltaField,
    LoRAKey,
    NetworkDict,
    build_module_aliases,
    detect_lora_format,
    parse_lora_key,
)
from ldm.adapters.lora_saving import LORA_ADAPTER_METADATA_KEY, save_adapter
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.hub import LORA_WEIGHT_NAME_SAFE, PEFT_CONFIG_NAME, PEFT_LORA_NAME
from ldm.checkpoints.networks import build_meta_network
from ldm.checkpoints.tensors import SafetensorsFile, open_safetensors
from ldm.errors import choose, parse_json
from ldm.files import check_creatable_dir, ensure_writable_dir, file_sha256, read_json

if TYPE_CHECKING:
    from hashlib import _Hash


ADAPTER_COMPONENTS = "unet", "text_encoder", "text_encoder_2"
ALPHA_FIELD, BIAS_FIELD, UP_BIAS_FIELD, DORA_SCALE_FIELD, MAGNITUDE_FIELD = (
    (None, name) for name in ("alpha", "bias", "up_bias", "dora_scale", "magnitude")
)
DOWN_FIELDS = (LoRA, "down"), (LoHa, "w1_b")  # [rank, in]
DIFFUSION_TRANSFORMER_KEYS = (
    "double_blocks",
    "joint_blocks",
    "transformer.transformer_blocks",
    "single_transformer_blocks",
)


class BaseModelVersion(NamedTuple):
    """A line of Stable Diffusion: its name, the family that stands for it, its text's width, its marks in metadata."""

    name: str
    family: str
    cross_attention_dim: int
    metadata_prefixes: tuple[str, ...]


BASE_MODEL_VERSIONS = {  # by the beginning of a family's name
    "sd1": BaseModelVersion("SD 1.x", "sd1", 768, ("sd_v1", "stable-diffusion-v1")),
    "sd2": BaseModelVersion("SD 2.x", "sd2-base", 1024, ("sd_v2", "stable-diffusion-v2")),
    "sdxl": BaseModelVersion("SDXL", "sdxl", 2048, ("sdxl_", "stable-diffusion-xl")),
}


def load_adapter(path: Path, networks: NetworkDict, family: str | None = None) -> Adapter:
    """The adapter in a file, or in a folder of diffusers or peft, for these networks; its name is the file's.

    `family` is the model's, for the error of an adapter of another. ValueError names the file and, three at most, what
    is unknown, missing, of another shape or not a number; a pickle is not opened.
    """
    digest = hashlib.sha256()
    opened = [open_safetensors(file) for file in find_adapter_files(path)]
    targets: dict[str, ModuleDelta] = {}
    for file in opened:
        try:
            targets |= _read_deltas(file, networks, digest)
        except ValueError as error:
            raise ValueError(f"{file.path}: {_base_model_mismatch(file, family)}{error}") from None
    spoken = "peft" if opened[0].path.name == PEFT_LORA_NAME else detect_lora_format(opened[0].tensor_infos)
    return Adapter(
        default_adapter_name(path),
        targets,
        digest.hexdigest(),
        compute_webui_hash(opened[0]),
        spoken,
        opened[0].metadata,
    )


def compute_webui_hash(file: SafetensorsFile) -> str:
    """What the web UI knows an adapter by: kohya's `sshs_model_hash`, or the SHA-256 of all behind the header."""
    return file.metadata.get("sshs_model_hash") or file_sha256(file.path, file.data_offset)


def default_adapter_name(path: Path) -> str:
    """A folder's name or a file's stem; the folder's too where the file has the name that a tool gives to all."""
    path = Path(os.path.abspath(path))
    if path.name in (LORA_WEIGHT_NAME_SAFE, PEFT_LORA_NAME):
        path = path.parent
    return path.name if path.is_dir() else path.stem


def convert_adapter(src: Path, dst: Path, lora_format: str, family: str | None = None) -> Adapter:
    """Write an adapter in another dialect, a row of DIALECTS, and return what was read.

    kohya's and diffusers' are files, peft's is a folder. `family` is a row of FAMILIES; where it is None, the file must
    tell what it was made for. ValueError where `dst` exists, and for what the dialect has no names for.
    """
    if dst.exists():
        raise ValueError(f"{dst}: exists already")
    check_creatable_dir(dst.parent)
    family = family or detect_adapter_family(src)
    networks = build_adaptable_networks(family)
    adapter = load_adapter(src, networks, family)
    ensure_writable_dir(dst.parent)
    save_adapter(adapter, dst, lora_format, networks, family)
    return adapter


def detect_adapter_family(path: Path) -> str:
    """The family that an adapter was made for, by its shapes, names or metadata; ValueError where none tells."""
    lines = [line for file in find_adapter_files(path) if (line := _detect_base_model_version(open_safetensors(file)))]
    if not lines:
        raise ValueError(f"{path}: does not tell what it was made for: choose a family from {', '.join(FAMILIES)}")
    return BASE_MODEL_VERSIONS[lines[0]].family


def build_adaptable_networks(family: str) -> dict[str, nn.Module]:
    """The networks that adapters change, on the meta device."""
    configs = choose(FAMILIES, family, "family").configs
    return {folder: build_meta_network(folder, config) for folder, config in configs.items() if folder != "vae"}


def find_adapter_files(path: Path) -> list[Path]:
    """The file or files of an adapter: itself, or those of a folder."""
    if not path.is_dir():
        return [path]
    found = list_adapter_files(path)
    if len(found) > 1 and any(file.parent == path for file in found):
        raise ValueError(f"{path}: more than one adapter ({', '.join(str(f.relative_to(path)) for f in found)})")
    if not found:
        raise ValueError(f"{path}: no adapter in this folder ({LORA_WEIGHT_NAME_SAFE} or {PEFT_LORA_NAME})")
    return found


def list_adapter_files(path: Path) -> list[Path]:
    """The files of a folder that have the names of diffusers' and peft's adapters."""
    names = LORA_WEIGHT_NAME_SAFE, PEFT_LORA_NAME, *(f"{folder}/{PEFT_LORA_NAME}" for folder in ADAPTER_COMPONENTS)
    return [path / name for name in names if (path / name).is_file()]


def _read_deltas(file: SafetensorsFile, networks: NetworkDict, digest: _Hash) -> dict[str, ModuleDelta]:
    """The changes in a file, by target; ValueError lists its faults, those of names and shapes before it is read."""
    parts = _group_keys(file, networks)
    values = dict(file.iter_tensors(digest))
    if wrong := [f"{name} is not finite" for name, a in values.items() if not a.float().isfinite().all()]:
        raise ValueError(summarize_faults(wrong))
    targets: dict[str, ModuleDelta] = {}
    for target, names in parts.items():
        folder, path = target.split("/")
        given = {part: values[name] for part, name in names.items()}
        spelled = cast(LoRAKey, parse_lora_key(next(iter(names.values())))).module
        weight = cast(Tensor, networks[folder].get_submodule(path).weight)
        targets[target] = _build_delta(given, weight.ndim, _PeftModuleConfig(_read_peft_config(file, folder), spelled))
    if wrong := find_shape_errors(targets, networks):
        raise ValueError(summarize_faults(wrong))
    return targets


def _group_keys(file: SafetensorsFile, networks: NetworkDict) -> dict[str, dict[DeltaField, str]]:
    """The names of a file's tensors by target and part; ValueError where one is not known or missing."""
    spelled = {
        folder: build_module_aliases(folder, networks[folder]) for folder in ADAPTER_COMPONENTS if folder in networks
    }
    places = {name: at for name in file.tensor_infos if (at := parse_lora_key(name))}
    if not places:
        raise ValueError("not an adapter: no tensor has the name of one")
    home = _infer_component(file, places.values(), spelled)
    found: dict[str, dict[DeltaField, str]] = {}
    faults = [f"unknown {name}" for name in file.tensor_infos if name not in places]
    for name, at in places.items():
        folder = at.component or home
        if (path := spelled.get(folder, {}).get(at.module)) is None:
            faults.append(f"no module for {name}")
        elif at.delta_field in (parts := found.setdefault(f"{folder}/{path}", {})):
            faults.append(f"{name} and {parts[at.delta_field]} are one")
        else:
            parts[at.delta_field] = name
        if at.delta_field == ALPHA_FIELD and math.prod(file.tensor_infos[name].shape) != 1:
            faults.append(f"{name} has shape {list(file.tensor_infos[name].shape)}, expected one number")
        elif at.delta_field != ALPHA_FIELD and not file.tensor_infos[name].dtype.is_floating_point:
            faults.append(f"{name} has dtype {file.tensor_infos[name].dtype}, real numbers are needed")
    faults += [f"{target} {why}" for target, parts in found.items() if (why := _incomplete_reason(parts))]
    if faults:
        raise ValueError(summarize_faults(faults))
    return found


def _infer_component(file: SafetensorsFile, keys: Iterable[LoRAKey], aliases: Mapping[str, Mapping[str, str]]) -> str:
    """The network of names that do not say it: the folder's, or the only one that has them all."""
    if file.path.name == PEFT_LORA_NAME and file.path.parent.name in ADAPTER_COMPONENTS:
        return file.path.parent.name
    modules = {at.module for at in keys if at.component is None}
    homes = [folder for folder, names in aliases.items() if modules <= names.keys()]
    if modules and len(homes) > 1:
        raise ValueError(f"its names fit {' and '.join(homes)}: put it in a folder of that name, as {PEFT_LORA_NAME}")
    return homes[0] if homes else "unet"


def _incomplete_reason(parts: Mapping[DeltaField, Any]) -> str | None:
    """What a change lacks, or has too much of."""
    kinds = {kind for kind, _ in parts if kind}
    if len(kinds) > 1:
        return f"is given as {' and '.join(sorted(kind.__name__ for kind in kinds))}"
    if not kinds:
        return None if parts.keys() <= {BIAS_FIELD} else "has no factors"
    kind = kinds.pop()
    lacking = [
        name for name in REQUIRED_FACTORS[kind] if not {(kind, name), (kind, name[:2])} & parts.keys()
    ]  # w1 for w1_a
    return f"lacks {' and '.join(KOHYA_KEY_SUFFIXES[kind, name][1:] for name in lacking)}" if lacking else None


class _PeftModuleConfig(NamedTuple):
    """What a configuration of peft says of one module."""

    settings: Mapping[str, Any]
    module: str

    def get_number(self, names: Sequence[str], pattern: str) -> float | None:
        """A field, or the entry of `pattern` for the end of the module's path; ValueError for what is no number."""
        own = self.settings.get(pattern) or {}
        if not isinstance(own, dict):
            raise ValueError(f"{pattern} {own!r}: must be an object")
        ends = (value for key, value in own.items() if f".{self.module}".endswith(f".{key.removeprefix('^')}"))
        value = next(ends, next((self.settings[name] for name in names if name in self.settings), None))
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ValueError(f"{names[0]} {value!r}: must be a positive number")
        return value

    def get_alpha(self, rank: int | None) -> float | None:
        """alpha; of rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) such that alpha / rank is its alpha / sqrt(rank)."""
        alpha = self.get_number(("lora_alpha", "alpha"), "alpha_pattern")
        return alpha * math.sqrt(rank) if alpha and rank and self.settings.get("use_rslora") else alpha


def _read_peft_config(file: SafetensorsFile, folder: str) -> Mapping[str, Any]:
    """peft's configuration of a network: in the header, as diffusers writes it, or beside peft's own file."""
    if file.path.name == PEFT_LORA_NAME and (beside := file.path.with_name(PEFT_CONFIG_NAME)).is_file():
        return read_json(beside)
    values = parse_json(
        file.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"), f"{LORA_ADAPTER_METADATA_KEY} of its header"
    )
    if not isinstance(values, dict):
        raise ValueError(f"{LORA_ADAPTER_METADATA_KEY} of its header: not a JSON object")
    return {name.removeprefix(f"{folder}."): a for name, a in values.items() if name.startswith(f"{folder}.")}


def _build_delta(parts: Mapping[DeltaField, Tensor], ndim: int, config: _PeftModuleConfig) -> ModuleDelta:
    """The change of a module whose weight has `ndim` dimensions."""
    kind = next((kind for kind, _ in parts if kind), None)
    factors: Any = kind and kind(**{name: a for (of, name), a in parts.items() if of})
    alpha = float(parts[ALPHA_FIELD]) if ALPHA_FIELD in parts else config.get_alpha(factors.rank if factors else None)
    if isinstance(factors, LoKr) and factors.rank is None and (r := config.get_number(("r",), "rank_pattern")):
        factors = replace(
            factors, w1=cast(Tensor, factors.w1).float() * ((alpha or r) / r)
        )  # peft's alpha always means
    delta = ModuleDelta(factors, alpha, _reshape_dora_magnitude(parts, ndim), parts.get(BIAS_FIELD))
    return replace(delta, bias=delta.scale * parts[UP_BIAS_FIELD].float()) if UP_BIAS_FIELD in parts else delta


def _reshape_dora_magnitude(parts: Mapping[DeltaField, Tensor], ndim: int) -> Tensor | None:
    """DoRA's magnitude, one for each output; in LyCORIS' older files, by its shape, for each input."""
    if MAGNITUDE_FIELD in parts:
        return parts[MAGNITUDE_FIELD].reshape(-1, *(ndim - 1) * [1])
    if (m := parts.get(DORA_SCALE_FIELD)) is None:
        return None
    inputs = m.ndim > 1 and len(m) == 1 != m.numel()
    return m.reshape(*([1] if inputs else []), -1, *(ndim - 1 - inputs) * [1])


def _detect_base_model_version(file: SafetensorsFile) -> str | None:
    """For which of LINES a file was made: by the width of its text, by its names, by its metadata."""
    for name, slot in file.tensor_infos.items():
        at = parse_lora_key(name)
        if at and "attn2" in at.module and at.module.endswith(("to_k", "to_v")) and at.delta_field in DOWN_FIELDS:
            return next(
                (line for line, known in BASE_MODEL_VERSIONS.items() if known.cross_attention_dim == slot.shape[1]),
                None,
            )
    if any(at.component == "text_encoder_2" for name in file.tensor_infos if (at := parse_lora_key(name))):
        return "sdxl"
    said = [file.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")]
    marked = (
        line for line, known in BASE_MODEL_VERSIONS.items() for mark in said if mark.startswith(known.metadata_prefixes)
    )
    return next(marked, None)


def _base_model_mismatch(file: SafetensorsFile, family: str | None) -> str:
    """Begins the error of an adapter for another family, or is empty."""
    if any(mark in name for name in file.tensor_infos for mark in DIFFUSION_TRANSFORMER_KEYS):
        return "made for a transformer (SD 3, Flux), which is not supported: "
    made, own = _detect_base_model_version(file), family and family.split("-")[0]
    if made is None or own not in BASE_MODEL_VERSIONS or made == own:
        return ""
    return f"made for {BASE_MODEL_VERSIONS[made].name}: this model is {BASE_MODEL_VERSIONS[own].name}: "
