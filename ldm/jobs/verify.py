"""Verification: an image is generated again from its own metadata and compared, or the hashes that differ are named."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from ldm import __version__
from ldm.checkpoints.families import FAMILIES
from ldm.diffusion.prediction import PREDICTIONS
from ldm.errors import error_text, parse_json
from ldm.image_io import image_digest
from ldm.metadata import read_image_and_metadata, recompress_jpeg
from ldm.nn.vae import vae_scale_factor
from ldm.pipeline.pipeline import PIPELINE_DTYPES, Pipeline
from ldm.pipeline.request import Request, complete_record, upscale_size

PIXEL_TOLERANCE = 1  # of 255: kernels round by the shape of a batch
JPEG_PIXEL_TOLERANCE = 8  # of 255: quantization enlarges such a difference
SHORT_HASH_LENGTH = 10  # digits
MAX_RECORD_LENGTH = 2**20  # characters of a file's metadata
MAX_VERIFY_STEPS = 1000  # sampling steps of an image; with its size they bound the work


class VerifyResult(NamedTuple):
    """Whether a file regenerates, a message, the largest difference of pixels, of 255, and the share that differ."""

    file: Path
    equal: bool
    said: str  # these names are keys of `ldm verify --json`
    worst: int | None = None
    share: float | None = None


Name = Annotated[str, Field(max_length=1000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    """Values of a file's metadata, which anybody may have written: all are typed before one is used."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


class LoadRecord(_Record):
    """How a model was read. Where it lay, a revision, a token and a device are not read from a file."""

    variant: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")] | None = None
    family: Annotated[str, Field(pattern=f"^({'|'.join(FAMILIES)})$")] | None = None
    prediction: Annotated[str, Field(pattern=f"^({'|'.join(PREDICTIONS)})$")] | None = None
    zero_snr: bool | None = None
    ema: bool = False


class AdapterRecord(_Record):
    """A merged adapter: its weight, or those of the U-Net and of the text encoders."""

    name: Name
    sha256: Digest
    weight: FiniteFloat | Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]


class GenerationRecord(_Record):
    """The record `ldm` in an image's metadata, as `Pipeline.metadata` writes it."""

    version: Name = ""
    model: Name = ""
    load: LoadRecord = LoadRecord()
    dtype: Annotated[str, Field(pattern=f"^({'|'.join(PIPELINE_DTYPES)})$")] | None = None
    weights: dict[Name, Digest]
    adapters: list[AdapterRecord]
    embeddings: dict[Name, Digest]
    request: Annotated[dict[str, Any], AfterValidator(complete_record)]
    tensors: list[Name] = []  # fields of a request that were given as tensors, which are not recorded


class RecordedImage(NamedTuple):
    """An image file and the record in its metadata."""

    file: Path
    image: Image.Image
    record: GenerationRecord
    is_jpeg: bool


def read_recorded_image(file: Path) -> RecordedImage:
    """An image file of ours; ValueError where it is no image, or has no valid metadata of ours."""
    image, texts = read_image_and_metadata(file)
    if not (text := texts.get("ldm")):
        raise ValueError(f"{file}: no settings of ldm in it")
    try:
        record = parse_generation_record(text)
    except ValueError as error:
        raise ValueError(f"{file}: its settings of ldm are invalid ({error_text(error)})") from None
    return RecordedImage(file, image, record, file.suffix.lower() in (".jpg", ".jpeg"))


