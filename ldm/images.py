"""Pictures as people hold them (PIL, uint8) and as networks see them ([B, 3, H, W] in [-1, 1])."""

from __future__ import annotations

import hashlib
import json
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.decode import DecodedImage, decode_image
from ldm.files import atomic_write

# Our names in the words of AUTOMATIC1111's web UI; what it has no word for keeps our name.
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


def from_uint8(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1], channels_last."""
    return (torch.as_tensor(pixels).float() / 127.5 - 1).permute(0, 3, 1, 2)


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3], rounded to nearest; what lies outside is clipped."""
    levels = (images.float().clamp(-1, 1) * 127.5 + 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] to PIL, one picture a row."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


def image_digest(image: Image.Image) -> dict[str, Any]:
    """What tells a picture from another, as JSON values: its size, and the SHA-256 of its RGB pixels, row by row."""
    return {"size": list(image.size), "sha256": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()}


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """Pictures of one size in rows of `columns`, each over its caption."""
    width, height = images[0].size
    wrapped = [textwrap.wrap(caption, width // 5) for caption in captions]
    cell = width + 8, height + 10 + 12 * max(map(len, wrapped))
    sheet = Image.new("RGB", (columns * cell[0], -(-len(images) // columns) * cell[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for k, (picture, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = k % columns * cell[0] + 4, k // columns * cell[1] + 4
        sheet.paste(picture, (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline="lightgray")
        draw.text((x, y + height + 2), "\n".join(lines), "black", font)
    return sheet


INFOTEXT_PATTERN = re.compile(
    r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
)  # as the web UI reads name: value
NEGATIVE_PREFIX = "Negative prompt:"


def create_infotext(
    settings: Mapping[str, Any],
    model_name: str,
    model_hash: str,
    version: str,
    vae: tuple[str, str] | None = None,
    loras: Mapping[str, str] | None = None,
    embeddings: Mapping[str, str] | None = None,
) -> str:
    """The text that AUTOMATIC1111's web UI writes into its PNGs and other tools read, from a request's record.

    `vae` is the name and hash of an autoencoder that replaces the model's own; `loras` and `embeddings` are hashes by
    name. What is None goes unsaid. `clip_skip` counts layers as the web UI does, from the last, 1.
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
    """The first digits of files' hashes by name, in one value."""
    return ", ".join(f"{name}: {digits[:12]}" for name, digits in digests.items()) if digests else None


def parse_generation_parameters(text: str) -> dict[str, str]:
    """What `create_infotext` says, by its own names, with "Prompt" and "Negative prompt": the web UI's rules of reading.

    Its lines are stripped; a last line of fewer than three pairs belongs to the prompts. The format has no word for a
    prompt with a line that begins with "Negative prompt:".
    """
    *lines, last = text.strip().split("\n")
    pairs = INFOTEXT_PATTERN.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    lines = [line.strip() for line in lines]
    turn = next((k for k, line in enumerate(lines) if line.startswith(NEGATIVE_PREFIX)), len(lines))
    negative = [line.removeprefix(NEGATIVE_PREFIX).strip() for line in lines[turn:]]
    prompts = {"Prompt": "\n".join(lines[:turn]), NEGATIVE_PREFIX[:-1]: "\n".join(negative)}
    return {**prompts, **{name: unquote(value) for name, value in pairs}}


def quote(value: str) -> str:
    """A value as the web UI writes it: in JSON's quotes where a comma, colon, newline or quote would be misread."""
    misread = any(c in value for c in ",:\n") or value.startswith('"')
    return json.dumps(value, ensure_ascii=False) if misread else value


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


def read_image(path: Path) -> Image.Image:
    """A picture file as RGB, as `decode` shows it: upright, in sRGB, transparency on white; ValueError by its name."""
    return _decode_file(path).rgb


def read_mask(path: Path) -> Image.Image:
    """A mask file as grey, of which white is redrawn, as `inpaint_mask` says; ValueError by its name."""
    return inpaint_mask(_decode_file(path))


def inpaint_mask(mask: DecodedImage) -> Image.Image:
    """A mask as grey, of which white is redrawn: it is its brightness, or of one with transparency, its holes.

    So do ComfyUI, and whoever erases what is to be redrawn; white strokes on nothing are no holes, but are redrawn
    themselves. (AUTOMATIC1111's web UI redraws what is opaque, whatever its colour.)
    """
    grey = mask.rgb.convert("L")
    if mask.alpha is None or mask.alpha.getextrema()[0] == 255:
        return grey
    strokes = grey.getextrema()[0] == 255  # on white, nothing else is to be seen
    return mask.alpha if strokes else ImageChops.invert(mask.alpha)


def read_png_texts(path: Path) -> dict[str, str]:
    """The texts in a PNG; ValueError by its name where the file is not a whole picture."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return dict(getattr(picture, "text", {}))
    except Exception as error:  # Pillow's readers raise what they like
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'not a picture'}") from None


def _decode_file(path: Path) -> DecodedImage:
    try:
        return decode_image(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
