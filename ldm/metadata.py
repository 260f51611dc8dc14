"""Metadata of image files: the text and the sampler names of AUTOMATIC1111's web UI, and texts in PNG files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.files import atomic_write

# Our names and those of AUTOMATIC1111's web UI; what it does not have keeps our name.
A1111_SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
}
A1111_SPACINGS = {
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "linspace": "Normal",
    "trailing": "SGM Uniform",
    "leading": "DDIM",
}
# name: value, as the web UI reads it
INFOTEXT_PATTERN = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
NEGATIVE_PREFIX = "Negative prompt:"


def resolve_a1111_sampler(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `sampler` and `spacing` by our names where they are the web UI's, in any case.

    Its older versions had one name for both: "DPM++ 2M Karras".
    """
    samplers, spacings = (
        {label.lower(): name for name, label in table.items()} for table in (A1111_SAMPLERS, A1111_SPACINGS)
    )
    names = {name: value for name in ("sampler", "spacing") if (value := values.get(name))}
    label = names.get("sampler", "").lower()
    first, _, last = label.rpartition(" ")
    if label in samplers:
        names["sampler"] = samplers[label]
    elif first in samplers and last in spacings:
        names = {"spacing": spacings[last], **names, "sampler": samplers[first]}
    if "spacing" in names:
        names["spacing"] = spacings.get(names["spacing"].lower(), names["spacing"])
    return {**values, **names}


def create_infotext(
    settings: Mapping[str, Any],
    model_name: str,
    model_hash: str,
    version: str,
    vae: tuple[str, str] | None = None,
    loras: Mapping[str, str] | None = None,
    embeddings: Mapping[str, str] | None = None,
) -> str:
    """The text "parameters" that the web UI writes into its PNGs and other tools read, from a request's record.

    `vae` is the name and hash of an autoencoder that replaces the model's own; `loras` and `embeddings` are hashes by
    name. What is None is left out. `clip_skip` counts layers as the web UI does, from the last, 1.
    """
    lines = [settings["prompt"]]
    if settings["negative_prompt"]:
        lines.append(f"{NEGATIVE_PREFIX} {settings['negative_prompt']}")
    upscale, skip = settings["upscale"], settings["clip_skip"]
    fields = {
        "Steps": settings["num_inference_steps"],
        "Sampler": A1111_SAMPLERS.get(settings["sampler"], settings["sampler"]),
        "Schedule type": A1111_SPACINGS.get(settings["spacing"], settings["spacing"]),
        "CFG scale": f"{settings['guidance_scale']:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": model_hash[:10],
        "Model": model_name,
        "VAE hash": vae and vae[1][:10],
        "VAE": vae and vae[0],
        "Denoising strength": settings["upscale_strength"] if upscale else settings["strength"],
        "Clip skip": skip or None,
        "RNG": "CPU",
        "Hires upscale": upscale,
        "Hires upscaler": "Lanczos" if upscale else None,
        "Lora hashes": format_hashes(loras),
        "TI hashes": format_hashes(embeddings),
        "Version": f"ldm {version}",
    }
    pairs = (f"{name}: {quote(str(value))}" for name, value in fields.items() if value is not None)
    return "\n".join([*lines, ", ".join(pairs)])


def format_hashes(digests: Mapping[str, str] | None) -> str | None:
    """The first digits of hashes, by name, as one value."""
    return ", ".join(f"{name}: {digits[:12]}" for name, digits in digests.items()) if digests else None


def parse_generation_parameters(text: str) -> dict[str, str]:
    """The values of an infotext by its own names, with "Prompt" and "Negative prompt", by the web UI's rules.

    Lines are stripped; a last line of fewer than three pairs belongs to the prompts. The format cannot express a prompt
    with a line that begins with "Negative prompt:".
    """
    *lines, last = text.strip().split("\n")
    pairs = INFOTEXT_PATTERN.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    lines = [line.strip() for line in lines]
    start = next((k for k, line in enumerate(lines) if line.startswith(NEGATIVE_PREFIX)), len(lines))
    negative = [line.removeprefix(NEGATIVE_PREFIX).strip() for line in lines[start:]]
    prompts = {"Prompt": "\n".join(lines[:start]), NEGATIVE_PREFIX[:-1]: "\n".join(negative)}
    return {**prompts, **{name: unquote(value) for name, value in pairs}}


def quote(value: str) -> str:
    """A value as the web UI writes it: in JSON's quotes where a comma, colon, newline or quote would be misread."""
    ambiguous = any(c in value for c in ",:\n") or value.startswith('"')
    return json.dumps(value, ensure_ascii=False) if ambiguous else value


def unquote(value: str) -> str:
    """A value as the web UI reads it."""
    try:
        return json.loads(value) if value[:1] == value[-1:] == '"' else value
    except json.JSONDecodeError:
        return value


def save_png(
    image: Image.Image,
    path: Path,
    texts: Mapping[str, str],
    rename: Callable[[Path, Path], object] = os.replace,
) -> None:
    """Publish a PNG with texts in it (iTXt, UTF-8); the same picture and texts give the same bytes."""
    info = PngInfo()
    for key, value in texts.items():
        info.add_itxt(key, value)
    with atomic_write(path, rename) as draft:
        image.save(draft, "PNG", pnginfo=info)


def read_png_texts(path: Path) -> dict[str, str]:
    """The texts in a PNG; ValueError by its name where the file is not a whole picture."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return dict(getattr(picture, "text", {}))
    except Exception as error:  # Pillow's readers raise what they like
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'not a picture'}") from None
