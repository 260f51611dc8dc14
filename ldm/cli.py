"""The `ldm` command. Heavy imports happen inside commands, so that `ldm --help` answers at once."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.nn.vae import Posterior
    from ldm.pipeline import Pipeline
    from ldm.request import Request

app = typer.Typer(
    add_completion=False,
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
    sampler: Annotated[str, typer.Option(help="dpmpp_2m, unipc, heun, ddim, ...: `ldm info` lists all.")] = "dpmpp_2m",
    spacing: Annotated[str, typer.Option(help="trailing, karras, linspace, ...: `ldm info` lists all.")] = "trailing",
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    guidance_rescale: Annotated[float, typer.Option(help="Share of the rescaled output: 0 to 1.")] = 0.0,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="Guide in these sigma/alpha alone.")
    ] = None,
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
    """Draw prompts to PNG files, whose names are printed.

    Words weigh as in AUTOMATIC1111's web UI: (more), [less], (so much:1.3); BREAK begins a new chunk.
    """
    texts = [prompt for prompt in prompts or [] if prompt.strip()]
    if not texts:
        raise InputError("PROMPT: at least one that is not blank is needed")
    for name, value in (("--count", count), ("--batch-size", batch_size)):
        if not 1 <= value <= 100_000:
            raise InputError(f"{name} {value}: must be from 1 to 100000")
    from ldm.pipeline import PICTO, Pipeline
    from ldm.request import Request

    pipe = Pipeline.from_pretrained(model or PICTO, device=device, dtype=dtype, batch_size=batch_size)
    settings = Request(
        prompt="",
        negative_prompt=negative,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        sampler=sampler,
        spacing=spacing,
        eta=eta,
        guidance_rescale=guidance_rescale,
        guidance_interval=guidance_interval and (guidance_interval[0], finite(guidance_interval[1])),
    )
    requests = [pipe.resolve(replace(settings, prompt=text, seed=seed + k)) for text in texts for k in range(count)]
    writable(out)
    files = draw(pipe, (model or PICTO).name, requests, out)
    for file in files if not as_json else ():
        print(file)
    if as_json:
        records = [{"file": str(file), **r.record()} for file, r in zip(files, requests, strict=True)]
        print(json.dumps({"images": records}))


def finite(value: float) -> float | None:
    """None for infinity, which JSON does not have."""
    return value if value < math.inf else None


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
def likelihood(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="What the picture shows; without it, log p(z) alone.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a model; the default is the one shipped.")] = None,
    method: Annotated[str, typer.Option(help="ode (exact), elbo (a lower bound) or both.")] = "both",
    steps: Annotated[int, typer.Option(help="Steps of the ODE; strata of the ELBO's noise levels.")] = 16,
    tolerance: Annotated[float | None, typer.Option(help="Adaptive steps of the ODE, instead of --steps.")] = None,
    probes: Annotated[int, typer.Option(help="Of the ODE's divergence; draws of the ELBO's noise.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the latent, the probes and the noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """How probable a picture is: log p(z | prompt), log p(z) and their difference, z ~ q(z | picture) its latent.

    Without guidance. The prompt and no prompt see the same latent, probes and noise. The autoencoder's part stands
    apart: log p(picture | z) of a Gaussian with its best variance, pixels in [-1, 1], and the entropy of
    q(z | picture).
    """
    if method not in ("ode", "elbo", "both"):
        raise InputError(f"--method {method}: choose from ode, elbo, both")
    for name, value in (("--steps", steps), ("--probes", probes)):
        if not 2 <= value <= 10_000:
            raise InputError(f"{name} {value}: must be from 2 to 10000")
    if tolerance is not None and not 1e-12 <= tolerance < 1:
        raise InputError(f"--tolerance {tolerance}: must be from 1e-12 to below 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: must be from 0 to 2**63 - 1")
    from ldm.images import read_picture

    picture = read_picture(image)
    from ldm import measure
    from ldm.pipeline import PICTO, Pipeline

    pipe = Pipeline.from_pretrained(model or PICTO, device=device, dtype=dtype)
    posterior = encoded(pipe, picture, image)
    record = measure.likelihood(pipe, picture, posterior, prompt, method, steps, tolerance, probes, seed)
    record = {"image": str(image), "prompt": prompt, "seed": seed, **record}
    print(json.dumps(record) if as_json else tables(record))


def encoded(pipe: Pipeline, picture: Image, path: Path) -> Posterior:
    """q(z | picture); InputError with the file's name where its size does not fit."""
    try:
        return pipe.encode([picture])
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def tables(record: dict) -> str:
    """A record of `likelihood` for the eye: estimates, the ELBO's terms in nats, and the autoencoder's part."""
    lines = [f"{'':32}{'nats':>11}{'+-':>9}{'bits/dim':>11}{'+-':>9}"]
    for method in ("ode", "elbo"):
        for name, row in record.get(method, {}).items():
            estimate = f"{row['nats']:11.2f}{row['standard_error']:9.2f}"
            bits = f"{row['bits_per_dim']:11.4f}{row['bits_per_dim_error']:9.4f}"
            lines.append(f"{method.upper():5}{name:27}{estimate}{bits}")
    terms = record.get("elbo_terms", {})
    for name, row in terms.items():
        edges = [f"log-SNR {low:.1f} to {high:.1f}" for low, high in pairwise(row["log_snr"])]
        lines.append(f"terms of -ELBO, {name}")
        for term, nats in [("prior", row["prior"]), *zip(edges, row["diffusion"], strict=True)]:
            lines.append(f"     {term:27}{nats:11.2f}")
        lines.append(f"     {'reconstruction of z':27}{row['reconstruction']:11.2f}")
    for name, row in record["vae"].items():
        bits = f"{'':9}{row['bits_per_dim']:11.4f}" if "bits_per_dim" in row else ""
        lines.append(f"VAE  {name:27}{row['nats']:11.2f}{bits}")
    return "\n".join(lines)


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
def invert(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture whose sides the VAE can divide.")],
    prompt: Annotated[str, typer.Option(help="What the picture shows.")] = "",
    scheme: Annotated[str, typer.Option(help="exact or ode.")] = "exact",
    steps: Annotated[int, typer.Option(help="Steps of the exact scheme.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 1.0,
    rtol: Annotated[float, typer.Option(help="Relative tolerance of the ode scheme.")] = 1e-5,
    atol: Annotated[float, typer.Option(help="Absolute tolerance of the ode scheme.")] = 1e-5,
    model: Annotated[Path | None, typer.Option(help="Folder of a model; the default is the one shipped.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the noise and the picture that comes back.")] = Path("out"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Take a picture to its noise and back; prints how far the picture that returns is off."""
    for name, value, low, high in (("steps", steps, 1, 10_000), ("guidance", guidance, 0, 1000)):
        if not low <= value <= high:
            raise InputError(f"--{name} {value}: must be from {low} to {high}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 1e-8 <= value < 1:
            raise InputError(f"--{name} {value}: must be from 1e-8 to below 1")
    if scheme not in ("exact", "ode"):
        raise InputError(f"--scheme {scheme}: choose from exact, ode")
    from ldm.images import read_picture, save_png

    picture = read_picture(image)
    from ldm import measure
    from ldm.pipeline import PICTO, Pipeline

    pipe = Pipeline.from_pretrained(model or PICTO, device=device, dtype=dtype)
    options = {"rtol": rtol, "atol": atol} if scheme == "ode" else {}
    posterior = encoded(pipe, picture, image)
    writable(out)
    inversion = measure.invert(pipe, picture, posterior.mean, prompt, scheme, steps, guidance, **options)
    name = (model or PICTO).name
    settings = {"prompt": prompt, "model": name, "scheme": scheme, "steps": steps, "guidance": guidance, **options}
    files = [out / f"{image.stem}-noise.safetensors", out / f"{image.stem}-back.png"]
    measure.save_state(inversion.state, files[0], settings)
    save_png(inversion.picture, files[1], {"ldm-invert": json.dumps(settings)})
    report({**settings, **inversion.figures, "files": [str(file) for file in files]}, as_json)


def report(record: Mapping[str, object], as_json: bool) -> None:
    """Print a record as one JSON object, or as a table with lists below each other."""
    if as_json:
        return print(json.dumps(record))
    for name, value in record.items():
        for part in value if isinstance(value, list) else [value]:
            print(f"{name.replace('_', ' '):26} {f'{part:.4g}' if isinstance(part, float) else part}")


@app.command()
def info() -> None:
    """Versions, devices, attention back ends, and the model that is shipped."""
    from importlib import metadata

    import torch

    from ldm import __version__
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.diffusion.spacing import SPACINGS
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
    rows["samplers"], rows["spacings"] = ", ".join(SAMPLERS), ", ".join(SPACINGS)
    rows["picto"] = str(PICTO) if PICTO.is_dir() else "not found"
    for name, value in rows.items():
        print(f"{name:20} {value}")


def main() -> None:
    """Run a command line; exit status 0, 1, 2 (one `error:` line) or 130 (interrupted)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
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
