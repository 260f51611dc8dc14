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

from ldm.checkpoints.dialects import KOHYA_ENDS, NEEDS, Networks, Part, Place, dialect, place, spellings
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.files import parse_json, read_json, sha256
from ldm.checkpoints.lora_save import DIFFUSERS_CONFIG, DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE, save_adapter
from ldm.checkpoints.networks import skeleton
from ldm.checkpoints.tensors import TensorFile, open_tensors
from ldm.diffusion.spacing import choose
from ldm.files import creatable, writable
from ldm.nn.lora import Adapter, Delta, LoHa, LoKr, LoRA, listed, misfits

if TYPE_CHECKING:
    from hashlib import _Hash

FOLDERS = "unet", "text_encoder", "text_encoder_2"
ALPHA, BIAS, UP_BIAS, DORA_SCALE, MAGNITUDE = (
    (None, name) for name in ("alpha", "bias", "up_bias", "dora_scale", "magnitude")
)
CONTEXT = (LoRA, "down"), (LoHa, "w1_b")  # [rank, in]
TRANSFORMERS = "double_blocks", "joint_blocks", "transformer.transformer_blocks", "single_transformer_blocks"


class Line(NamedTuple):
    """A line of Stable Diffusion: its name, the family that stands for it, its text's width, its marks in metadata."""

    name: str
    family: str
    width: int
    marks: tuple[str, ...]


LINES = {  # by the beginning of a family's name
    "sd1": Line("SD 1.x", "sd1", 768, ("sd_v1", "stable-diffusion-v1")),
    "sd2": Line("SD 2.x", "sd2-base", 1024, ("sd_v2", "stable-diffusion-v2")),
    "sdxl": Line("SDXL", "sdxl", 2048, ("sdxl_", "stable-diffusion-xl")),
}


def open_adapter(path: Path, networks: Networks, family: str | None = None) -> Adapter:
    """The adapter in a file, or in a folder of diffusers or peft, for these networks; its name is the file's.

    `family` is the model's, for the error of an adapter of another. ValueError names the file and, three at most, what
    is unknown, missing, of another shape or not a number; a pickle is not opened.
    """
    digest = hashlib.sha256()
    opened = [open_tensors(file) for file in files(path)]
    targets: dict[str, Delta] = {}
    for file in opened:
        try:
            targets |= _read(file, networks, digest)
        except ValueError as error:
            raise ValueError(f"{file.path}: {_stranger(file, family)}{error}") from None
    spoken = "peft" if opened[0].path.name == PEFT_FILE else dialect(opened[0].slots)
    return Adapter(name_of(path), targets, digest.hexdigest(), web_hash(opened[0]), spoken, opened[0].metadata)


def web_hash(file: TensorFile) -> str:
    """What the web UI knows an adapter by: kohya's `sshs_model_hash`, or the SHA-256 of all behind the header."""
    return file.metadata.get("sshs_model_hash") or sha256(file.path, file.offset)


def name_of(path: Path) -> str:
    """A folder's name or a file's stem; the folder's too where the file has the name that a tool gives to all."""
    path = Path(os.path.abspath(path))
    if path.name in (DIFFUSERS_FILE, PEFT_FILE):
        path = path.parent
    return path.name if path.is_dir() else path.stem


def convert_adapter(src: Path, dst: Path, to: str, family: str | None = None) -> Adapter:
    """Write an adapter in another dialect, a row of DIALECTS, and return what was read.

    kohya's and diffusers' are files, peft's is a folder. `family` is a row of FAMILIES; where it is None, the file must
    tell what it was made for. ValueError where `dst` exists, and for what the dialect has no names for.
    """
    if dst.exists():
        raise ValueError(f"{dst}: exists already")
    creatable(dst.parent)
    family = family or made_for(src)
    networks = skeletons(family)
    adapter = open_adapter(src, networks, family)
    writable(dst.parent)
    save_adapter(adapter, dst, to, networks, family)
    return adapter


def made_for(path: Path) -> str:
    """The family that an adapter was made for, by its shapes, names or metadata; ValueError where none tells."""
    lines = [line for file in files(path) if (line := _line(open_tensors(file)))]
    if not lines:
        raise ValueError(f"{path}: does not tell what it was made for: choose a family from {', '.join(FAMILIES)}")
    return LINES[lines[0]].family