def parse_generation_record(text: str) -> GenerationRecord:
    """The record in a file's metadata; ValueError names the first value that is invalid."""
    if len(text) > MAX_RECORD_LENGTH:
        raise ValueError(f"longer than {MAX_RECORD_LENGTH} characters")
    try:
        return GenerationRecord.model_validate(parse_json(text))
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


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
    """The request in a file's record; ValueError where it gives another size, or the model or an input image differs.

    The work is bounded by the file: by its size in pixels and `MAX_VERIFY_STEPS`.
    """
    if mismatches := find_model_mismatches(original.record, pipe):
        raise ValueError("; ".join(mismatches) + describe_version(original))
    if tensors := original.record.tensors:
        raise ValueError(f"made from tensors that no metadata holds: {', '.join(tensors)}")
    values = {**original.record.request, "output_type": "pil"}
    for name, image in input_images.items():
        if (digest := values.get(name)) is None:
            continue
        if image is None:
            raise ValueError(f"made from an input image: give it by --{name}")
        if image_digest(image) != digest:
            raise ValueError(f"--{name}: not the image that it was made from")
        values[name] = image
    try:
        request = pipe.resolve(Request(**values))
        check_generated_size(request, original.image.size, vae_scale_factor(pipe.model.vae))
        if (request.num_inference_steps or 0) > MAX_VERIFY_STEPS:
            raise ValueError(f"steps {request.num_inference_steps}: at most {MAX_VERIFY_STEPS} are verified")
    except ValueError as error:
        raise ValueError(f"its settings are invalid ({error}){describe_version(original)}") from None
    return request


def check_generated_size(request: Request, size: tuple[int, int], multiple: int) -> None:
    """ValueError where a resolved request gives an image of another size."""
    generated = request.width or 0, request.height or 0
    if request.upscale:
        generated = upscale_size(generated, request.upscale, multiple)
    if generated != size:
        one, other = ("x".join(map(str, pair)) for pair in (size, generated))
        raise ValueError(f"the image has {one} pixels, but is generated with {other}")


def find_model_mismatches(record: GenerationRecord, pipe: Pipeline) -> list[str]:
    """A message for each hash in a file's record that is not the model's."""
    metadata = json.loads(pipe.metadata(pipe.resolve(Request("")), "")["ldm"])
    actual = collect_model_hashes(GenerationRecord.model_validate(metadata))
    recorded = collect_model_hashes(record)
    return [
        f"{name} differs: {shorten_hash(recorded.get(name))} in the file, {shorten_hash(actual.get(name))} here"
        for name in [*recorded, *(actual.keys() - recorded.keys())]
        if recorded.get(name) != actual.get(name)
    ]


def collect_model_hashes(record: GenerationRecord) -> dict[str, Any]:
    """The hashes of weights, adapters (with their weight) and embeddings, by names for messages."""
    adapters = {f"adapter {a.name}": [a.sha256, a.weight] for a in record.adapters}
    embeddings = {f"embedding {token}": digits for token, digits in record.embeddings.items()}
    return {**record.weights, **adapters, **embeddings}


def shorten_hash(value: Any) -> str:
    """A hash, or a list of a hash and a weight, for a message."""
    if value is None:
        return "none"
    digits, *weight = value if isinstance(value, list) else [value]
    return " with weight ".join([str(digits)[:SHORT_HASH_LENGTH], *map(str, weight)])


def compare_pixels(original: RecordedImage, image: Image.Image) -> VerifyResult:
    """Compare RGB pixels; where the file is a JPEG, the generated image is compressed in the same way before."""
    image, tolerance = (recompress_jpeg(image), JPEG_PIXEL_TOLERANCE) if original.is_jpeg else (image, PIXEL_TOLERANCE)
    gaps = np.abs(np.asarray(image.convert("RGB"), np.int16) - np.asarray(original.image, np.int16)).max(-1)
    worst, share = int(gaps.max()), float((gaps > 0).mean())
    message = f"pixels differ by {worst} of 255 at most, {share:.1%} of them at all" if worst else "equal"
    if worst > tolerance:
        message += describe_version(original)
    return VerifyResult(original.file, worst <= tolerance, message, worst, share)


def describe_version(original: RecordedImage) -> str:
    """The version that generated a file, in brackets, where it is another one; else nothing."""
    version = original.record.version
    return "" if version == __version__ else f" (generated by version {version}; this is {__version__})"
