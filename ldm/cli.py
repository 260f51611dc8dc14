"""The `ldm` command. Heavy imports happen inside commands, so that `ldm --help` answers at once."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline, Request

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Latent diffusion, text to image.",
)


class InputError(Exception):
    """The caller's input is wrong: one line, exit status 2."""


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a model; the default is the one shipped.")] = None,
    negative: Annotated[str, typer.Option(help="What the pictures shall not show.")] = "",
    steps: Annotated[int | None, typer.Option(help="Sampling steps; the default is the model's.")] = None,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim, euler, heun or dpmpp_2m.")] = "dpmpp_2m",
    spacing: Annotated[str, typer.Option(help="linspace, leading, trailing, karras or log_snr.")] = "trailing",
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    eta: Annotated[float, typer.Option(help="Share of fresh noise in DDIM's steps.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Picture k of a prompt uses seed + k.")] = 0,
    count: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 1,
    width: Annotated[int | None, typer.Option(help="Pixels; the default is the model's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the default is the model's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at a time.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the PNGs.")] = Path("out"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of file names.")] = False,
) -> None:
    """Draw prompts to PNG files, whose names are printed."""
    texts = [prompt for prompt in prompts or [] if prompt.strip()]
    if not texts:
        raise InputError("PROMPT: at least one that is not blank is needed")
    for name, value in (("--count", count), ("--batch-size", batch_size)):
        if not 1 <= value <= 100_000:
            raise InputError(f"{name} {value}: must be from 1 to 100000")
    from ldm.pipeline import PICTO, Pipeline, Request

    pipe = Pipeline.from_pretrained(model or PICTO, device=device, dtype=dtype, batch_size=batch_size)
    requests = [
        pipe.resolve(Request(text, negative, seed + k, height, width, steps, guidance, sampler, spacing, eta))
        for text in texts
        for k in range(count)
    ]
    writable(out)
    files = draw(pipe, (model or PICTO).name, requests, out)
    for file in files if not as_json else ():
        print(file)
    if as_json:
        records = [{"file": str(file), **r.record()} for file, r in zip(files, requests, strict=True)]
        print(json.dumps({"images": records}))


def draw(pipe: Pipeline, model: str, requests: Sequence[Request], out: Path) -> list[Path]:
    """Write each picture once it is finished, with progress on stderr; the files in the order of the requests."""
    from rich.console import Console
    from rich.progress import Progress

    from ldm import __version__
    from ldm.images import parameters, save_png

    files = [out / name for name in names(requests)]
    hashes = pipe.model.hashes
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("drawing", total=len(requests))
        for k, picture in pipe.stream(requests, lambda share: bar.advance(task, share)):
            record = {
                "version": __version__,
                "model": model,
                "weights": hashes,
                "request": requests[k].record(),
            }
            texts = {
                "parameters": parameters(requests[k].record(), model, hashes["unet"], __version__),
                "ldm": json.dumps(record),
            }
            save_png(picture, files[k], texts)
    return files


def names(requests: Sequence[Request]) -> list[str]:
    """A file name for each request: its number, words of its prompt, its seed; safe whatever the prompt says."""
    words = (re.sub(r"[^a-z0-9]+", "-", r.prompt.lower()).strip("-")[:60].rstrip("-") or "picture" for r in requests)
    digits = max(4, len(str(len(requests))))
    return [f"{k:0{digits}d}-{w}-{r.seed}.png" for k, (w, r) in enumerate(zip(words, requests, strict=True))]


def writable(folder: Path) -> None:
    """Make the folder; InputError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: not writable")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, as in the recipe.")] = None,
) -> None:
    """Train from a recipe; the same command again resumes. Prints the folder of the trained weights."""
    from ldm.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from ldm.train.loop import train as run
    from ldm.train.setup import task_for

    print(run(loaded, task_for(loaded)))


@app.command()
def info() -> None:
    """Versions, devices, attention back ends, and the model that is shipped."""
    from importlib import metadata

    import torch

    from ldm import __version__
    from ldm.nn.attention import available
    from ldm.pipeline import PICTO

    libraries = ("torch", "diffusers", "transformers", "accelerate")
    rows = {"ldm": __version__, **{name: metadata.version(name) for name in libraries}}
    rows["python"] = sys.version.split()[0]
    rows["cpu"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    cuda = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    rows["cuda"] = ", ".join(cuda) if cuda else "none"
    for name, reason in available().items():
        rows[f"attention {name}"] = reason or "available"
    rows["picto"] = str(PICTO) if PICTO.is_dir() else "not found"
    for name, value in rows.items():
        print(f"{name:20} {value}")


def main() -> None:
    """Run a command line; exit status 0, 1, 2 (one `error:` line) or 130 (interrupted)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app(standalone_mode=False)
    except (InputError, ValueError) as error:
        status = fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        status = fail(error.format_message())  # typer's own: an unknown command or option, a value of the wrong type
    sys.exit(status or 0)


def fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
