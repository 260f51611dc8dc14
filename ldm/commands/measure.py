"""`ldm likelihood` and `ldm invert`: measurements of an image under a model."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.commands.options import (
    JsonOption,
    ModelOptions,
    check_out_folder,
    check_range,
    expand_options,
    print_record,
)
from ldm.pipeline.request import MAX_SEED

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.nn.vae import Posterior
    from ldm.pipeline.pipeline import Pipeline

FLOAT32_MODEL = ModelOptions(dtype="float32")


@expand_options
def likelihood(
    *,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="What the image shows; without it, log p(z) alone.")] = None,
    method: Annotated[str, typer.Option(help="ode (exact), elbo (a lower bound) or both.")] = "both",
    steps: Annotated[int, typer.Option(help="Steps of the ODE; strata of the ELBO's noise levels.")] = 16,
    tolerance: Annotated[float | None, typer.Option(help="Adaptive steps of the ODE, instead of --steps.")] = None,
    probes: Annotated[int, typer.Option(help="Probes of the ODE's divergence; noise samples of the ELBO.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the latent, the probes and the noise.")] = 0,
    model: ModelOptions = FLOAT32_MODEL,
    as_json: JsonOption = False,
) -> None:
    """Estimate log p(z | prompt), log p(z) and their difference for an image, z ~ q(z | image) its latent.

    Without guidance. With and without the prompt, the latent, the probes and the noise are the same. The terms of the
    VAE are separate: log p(image | z) of a Gaussian with its best variance, pixels in [-1, 1], and the entropy of
    q(z | image).
    """
    if method not in ("ode", "elbo", "both"):
        raise ValueError(f"--method {method}: choose from ode, elbo, both")
    check_range("--steps", steps, 2, 10_000)
    check_range("--probes", probes, 2, 10_000)
    if tolerance is not None and not 1e-12 <= tolerance < 1:
        raise ValueError(f"--tolerance {tolerance}: must be from 1e-12 to below 1")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"--seed {seed}: must be from 0 to {MAX_SEED}")
    from ldm.image_io import read_image

    decoded = read_image(image)
    from ldm.analysis import measure

    pipe = model.load_pipeline()
    posterior = encode_image_file(pipe, decoded, image)
    record = measure.measure_likelihood(pipe, decoded, posterior, prompt, method, steps, tolerance, probes, seed)
    record = {"image": str(image), "prompt": prompt, "seed": seed, **record}
    print(json.dumps(record) if as_json else format_likelihood_tables(record))


def encode_image_file(pipe: Pipeline, image: Image, path: Path) -> Posterior:
    """q(z | image); ValueError with the file's name where its size does not fit."""
    try:
        return pipe.encode_images([image])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def format_likelihood_tables(record: dict) -> str:
    """A record of `likelihood` as a table: estimates, the terms of the ELBO in nats, and those of the VAE."""
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


@expand_options
def invert(
    *,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Its sides are multiples of the VAE's factor.")],
    prompt: Annotated[str, typer.Option(help="What the image shows.")] = "",
    scheme: Annotated[str, typer.Option(help="exact or ode.")] = "exact",
    steps: Annotated[int, typer.Option(help="Steps of the exact scheme.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale (1 disables it).")] = 1.0,
    rtol: Annotated[float, typer.Option(help="Relative tolerance of the ode scheme.")] = 1e-5,
    atol: Annotated[float, typer.Option(help="Absolute tolerance of the ode scheme.")] = 1e-5,
    model: ModelOptions = FLOAT32_MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the noise and the returned image.")] = Path(
        "out"
    ),
    as_json: JsonOption = False,
) -> None:
    """Map an image to its noise and back, and print the error of the returned image."""
    check_range("--steps", steps, 1, 10_000)
    check_range("--guidance", guidance, 0, 1000)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 1e-8 <= value < 1:
            raise ValueError(f"--{name} {value}: must be from 1e-8 to below 1")
    if scheme not in ("exact", "ode"):
        raise ValueError(f"--scheme {scheme}: choose from exact, ode")
    from ldm.image_io import read_image
    from ldm.metadata import save_png

    decoded = read_image(image)
    from ldm.analysis import measure

    pipe = model.load_pipeline()
    options = {"rtol": rtol, "atol": atol} if scheme == "ode" else {}
    posterior = encode_image_file(pipe, decoded, image)
    check_out_folder(out)
    inversion = measure.invert_image(pipe, decoded, posterior.mean, prompt, scheme, steps, guidance, **options)
    settings = {"prompt": prompt, "model": model.display_name, "scheme": scheme, "steps": steps, "guidance": guidance}
    settings |= options
    files = [out / f"{image.stem}-noise.safetensors", out / f"{image.stem}-back.png"]
    measure.save_inversion_state(inversion.state, files[0], settings)
    save_png(inversion.image, files[1], {"ldm-invert": json.dumps(settings)})
    print_record({**settings, **inversion.metrics, "files": [str(file) for file in files]}, as_json)
