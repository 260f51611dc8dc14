"""From a picture file's bytes to upright 8-bit sRGB, whole or not at all.

Pictures as people hold them (PIL, uint8) and as networks see them ([B, 3, H, W] in [-1, 1])."""

from __future__ import annotations

import hashlib
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageFont, ImageOps
from torch import Tensor

ALPHA_BACKGROUND = (255, 255, 255)  # what shows where a picture is transparent
MAX_IMAGE_PIXELS = 2 * 89_478_485  # Pillow's own bound against decompression bombs
TRANSPOSED_ORIENTATIONS = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
EXIF_ORIENTATION = 0x0112
HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
ICC_MODES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}  # ICC colour spaces and the modes that hold them


class DecodedImage(NamedTuple):
    """A picture in RGB, its alpha where it has any, and what a person may want to know: (kind, words)."""

    rgb: Image.Image
    alpha: Image.Image | None
    notices: tuple[tuple[str, str], ...] = ()


def read_image_size(data: bytes) -> tuple[int, int]:
    """Width and height of the upright picture, from its head alone; ValueError where it is not one."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            _check_pixel_count(picture)
            width, height = picture.size
            turned = picture.getexif().get(EXIF_ORIENTATION) in TRANSPOSED_ORIENTATIONS
    except Exception as error:
        raise ValueError(_decode_error(data, error)) from None
    return (height, width) if turned else (width, height)


def decode_image(data: bytes) -> DecodedImage:
    """The picture in a file's bytes: its first frame, turned upright (EXIF), in sRGB (ICC), transparency on white.

    Sixteen bits are scaled to eight. ValueError, in one line, where it cannot be shown whole.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            _check_pixel_count(picture)
            notices = _animation_notices(picture)
            picture.seek(0)
            picture.load()
            found = convert_to_rgb(ImageOps.exif_transpose(picture), picture.info.get("icc_profile"), picture.format)
    except Exception as error:  # Pillow's readers raise what they like
        raise ValueError(_decode_error(data, error)) from None
    return found._replace(notices=notices + found.notices)


def convert_to_rgb(
    image: Image.Image, icc_profile: bytes | None = None, file_format: str | None = None
) -> DecodedImage:
    """A picture of any mode, from a file of that format if any, as `decode_image` says; ValueError for what is no colour."""
    image, alpha = _to_8bit(image, file_format), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    rgb, unread = to_srgb(image, icc_profile)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, ALPHA_BACKGROUND), alpha)
    return DecodedImage(rgb, alpha, unread)


def decode_mask(data: bytes) -> Image.Image:
    """A mask: the picture in a file's bytes as 8-bit grey; ValueError as `decode_image`."""
    return decode_image(data).rgb.convert("L")


def _check_pixel_count(image: Image.Image) -> None:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _animation_notices(image: Image.Image) -> tuple[tuple[str, str], ...]:
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format == "MPO":  # a phone's JPEG with a second view
        return ()
    return (("animated", f"{frames} frames: the first is used"),)


def _to_8bit(image: Image.Image, file_format: str | None) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow's own conversion would clip at 255; other pictures as they are."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and file_format in ("PNG", "PPM")):
        levels = np.rint(np.asarray(image).astype(np.float64) / 257).astype(np.uint8)
        return Image.fromarray(levels)
    if mode in ("I", "F", "LAB", "HSV"):
        raise ValueError(f"pictures of mode {mode} cannot be read: convert it to 8 or 16 bits, grey or RGB")
    return image


def to_srgb(image: Image.Image, icc_profile: bytes | None) -> tuple[Image.Image, tuple[tuple[str, str], ...]]:
    """RGB as a screen shows it, by the colour profile where there is one; a profile that does not fit is a notice."""
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
        return "HEIC pictures cannot be read: convert it to PNG or JPEG"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_IMAGE_PIXELS // 10**6} million pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    return " ".join(str(error).split()) or f"not a picture ({type(error).__name__})"


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


def _decode_file(path: Path) -> DecodedImage:
    try:
        return decode_image(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
