"""`ldm inspect`, `ldm convert` and `ldm info`: what a model is, and what there is here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ldm.checkpoints.families import LoadOptions
from ldm.commands.options import JsonOption, RevisionOption, WeightVariantOption, print_record


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, file or hub id.", show_default=False)],
    probe: Annotated[bool, typer.Option(help="Ask the U-Net what it predicts, where nothing else says it.")] = True,
    revision: RevisionOption = None,
    variant: WeightVariantOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a model, adapter or embedding is, with the evidence, and what each of its tensors is for."""
    from ldm.convert import inspect as inspection

    found = inspection.inspect_model(model, probe, LoadOptions(revision=revision, variant=variant))
    print(json.dumps(found) if as_json else inspection.format_report(found))


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder, file or hub id.", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="DST", show_default=False)],
    to: Annotated[str | None, typer.Option(help="Of an adapter: kohya, diffusers or peft.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Open pickles, as weights alone, in a process apart.")] = False,
    family: Annotated[str | None, typer.Option(help="sd1, sd2-v, sdxl, ...: instead of what the file says.")] = None,
    prediction: Annotated[str | None, typer.Option(help="eps, v or x0: instead of what the file says.")] = None,
    zero_snr: Annotated[bool | None, typer.Option(help="Zero terminal SNR: instead of what the file says.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The moving average in a single file.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the default is as it is.")] = None,
    revision: RevisionOption = None,
    variant: WeightVariantOption = None,
    as_json: JsonOption = False,
) -> None:
    """A model's folder as a single file or the other way round; an adapter in another dialect; a pickle as weights.

    Into a single file where DST ends in .safetensors. DST must not exist, and appears whole or not at all.
    """
    if to is not None:
        models = {
            "--trust": trust or None,
            "--dtype": dtype,
            "--prediction": prediction,
            "--zero-snr": zero_snr,
            "--ema": ema or None,
            "--variant": variant,
        }
        if stray := [name for name, value in models.items() if value is not None]:
            raise ValueError(f"{' and '.join(stray)}: of a model, --to is of an adapter")
        return print_record(convert_lora_file(source, destination.expanduser(), to, family, revision), as_json)
    from ldm.convert import convert as conversion
    from ldm.errors import choose
    from ldm.pipeline.pipeline import PIPELINE_DTYPES

    options = LoadOptions(
        revision=revision, variant=variant, family=family, prediction=prediction, zero_snr=zero_snr, ema=ema
    )
    made = conversion.convert_checkpoint(
        source,
        destination,
        options,
        trust=trust,
        dtype=None if dtype is None else choose(PIPELINE_DTYPES, dtype, "dtype"),
    )
    print_record(made, as_json)


def convert_lora_file(
    source: str, destination: Path, to: str, family: str | None, revision: str | None
) -> dict[str, object]:
    """Write an adapter in another dialect; what was written."""
    from ldm.adapters.lora_loading import convert_adapter
    from ldm.checkpoints.formats import locate_weights

    adapter = convert_adapter(
        locate_weights(source, LoadOptions(revision=revision), "adapter"), destination, to, family
    )
    return {"destination": str(destination), "adapter": adapter.name, "dialect": to, "modules": len(adapter.deltas)}


def info() -> None:
    """Versions, devices, attention back ends, and the model that is shipped."""
    from importlib import metadata

    import torch

    from ldm import __version__
    from ldm.checkpoints.formats import PICTO_PATH
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.diffusion.timesteps import SPACINGS
    from ldm.nn.attention import check_attention_backends

    libraries = ("torch", "diffusers", "transformers", "accelerate")
    rows = {"ldm": __version__, **{name: metadata.version(name) for name in libraries}}
    rows["python"] = sys.version.split()[0]
    rows["cpu"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    cuda = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    rows["cuda"] = ", ".join(cuda) if cuda else "none"
    for name, reason in check_attention_backends().items():
        rows[f"attention {name}"] = reason or "available"
    rows["samplers"], rows["spacings"] = ", ".join(SAMPLERS), ", ".join(SPACINGS)
    rows["picto"] = str(PICTO_PATH) if PICTO_PATH.is_dir() else "not found"
    for name, value in rows.items():
        print(f"{name:20} {value}")
