"""Verification: is a picture what its own metadata say? Drawn again and compared, or which hash differs."""

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
from ldm.jobs.outputs import read_image_and_metadata, roundtrip_jpeg
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request

PIXEL_TOLERANCE = 1  # of 255: kernels round by the shape of a batch
JPEG_PIXEL_TOLERANCE = 8  # whose steps make more of such a difference
SHORT_HASH_LENGTH = 10  # digits of a hash


class VerifyResult(NamedTuple):
    """Of one file: does it regenerate, why not, and by how much of 255 and in what share of pixels it differs."""

    file: Path
    equal: bool
    said: str
    worst: int | None = None
    share: float | None = None


class RecordedImage(NamedTuple):
    """What a file says of itself, and its picture."""

    file: Path
    image: Image.Image
    record: Mapping[str, Any]
    is_jpeg: bool


def read_recorded_image(file: Path) -> RecordedImage:
    """ValueError where the file is no picture, or holds no metadata of ours."""
    picture, texts = read_image_and_metadata(file)
    try:
        record = json.loads(texts["ldm"])
        wanted = (("weights", dict), ("request", dict), ("adapters", list), ("embeddings", dict))
        whole = all(isinstance(record.get(name), kind) for name, kind in wanted)
    except (KeyError, ValueError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{file}: no settings of ldm in it")
    return RecordedImage(file, picture, record, file.suffix.lower() in (".jpg", ".jpeg"))


def verify_images(
    files: Iterable[Path], pipe: Pipeline, image: Image.Image | None = None, mask: Image.Image | None = None
) -> Iterator[VerifyResult]:
    """A verdict on each file, as they are found. `image` and `mask` are what the pictures began from."""
    known: deque[VerifyResult] = deque()
    drawn: dict[int, RecordedImage] = {}
    index = count()

    def requests() -> Iterator[Request]:
        for file in files:
            try:
                claim = read_recorded_image(file)
                request = rebuild_request(claim, pipe, {"image": image, "mask": mask})
            except ValueError as error:
                known.append(VerifyResult(file, False, str(error).removeprefix(f"{file}: ")))
            else:
                drawn[next(index)] = claim
                yield request

    for k, picture in pipe.batch_scheduler.run(requests(), lambda share: None):
        while known:
            yield known.popleft()
        yield compare_pixels(drawn.pop(k), picture)
    yield from known


def rebuild_request(original: RecordedImage, pipe: Pipeline, input_images: Mapping[str, Image.Image | None]) -> Request:
    """The request that a file says it is of; ValueError where the model differs, or a picture that it began from."""
    if others := find_model_mismatches(original.record, pipe):
        raise ValueError("; ".join(others) + describe_version(original))
    values = dict(original.record["request"])
    for name, picture in input_images.items():
        if (wanted := values.get(name)) is None:
            continue
        if picture is None:
            raise ValueError(f"began from a picture: give it by --{name}")
        if image_digest(picture) != wanted:
            raise ValueError(f"--{name}: another picture than the one it began from")
        values[name] = picture
    try:
        return pipe.resolve(Request(**values))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its settings cannot be drawn ({error}){describe_version(original)}") from None


def find_model_mismatches(record: Mapping[str, Any], pipe: Pipeline) -> list[str]:
    """Which hashes of a file's metadata are not the model's, in words."""
    ours = collect_model_hashes(json.loads(pipe.metadata(pipe.resolve(Request("")), "")["ldm"]))
    theirs = collect_model_hashes(record)
    return [
        f"{name} differs: {shorten_hash(theirs.get(name))} in the file, {shorten_hash(ours.get(name))} here"
        for name in [*theirs, *(ours.keys() - theirs.keys())]
        if theirs.get(name) != ours.get(name)
    ]


def collect_model_hashes(record: Mapping[str, Any]) -> dict[str, Any]:
    """All that metadata say of a model, by names for the eye."""
    adapters = {f"adapter {a.get('name')}": [a.get("sha256"), a.get("weight")] for a in record["adapters"]}
    words = {f"embedding {word}": digits for word, digits in record["embeddings"].items()}
    return {**record["weights"], **adapters, **words}


def shorten_hash(value: Any) -> str:
    """A hash, or a hash and a weight, as they are shown."""
    if value is None:
        return "none"
    digits, *weight = value if isinstance(value, list) else [value]
    return " with weight ".join([str(digits)[:SHORT_HASH_LENGTH], *map(str, weight)])


def compare_pixels(original: RecordedImage, image: Image.Image) -> VerifyResult:
    """Pixels against pixels, RGB; of a JPEG, as one of the drawn picture shows them."""
    if image.size != original.image.size:
        drawn, found = ("x".join(map(str, size)) for size in (image.size, original.image.size))
        return VerifyResult(
            original.file, False, f"is of {found} pixels, and is drawn with {drawn}{describe_version(original)}"
        )
    image, near = (roundtrip_jpeg(image), JPEG_PIXEL_TOLERANCE) if original.is_jpeg else (image, PIXEL_TOLERANCE)
    gaps = np.abs(np.asarray(image.convert("RGB"), np.int16) - np.asarray(original.image, np.int16)).max(-1)
    worst, share = int(gaps.max()), float((gaps > 0).mean())
    said = f"pixels differ by {worst} of 255 at most, {share:.1%} of them at all" if worst else "equal"
    return VerifyResult(
        original.file, worst <= near, said + (describe_version(original) if worst > near else ""), worst, share
    )


def describe_version(original: RecordedImage) -> str:
    """A word on the version that drew a picture, where it is another."""
    theirs = original.record.get("version")
    return "" if theirs == __version__ else f" (drawn by version {theirs}; this is {__version__})"
