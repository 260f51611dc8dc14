"""Reads adapter files into changes of a model's modules, and converts them between formats.

The content decides which format a file has. Every tensor in it is used, or is an error.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ldm.adapters.lora import Adapter, ModuleDelta, NetworkDict, find_shape_errors
from ldm.adapters.lora_keys import (
    BASE_MODEL_VERSIONS,
    INPUT_WIDTH_FIELDS,
    DeltaField,
    LoRAKey,
    build_module_aliases,
    detect_lora_format,
    find_unsupported_kind,
    number_modules,
    parse_lora_keys,
)
from ldm.adapters.lora_kinds import ModuleContext, build_delta, find_incomplete_reason
from ldm.adapters.lora_saving import LORA_ADAPTER_METADATA_KEY, save_adapter
from ldm.adapters.textual_inversion import has_bundled_embeddings, parse_embedding_keys
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.hub import LORA_WEIGHT_NAME_SAFE, PEFT_CONFIG_NAME, PEFT_LORA_NAME
from ldm.checkpoints.keys import build_meta_network
from ldm.checkpoints.tensors import SafetensorsFile, open_safetensors
from ldm.errors import choose, list_some, parse_json, warn_of_input
from ldm.files import check_creatable_dir, ensure_writable_dir, file_sha256, read_json

if TYPE_CHECKING:
    from hashlib import _Hash

ADAPTER_COMPONENTS = "unet", "text_encoder", "text_encoder_2"
UNUSED_MODULE = "text_projection"
NUMBER_FIELDS = (None, "alpha"), (None, "scalar"), ("IA3", "on_input")
SDXL_MODULE_PATTERN = (  # no other family has two blocks in a row, or embeds sizes
    r"(attentions|(input|output)_blocks|middle_block)[._].*transformer_blocks[._][1-9]|^(add_embedding|label_emb)(?![a-z])"
)
OTHER_ARCHITECTURE_PATTERN = (  # of what trainers write into the metadata
    "sd3|stable-(cascade|diffusion-3)|flux|chroma|lumina|hunyuan|pixart|auraflow|kolors|qwen|wan|hidream|anima|z-?image"
)
DIFFUSION_TRANSFORMER_PATTERN = (
    r"(double|joint|single_transformer)_blocks"
    r"|^(base_model\.model\.|transformer\.|diffusion_model\.|lora_unet_|lycoris_)*(transformer_)?(blocks|layers)[._]\d"
)


def load_adapter(path: Path, networks: NetworkDict, family: str | None = None) -> Adapter:
    """The adapter in a file, or in a folder of diffusers or peft, for these networks, named after the file.

    `family` is the model's, for the error about an adapter of another. ValueError names the file and up to three
    tensors that are unknown, missing, of another shape or not finite; a pickle is not opened.
    """
    digest = hashlib.sha256()
    files = [open_safetensors(file) for file in find_adapter_files(path)]
    deltas: dict[str, ModuleDelta] = {}
    for file in files:
        try:
            deltas |= _read_deltas(file, networks, digest)
        except ValueError as error:
            raise ValueError(f"{file.path}: {_base_model_mismatch(file, family, networks) or error}") from None
    first = files[0]
    lora_format = "peft" if first.path.name == PEFT_LORA_NAME else detect_lora_format(first.tensor_infos)
    # kohya's `sshs_model_hash`, or the SHA-256 of all that follows the header
    webui_hash = first.metadata.get("sshs_model_hash") or file_sha256(first.path, first.data_offset)
    return Adapter(_default_name(path), deltas, digest.hexdigest(), webui_hash, lora_format, first.metadata)


def _default_name(path: Path) -> str:
    """The name of a folder or the stem of a file; the folder's if a tool gives all its files that name."""
    path = Path(os.path.abspath(path))
    if path.name in (LORA_WEIGHT_NAME_SAFE, PEFT_LORA_NAME):
        path = path.parent
    return path.name if path.is_dir() else path.stem


