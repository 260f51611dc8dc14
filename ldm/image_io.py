"""Decode image files to upright 8-bit sRGB, whole or not at all, and convert images between PIL and tensors."""

from __future__ import annotations

import hashlib
import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ldm.errors import error_text, warn_of_input
from ldm.files import read_regular_file
from ldm.image_repair import MAX_IMAGE_PIXELS, MAX_PNG_TEXT_BYTES, Notices, read_with_repairs

ALPHA_BACKGROUND = (255, 255, 255)
MAX_IMAGE_SIDE = 2**17
MAX_DECODED_PIXELS = 2**26  # 8192 x 8192: an image of more is shrunk
ROWS_AT_A_TIME = 64
TRANSPOSED_ORIENTATIONS = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
EXIF_ORIENTATION = 0x0112
ORIENTATION_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_WIDTH, TIFF_LENGTH = 256, 257
MISSING_JPEG_PIXELS = (128, (128, 128, 128))
NEARLY_WHITE = 245  # of 255
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
ICC_MODES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}  # ICC colour spaces and the modes that hold them


# Pillow's bounds for the process: `_check_pixel_count` is stricter than its warning, and gives one line
Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PNG_TEXT_BYTES
warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of them is a notice of `decode_image`


class DecodedImage(NamedTuple):
    """An image in RGB, its alpha channel if it has one, and notices for the user: (kind, text)."""

    rgb: Image.Image
    alpha: Image.Image | None
    notices: tuple[tuple[str, str], ...] = ()


def read_image_size(data: bytes) -> tuple[int, int]:
    """Width and height of the upright image, from the file's header alone; ValueError if it is not an image."""
    (width, height), orientation = read_with_repairs(data, _read_header)[0]
    return (height, width) if orientation in TRANSPOSED_ORIENTATIONS else (width, height)


def decode_image(data: bytes) -> DecodedImage:
    """Decode a file's bytes: its first frame, upright (EXIF), in sRGB (ICC), transparency on white, 16 bits as 8.

    Of more than 8192^2 pixels it is shrunk by a whole factor: decoding takes at most 5 bytes for each pixel of the file
    and 1 GB. Damage to texts, profiles and EXIF, and a JPEG without its last rows, give a notice.
    ValueError, in one line, if it cannot be decoded completely.
    """
    decoded, notices = read_with_repairs(data, _decode)
    return decoded._replace(notices=notices + decoded.notices)


def _read_header(data: bytes) -> tuple[tuple[int, int], int]:
    """The size that a file stores, and its EXIF orientation."""
    with Image.open(io.BytesIO(data)) as image:
        _check_pixel_count(image)
        size = _stored_size(image)
        return size, _orientation(image)[0]


