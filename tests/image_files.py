"""Images with known pixels, as files."""

import io

import numpy as np
from PIL import Image


def noise(width, height, seed=0, channels=3):
    """Random pixels, uint8 [height, width, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(picture, form="PNG", **options):
    """The bytes of a file that holds an image or an array of pixels."""
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, form, **options)
    return file.getvalue()


def write(folder, files):
    """Write files by name below a folder; a text as UTF-8, a number as an image of that seed, 12 by 8 pixels."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = {".JPG": "JPEG", ".jpg": "JPEG", ".webp": "WEBP"}.get(path.suffix, "PNG")
        content = encoded(noise(12, 8, content), form) if isinstance(content, int) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder
