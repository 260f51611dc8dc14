"""Items: what a job draws once, named by all that the picture depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ldm.pipeline import Pipeline
from ldm.request import Request

DIGITS = 24  # of an id: two of 10^9 items share one with a probability of 10^-11
REALS = {f.name for f in fields(Request) if str(f.type).startswith("float")}


@dataclass(frozen=True)
class Item:
    """A request with its defaults filled in, its id, and the first line of the source that asks for it."""

    id: str
    request: Request
    line: int

    def file(self, suffix: str) -> str:
        """Where its picture lies in the job's folder; the name says nothing of the prompt."""
        return f"images/{self.id[:2]}/{self.id}.{suffix}"


def fingerprint(pipe: Pipeline) -> dict[str, Any]:
    """A model as hashes: of its weights by folder, of its adapters with their weights, of its embeddings by word."""
    loaded = [[adapter.sha256, weight] for adapter, weight in pipe.adapters.loaded.values() if weight]
    words = dict(pipe.embeddings)
    return {"weights": dict(pipe.model.hashes), "adapters": sorted(loaded, key=canonical), "embeddings": words}


def canonical(values: Any) -> str:
    """JSON that is one text for equal values: keys sorted, no spaces, ASCII, floats by repr; ValueError for NaN."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def identify(request: Request, model: Mapping[str, Any]) -> str:
    """An item's id: the first 24 hex digits of SHA-256 over the canonical JSON of its resolved request and its model.

    `model` is a `fingerprint`. A real number is one whether it was written 3 or 3.0.
    """
    record = {k: real(v) if k in REALS else v for k, v in request.record().items()}
    record["guidance_interval"] = [real(v) for v in request.guidance_interval or ()]
    return hashlib.sha256(canonical({"request": record, "model": model}).encode()).hexdigest()[:DIGITS]


def real(value: float | None) -> float | None:
    """A number as a real one."""
    return None if value is None else float(value)
