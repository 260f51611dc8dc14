"""`ldm convert`: a model from one layout to the other, or the same layout without pickles or in another dtype.

Tensors stream from file to file: in memory there are one of them and the parts of one fused tensor. Only where nothing
tells what the U-Net of a single file predicts, the model is loaded once, in bfloat16, and asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints import detect, formats, keys
from ldm.checkpoints.directory import CLASSES, INDEX, TOKENIZERS, WEIGHTS, read_directory
from ldm.checkpoints.families import FAMILIES, Family
from ldm.checkpoints.files import read_json, write_json
from ldm.checkpoints.likeness import chosen_family, unsaid
from ldm.checkpoints.networks import Source
from ldm.checkpoints.rewrite import PICKLES, SAFETENSORS, files, rewrite
from ldm.checkpoints.schedule import PREDICTION_TYPES
from ldm.checkpoints.single import read_single, scheduler_config
from ldm.checkpoints.tensors import TensorFile
from ldm.checkpoints.unpickle import is_pickle
from ldm.checkpoints.writer import TensorWriter
from ldm.files import creatable, publish, writable
from ldm.nn import text

ARCHITECTURES = {  # modelspec.architecture
    "sd1": "stable-diffusion-v1",
    "sd1-inpainting": "stable-diffusion-v1-inpainting",
    "sd2-base": "stable-diffusion-v2-512",
    "sd2-v": "stable-diffusion-v2-768-v",
    "sd2-inpainting": "stable-diffusion-v2-inpainting",
    "sdxl": "stable-diffusion-xl-v1-base",
}
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"  # whose names the file has, as kohya's scripts say
SPEC_PREDICTIONS = {"eps": "epsilon", "v": "v", "x0": "sample"}  # modelspec.prediction_type
DIFFUSERS_VERSION = "0.42.1"  # whose layout it is; its inpainting asks
Report = dict[str, Any]


class Asked(NamedTuple):
    """What the user says of a model, None where the model shall say it itself."""

    family: str | None = None
    prediction: str | None = None
    zero_snr: bool | None = None
    ema: bool = False


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    trust: bool = False,
    family: str | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Report:
    """A folder, file or hub id as `dst`, a single file if its name ends in .safetensors, else a folder; a report.

    A folder becomes a single file in its makers' layout, a single file a folder in diffusers', and what would stay as
    it is is written again. `trust` opens pickles (see `ldm.checkpoints.unpickle`), `dtype` is that of the real numbers,
    None each tensor's own. `family`, `prediction` and `zero_snr` overrule what the source says, `ema` takes a single
    file's moving average; `revision` is a hub id's, `variant` chooses among its weights or a folder's. `dst` must not
    exist, or be an empty folder; it appears whole or not at all. The report lists what was `ignored`, `left_out` and
    `dropped`. ValueError in one line that names the file.
    """
    dst, given = _destination(Path(dst).expanduser()), src
    src = formats.locate(src, revision, None, variant)
    writable(dst.parent)
    asked, same = Asked(family, prediction, zero_snr, ema), src.is_dir() != (dst.suffix == SAFETENSORS)
    if same and (asked != Asked() or (variant and not formats.of_hub(given))):
        raise ValueError(
            f"{dst}: the layout stays the same, of family, prediction, zero_snr, ema and variant nothing can be said"
        )
    with ExitStack() as stack:
        plain, dropped = (src, {}) if same else stack.enter_context(_plain(src, dst, trust))
        draft = stack.enter_context(publish(dst))
        if same:
            report = rewrite(src, draft, dtype, trust)
        elif src.is_dir():
            report = _to_single(plain, draft, dst.stem, dtype, asked, variant)
        else:
            report = _to_directory(plain, draft, dtype, asked)
    return {"source": str(given), "destination": str(dst), "dropped": dropped, **report}


def _destination(dst: Path) -> Path:
    """Where to write, a link to an empty folder followed; ValueError where there is something, or nothing can be."""
    if dst.suffix in PICKLES:
        raise ValueError(f"{dst}: weights are written as .safetensors or as a folder")
    if dst.is_dir() and dst.suffix != SAFETENSORS and not any(dst.iterdir()):
        return dst.resolve()
    if dst.exists() or dst.is_symlink():
        raise ValueError(f"{dst}: there is something of that name")
    creatable(dst.parent)
    return dst


@contextmanager
def _plain(src: Path, dst: Path, trust: bool) -> Iterator[tuple[Path, Mapping[str, list[str]]]]:
    """The source without pickles, and what was dropped: itself, or a copy beside `dst` for as long as it takes."""
    if not trust or not any(map(is_pickle, files(src))):
        yield src, {}
        return
    dst.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as folder:
        copy = Path(folder) / src.name
        dropped = rewrite(src, copy, None, trust)["dropped"]
        try:
            yield copy, dropped
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), str(src))) from None


def _to_directory(src: Path, draft: Path, dtype: torch.dtype | None, asked: Asked) -> Report:
    """A single file as a folder that diffusers and we read."""
    ((source,),) = read_single(src, *asked).groups
    file, entries = source
    if not any(entry.folder == "vae" for entry in entries.values()):
        raise ValueError(f"{src}: no vae in it, without which a folder is no model")
    verdict = _verdict(file, asked)
    record, meta = FAMILIES[verdict.family], file.meta()
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, entry in entries.items():
        parts[entry.folder].update(entry.divide(meta[name]))
    with ExitStack() as stack:
        writers = {}
        for folder, tensors in parts.items():
            path = draft / folder / f"{WEIGHTS[folder]}{SAFETENSORS}"
            writers[folder] = stack.enter_context(TensorWriter(path, tensors, {"format": "pt"}, dtype))
        for name, tensor in file.read():
            if name in entries:
                for part, value in entries[name].divide(tensor).items():
                    writers[entries[name].folder].write(part, value)
    _describe(record, verdict, draft)
    ignored: dict[str, list[str]] = defaultdict(list)
    for name in sorted(file.slots.keys() - entries.keys()):
        ignored[keys.ignored(name, record) or "its moving average is in its place"].append(name)
    count = sum(map(len, parts.values()))
    return {"layout": "folder", "tensors": count, **asdict(verdict), "ignored": dict(ignored)}


def _verdict(file: TensorFile, asked: Asked) -> detect.Verdict:
    """What a single file is; its U-Net is asked if need be."""

    def probe() -> detect.Reply:
        known = asked._replace(prediction="eps", zero_snr=False)._asdict()  # whatever they are: the U-Net is the same
        model = formats.load(file.path, formats.CPU, torch.bfloat16, **known)
        return formats.asked(model.unet, model.towers, model.sde)

    said = asked._asdict()
    del said["ema"]
    try:
        return detect.verdict(file.meta(), file.metadata, probe, **said)
    except ValueError as error:
        raise ValueError(f"{file.path}: {str(error).removeprefix(f'{file.path}: ')}") from None


def _describe(family: Family, verdict: detect.Verdict, folder: Path) -> None:
    """Write all of a directory but its weights: configurations, tokenizers, schedule, index."""
    index: dict[str, Any] = {"_class_name": family.pipeline, "_diffusers_version": DIFFUSERS_VERSION}
    for name, config in family.configs.items():
        library, (kind, *_) = CLASSES[name]
        marks = {"architectures": [kind], "model_type": "clip_text_model"} if library == "transformers" else {}
        write_json({**config, **marks}, folder / name / "config.json")
        index[name] = [library, kind]
    for name, tower in family.towers.items():
        text.save_tokenizer(text.clip_tokenizer(tower.pad), folder / TOKENIZERS[name])
        index[TOKENIZERS[name]] = ["transformers", "CLIPTokenizer"]
    scheduler = scheduler_config(family, verdict.prediction, verdict.zero_snr)
    (folder / "scheduler").mkdir()
    write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if "text_encoder_2" in family.towers:
        index["force_zeros_for_empty_prompt"] = family.zero_negative
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    write_json(index, folder / INDEX)


def _to_single(
    src: Path, draft: Path, title: str, dtype: torch.dtype | None, asked: Asked, variant: str | None
) -> Report:
    """A folder as a single file, which says what it predicts, so that nobody has to guess."""
    if asked.ema:
        raise ValueError(f"{src}: ema cannot be said of a folder")
    model = read_directory(src, variant, prediction=asked.prediction, zero_snr=asked.zero_snr)
    scheduler = read_json(src / "scheduler" / "scheduler_config.json")
    kind = asked.prediction or PREDICTION_TYPES[scheduler.get("prediction_type", "epsilon")]
    zero = bool(scheduler.get("rescale_betas_zero_snr")) if asked.zero_snr is None else asked.zero_snr
    name = chosen_family(model, scheduler, kind, src, asked.family)
    record = FAMILIES[name]
    sources = [source for group in model.groups for source in group]
    components: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for source in sources:
        meta = source.file.meta()
        for given, entry in source.entries.items():
            components[entry.folder][entry.single] = meta[given]
    marks = _marks(record, kind, zero)
    tensors = keys.to_single(components, record) | marks
    with TensorWriter(draft, tensors, _metadata(name, kind, title, record.size), dtype) as writer:
        for single, tensor in chain(marks.items(), _joined(sources, keys.plan_directory(components, record))):
            writer.write(single, tensor)
    said = {"family": name, "prediction": kind, "zero_snr": zero}
    return {"layout": "single file", "tensors": len(tensors), **said, "left_out": unsaid(model, record, src)}


def _joined(sources: Iterable[Source], places: Mapping[str, tuple[keys.Entry, str]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a single file from those of a directory, each as soon as its parts are there."""
    waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for source in sources:
        for given, tensor in source.file.read():
            if known := source.entries.get(given):
                entry, part = places[f"{known.folder}/{known.single}"]
                waiting[entry.single][part] = tensor
                if len(waiting[entry.single]) == len(entry.parts):
                    yield entry.single, entry.join(waiting.pop(entry.single))


def _marks(family: Family, prediction: str, zero_snr: bool) -> dict[str, Tensor]:
    """The empty tensors by which ComfyUI and others know what a family's network does not always do."""
    usual = PREDICTION_TYPES[family.scheduler["prediction_type"]]
    said = {"v_pred": prediction == "v" != usual, "ztsnr": zero_snr}
    return {name: torch.zeros(0) for name, true in said.items() if true}


def _metadata(family: str, prediction: str, title: str, size: int) -> dict[str, str]:
    """The header by Stability's model spec (sai_model_spec 1.0.0)."""
    architecture = {} if prediction == "x0" else {"modelspec.architecture": ARCHITECTURES[family]}
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        **architecture,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.prediction_type": SPEC_PREDICTIONS[prediction],
        "modelspec.resolution": f"{size}x{size}",
    }