def convert_adapter(src: Path, dst: Path, lora_format: str, family: str | None = None) -> Adapter:
    """Write an adapter in another format, a row of LORA_FORMATS, and return it.

    kohya's and diffusers' are files, peft's is a folder. `family` is a row of FAMILIES, by default detected from the
    file. ValueError if `dst` exists, and for a change that the format has no keys for.
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
    """The family that an adapter was made for, by its shapes, names or metadata; ValueError if none tells."""
    files = map(open_safetensors, find_adapter_files(path))
    version = next(filter(None, map(detect_base_model_version, files)), None)
    if version is None:
        raise ValueError(f"{path}: does not say which base model it is for: choose a family from {', '.join(FAMILIES)}")
    return BASE_MODEL_VERSIONS[version].family


def build_adaptable_networks(family: str) -> dict[str, nn.Module]:
    """The networks of a family that adapters change, on the meta device."""
    configs = choose(FAMILIES, family, "family").configs
    return {
        component: build_meta_network(component, config) for component, config in configs.items() if component != "vae"
    }


def find_adapter_files(path: Path) -> list[Path]:
    """The file or files of an adapter: itself, or those of a folder."""
    if not path.is_dir():
        return [path]
    files = list_adapter_files(path)
    if len(files) > 1 and any(file.parent == path for file in files):
        raise ValueError(f"{path}: more than one adapter ({', '.join(str(f.relative_to(path)) for f in files)})")
    if not files:
        raise ValueError(f"{path}: no adapter in this folder ({LORA_WEIGHT_NAME_SAFE} or {PEFT_LORA_NAME})")
    return files


def list_adapter_files(folder: Path) -> list[Path]:
    """The files of a folder that are named like diffusers' and peft's adapters."""
    names = LORA_WEIGHT_NAME_SAFE, PEFT_LORA_NAME, *(f"{name}/{PEFT_LORA_NAME}" for name in ADAPTER_COMPONENTS)
    return [folder / name for name in names if (folder / name).is_file()]


def _read_deltas(file: SafetensorsFile, networks: NetworkDict, digest: _Hash) -> dict[str, ModuleDelta]:
    """The changes in a file by target; ValueError lists its faults, those of its keys before a tensor is read."""
    keys = parse_lora_keys(file.tensor_infos)
    groups = _group_keys(file, keys, networks)
    tensors = dict(file.iter_tensors(digest))
    if faults := [f"{name} is not finite" for name, a in tensors.items() if not a.float().isfinite().all()]:
        raise ValueError(list_some(faults))
    deltas: dict[str, ModuleDelta] = {}
    for target, names in groups.items():
        component, path = target.split("/")
        module = keys[next(iter(names.values()))].module
        config = _read_peft_config(file, component)
        fields = {delta_field: tensors[name] for delta_field, name in names.items()}
        if any(0 in tensor.shape for tensor in fields.values()):
            continue
        deltas[target] = build_delta(fields, ModuleContext(networks[component].get_submodule(path), module, config))
    if empty := len(groups) - len(deltas):
        warn_of_input(f"{file.path}: {empty} modules have rank 0, and change nothing")
    if faults := find_shape_errors(deltas, networks):
        raise ValueError(list_some(faults))
    return deltas


def _group_keys(
    file: SafetensorsFile, keys: Mapping[str, LoRAKey], networks: NetworkDict
) -> dict[str, dict[DeltaField, str]]:
    """The names of a file's tensors by target and field; ValueError lists what is unknown or missing."""
    if reason := find_unsupported_reason(file):
        raise ValueError(reason)
    if not keys:
        raise ValueError("not an adapter: no tensor has a LoRA key")
    aliases = {name: build_module_aliases(name, networks[name]) for name in ADAPTER_COMPONENTS if name in networks}
    default = _infer_component(file, keys.values(), aliases)
    groups: dict[str, dict[DeltaField, str]] = {}
    bundled = parse_embedding_keys(file.tensor_infos) if has_bundled_embeddings(file.tensor_infos) else {}
    faults = [f"unknown {name}" for name in file.tensor_infos if name not in keys and name not in bundled]
    faults += _find_numbering_errors(keys.values(), networks)
    unused = {name for name, key in keys.items() if _is_unused(key, aliases)}
    if unused:
        warn_of_input(f"{file.path}: {len(unused)} tensors not used: the model takes no {UNUSED_MODULE}")
    for name, key in keys.items():
        if name in unused:
            continue
        component, info = key.component or default, file.tensor_infos[name]
        if (path := aliases.get(component, {}).get(key.module)) is None:
            faults.append(f"no module for {name}")
        elif key.delta_field in (group := groups.setdefault(f"{component}/{path}", {})):
            faults.append(f"{name} and {group[key.delta_field]} are the same tensor")
        else:
            group[key.delta_field] = name
        is_number = key.delta_field in NUMBER_FIELDS
        if is_number and math.prod(info.shape) != 1:
            faults.append(f"{name} has shape {list(info.shape)}, expected one number")
        elif not is_number and not info.dtype.is_floating_point:
            faults.append(f"{name} has dtype {info.dtype}, expected floating point")
    faults += [f"{target} {why}" for target, group in groups.items() if (why := find_incomplete_reason(group))]
    if faults:
        raise ValueError(list_some(faults))
    return groups


def _find_numbering_errors(keys: Iterable[LoRAKey], networks: NetworkDict) -> list[str]:
    """Why modules that a file numbers are not all those that its tool numbers, which their order depends on."""
    given = Counter(component for component, module in {key[:2] for key in keys} if component and module.isdigit())
    expected = {name: len(number_modules(name, networks[name])) for name in given if name in networks}
    faults = ((name, count, expected.get(name, 0)) for name, count in given.items())
    return [f"numbers {n} modules of the {name}, expected {wanted}" for name, n, wanted in faults if n != wanted]