def _decode(data: bytes) -> DecodedImage:
    with Image.open(io.BytesIO(data)) as image:
        _check_pixel_count(image)
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a phone's JPEG with a preview
        image.seek(0)
        size, shrink = image.size, _shrink_factor(image.size)
        if shrink > 1 and image.format == "JPEG":  # decodes at 1/2, 1/4 or 1/8
            image.draft(image.mode, (-(-image.width // shrink), -(-image.height // shrink)))
        image.load()
        _check_missing_rows(image)
        orientation, notices = _orientation(image)  # of a TIFF, 1: Pillow has turned it
        profile, file_format = image.info.get("icc_profile", b""), image.format
        small = _shrink(image)
    del image  # of a large file, hundreds of megabytes
    decoded = convert_to_rgb(_transpose(small, orientation), profile, file_format)
    if small.width * small.height < size[0] * size[1]:
        notices += (("large image", f"{size[0]}x{size[1]} is shrunk to {small.width}x{small.height}"),)
    if profile is None:  # Pillow could not unpack it
        notices += (("color profile", "not used (it is damaged)"),)
    if frames > 1:
        notices = (("animated", f"{frames} frames: the first is used"), *notices)
    return decoded._replace(notices=notices + decoded.notices)


def _check_missing_rows(image: Image.Image) -> None:
    """ValueError for a JPEG of which more than an eighth of the rows is missing, which libjpeg makes mid-grey."""
    if image.format != "JPEG" or image.getpixel((0, image.height - 1)) not in MISSING_JPEG_PIXELS:
        return
    first = image.height - 1 - image.height // 8
    if (np.asarray(image.crop((0, first, image.width, image.height))) == 128).all():
        raise ValueError("the image is truncated")


def _orientation(image: Image.Image) -> tuple[int, Notices]:
    """An image's EXIF orientation, 1 where it has none or cannot be read."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception as error:  # of all kinds, as Pillow parses EXIF by its TIFF plugin
        return 1, (("EXIF", f"not used ({error_text(error)})"),)
    return (orientation if orientation in ORIENTATION_TRANSPOSES else 1), ()


def _transpose(image: Image.Image, orientation: int) -> Image.Image:
    """The image upright."""
    return image if orientation == 1 else image.transpose(ORIENTATION_TRANSPOSES[orientation])


def _shrink_factor(size: tuple[int, int]) -> int:
    """The whole factor by which the sides of a large image are shrunk."""
    return math.ceil(math.sqrt(size[0] * size[1] / MAX_DECODED_PIXELS))


def _shrink(image: Image.Image) -> Image.Image:
    """A large image made smaller by a whole factor, some rows at a time: a copy would take its memory again."""
    if (factor := _shrink_factor(image.size)) <= 1:
        return image
    rows, bands = factor * ROWS_AT_A_TIME, []
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        bands.append(_to_reducible(band).reduce(factor))
    small = Image.new(bands[0].mode, (bands[0].width, sum(band.height for band in bands)))
    for k, band in enumerate(bands):
        small.paste(band, (0, k * ROWS_AT_A_TIME))
    return small


def _to_reducible(image: Image.Image) -> Image.Image:
    """The image in a mode whose pixels Pillow can average."""
    if image.mode.startswith("I;16"):
        return _scale_rows(image, 65535)
    mode = "RGBA" if image.has_transparency_data else {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
    return image if image.mode == mode else image.convert(mode)


def convert_to_rgb(
    image: Image.Image, icc_profile: bytes | None = None, file_format: str | None = None
) -> DecodedImage:
    """Convert an image of any mode as `decode_image` does; ValueError for modes that are not grey, RGB or CMYK."""
    image, notices = _to_8bit(image, file_format)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    rgb, profile_notices = to_srgb(image, icc_profile)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, ALPHA_BACKGROUND), alpha)
    return DecodedImage(rgb, alpha, notices + profile_notices)


def decode_mask(data: bytes) -> Image.Image:
    """The brightness (L) of the image in a file's bytes; ValueError as `decode_image`."""
    return decode_image(data).rgb.convert("L")


def _check_pixel_count(image: Image.Image) -> None:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    if max(image.size) > MAX_IMAGE_SIDE:
        raise ValueError(f"{image.width}x{image.height}: a side of more than {MAX_IMAGE_SIDE} pixels")


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as the file stores them, before EXIF's orientation: Pillow swaps those of a TIFF by itself."""
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        return int(tags[TIFF_WIDTH]), int(tags[TIFF_LENGTH])
    return image.size


def _to_8bit(image: Image.Image, file_format: str | None) -> tuple[Image.Image, Notices]:
    """Scale grey of 16 bits and more to 8, which Pillow's conversion would clip at 255; return others unchanged."""
    mode = image.mode
    if mode.startswith("I;16"):
        return _scale_rows(image, 65535), ()
    if mode not in ("I", "F", "LAB"):
        return image, ()
    if mode == "LAB":
        rgb = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), SRGB_PROFILE, outputMode="RGB")
        assert rgb is not None
        return rgb, ()
    if file_format in ("PNG", "PPM"):
        return _scale_rows(image, 65535), ()
    white = _white_level(image)
    return _scale_rows(image, white), (("gray levels", f"mode {mode}: 0 to {white:g} is taken as black to white"),)


def _white_level(image: Image.Image) -> float:
    """The full scale of grey levels whose file does not say it: 1 (of floats), 8, 16 or 32 bits, or their maximum."""
    levels = np.asarray(image)
    highest = float(np.max(levels, initial=0, where=np.isfinite(levels)))
    scales = (*((1,) if image.mode == "F" else ()), 255, 65535, 2**31 - 1)
    return next((scale for scale in scales if highest <= scale), highest)


def _scale_rows(image: Image.Image, white: float) -> Image.Image:
    """Grey levels from 0 to `white` as L, some rows at a time; what is not finite is black, or white if +inf."""
    levels, scaled = np.asarray(image), np.empty((image.height, image.width), np.uint8)
    for start in range(0, len(levels), ROWS_AT_A_TIME):
        rows = np.nan_to_num(levels[start : start + ROWS_AT_A_TIME].astype(np.float64), nan=0, posinf=white, neginf=0)
        scaled[start : start + ROWS_AT_A_TIME] = np.rint(np.clip(rows / (white / 255), 0, 255))
    return Image.fromarray(scaled)


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


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """A grid of images of one size in rows of `columns`, each above its caption; by default it is nearly square."""
    width, height = images[0].size
    wrapped = [textwrap.wrap(caption, width // 5) for caption in captions]
    cell = width + 8, height + 10 + 12 * max(map(len, wrapped))
    columns = columns or max(1, round(math.sqrt(len(images) * cell[1] / cell[0])))
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
        decoded = decode_image(read_regular_file(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error_text(error)}") from None
    for kind, text in decoded.notices:
        warn_of_input(f"{path}: {kind}: {text}")
    return decoded
