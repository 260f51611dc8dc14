"""Image files before they are decoded: Pillow's plug-ins, sound images in damaged files, and errors in one line."""

from __future__ import annotations

import ctypes
import logging
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

from PIL import Image

from ldm.errors import error_text

PNG_SIGNATURE, JPEG_START, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
PNG_PIXEL_CHUNKS = {b"tRNS", b"acTL", b"fcTL", b"fdAT"}  # optional by their names, and yet needed for pixels
MAX_PNG_TEXT_BYTES = 2**24  # of a text or a color profile, where Pillow allows 2**20
MAX_IMAGE_PIXELS = 2**28  # of a file
HEIC_BRANDS = tuple(b"ftyp" + brand for brand in (b"hei", b"hev", b"mif1", b"msf1"))
OTHER_FILES = {  # files that lie where images should, by their first bytes
    b"version https://git-lfs": "a pointer of Git LFS, not the image: run `git lfs pull`",
    b"<!doctype html": "a web page, not an image",
    b"<html": "a web page, not an image",
    b"<svg": "SVG images are not read: convert it to PNG",
}
JXL_STARTS = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"

Notices = tuple[tuple[str, str], ...]
Result = TypeVar("Result")


logging.getLogger("PIL").addHandler(logging.NullHandler())  # Pillow and libtiff would print what Pillow raises, too
with suppress(OSError, AttributeError):
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
    ctypes.CDLL(Image.core.__file__).TIFFSetWarningHandler(None)


class ImagePlugin(NamedTuple):
    """A plug-in of Pillow that is used where it is installed: its package, its module, and the files that need it."""

    package: str
    module: str
    suffixes: tuple[str, ...]


IMAGE_PLUGINS = {
    "HEIC": ImagePlugin("pillow-heif", "pillow_heif", (".heic", ".heif", ".hif")),
    "JPEG XL": ImagePlugin("pillow-jxl-plugin", "pillow_jxl", (".jxl",)),
}


def detect_plugin_format(data: bytes) -> str | None:
    """The key in `IMAGE_PLUGINS` of a file's format, by its first bytes."""
    if data[4:].startswith(HEIC_BRANDS):
        return "HEIC"
    return "JPEG XL" if data.startswith(JXL_STARTS) else None


@cache
def load_image_plugin(file_format: str) -> bool:
    """Let Pillow read a format of `IMAGE_PLUGINS`; False where its plug-in is not installed."""
    if find_spec(name := IMAGE_PLUGINS[file_format].module) is None:
        return False
    plugin = import_module(name)  # pillow_jxl registers itself
    if name == "pillow_heif":
        plugin.register_heif_opener()
    return True


def read_with_repairs(data: bytes, read: Callable[[bytes], Result]) -> tuple[Result, Notices]:
    """The result of `read`, if need be of a repaired file, with a notice of what was repaired; ValueError."""
    file_format = detect_plugin_format(data)
    if file_format and not load_image_plugin(file_format):
        package = IMAGE_PLUGINS[file_format].package
        raise ValueError(f"{file_format} images are not read without a plug-in: pip install {package}, or convert it")
    try:
        return read(data), ()
    except Exception as error:  # Pillow's plugins raise exceptions of all kinds
        reason, repaired = _decode_error(data, error), _repair(data, error)
    if repaired is None:
        raise ValueError(reason)
    try:
        return read(repaired[0]), (repaired[1],)
    except Exception:
        raise ValueError(reason) from None


def _repair(data: bytes, error: Exception) -> tuple[bytes, tuple[str, str]] | None:
    """A PNG without its texts and damaged profile or EXIF, a JPEG with an end; None for what cannot be repaired."""
    if data.startswith(PNG_SIGNATURE):
        sound = _essential_png_chunks(data)
        return (sound, ("metadata", f"not used ({error_text(error)})")) if len(sound) < len(data) else None
    if data.startswith(JPEG_START) and "truncated" in str(error):
        return data + JPEG_END, ("truncated", "the end of the file is missing")
    return None


def _essential_png_chunks(data: bytes) -> bytes:
    """A PNG without the chunks that its pixels do not need, but with a sound color profile and EXIF."""
    parts, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start < len(data):
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        chunk = data[start : start + length + 12]
        optional = kind[:1].islower() and kind not in PNG_PIXEL_CHUNKS
        if not optional or (kind in (b"iCCP", b"eXIf") and _is_sound_chunk(chunk)):
            parts.append(chunk)
        start += length + 12
    return b"".join(parts)


def _is_sound_chunk(chunk: bytes) -> bool:
    """Is its checksum right, and, of a profile, its size bounded?"""
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    if chunk[4:8] == b"eXIf":
        return True
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(chunk[8:-4].partition(b"\0")[2][1:], MAX_PNG_TEXT_BYTES)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail


def _decode_error(data: bytes, error: Exception) -> str:
    """Why a file cannot be decoded, in one line."""
    if not data:
        return "the file is empty"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_IMAGE_PIXELS // 10**6} million pixels"
    if file_format := detect_plugin_format(data):
        return f"a damaged {file_format} image"
    start = data[:64].lstrip().lower()
    if other := next((text for begin, text in OTHER_FILES.items() if start.startswith(begin)), None):
        return other
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return error_text(error) if str(error).strip() else f"not an image ({type(error).__name__})"