def skeletons(family: str) -> dict[str, nn.Module]:
    """The networks that adapters change, on the meta device."""
    configs = choose(FAMILIES, family, "family").configs
    return {folder: skeleton(folder, config) for folder, config in configs.items() if folder != "vae"}


def files(path: Path) -> list[Path]:
    """The file or files of an adapter: itself, or those of a folder."""
    if not path.is_dir():
        return [path]
    found = in_folder(path)
    if len(found) > 1 and any(file.parent == path for file in found):
        raise ValueError(f"{path}: more than one adapter ({', '.join(str(f.relative_to(path)) for f in found)})")
    if not found:
        raise ValueError(f"{path}: no adapter in this folder ({DIFFUSERS_FILE} or {PEFT_FILE})")
    return found


def in_folder(path: Path) -> list[Path]:
    """The files of a folder that have the names of diffusers' and peft's adapters."""
    names = DIFFUSERS_FILE, PEFT_FILE, *(f"{folder}/{PEFT_FILE}" for folder in FOLDERS)
    return [path / name for name in names if (path / name).is_file()]


def _read(file: TensorFile, networks: Networks, digest: _Hash) -> dict[str, Delta]:
    """The changes in a file, by target; ValueError lists its faults, those of names and shapes before it is read."""
    parts = _sorted(file, networks)
    values = dict(file.read(digest))
    if wrong := [f"{name} is not finite" for name, a in values.items() if not a.float().isfinite().all()]:
        raise ValueError(listed(wrong))
    targets: dict[str, Delta] = {}
    for target, names in parts.items():
        folder, path = target.split("/")
        given = {part: values[name] for part, name in names.items()}
        spelled = cast(Place, place(next(iter(names.values())))).module
        weight = cast(Tensor, networks[folder].get_submodule(path).weight)
        targets[target] = _delta(given, weight.ndim, _Said(_settings(file, folder), spelled))
    if wrong := misfits(targets, networks):
        raise ValueError(listed(wrong))
    return targets


def _sorted(file: TensorFile, networks: Networks) -> dict[str, dict[Part, str]]:
    """The names of a file's tensors by target and part; ValueError where one is not known or missing."""
    spelled = {folder: spellings(folder, networks[folder]) for folder in FOLDERS if folder in networks}
    places = {name: at for name in file.slots if (at := place(name))}
    if not places:
        raise ValueError("not an adapter: no tensor has the name of one")
    home = _home(file, places.values(), spelled)
    found: dict[str, dict[Part, str]] = {}
    faults = [f"unknown {name}" for name in file.slots if name not in places]
    for name, at in places.items():
        folder = at.folder or home
        if (path := spelled.get(folder, {}).get(at.module)) is None:
            faults.append(f"no module for {name}")
        elif at.part in (parts := found.setdefault(f"{folder}/{path}", {})):
            faults.append(f"{name} and {parts[at.part]} are one")
        else:
            parts[at.part] = name
        if at.part == ALPHA and math.prod(file.slots[name].shape) != 1:
            faults.append(f"{name} has shape {list(file.slots[name].shape)}, expected one number")
        elif at.part != ALPHA and not file.slots[name].dtype.is_floating_point:
            faults.append(f"{name} has dtype {file.slots[name].dtype}, real numbers are needed")
    faults += [f"{target} {why}" for target, parts in found.items() if (why := _incomplete(parts))]
    if faults:
        raise ValueError(listed(faults))
    return found


def _home(file: TensorFile, places: Iterable[Place], spelled: Mapping[str, Mapping[str, str]]) -> str:
    """The network of names that do not say it: the folder's, or the only one that has them all."""
    if file.path.name == PEFT_FILE and file.path.parent.name in FOLDERS:
        return file.path.parent.name
    modules = {at.module for at in places if at.folder is None}
    homes = [folder for folder, names in spelled.items() if modules <= names.keys()]
    if modules and len(homes) > 1:
        raise ValueError(f"its names fit {' and '.join(homes)}: put it in a folder of that name, as {PEFT_FILE}")
    return homes[0] if homes else "unet"


def _incomplete(parts: Mapping[Part, Any]) -> str | None:
    """What a change lacks, or has too much of."""
    kinds = {kind for kind, _ in parts if kind}
    if len(kinds) > 1:
        return f"is given as {' and '.join(sorted(kind.__name__ for kind in kinds))}"
    if not kinds:
        return None if parts.keys() <= {BIAS} else "has no factors"
    kind = kinds.pop()
    lacking = [name for name in NEEDS[kind] if not {(kind, name), (kind, name[:2])} & parts.keys()]  # w1 for w1_a
    return f"lacks {' and '.join(KOHYA_ENDS[kind, name][1:] for name in lacking)}" if lacking else None


