"""Images with known pixels, as files, and other files of data folders."""

import io
import json
import tarfile

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


def jsonl(rows):
    return "\n".join(json.dumps(row) for row in rows)


def tar(files):
    """The bytes of a tar of files by name; a number is an image as for `write`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            content = encoded(noise(12, 8, content)) if isinstance(content, int) else content
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()