def _is_unused(key: LoRAKey, aliases: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether a change is one of a pooled vector's projection in a text encoder whose pooled vector nothing takes."""
    own = aliases.get(key.component or "", {})
    return key.component == "text_encoder" and key.module == UNUSED_MODULE and key.module not in own


def folder_component(path: Path) -> str | None:
    """The network that the folder of peft's file is named after."""
    return path.parent.name if path.name == PEFT_LORA_NAME and path.parent.name in ADAPTER_COMPONENTS else None


def _infer_component(file: SafetensorsFile, keys: Iterable[LoRAKey], aliases: Mapping[str, Mapping[str, str]]) -> str:
    """The network of the keys that do not name one: by the name of the folder, or the only one with all the modules."""
    if component := folder_component(file.path):
        return component
    modules = {key.module for key in keys if key.component is None}
    matches = [component for component, names in aliases.items() if modules <= names.keys()]
    if modules and len(matches) > 1:
        raise ValueError(f"its keys fit {' and '.join(matches)}: put it in a folder of that name, as {PEFT_LORA_NAME}")
    return matches[0] if matches else "unet"


def _read_peft_config(file: SafetensorsFile, component: str) -> Mapping[str, Any]:
    """peft's configuration of a network: in the header, as diffusers writes it, or beside peft's own file."""
    if file.path.name == PEFT_LORA_NAME and (path := file.path.with_name(PEFT_CONFIG_NAME)).is_file():
        return read_json(path)
    what = f"{LORA_ADAPTER_METADATA_KEY} of its header"
    settings = parse_json(file.metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"), what)
    if not isinstance(settings, dict):
        raise ValueError(f"{what}: not a JSON object")
    prefix = f"{component}."
    return {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}


def detect_base_model_version(file: SafetensorsFile) -> str | None:
    """The row of BASE_MODEL_VERSIONS that a file was made for: by the text width, the names, or the metadata."""
    if find_unsupported_reason(file):
        return None
    if width := _read_text_width(file):
        return next((name for name, v in BASE_MODEL_VERSIONS.items() if v.cross_attention_dim == width), None)
    keys = parse_lora_keys(file.tensor_infos).values()
    if any(key.component == "text_encoder_2" or re.search(SDXL_MODULE_PATTERN, key.module) for key in keys):
        return "sdxl"
    texts = _read_base_model_names(file)
    matches = (name for name, v in BASE_MODEL_VERSIONS.items() if any(t.startswith(v.metadata_prefixes) for t in texts))
    return next(matches, None)


def find_unsupported_reason(file: SafetensorsFile) -> str | None:
    """Why no model here takes an adapter, by its names; None for others."""
    if any(re.search(DIFFUSION_TRANSFORMER_PATTERN, name) for name in file.tensor_infos):
        return "made for a transformer (SD 3, Flux, ...), which is not supported"
    kind = find_unsupported_kind(file.tensor_infos)
    return kind and f"an adapter of kind {kind}, which is not supported"


def _read_text_width(file: SafetensorsFile) -> int | None:
    """The width of the text that a file's cross-attention takes; None if no tensor tells."""
    keys = parse_lora_keys(file.tensor_infos).items()
    widths = (
        file.tensor_infos[name].shape[1]
        for name, key in keys
        if _reads_text(key) and key.delta_field in INPUT_WIDTH_FIELDS
        if len(file.tensor_infos[name].shape) > 1
    )
    return next(widths, None)


def _reads_text(key: LoRAKey) -> bool:
    """Whether a module's input is the text: to_k and to_v of attn2, of which the seventh number is one."""
    is_numbered = key.component == "unet" and key.module == "6"
    return is_numbered or ("attn2" in key.module and key.module.endswith(("to_k", "to_v")))


def _read_base_model_names(file: SafetensorsFile) -> list[str]:
    """The base model in kohya's and in ModelSpec's words."""
    texts = (file.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture"))
    return [text for text in texts if text]


def _base_model_mismatch(file: SafetensorsFile, family: str | None, networks: NetworkDict) -> str:
    """The error about an adapter for another base model; empty if it is for this one."""
    made, own = detect_base_model_version(file), _version_of_networks(family, networks)
    width, own_width = _read_text_width(file), _text_width(networks)
    if made is not None and made != own:
        base = BASE_MODEL_VERSIONS[made].name
    elif made is None and width not in (None, own_width):
        base = f"a model whose text is {width} wide"
    elif others := [text for text in _read_base_model_names(file) if re.match(OTHER_ARCHITECTURE_PATTERN, text)]:
        base = others[0]
    else:
        return ""
    return f"made for {base}: this model is {BASE_MODEL_VERSIONS[own].name if own else f'one of {own_width} wide text'}"


def _text_width(networks: NetworkDict) -> int | None:
    return getattr(getattr(networks.get("unet"), "config", None), "cross_attention_dim", None)


def _version_of_networks(family: str | None, networks: NetworkDict) -> str | None:
    """The row of BASE_MODEL_VERSIONS of a family, or else of the U-Net's text width."""
    if family is not None and (version := family.split("-")[0]) in BASE_MODEL_VERSIONS:
        return version
    width = _text_width(networks)
    return next((name for name, v in BASE_MODEL_VERSIONS.items() if v.cross_attention_dim == width), None)
