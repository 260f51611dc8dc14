"""`ldm likelihood` and `ldm invert`: measurements of a picture under a model."""

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
    print_record,
    with_model_options,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.nn.vae import Posterior
    from ldm.pipeline.pipeline import Pipeline


@with_model_options(dtype="float32")
def likelihood(
    model: ModelOptions,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="What the picture shows; without it, log p(z) alone.")] = None,
    method: Annotated[str, typer.Option(help="ode (exact), elbo (a lower bound) or both.")] = "both",
    steps: Annotated[int, typer.Option(help="Steps of the ODE; strata of the ELBO's noise levels.")] = 16,
    tolerance: Annotated[float | None, typer.Option(help="Adaptive steps of the ODE, instead of --steps.")] = None,
    probes: Annotated[int, typer.Option(help="Of the ODE's divergence; draws of the ELBO's noise.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the latent, the probes and the noise.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """How probable a picture is: log p(z | prompt), log p(z) and their difference, z ~ q(z | picture) its latent.

    Without guidance. The prompt and no prompt see the same latent, probes and noise. The autoencoder's part stands
    apart: log p(picture | z) of a Gaussian with its best variance, pixels in [-1, 1], and the entropy of
    q(z | picture).
    """
    if method not in ("ode", "elbo", "both"):
        raise ValueError(f"--method {method}: choose from ode, elbo, both")
    check_range("--steps", steps, 2, 10_000)
    check_range("--probes", probes, 2, 10_000)
    if tolerance is not None and not 1e-12 <= tolerance < 1:
        raise ValueError(f"--tolerance {tolerance}: must be from 1e-12 to below 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed {seed}: must be from 0 to 2**63 - 1")
    from ldm.image_io import read_image

    picture = read_image(image)
    from ldm.analysis import measure

    pipe = model.load_pipeline()
    posterior = encode_image_file(pipe, picture, image)
    record = measure.measure_likelihood(pipe, picture, posterior, prompt, method, steps, tolerance, probes, seed)
    record = {"image": str(image), "prompt": prompt, "seed": seed, **record}
    print(json.dumps(record) if as_json else format_likelihood_tables(record))


def encode_image_file(pipe: Pipeline, image: Image, path: Path) -> Posterior:
    """q(z | picture); ValueError with the file's name where its size does not fit."""
    try:
        return pipe.encode_images([image])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def format_likelihood_tables(record: dict) -> str:
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


@with_model_options(dtype="float32")
def invert(
    model: ModelOptions,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture whose sides the VAE can divide.")],
    prompt: Annotated[str, typer.Option(help="What the picture shows.")] = "",
    scheme: Annotated[str, typer.Option(help="exact or ode.")] = "exact",
    steps: Annotated[int, typer.Option(help="Steps of the exact scheme.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 1.0,
    rtol: Annotated[float, typer.Option(help="Relative tolerance of the ode scheme.")] = 1e-5,
    atol: Annotated[float, typer.Option(help="Absolute tolerance of the ode scheme.")] = 1e-5,
    out: Annotated[Path, typer.Option(help="Folder for the noise and the picture that comes back.")] = Path("out"),
    as_json: JsonOption = False,
) -> None:
    """Take a picture to its noise and back; prints how far the picture that returns is off."""
    check_range("--steps", steps, 1, 10_000)
    check_range("--guidance", guidance, 0, 1000)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 1e-8 <= value < 1:
            raise ValueError(f"--{name} {value}: must be from 1e-8 to below 1")
    if scheme not in ("exact", "ode"):
        raise ValueError(f"--scheme {scheme}: choose from exact, ode")
    from ldm.image_io import read_image
    from ldm.metadata import save_png

    picture = read_image(image)
    from ldm.analysis import measure

    pipe = model.load_pipeline()
    options = {"rtol": rtol, "atol": atol} if scheme == "ode" else {}
    posterior = encode_image_file(pipe, picture, image)
    check_out_folder(out)
    inversion = measure.invert_image(pipe, picture, posterior.mean, prompt, scheme, steps, guidance, **options)
    settings = {
        "prompt": prompt,
        "model": model.display_name,
        "scheme": scheme,
        "steps": steps,
        "guidance": guidance,
        **options,
    }
    files = [out / f"{image.stem}-noise.safetensors", out / f"{image.stem}-back.png"]
    measure.save_inversion_state(inversion.state, files[0], settings)
    save_png(inversion.image, files[1], {"ldm-invert": json.dumps(settings)})
    print_record({**settings, **inversion.metrics, "files": [str(file) for file in files]}, as_json)
