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

from ldm.images import fingerprint
from ldm.jobs.outputs import open_output, through_jpeg
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.version import VERSION

NEAR = 1  # of 255: kernels round by the shape of a batch
NEAR_JPEG = 8  # whose steps make more of such a difference
SHOWN = 10  # digits of a hash


class Verdict(NamedTuple):
    """Of one file: does it regenerate, why not, and by how much of 255 and in what share of pixels it differs."""

    file: Path
    equal: bool
    said: str
    worst: int | None = None
    share: float | None = None


class Claim(NamedTuple):
    """What a file says of itself, and its picture."""

    file: Path
    picture: Image.Image
    record: Mapping[str, Any]
    jpeg: bool


def read_claim(file: Path) -> Claim:
    """ValueError where the file is no picture, or holds no metadata of ours."""
    picture, texts = open_output(file)
    try:
        record = json.loads(texts["ldm"])
        wanted = (("weights", dict), ("request", dict), ("adapters", list), ("embeddings", dict))
        whole = all(isinstance(record.get(name), kind) for name, kind in wanted)
    except (KeyError, ValueError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{file}: no settings of ldm in it")
    return Claim(file, picture, record, file.suffix.lower() in (".jpg", ".jpeg"))


def verify(
    files: Iterable[Path], pipe: Pipeline, image: Image.Image | None = None, mask: Image.Image | None = None
) -> Iterator[Verdict]:
    """A verdict on each file, as they are found. `image` and `mask` are what the pictures began from."""
    known: deque[Verdict] = deque()
    drawn: dict[int, Claim] = {}
    index = count()

    def requests() -> Iterator[Request]:
        for file in files:
            try:
                claim = read_claim(file)
                request = request_of(claim, pipe, {"image": image, "mask": mask})
            except ValueError as error:
                known.append(Verdict(file, False, str(error).removeprefix(f"{file}: ")))
            else:
                drawn[next(index)] = claim
                yield request

    for k, picture in pipe.scheduler.run(requests(), lambda share: None):
        while known:
            yield known.popleft()
        yield compare(drawn.pop(k), picture)
    yield from known


def request_of(claim: Claim, pipe: Pipeline, given: Mapping[str, Image.Image | None]) -> Request:
    """The request that a file says it is of; ValueError where the model differs, or a picture that it began from."""
    if others := differing(claim.record, pipe):
        raise ValueError("; ".join(others) + version(claim))
    values = dict(claim.record["request"])
    for name, picture in given.items():
        if (wanted := values.get(name)) is None:
            continue
        if picture is None:
            raise ValueError(f"began from a picture: give it by --{name}")
        if fingerprint(picture) != wanted:
            raise ValueError(f"--{name}: another picture than the one it began from")
        values[name] = picture
    try:
        return pipe.resolve(Request(**values))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its settings cannot be drawn ({error}){version(claim)}") from None


def differing(record: Mapping[str, Any], pipe: Pipeline) -> list[str]:
    """Which hashes of a file's metadata are not the model's, in words."""
    ours = hashes(json.loads(pipe.texts_of(pipe.resolve(Request("")), "")["ldm"]))
    theirs = hashes(record)
    return [
        f"{name} differs: {short(theirs.get(name))} in the file, {short(ours.get(name))} here"
        for name in [*theirs, *(ours.keys() - theirs.keys())]
        if theirs.get(name) != ours.get(name)
    ]


def hashes(record: Mapping[str, Any]) -> dict[str, Any]:
    """All that metadata say of a model, by names for the eye."""
    adapters = {f"adapter {a.get('name')}": [a.get("sha256"), a.get("weight")] for a in record["adapters"]}
    words = {f"embedding {word}": digits for word, digits in record["embeddings"].items()}
    return {**record["weights"], **adapters, **words}


def short(value: Any) -> str:
    """A hash, or a hash and a weight, as they are shown."""
    if value is None:
        return "none"
    digits, *weight = value if isinstance(value, list) else [value]
    return " with weight ".join([str(digits)[:SHOWN], *map(str, weight)])


def compare(claim: Claim, picture: Image.Image) -> Verdict:
    """Pixels against pixels, RGB; of a JPEG, as one of the drawn picture shows them."""
    if picture.size != claim.picture.size:
        drawn, found = ("x".join(map(str, size)) for size in (picture.size, claim.picture.size))
        return Verdict(claim.file, False, f"is of {found} pixels, and is drawn with {drawn}{version(claim)}")
    picture, near = (through_jpeg(picture), NEAR_JPEG) if claim.jpeg else (picture, NEAR)
    gaps = np.abs(np.asarray(picture.convert("RGB"), np.int16) - np.asarray(claim.picture, np.int16)).max(-1)
    worst, share = int(gaps.max()), float((gaps > 0).mean())
    said = f"pixels differ by {worst} of 255 at most, {share:.1%} of them at all" if worst else "equal"
    return Verdict(claim.file, worst <= near, said + (version(claim) if worst > near else ""), worst, share)


def version(claim: Claim) -> str:
    """A word on the version that drew a picture, where it is another."""
    theirs = claim.record.get("version")
    return "" if theirs == VERSION else f" (drawn by version {theirs}; this is {VERSION})"
