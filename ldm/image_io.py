"""Decode image files to upright 8-bit sRGB, whole or not at all, and convert images between PIL and tensors."""

from __future__ import annotations

import hashlib
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ldm.errors import error_text

ALPHA_BACKGROUND = (255, 255, 255)
MAX_IMAGE_PIXELS = 2 * 89_478_485  # Pillow's own bound against decompression bombs
TRANSPOSED_ORIENTATIONS = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
EXIF_ORIENTATION = 0x0112
TIFF_WIDTH, TIFF_LENGTH = 256, 257
HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
NEARLY_WHITE = 245  # of 255
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
ICC_MODES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}  # ICC colour spaces and the modes that hold them


class DecodedImage(NamedTuple):
    """An image in RGB, its alpha channel if it has one, and notices for the user: (kind, text)."""

    rgb: Image.Image
    alpha: Image.Image | None
    notices: tuple[tuple[str, str], ...] = ()


def read_image_size(data: bytes) -> tuple[int, int]:
    """Width and height of the upright image, from the file's header alone; ValueError if it is not an image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_pixel_count(image)
            width, height = _stored_size(image)
            transposed = image.getexif().get(EXIF_ORIENTATION) in TRANSPOSED_ORIENTATIONS
    except Exception as error:
        raise ValueError(_decode_error(data, error)) from None
    return (height, width) if transposed else (width, height)


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as the file stores them, before EXIF's orientation: Pillow swaps those of a TIFF by itself."""
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        return int(tags[TIFF_WIDTH]), int(tags[TIFF_LENGTH])
    return image.size


def decode_image(data: bytes) -> DecodedImage:
    """Decode a file's bytes: its first frame, upright (EXIF), in sRGB (ICC), transparency on white, 16 bits as 8.

    ValueError, in one line, if it cannot be decoded completely.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_pixel_count(image)
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a phone's JPEG with a preview
            image.seek(0)
            image.load()
            decoded = convert_to_rgb(ImageOps.exif_transpose(image), image.info.get("icc_profile"), image.format)
    except Exception as error:  # Pillow's plugins raise exceptions of all kinds
        raise ValueError(_decode_error(data, error)) from None
    notices = (("animated", f"{frames} frames: the first is used"),) if frames > 1 else ()
    return decoded._replace(notices=notices + decoded.notices)


def convert_to_rgb(
    image: Image.Image, icc_profile: bytes | None = None, file_format: str | None = None
) -> DecodedImage:
    """Convert an image of any mode as `decode_image` does; ValueError for modes that are not grey, RGB or CMYK."""
    image, alpha = _to_8bit(image, file_format), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    rgb, notices = to_srgb(image, icc_profile)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, ALPHA_BACKGROUND), alpha)
    return DecodedImage(rgb, alpha, notices)


def decode_mask(data: bytes) -> Image.Image:
    """The brightness (L) of the image in a file's bytes; ValueError as `decode_image`."""
    return decode_image(data).rgb.convert("L")


