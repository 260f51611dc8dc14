"""`ldm inspect`, `ldm convert` and `ldm info`: what a model is, other formats of it, and the installation."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.checkpoints.families import LoadOptions
from ldm.commands.defaults import find_user_config
from ldm.commands.options import (
    JsonOption,
    RevisionOption,
    StrictOption,
    WeightVariantOption,
    apply_strictness,
    expand_options,
    print_record,
)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, file or hub id.", show_default=False)],
    probe: Annotated[bool, typer.Option(help="Evaluate the U-Net to find its prediction, if no file says it.")] = True,
    revision: RevisionOption = None,
    variant: WeightVariantOption = None,
    strict: StrictOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a model, adapter or embedding is, with the evidence, and what each of its tensors is for."""
    from ldm.convert import inspect as inspection
    from ldm.errors import list_some

    apply_strictness(strict)
    record = inspection.inspect_model(model, probe, LoadOptions(revision=revision, variant=variant))
    print(json.dumps(record) if as_json else inspection.format_report(record))
    for what in ("faults", "unknown", "missing") if strict else ():
        if names := record.get(what):
            raise ValueError(f"{model}: {what}: {list_some(names)} (--strict)")


@expand_options
def convert(
    *,
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, file or hub id.", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="DST", show_default=False)],
    to: Annotated[str | None, typer.Option(help="LoRA format of an adapter: kohya, diffusers or peft.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Open pickles, weights only, in a separate process.")] = False,
    options: LoadOptions,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: unchanged.")] = None,
    strict: StrictOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a model's folder to a single file or back, an adapter to another format, a pickle to safetensors.

    A single file is written where DST ends in .safetensors. DST must not exist, and appears whole or not at all.
    """
    apply_strictness(strict)
    if to is not None:
        given = {"--trust": trust, "--dtype": dtype, "--prediction": options.prediction}
        given |= {"--zero-snr": options.zero_snr, "--ema": options.ema, "--variant": options.variant}
        if stray := [name for name, value in given.items() if value is not None and (value or name == "--zero-snr")]:
            raise ValueError(f"{' and '.join(stray)} does not apply to an adapter (--to)")
        return print_record(convert_lora_file(source, destination.expanduser(), to, options), as_json)
    from ldm.convert.convert import convert_checkpoint
    from ldm.errors import choose
    from ldm.pipeline.pipeline import PIPELINE_DTYPES

    target_dtype = None if dtype is None else choose(PIPELINE_DTYPES, dtype, "dtype")
    print_record(convert_checkpoint(source, destination, options, trust=trust, dtype=target_dtype), as_json)


def convert_lora_file(source: str, destination: Path, to: str, options: LoadOptions) -> dict[str, object]:
    """Write an adapter in another format; returns what was written."""
    from ldm.adapters.lora_loading import convert_adapter
    from ldm.checkpoints.formats import locate_weights

    file = locate_weights(source, LoadOptions(revision=options.revision), "adapter")
    adapter = convert_adapter(file, destination, to, options.family)
    return {"destination": str(destination), "adapter": adapter.name, "dialect": to, "modules": len(adapter.deltas)}


def info(
    image: Annotated[
        Path | None,
        typer.Argument(metavar="[IMAGE]", help="Print an image's settings instead.", show_default=False),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Print the memory that a model takes instead.", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="With --size: float32, bfloat16 or float16.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Print versions, devices, attention backends, samplers, and where picto is; or an image's settings; or a memory.

    IMAGE is of any tool that `ldm generate --from` reads: ours, A1111, Forge, Fooocus, ComfyUI, InvokeAI. The memory of
    --size is that of loading a model, and of generating one image of its native size, 512x512 and 1024x1024.
    """
    if image is not None:
        return print_image_settings(image, as_json)
    if size is not None:
        return print_model_size(size, dtype, as_json)
    if dtype != "auto":
        raise ValueError("--dtype: only with --size")
    from importlib import metadata

    import torch

    from ldm import __version__
    from ldm.checkpoints.formats import PICTO_PATH
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.diffusion.timesteps import SPACINGS
    from ldm.hardware import best_device
    from ldm.nn.attention import check_attention_backends
    from ldm.nn.packing import packing_unavailable_reason

    libraries = ("torch", "diffusers", "transformers", "accelerate")
    rows = {"ldm": __version__, **{name: metadata.version(name) for name in libraries}}
    rows["python"] = sys.version.split()[0]
    rows["cpu"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    cuda = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    rows["cuda"] = ", ".join(cuda) if cuda else "none"
    rows["device"] = f"{best_device()} (auto)"
    for name, reason in check_attention_backends().items():
        rows[f"attention {name}"] = reason or "available"
    for precision in (torch.float32, torch.bfloat16):
        name = str(precision).removeprefix("torch.")
        rows[f"packed weights {name}"] = packing_unavailable_reason(precision) or "on the CPU"
    rows["samplers"], rows["spacings"] = ", ".join(SAMPLERS), ", ".join(SPACINGS)
    rows["picto"] = str(PICTO_PATH) if PICTO_PATH.is_dir() else "not found"
    rows["config"] = str(find_user_config() or "none")
    print_rows(rows, as_json)


def print_image_settings(path: Path, as_json: bool) -> None:
    """Print the settings in an image's metadata by the names of options, and what of them cannot be taken over."""
    from ldm.errors import printable
    from ldm.jobs.image_settings import read_image_settings
    from ldm.pipeline.request import REQUEST_FIELDS

    settings = read_image_settings(path)
    rows: dict[str, Any] = {"tool": settings.tool, "model": settings.model}
    for name, value in settings.values.items():
        option = REQUEST_FIELDS[name].option if name in REQUEST_FIELDS else "clip_skip (A1111)"
        rows[option.replace("_", "-") if not as_json else name] = value
    rows |= {"loras": list(map(str, settings.loras)), "lost": list(settings.lost)}
    if as_json:
        return print(json.dumps(rows))
    shown = {name: ", ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for name, v in rows.items()}
    print_rows({name: printable(value) for name, value in shown.items() if value}, False)


def print_model_size(model: str, dtype: str, as_json: bool) -> None:
    """Print the parameters of a model's networks, and the memory of loading it and of generating an image."""
    from ldm.audit.estimates import estimate_generation
    from ldm.checkpoints.formats import read_model_spec
    from ldm.hardware import best_device
    from ldm.nn.unet import native_size
    from ldm.nn.vae import vae_scale_factor
    from ldm.pipeline.pipeline import choose_dtype

    spec, device = read_model_spec(model), best_device()
    chosen = choose_dtype(dtype, device)
    height, width = (
        side * vae_scale_factor(spec.networks["vae"]) for side in native_size(spec.networks["unet"].config)
    )
    sizes = sorted({(width, height), (512, 512), (1024, 1024)})
    rows = {"device": str(device), "dtype": str(chosen).removeprefix("torch.")}
    for name, network in spec.networks.items():
        rows[name] = f"{sum(p.numel() for p in network.parameters()) / 1e6:,.1f} million parameters"
    for name, count in estimate_generation(spec, chosen, sizes).items():
        rows[f"memory {name}"] = f"{count / 1e9:.2f} GB"
    print_rows(rows, as_json)


def print_rows(rows: Mapping[str, str], as_json: bool) -> None:
    """Print names and values in two columns, or as one JSON object."""
    if as_json:
        return print(json.dumps(rows))
    for name, value in rows.items():
        print(f"{name:20} {value}")
