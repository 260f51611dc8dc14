"""`ldm convert`: a model in the other layout, or in the same one without pickles or in another dtype.

Tensors stream from file to file: at most one tensor and the parts of one fused tensor are in memory. A single file is
loaded, in bfloat16, only if nothing but its U-Net tells what it predicts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import formats, keys, saving
from ldm.checkpoints.families import FAMILIES, LoadOptions, ModelFamily
from ldm.checkpoints.layouts import read_directory
from ldm.checkpoints.networks import WeightFile
from ldm.checkpoints.schedule import PREDICTION_TYPES
from ldm.checkpoints.tensors import PICKLE_SUFFIXES, SafetensorsWriter
from ldm.convert.family_match import list_omissions, match_family, match_structure
from ldm.convert.unpickle import is_pickle, unpickle_weights
from ldm.files import atomic_write, check_creatable_dir, ensure_writable_dir, read_json

MODELSPEC_ARCHITECTURES = {  # modelspec.architecture
    "sd1": "stable-diffusion-v1",
    "sd1-inpainting": "stable-diffusion-v1-inpainting",
    "sd2-base": "stable-diffusion-v2-512",
    "sd2-v": "stable-diffusion-v2-768-v",
    "sd2-inpainting": "stable-diffusion-v2-inpainting",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-inpainting": "stable-diffusion-xl-v1-inpainting",
}
MODELSPEC_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"  # whose key names the file has
MODELSPEC_PREDICTION_TYPES = {"eps": "epsilon", "v": "v", "x0": "sample"}  # modelspec.prediction_type


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    options: LoadOptions = LoadOptions(),
    *,
    trust: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Write a directory, file or hub id to `dst`, a single file if its name ends in .safetensors, and report.

    A directory becomes a single file in the original (LDM / SGM) layout, a single file a directory of diffusers, and
    what keeps its layout is copied. `trust` opens pickles (see `ldm.convert.unpickle`), `dtype` is that of
    floating-point tensors (None: each its own), `options` tell how to read the source. `dst` must not exist, or be an
    empty folder; it appears whole or not at all. The report lists what was `ignored`, `left_out` and `dropped`.
    ValueError in one line that names the file.
    """
    dst, source = _check_destination(Path(dst).expanduser()), src
    src = formats.locate_weights(src, options)
    ensure_writable_dir(dst.parent)
    same_layout = src.is_dir() != (dst.suffix == saving.SAFETENSORS_SUFFIX)
    variant = None if formats.is_hub_source(source) else options.variant
    if same_layout and replace(options, revision=None, token=None, variant=variant) != LoadOptions():
        raise ValueError(
            f"{dst}: the layout stays the same, so family, prediction, zero_snr, ema and variant do not apply"
        )
    unpickle = _unpickle if trust else None
    with ExitStack() as stack:
        plain, dropped = (src, {}) if same_layout else stack.enter_context(_without_pickles(src, dst, trust))
        draft = stack.enter_context(atomic_write(dst))
        if same_layout:
            report = saving.copy_weights(src, draft, dtype, unpickle)
        elif src.is_dir():
            report = _write_single_file(plain, draft, dst.stem, dtype, options)
        else:
            report = saving.write_directory(plain, draft, dtype, options)
    return {"source": str(source), "destination": str(dst), "dropped": dropped, **report}


def _check_destination(dst: Path) -> Path:
    """Where to write, following a link to an empty folder; ValueError if it exists or cannot be created."""
    if dst.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{dst}: weights are written as .safetensors or as a folder")
    if dst.is_dir() and dst.suffix != saving.SAFETENSORS_SUFFIX and not any(dst.iterdir()):
        return dst.resolve()
    if dst.exists() or dst.is_symlink():
        raise ValueError(f"{dst}: exists already")
    check_creatable_dir(dst.parent)
    return dst


def _unpickle(src: Path, dst: Path, dtype: torch.dtype | None) -> dict[str, Any] | None:
    return unpickle_weights(src, dst, dtype) if is_pickle(src) else None


@contextmanager
def _without_pickles(src: Path, dst: Path, trust: bool) -> Iterator[tuple[Path, Mapping[str, list[str]]]]:
    """The source, or a temporary copy of it beside `dst` without pickles, and what was dropped."""
    if not trust or not any(map(is_pickle, saving.list_source_files(src))):
        yield src, {}
        return
    dst.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as folder:
        copy = Path(folder) / src.name
        dropped = saving.copy_weights(src, copy, None, _unpickle)["dropped"]
        try:
            yield copy, dropped
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), str(src))) from None


def _write_single_file(
    src: Path, draft: Path, title: str, dtype: torch.dtype | None, options: LoadOptions
) -> dict[str, Any]:
    """Write a directory as a single file whose header and marker tensors tell what it predicts."""
    if options.ema:
        raise ValueError(f"{src}: ema does not apply to a folder")
    model = read_directory(src, options)
    scheduler = read_json(src / "scheduler" / "scheduler_config.json")
    prediction = options.prediction or PREDICTION_TYPES[scheduler.get("prediction_type", "epsilon")]
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr")) if options.zero_snr is None else options.zero_snr
    name = match_family(model, scheduler, prediction, src, options.family)
    family = match_structure(FAMILIES[name], model)
    components: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for source in model.weight_files:
        meta = source.file.meta_tensors()
        for key, mapping in source.key_mappings.items():
            components[mapping.component][mapping.original_key] = meta[key]
    markers = _marker_tensors(family, prediction, zero_snr)
    tensors = keys.convert_to_original(components, family) | markers
    metadata = _modelspec_metadata(name, prediction, title, family.resolution)
    converted = _iter_original_tensors(model.weight_files, keys.map_diffusers_keys(components, family))
    with SafetensorsWriter(draft, tensors, metadata, dtype) as writer:
        for key, tensor in chain(markers.items(), converted):
            writer.write(key, tensor)
    detected = {"family": name, "prediction": prediction, "zero_snr": zero_snr}
    left_out = list_omissions(model, family, src)
    return {"layout": "single file", "tensors": len(tensors), **detected, "left_out": left_out}


def _iter_original_tensors(
    sources: Iterable[WeightFile], mappings: Mapping[str, tuple[keys.KeyMapping, str]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a single file from those of a directory, each as soon as its parts are there."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for source in sources:
        for key, tensor in source.file.iter_tensors():
            if mapped := source.key_mappings.get(key):
                mapping, part = mappings[f"{mapped.component}/{mapped.original_key}"]
                parts[mapping.original_key][part] = tensor
                if len(parts[mapping.original_key]) == len(mapping.parts):
                    yield mapping.original_key, mapping.to_original(parts.pop(mapping.original_key))


def _marker_tensors(family: ModelFamily, prediction: str, zero_snr: bool) -> dict[str, Tensor]:
    """The empty tensors that tell ComfyUI and others of a prediction or schedule that is not the family's usual one."""
    usual = PREDICTION_TYPES[family.scheduler["prediction_type"]]
    markers = {"v_pred": prediction == "v" != usual, "ztsnr": zero_snr}
    return {name: torch.zeros(0) for name, present in markers.items() if present}


def _modelspec_metadata(family: str, prediction: str, title: str, resolution: int) -> dict[str, str]:
    """The header by Stability's model spec (sai_model_spec 1.0.0)."""
    architecture = {} if prediction == "x0" else {"modelspec.architecture": MODELSPEC_ARCHITECTURES[family]}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        **architecture,
        "modelspec.implementation": MODELSPEC_IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.prediction_type": MODELSPEC_PREDICTION_TYPES[prediction],
        "modelspec.resolution": f"{resolution}x{resolution}",
    }
