"""`ldm convert`: a model from one layout to the other, or the same layout without pickles or in another dtype.

Tensors stream from file to file: in memory there are one of them and the parts of one fused tensor. Only where nothing
tells what the U-Net of a single file predicts, the model is loaded once, in bfloat16, and asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import detect, formats, keys
from ldm.checkpoints.families import FAMILIES, LoadOptions, ModelFamily
from ldm.checkpoints.layouts import (
    COMPONENT_CLASSES,
    MODEL_INDEX_NAME,
    TOKENIZER_FOLDERS,
    WEIGHT_FILE_STEMS,
    family_scheduler_config,
    read_directory,
    read_single_file,
)
from ldm.checkpoints.networks import WeightFile
from ldm.checkpoints.schedule import PREDICTION_TYPES
from ldm.checkpoints.tensors import SafetensorsFile, SafetensorsWriter
from ldm.convert.family_match import list_omissions, match_family
from ldm.convert.rewrite import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX, list_source_files, rewrite_weights
from ldm.convert.unpickle import is_pickle
from ldm.files import atomic_write, check_creatable_dir, ensure_writable_dir, read_json, write_json
from ldm.nn import text_encoders

MODELSPEC_ARCHITECTURES = {  # modelspec.architecture
    "sd1": "stable-diffusion-v1",
    "sd1-inpainting": "stable-diffusion-v1-inpainting",
    "sd2-base": "stable-diffusion-v2-512",
    "sd2-v": "stable-diffusion-v2-768-v",
    "sd2-inpainting": "stable-diffusion-v2-inpainting",
    "sdxl": "stable-diffusion-xl-v1-base",
}
MODELSPEC_IMPLEMENTATION = (
    "https://github.com/Stability-AI/generative-models"  # whose names the file has, as kohya's scripts say
)
MODELSPEC_PREDICTION_TYPES = {"eps": "epsilon", "v": "v", "x0": "sample"}  # modelspec.prediction_type
DIFFUSERS_VERSION = "0.42.1"  # whose layout it is; its inpainting asks
ConversionReport = dict[str, Any]


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    options: LoadOptions = LoadOptions(),
    *,
    trust: bool = False,
    dtype: torch.dtype | None = None,
) -> ConversionReport:
    """A folder, file or hub id as `dst`, a single file if its name ends in .safetensors, else a folder; a report.

    A folder becomes a single file in its makers' layout, a single file a folder in diffusers', and what would stay as
    it is is written again. `trust` opens pickles (see `ldm.checkpoints.unpickle`), `dtype` is that of the real numbers,
    None each tensor's own; `options` are how the source is read. `dst` must not exist, or be an empty folder; it appears whole or not at all. The report lists what was `ignored_reason`, `left_out` and
    `should_drop_caption`. ValueError in one line that names the file.
    """
    dst, given = _check_destination(Path(dst).expanduser()), src
    src = formats.locate_weights(src, options)
    ensure_writable_dir(dst.parent)
    same = src.is_dir() != (dst.suffix == SAFETENSORS_SUFFIX)
    unused = replace(
        options, revision=None, token=None, variant=None if formats.is_hub_source(given) else options.variant
    )
    if same and unused != LoadOptions():
        raise ValueError(
            f"{dst}: the layout stays the same, so family, prediction, zero_snr, ema and variant do not apply"
        )
    with ExitStack() as stack:
        plain, dropped = (src, {}) if same else stack.enter_context(_without_pickles(src, dst, trust))
        draft = stack.enter_context(atomic_write(dst))
        if same:
            report = rewrite_weights(src, draft, dtype, trust)
        elif src.is_dir():
            report = _write_single_file(plain, draft, dst.stem, dtype, options)
        else:
            report = _write_directory(plain, draft, dtype, options)
    return {"source": str(given), "destination": str(dst), "dropped": dropped, **report}


def _check_destination(dst: Path) -> Path:
    """Where to write, a link to an empty folder followed; ValueError where there is something, or nothing can be."""
    if dst.suffix in PICKLE_SUFFIXES:
        raise ValueError(f"{dst}: weights are written as .safetensors or as a folder")
    if dst.is_dir() and dst.suffix != SAFETENSORS_SUFFIX and not any(dst.iterdir()):
        return dst.resolve()
    if dst.exists() or dst.is_symlink():
        raise ValueError(f"{dst}: there is something of that name")
    check_creatable_dir(dst.parent)
    return dst


@contextmanager
def _without_pickles(src: Path, dst: Path, trust: bool) -> Iterator[tuple[Path, Mapping[str, list[str]]]]:
    """The source without pickles, and what was dropped: itself, or a copy beside `dst` for as long as it takes."""
    if not trust or not any(map(is_pickle, list_source_files(src))):
        yield src, {}
        return
    dst.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as folder:
        copy = Path(folder) / src.name
        dropped = rewrite_weights(src, copy, None, trust)["dropped"]
        try:
            yield copy, dropped
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), str(src))) from None


def _write_directory(src: Path, draft: Path, dtype: torch.dtype | None, options: LoadOptions) -> ConversionReport:
    """A single file as a folder that diffusers and we read."""
    ((source,),) = read_single_file(src, options).shard_groups
    file, entries = source
    if not any(entry.component == "vae" for entry in entries.values()):
        raise ValueError(f"{src}: no vae in it, without which a folder is no model")
    verdict = _detect_model(file, options)
    record, meta = FAMILIES[verdict.family], file.meta_tensors()
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, entry in entries.items():
        parts[entry.component].update(entry.to_diffusers(meta[name]))
    with ExitStack() as stack:
        writers = {}
        for folder, tensors in parts.items():
            path = draft / folder / f"{WEIGHT_FILE_STEMS[folder]}{SAFETENSORS_SUFFIX}"
            writers[folder] = stack.enter_context(SafetensorsWriter(path, tensors, {"format": "pt"}, dtype))
        for name, tensor in file.iter_tensors():
            if name in entries:
                for part, value in entries[name].to_diffusers(tensor).items():
                    writers[entries[name].component].write(part, value)
    _write_configs(record, verdict, draft)
    ignored: dict[str, list[str]] = defaultdict(list)
    for name in sorted(file.tensor_infos.keys() - entries.keys()):
        ignored[keys.ignored_reason(name, record) or "its moving average is in its place"].append(name)
    count = sum(map(len, parts.values()))
    return {"layout": "folder", "tensors": count, **asdict(verdict), "ignored": dict(ignored)}


def _detect_model(file: SafetensorsFile, options: LoadOptions) -> detect.Detection:
    """What a single file is; its U-Net is asked if need be."""

    def probe() -> detect.ProbeResult:
        # any prediction will do: the U-Net is the same
        known = LoadOptions(family=options.family, prediction="eps", zero_snr=False, ema=options.ema)
        model = formats.load_checkpoint(file.path, formats.CPU_DEVICE, torch.bfloat16, known)
        return formats.probe_unet(model.unet, model.text_encoders, model.sde)

    said: dict[str, Any] = {name: getattr(options, name) for name in ("family", "prediction", "zero_snr")}
    try:
        return detect.detect_model(file.meta_tensors(), file.metadata, probe, **said)
    except ValueError as error:
        raise ValueError(f"{file.path}: {str(error).removeprefix(f'{file.path}: ')}") from None


def _write_configs(family: ModelFamily, verdict: detect.Detection, folder: Path) -> None:
    """Write all of a directory but its weights: configurations, tokenizers, schedule, index."""
    index: dict[str, Any] = {"_class_name": family.pipeline_class, "_diffusers_version": DIFFUSERS_VERSION}
    for name, config in family.configs.items():
        library, (kind, *_) = COMPONENT_CLASSES[name]
        marks = {"architectures": [kind], "model_type": "clip_text_model"} if library == "transformers" else {}
        write_json({**config, **marks}, folder / name / "config.json")
        index[name] = [library, kind]
    for name, tower in family.text_encoders.items():
        text_encoders.save_clip_tokenizer(
            text_encoders.build_clip_tokenizer(tower.pad_token_id), folder / TOKENIZER_FOLDERS[name]
        )
        index[TOKENIZER_FOLDERS[name]] = ["transformers", "CLIPTokenizer"]
    scheduler = family_scheduler_config(family, verdict.prediction, verdict.zero_snr)
    (folder / "scheduler").mkdir()
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if "text_encoder_2" in family.text_encoders:
        index["force_zeros_for_empty_prompt"] = family.force_zeros_for_empty_prompt
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    write_json(index, folder / MODEL_INDEX_NAME)


def _write_single_file(
    src: Path, draft: Path, title: str, dtype: torch.dtype | None, options: LoadOptions
) -> ConversionReport:
    """A folder as a single file, which says what it predicts, so that nobody has to guess."""
    if options.ema:
        raise ValueError(f"{src}: ema does not apply to a folder")
    model = read_directory(src, options)
    scheduler = read_json(src / "scheduler" / "scheduler_config.json")
    kind = options.prediction or PREDICTION_TYPES[scheduler.get("prediction_type", "epsilon")]
    zero = bool(scheduler.get("rescale_betas_zero_snr")) if options.zero_snr is None else options.zero_snr
    name = match_family(model, scheduler, kind, src, options.family)
    record = FAMILIES[name]
    sources = [source for group in model.shard_groups for source in group]
    components: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for source in sources:
        meta = source.file.meta_tensors()
        for given, entry in source.key_mappings.items():
            components[entry.component][entry.original_key] = meta[given]
    marks = _marker_tensors(record, kind, zero)
    tensors = keys.convert_to_original(components, record) | marks
    with SafetensorsWriter(draft, tensors, _modelspec_metadata(name, kind, title, record.resolution), dtype) as writer:
        for single, tensor in chain(
            marks.items(), _iter_original_tensors(sources, keys.map_diffusers_keys(components, record))
        ):
            writer.write(single, tensor)
    said = {"family": name, "prediction": kind, "zero_snr": zero}
    return {"layout": "single file", "tensors": len(tensors), **said, "left_out": list_omissions(model, record, src)}


def _iter_original_tensors(
    sources: Iterable[WeightFile], mappings: Mapping[str, tuple[keys.KeyMapping, str]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a single file from those of a directory, each as soon as its parts are there."""
    waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for source in sources:
        for given, tensor in source.file.iter_tensors():
            if known := source.key_mappings.get(given):
                entry, part = mappings[f"{known.component}/{known.original_key}"]
                waiting[entry.original_key][part] = tensor
                if len(waiting[entry.original_key]) == len(entry.parts):
                    yield entry.original_key, entry.to_original(waiting.pop(entry.original_key))


def _marker_tensors(family: ModelFamily, prediction: str, zero_snr: bool) -> dict[str, Tensor]:
    """The empty tensors by which ComfyUI and others know what a family's network does not always do."""
    usual = PREDICTION_TYPES[family.scheduler["prediction_type"]]
    said = {"v_pred": prediction == "v" != usual, "ztsnr": zero_snr}
    return {name: torch.zeros(0) for name, true in said.items() if true}


def _modelspec_metadata(family: str, prediction: str, title: str, size: int) -> dict[str, str]:
    """The header by Stability's model spec (sai_model_spec 1.0.0)."""
    architecture = {} if prediction == "x0" else {"modelspec.architecture": MODELSPEC_ARCHITECTURES[family]}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        **architecture,
        "modelspec.implementation": MODELSPEC_IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.prediction_type": MODELSPEC_PREDICTION_TYPES[prediction],
        "modelspec.resolution": f"{size}x{size}",
    }