def _check_pixel_count(image: Image.Image) -> None:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _to_8bit(image: Image.Image, file_format: str | None) -> Image.Image:
    """Scale 16-bit grey to 8 bits, which Pillow's conversion would clip at 255; return other images unchanged."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and file_format in ("PNG", "PPM")):
        levels = np.rint(np.asarray(image).astype(np.float64) / 257).astype(np.uint8)
        return Image.fromarray(levels)
    if mode in ("I", "F", "LAB", "HSV"):
        raise ValueError(f"images of mode {mode} cannot be read: convert it to 8 or 16 bits, grey or RGB")
    return image


def to_srgb(image: Image.Image, icc_profile: bytes | None) -> tuple[Image.Image, tuple[tuple[str, str], ...]]:
    """Convert to RGB by the ICC profile, if there is one; a profile that does not fit gives a notice."""
    if not icc_profile:
        return image.convert("RGB"), ()
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image.convert("RGB"), ()
        space = profile.profile.xcolor_space
        source = image.convert(ICC_MODES[space]) if image.mode != "CMYK" else image
        if ICC_MODES[space] != source.mode:
            raise KeyError(space)
        converted = ImageCms.profileToProfile(source, profile, SRGB_PROFILE, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, KeyError) as error:
        return image.convert("RGB"), (("color profile", f"not used ({error})"),)
    assert converted is not None
    return converted, ()


def _decode_error(data: bytes, error: Exception) -> str:
    """Why a file cannot be decoded, in one line."""
    if not data:
        return "the file is empty"
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        return "HEIC images cannot be read: convert it to PNG or JPEG"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_IMAGE_PIXELS // 10**6} million pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return error_text(error) if str(error).strip() else f"not an image ({type(error).__name__})"


def from_uint8(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1], channels_last."""
    return (torch.as_tensor(pixels).float() / 127.5 - 1).permute(0, 3, 1, 2)


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W], clipped to [-1, 1], to PIL images, rounded to the nearest level."""
    levels = (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return [Image.fromarray(pixels) for pixels in levels.permute(0, 2, 3, 1).cpu().numpy()]


def image_digest(image: Image.Image) -> dict[str, Any]:
    """An image's identity as JSON values: its size, and the SHA-256 of its RGB pixels, row by row."""
    return {"size": list(image.size), "sha256": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()}


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """A grid of images of one size in rows of `columns`, each above its caption."""
    width, height = images[0].size
    wrapped = [textwrap.wrap(caption, width // 5) for caption in captions]
    cell = width + 8, height + 10 + 12 * max(map(len, wrapped))
    sheet = Image.new("RGB", (columns * cell[0], -(-len(images) // columns) * cell[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for k, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = k % columns * cell[0] + 4, k // columns * cell[1] + 4
        sheet.paste(image, (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline="lightgray")
        draw.text((x, y + height + 2), "\n".join(lines), "black", font)
    return sheet


def read_image(path: Path) -> Image.Image:
    """An image file as RGB, decoded by `decode_image`; ValueError names the file."""
    return _decode_file(path).rgb


def read_mask(path: Path) -> Image.Image:
    """An inpainting mask from a file, by `inpaint_mask`; ValueError names the file."""
    return inpaint_mask(_decode_file(path))


def inpaint_mask(mask: DecodedImage) -> Image.Image:
    """A mask as grey (L), white where to regenerate: the image's brightness or, where it has real holes, these.

    ComfyUI takes the holes too, which is what erasing a region leaves. What is white wherever it is visible (strokes on
    a transparent background) is regenerated itself. A black-and-white mask whose frame alone is transparent, as turning
    it in an editor leaves it, and one that is nowhere less than half opaque keep the meaning of their brightness, with
    what is transparent as black. (AUTOMATIC1111's web UI regenerates what is opaque, whatever its colour.)
    """
    if mask.alpha is None:
        return mask.rgb.convert("L")
    alpha = np.asarray(mask.alpha)
    if 0 < alpha.max() < 128:  # a faint layer
        alpha = (alpha * (255 / alpha.max())).astype(np.uint8)
    visible, brightness = alpha >= 128, _brightness_without_background(mask)
    if visible.any() and brightness[visible].min() >= NEARLY_WHITE:
        return Image.fromarray(alpha)
    if visible.all() or _is_turned_mask(np.asarray(mask.rgb), brightness, visible):
        return Image.fromarray(np.rint(brightness * (alpha / np.float32(255))).astype(np.uint8))
    return Image.fromarray(255 - alpha)


def _brightness_without_background(image: DecodedImage) -> np.ndarray:
    """The brightness (uint8) before the image was composited on white: (c - 255 (1 - a)) / a, exact to 1 / a."""
    assert image.alpha is not None
    opacity = np.maximum(np.asarray(image.alpha), 1) / np.float32(255)
    composited = np.asarray(image.rgb.convert("L")).astype(np.float32)
    return np.rint(np.clip(255 - (255 - composited) / opacity, 0, 255)).astype(np.uint8)


def _is_turned_mask(rgb: np.ndarray, brightness: np.ndarray, visible: np.ndarray) -> bool:
    """Is what is visible a black-and-white mask, in one piece in each row and column?"""
    for rows in (visible, visible.T):
        pieces = rows[:, 0] + (rows[:, 1:] & ~rows[:, :-1]).sum(1)
        if pieces.max() > 1:
            return False
    shown, colours = brightness[visible], rgb[visible]
    if not shown.size or (colours.max(-1) - colours.min(-1)).max() > 8:
        return False
    black, white = (shown <= 255 - NEARLY_WHITE).mean(), (shown >= NEARLY_WHITE).mean()
    return bool(min(black, white) > 0 and black + white >= 0.5)


def _decode_file(path: Path) -> DecodedImage:
    try:
        return decode_image(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error_text(error)}") from None
