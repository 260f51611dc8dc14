"""Verification: an image is generated again from its own metadata and compared, or the hashes that differ are named."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm import __version__
from ldm.image_io import image_digest
from ldm.metadata import read_image_and_metadata, recompress_jpeg
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request

PIXEL_TOLERANCE = 1  # of 255: kernels round by the shape of a batch
JPEG_PIXEL_TOLERANCE = 8  # of 255: quantization enlarges such a difference
SHORT_HASH_LENGTH = 10  # digits


class VerifyResult(NamedTuple):
    """Whether a file regenerates, a message, the largest difference of pixels, of 255, and the share that differ."""

    file: Path
    equal: bool
    said: str  # these names are keys of `ldm verify --json`
    worst: int | None = None
    share: float | None = None


class RecordedImage(NamedTuple):
    """An image file and the record in its metadata."""

    file: Path
    image: Image.Image
    record: Mapping[str, Any]
    is_jpeg: bool


def read_recorded_image(file: Path) -> RecordedImage:
    """An image file of ours; ValueError where it is no image, or has no metadata of ours."""
    image, texts = read_image_and_metadata(file)
    try:
        record = json.loads(texts["ldm"])
        types = {"weights": dict, "request": dict, "adapters": list, "embeddings": dict}
        is_complete = all(isinstance(record.get(name), kind) for name, kind in types.items())
    except (KeyError, ValueError, AttributeError, RecursionError):
        is_complete = False
    if not is_complete:
        raise ValueError(f"{file}: no settings of ldm in it")
    return RecordedImage(file, image, record, file.suffix.lower() in (".jpg", ".jpeg"))


def verify_images(
    files: Iterable[Path], pipe: Pipeline, image: Image.Image | None = None, mask: Image.Image | None = None
) -> Iterator[VerifyResult]:
    """A result for each file, as images are finished; `image` and `mask` are the inputs of img2img and inpainting."""
    failed: deque[VerifyResult] = deque()
    originals: dict[int, RecordedImage] = {}
    index = count()

    def iter_requests() -> Iterator[Request]:
        for file in files:
            try:
                original = read_recorded_image(file)
                request = rebuild_request(original, pipe, {"image": image, "mask": mask})
            except ValueError as error:
                failed.append(VerifyResult(file, False, str(error).removeprefix(f"{file}: ")))
            else:
                originals[next(index)] = original
                yield request

    for k, generated in pipe.batch_scheduler.run(iter_requests(), lambda progress_delta: None):
        while failed:
            yield failed.popleft()
        yield compare_pixels(originals.pop(k), generated)
    yield from failed


def rebuild_request(original: RecordedImage, pipe: Pipeline, input_images: Mapping[str, Image.Image | None]) -> Request:
    """The request in a file's record; ValueError where the model or an input image is another one."""
    if mismatches := find_model_mismatches(original.record, pipe):
        raise ValueError("; ".join(mismatches) + describe_version(original))
    if tensors := original.record.get("tensors"):
        raise ValueError(f"made from tensors that no metadata holds: {tensors!r:.100}")
    values = {**original.record["request"], "output_type": "pil"}
    for name, image in input_images.items():
        if (digest := values.get(name)) is None:
            continue
        if image is None:
            raise ValueError(f"made from an input image: give it by --{name}")
        if image_digest(image) != digest:
            raise ValueError(f"--{name}: not the image that it was made from")
        values[name] = image
    try:
        return pipe.resolve(Request(**values))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its settings are invalid ({error}){describe_version(original)}") from None


def find_model_mismatches(record: Mapping[str, Any], pipe: Pipeline) -> list[str]:
    """A message for each hash in a file's record that is not the model's."""
    actual = collect_model_hashes(json.loads(pipe.metadata(pipe.resolve(Request("")), "")["ldm"]))
    recorded = collect_model_hashes(record)
    return [
        f"{name} differs: {shorten_hash(recorded.get(name))} in the file, {shorten_hash(actual.get(name))} here"
        for name in [*recorded, *(actual.keys() - recorded.keys())]
        if recorded.get(name) != actual.get(name)
    ]


def collect_model_hashes(record: Mapping[str, Any]) -> dict[str, Any]:
    """The hashes of weights, adapters (with their weight) and embeddings, by names for messages."""
    adapters = {f"adapter {a.get('name')}": [a.get("sha256"), a.get("weight")] for a in record["adapters"]}
    embeddings = {f"embedding {token}": digits for token, digits in record["embeddings"].items()}
    return {**record["weights"], **adapters, **embeddings}


def shorten_hash(value: Any) -> str:
    """A hash, or a list of a hash and a weight, for a message."""
    if value is None:
        return "none"
    digits, *weight = value if isinstance(value, list) else [value]
    return " with weight ".join([str(digits)[:SHORT_HASH_LENGTH], *map(str, weight)])


def compare_pixels(original: RecordedImage, image: Image.Image) -> VerifyResult:
    """Compare RGB pixels; where the file is a JPEG, the generated image is compressed in the same way before."""
    if image.size != original.image.size:
        found, generated = ("x".join(map(str, size)) for size in (original.image.size, image.size))
        message = f"has {found} pixels, but is generated with {generated}{describe_version(original)}"
        return VerifyResult(original.file, False, message)
    image, tolerance = (recompress_jpeg(image), JPEG_PIXEL_TOLERANCE) if original.is_jpeg else (image, PIXEL_TOLERANCE)
    gaps = np.abs(np.asarray(image.convert("RGB"), np.int16) - np.asarray(original.image, np.int16)).max(-1)
    worst, share = int(gaps.max()), float((gaps > 0).mean())
    message = f"pixels differ by {worst} of 255 at most, {share:.1%} of them at all" if worst else "equal"
    if worst > tolerance:
        message += describe_version(original)
    return VerifyResult(original.file, worst <= tolerance, message, worst, share)


def describe_version(original: RecordedImage) -> str:
    """The version that generated a file, in brackets, where it is another one; else nothing."""
    version = original.record.get("version")
    return "" if version == __version__ else f" (generated by version {version}; this is {__version__})"
