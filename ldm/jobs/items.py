"""Items: what a job draws once, named by all that the picture depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request

ITEM_ID_DIGITS = 24  # of an id: two of 10^9 items share one with a probability of 10^-11
FLOAT_FIELDS = {f.name for f in fields(Request) if str(f.type).startswith("float")}


@dataclass(frozen=True)
class JobItem:
    """A request with its defaults filled in, its id, and the first line of the source that asks for it."""

    id: str
    request: Request
    line: int

    def image_path(self, suffix: str) -> str:
        """Where its picture lies in the job's folder; the name says nothing of the prompt."""
        return f"images/{self.id[:2]}/{self.id}.{suffix}"


def fingerprint_model(pipe: Pipeline) -> dict[str, Any]:
    """A model as hashes: of its weights by folder, of its adapters with their weights, of its embeddings by word."""
    loaded = [[adapter.sha256, weight] for adapter, weight in pipe.adapters.loaded.values() if weight]
    words = dict(pipe.embedding_hashes)
    return {
        "weights": dict(pipe.model.weight_hashes),
        "adapters": sorted(loaded, key=canonical_json),
        "embeddings": words,
    }


def canonical_json(values: Any) -> str:
    """JSON that is one text for equal values: keys sorted, no spaces, ASCII, floats by repr; ValueError for NaN."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def compute_item_id(request: Request, model: Mapping[str, Any]) -> str:
    """An item's id: the first 24 hex digits of SHA-256 over the canonical JSON of its resolved request and its model.

    `model` is a `fingerprint_model`. A real number is one whether it was written 3 or 3.0.
    """
    record = {k: to_optional_float(v) if k in FLOAT_FIELDS else v for k, v in request.to_record().items()}
    record["guidance_interval"] = [to_optional_float(v) for v in request.guidance_interval or ()]
    return hashlib.sha256(canonical_json({"request": record, "model": model}).encode()).hexdigest()[:ITEM_ID_DIGITS]


def to_optional_float(value: float | None) -> float | None:
    """A number as a real one."""
    return None if value is None else float(value)
