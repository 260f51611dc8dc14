"""From a picture file's bytes to upright 8-bit sRGB, whole or not at all."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

GROUND = (255, 255, 255)  # what shows where a picture is transparent
MOST_PIXELS = 2 * 89_478_485  # Pillow's own bound against decompression bombs
TURNED = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
ORIENTATION = 0x0112
HEIC = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
COLOURS = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}  # ICC colour spaces and the modes that hold them


class Decoded(NamedTuple):
    """A picture in RGB, its alpha where it has any, and what a person may want to know: (kind, words)."""

    rgb: Image.Image
    alpha: Image.Image | None
    notices: tuple[tuple[str, str], ...] = ()


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of the upright picture, from its head alone; ValueError where it is not one."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            _bounded(picture)
            width, height = picture.size
            turned = picture.getexif().get(ORIENTATION) in TURNED
    except Exception as error:
        raise ValueError(_reason(data, error)) from None
    return (height, width) if turned else (width, height)


def decode(data: bytes) -> Decoded:
    """The picture in a file's bytes: its first frame, turned upright (EXIF), in sRGB (ICC), transparency on white.

    Sixteen bits are scaled to eight. ValueError, in one line, where it cannot be shown whole.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            _bounded(picture)
            notices = _animation(picture)
            picture.seek(0)
            picture.load()
            found = shown(ImageOps.exif_transpose(picture), picture.info.get("icc_profile"), picture.format)
    except Exception as error:  # Pillow's readers raise what they like
        raise ValueError(_reason(data, error)) from None
    return found._replace(notices=notices + found.notices)


def shown(picture: Image.Image, icc: bytes | None = None, form: str | None = None) -> Decoded:
    """A picture of any mode, from a file of that format if any, as `decode` says; ValueError for what is no colour."""
    picture, alpha = _eight_bits(picture, form), None
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        picture = picture.convert("RGB")
    rgb, unread = to_srgb(picture, icc)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, GROUND), alpha)
    return Decoded(rgb, alpha, unread)


def grey(data: bytes) -> Image.Image:
    """A mask: the picture in a file's bytes as 8-bit grey; ValueError as `decode`."""
    return decode(data).rgb.convert("L")


def _bounded(picture: Image.Image) -> None:
    if picture.width * picture.height > MOST_PIXELS:
        raise Image.DecompressionBombError


def _animation(picture: Image.Image) -> tuple[tuple[str, str], ...]:
    frames = getattr(picture, "n_frames", 1)
    if frames == 1 or picture.format == "MPO":  # a phone's JPEG with a second view
        return ()
    return (("animated", f"{frames} frames: the first is used"),)


def _eight_bits(picture: Image.Image, form: str | None) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow's own conversion would clip at 255; other pictures as they are."""
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and form in ("PNG", "PPM")):
        levels = np.rint(np.asarray(picture).astype(np.float64) / 257).astype(np.uint8)
        return Image.fromarray(levels)
    if mode in ("I", "F", "LAB", "HSV"):
        raise ValueError(f"pictures of mode {mode} cannot be read: convert it to 8 or 16 bits, grey or RGB")
    return picture


def to_srgb(picture: Image.Image, icc: bytes | None) -> tuple[Image.Image, tuple[tuple[str, str], ...]]:
    """RGB as a screen shows it, by the colour profile where there is one; a profile that does not fit is a notice."""
    if not icc:
        return picture.convert("RGB"), ()
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return picture.convert("RGB"), ()
        space = profile.profile.xcolor_space
        source = picture.convert(COLOURS[space]) if picture.mode != "CMYK" else picture
        if COLOURS[space] != source.mode:
            raise KeyError(space)
        converted = ImageCms.profileToProfile(source, profile, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, KeyError) as error:
        return picture.convert("RGB"), (("colour profile", f"not used ({error})"),)
    assert converted is not None
    return converted, ()


def _reason(data: bytes, error: Exception) -> str:
    """Why a file cannot be decoded, in one line."""
    if not data:
        return "the file is empty"
    if data[4:8] == b"ftyp" and data[8:12] in HEIC:
        return "HEIC pictures cannot be read: convert it to PNG or JPEG"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS // 10**6} million pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    return " ".join(str(error).split()) or f"not a picture ({type(error).__name__})"
