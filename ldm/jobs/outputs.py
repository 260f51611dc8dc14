"""Kinds of picture files that a job writes, with the picture's texts in each, and how they are read back."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from ldm.files import publish
from ldm.images import save_png

IFD, COMMENT, DESCRIPTION = 0x8769, 0x9286, 0x010E  # EXIF 2.32: the Exif IFD, UserComment, ImageDescription
UNICODE = b"UNICODE\0"  # of a UserComment: what follows is UTF-16, as the web UI writes it, big-endian


class Output(NamedTuple):
    """A kind of file: its suffix, what writes it, and whether its pixels are the picture's own."""

    suffix: str
    save: Callable[[Image.Image, Path, Mapping[str, str]], None]
    lossless: bool = True


def save_webp(picture: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """Publish a lossless WebP with texts in it."""
    with publish(path) as draft:
        picture.save(draft, "WEBP", lossless=True, exif=exif(texts))


def save_jpeg(picture: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """Publish a JPEG with texts in it; ValueError where they are longer than the 64 KiB that there is room for."""
    with publish(path) as draft:
        picture.save(draft, "JPEG", exif=exif(texts), **JPEG)


JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}
OUTPUTS = {
    "png": Output("png", save_png),
    "webp": Output("webp", save_webp),
    "jpeg": Output("jpg", save_jpeg, lossless=False),
}


def exif(texts: Mapping[str, str]) -> Image.Exif:
    """`parameters` as the UserComment in which the web UI writes them; `ldm`, which is ASCII, as the description."""
    found = Image.Exif()
    found[DESCRIPTION] = texts["ldm"]
    found.get_ifd(IFD)[COMMENT] = UNICODE + texts["parameters"].encode("utf-16-be", "surrogatepass")
    return found


def open_output(path: Path) -> tuple[Image.Image, dict[str, str]]:
    """The picture (RGB) and the texts of a file of any kind; ValueError where it is none."""
    try:
        with Image.open(path) as picture:
            picture.load()
            texts, found = dict(getattr(picture, "text", {})), picture.getexif()
            comment = found.get_ifd(IFD).get(COMMENT, b"")
            if isinstance(comment, bytes) and comment.startswith(UNICODE):
                texts["parameters"] = comment[len(UNICODE) :].decode("utf-16-be", "replace")
                texts["ldm"] = str(found.get(DESCRIPTION, ""))
            return picture.convert("RGB"), texts
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'a torn picture'}") from None


def through_jpeg(picture: Image.Image) -> Image.Image:
    """A picture as a JPEG of ours shows it."""
    data = io.BytesIO()
    picture.save(data, "JPEG", **JPEG)
    with Image.open(data) as shown:
        return shown.convert("RGB")
