"""From a picture file's bytes to upright 8-bit sRGB, whole or not at all."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

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
        return image.convert("RGB"), (("colour profile", f"not used ({error})"),)
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
