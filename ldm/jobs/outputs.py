"""Kinds of picture files that a job writes, with the picture's texts in each, and how they are read back."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from ldm.files import atomic_write
from ldm.metadata import save_png

EXIF_IFD, EXIF_USER_COMMENT, EXIF_IMAGE_DESCRIPTION = (
    0x8769,
    0x9286,
    0x010E,
)  # EXIF 2.32: the Exif IFD, UserComment, ImageDescription
USER_COMMENT_UNICODE = b"UNICODE\0"  # of a UserComment: what follows is UTF-16, as the web UI writes it, big-endian


class ImageFormat(NamedTuple):
    """A kind of file: its suffix, what writes it, and whether its pixels are the picture's own."""

    suffix: str
    save: Callable[[Image.Image, Path, Mapping[str, str]], None]
    lossless: bool = True


def save_webp(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Publish a lossless WebP with texts in it."""
    with atomic_write(path) as draft:
        image.save(draft, "WEBP", lossless=True, exif=build_exif(metadata))


def save_jpeg(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Publish a JPEG with texts in it; ValueError where they are longer than the 64 KiB that there is room for."""
    with atomic_write(path) as draft:
        image.save(draft, "JPEG", exif=build_exif(metadata), **JPEG_OPTIONS)


JPEG_OPTIONS: dict[str, Any] = {"quality": 95, "subsampling": 0}
IMAGE_FORMATS = {
    "png": ImageFormat("png", save_png),
    "webp": ImageFormat("webp", save_webp),
    "jpeg": ImageFormat("jpg", save_jpeg, lossless=False),
}


def build_exif(metadata: Mapping[str, str]) -> Image.Exif:
    """`parameters` as the UserComment in which the web UI writes them; `ldm`, which is ASCII, as the description."""
    found = Image.Exif()
    found[EXIF_IMAGE_DESCRIPTION] = metadata["ldm"]
    found.get_ifd(EXIF_IFD)[EXIF_USER_COMMENT] = USER_COMMENT_UNICODE + metadata["parameters"].encode(
        "utf-16-be", "surrogatepass"
    )
    return found


def read_image_and_metadata(path: Path) -> tuple[Image.Image, dict[str, str]]:
    """The picture (RGB) and the texts of a file of any kind; ValueError where it is none."""
    try:
        with Image.open(path) as picture:
            picture.load()
            texts, found = dict(getattr(picture, "text", {})), picture.getexif()
            comment = found.get_ifd(EXIF_IFD).get(EXIF_USER_COMMENT, b"")
            if isinstance(comment, bytes) and comment.startswith(USER_COMMENT_UNICODE):
                texts["parameters"] = comment[len(USER_COMMENT_UNICODE) :].decode("utf-16-be", "replace")
                texts["ldm"] = str(found.get(EXIF_IMAGE_DESCRIPTION, ""))
            return picture.convert("RGB"), texts
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'a torn picture'}") from None


def roundtrip_jpeg(image: Image.Image) -> Image.Image:
    """A picture as a JPEG of ours shows it."""
    data = io.BytesIO()
    image.save(data, "JPEG", **JPEG_OPTIONS)
    with Image.open(data) as shown:
        return shown.convert("RGB")