class _Said(NamedTuple):
    """What a configuration of peft says of one module."""

    settings: Mapping[str, Any]
    module: str

    def number(self, names: Sequence[str], pattern: str) -> float | None:
        """A field, or the entry of `pattern` for the end of the module's path; ValueError for what is no number."""
        own = self.settings.get(pattern) or {}
        if not isinstance(own, dict):
            raise ValueError(f"{pattern} {own!r}: must be an object")
        ends = (value for key, value in own.items() if f".{self.module}".endswith(f".{key.removeprefix('^')}"))
        value = next(ends, next((self.settings[name] for name in names if name in self.settings), None))
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ValueError(f"{names[0]} {value!r}: must be a positive number")
        return value

    def alpha(self, rank: int | None) -> float | None:
        """alpha; of rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) such that alpha / rank is its alpha / sqrt(rank)."""
        alpha = self.number(("lora_alpha", "alpha"), "alpha_pattern")
        return alpha * math.sqrt(rank) if alpha and rank and self.settings.get("use_rslora") else alpha


def _settings(file: TensorFile, folder: str) -> Mapping[str, Any]:
    """peft's configuration of a network: in the header, as diffusers writes it, or beside peft's own file."""
    if file.path.name == PEFT_FILE and (beside := file.path.with_name(PEFT_CONFIG)).is_file():
        return read_json(beside)
    try:
        values = parse_json(file.metadata.get(DIFFUSERS_CONFIG, "{}"))
    except ValueError as error:
        raise ValueError(f"{DIFFUSERS_CONFIG} of its header: {error}") from None
    return {name.removeprefix(f"{folder}."): a for name, a in values.items() if name.startswith(f"{folder}.")}


def _delta(parts: Mapping[Part, Tensor], ndim: int, said: _Said) -> Delta:
    """The change of a module whose weight has `ndim` dimensions."""
    kind = next((kind for kind, _ in parts if kind), None)
    factors: Any = kind and kind(**{name: a for (of, name), a in parts.items() if of})
    alpha = float(parts[ALPHA]) if ALPHA in parts else said.alpha(factors.rank if factors else None)
    if isinstance(factors, LoKr) and factors.rank is None and (r := said.number(("r",), "rank_pattern")):
        factors = replace(
            factors, w1=cast(Tensor, factors.w1).float() * ((alpha or r) / r)
        )  # peft's alpha always means
    delta = Delta(factors, alpha, _magnitude(parts, ndim), parts.get(BIAS))
    return replace(delta, bias=delta.scale * parts[UP_BIAS].float()) if UP_BIAS in parts else delta


def _magnitude(parts: Mapping[Part, Tensor], ndim: int) -> Tensor | None:
    """DoRA's magnitude, one for each output; in LyCORIS' older files, by its shape, for each input."""
    if MAGNITUDE in parts:
        return parts[MAGNITUDE].reshape(-1, *(ndim - 1) * [1])
    if (m := parts.get(DORA_SCALE)) is None:
        return None
    inputs = m.ndim > 1 and len(m) == 1 != m.numel()
    return m.reshape(*([1] if inputs else []), -1, *(ndim - 1 - inputs) * [1])


def _line(file: TensorFile) -> str | None:
    """For which of LINES a file was made: by the width of its text, by its names, by its metadata."""
    for name, slot in file.slots.items():
        at = place(name)
        if at and "attn2" in at.module and at.module.endswith(("to_k", "to_v")) and at.part in CONTEXT:
            return next((line for line, known in LINES.items() if known.width == slot.shape[1]), None)
    if any(at.folder == "text_encoder_2" for name in file.slots if (at := place(name))):
        return "sdxl"
    said = [file.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")]
    marked = (line for line, known in LINES.items() for mark in said if mark.startswith(known.marks))
    return next(marked, None)


def _stranger(file: TensorFile, family: str | None) -> str:
    """Begins the error of an adapter for another family, or is empty."""
    if any(mark in name for name in file.slots for mark in TRANSFORMERS):
        return "made for a transformer (SD 3, Flux), which is not supported: "
    made, own = _line(file), family and family.split("-")[0]
    if made is None or own not in LINES or made == own:
        return ""
    return f"made for {LINES[made].name}: this model is {LINES[own].name}: "
