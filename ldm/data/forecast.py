"""What a training will take, before it begins: steps, epochs, buckets. Times are measured or not said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from statistics import median
from typing import Any

from ldm.config import Recipe
from ldm.data.buckets import Size
from ldm.data.captions import token_count
from ldm.data.networks import Networks
from ldm.data.pictures import Surveyed
from ldm.data.samples import Fault, Sample
from ldm.data.scans import ENLARGED, cropped
from ldm.data.visits import Visits


def visits_of(recipe: Recipe, samples: Sequence[Sample], looks: Sequence[Surveyed]) -> Visits:
    """The order in which a recipe sees samples that are whole."""
    shapes = [look.placement.bucket for look in looks]
    homes = {bucket: k for k, bucket in enumerate(sorted(set(shapes)))}
    repeats = [sample.repeats for sample in samples]
    return Visits(repeats, [homes[shape] for shape in shapes], recipe.train_batch_size, recipe.seed)


def buckets_in(samples: Sequence[Sample], looks: Sequence[Surveyed]) -> dict[str, int]:
    """How many visits an epoch makes to each bucket, by its name."""
    counts: Counter[Size] = Counter()
    for sample, look in zip(samples, looks, strict=True):
        counts[look.placement.bucket] += sample.repeats
    return {f"{width}x{height}": count for (width, height), count in sorted(counts.items())}


def schedule(recipe: Recipe, samples: Sequence[Sample], looks: Sequence[Surveyed]) -> dict[str, Any]:
    """How often the pictures are seen, and what their buckets do to them."""
    shown = sum(sample.repeats for sample in samples)
    scales = [look.placement.resized[0] / look.size[0] for look in looks]
    counts = buckets_in(samples, looks)
    return {
        "pictures": len(samples),
        "visits_per_epoch": shown,
        "steps": recipe.max_train_steps,
        "steps_per_epoch": shown / recipe.train_batch_size,
        "epochs": recipe.max_train_steps * recipe.train_batch_size / shown,
        "buckets": counts,
        "remainders": {name: count % recipe.train_batch_size for name, count in counts.items()},
        "cropped_share": sum(map(cropped, looks)) / len(looks),
        "enlarged_pictures": sum(scale > ENLARGED for scale in scales),
    }


def tokens(samples: Sequence[Sample], networks: Networks) -> dict[str, Any]:
    """How long the captions are that can be spelled, in tokens."""
    lengths = []
    for sample in samples:
        with suppress(ValueError):
            lengths.append(token_count(sample.caption, networks.tokenizer, networks.words))
    room = networks.tokenizer.model_max_length
    return {
        "median": median(lengths or [0]),
        "longest": max(lengths, default=0),
        "room": room,
        "cut": sum(length > room for length in lengths),
    }


def course(recipe: Recipe, samples: Sequence[Sample], looks: Sequence[Surveyed]) -> Iterator[Fault]:
    """What the order of batches will do that a person may not expect: never show pictures, or show them twice."""
    steps, batch = recipe.max_train_steps, recipe.train_batch_size
    first = visits_of(recipe, samples, looks).before(1)
    if steps < first:
        yield Fault("too few steps", "max_train_steps", f"{steps}, where {first} would show every picture once")
    for name, count in buckets_in(samples, looks).items():
        if count < batch:
            yield Fault("small bucket", name, f"{count} of a batch of {batch}: a batch shows pictures more than once")
