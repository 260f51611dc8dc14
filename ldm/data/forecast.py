"""What a training will take, before it begins: steps, epochs, buckets. Times are measured or not said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from statistics import median
from typing import Any

from ldm.config import Recipe
from ldm.data.buckets import ImageSize
from ldm.data.captions import count_tokens
from ldm.data.networks import ModelConfig
from ldm.data.pictures import ImageInfo
from ldm.data.samples import DatasetIssue, ImageSample
from ldm.data.scans import MAX_UPSCALE, cropped_fraction
from ldm.data.visits import BucketBatchSampler


def make_batch_sampler(
    recipe: Recipe, samples: Sequence[ImageSample], image_infos: Sequence[ImageInfo]
) -> BucketBatchSampler:
    """The order in which a recipe sees samples that are whole."""
    shapes = [look.placement.bucket for look in image_infos]
    homes = {bucket: k for k, bucket in enumerate(sorted(set(shapes)))}
    repeats = [sample.repeats for sample in samples]
    return BucketBatchSampler(repeats, [homes[shape] for shape in shapes], recipe.train_batch_size, recipe.seed)


def count_samples_per_bucket(samples: Sequence[ImageSample], image_infos: Sequence[ImageInfo]) -> dict[str, int]:
    """How many visits an epoch makes to each bucket, by its name."""
    counts: Counter[ImageSize] = Counter()
    for sample, look in zip(samples, image_infos, strict=True):
        counts[look.placement.bucket] += sample.repeats
    return {f"{width}x{height}": count for (width, height), count in sorted(counts.items())}


def estimate_schedule(
    recipe: Recipe, samples: Sequence[ImageSample], image_infos: Sequence[ImageInfo]
) -> dict[str, Any]:
    """How often the pictures are seen, and what their buckets do to them."""
    shown = sum(sample.repeats for sample in samples)
    scales = [look.placement.resized_size[0] / look.size[0] for look in image_infos]
    counts = count_samples_per_bucket(samples, image_infos)
    return {
        "pictures": len(samples),
        "visits_per_epoch": shown,
        "steps": recipe.max_train_steps,
        "steps_per_epoch": shown / recipe.train_batch_size,
        "epochs": recipe.max_train_steps * recipe.train_batch_size / shown,
        "buckets": counts,
        "remainders": {name: count % recipe.train_batch_size for name, count in counts.items()},
        "cropped_share": sum(map(cropped_fraction, image_infos)) / len(image_infos),
        "enlarged_pictures": sum(scale > MAX_UPSCALE for scale in scales),
    }


def summarize_caption_lengths(samples: Sequence[ImageSample], model_config: ModelConfig) -> dict[str, Any]:
    """How long the captions are that can be spelled, in tokens."""
    lengths = []
    for sample in samples:
        with suppress(ValueError):
            lengths.append(count_tokens(sample.caption, model_config.tokenizer, model_config.placeholder_tokens))
    room = model_config.tokenizer.model_max_length
    return {
        "median": median(lengths or [0]),
        "longest": max(lengths, default=0),
        "room": room,
        "cut": sum(length > room for length in lengths),
    }


def check_schedule(
    recipe: Recipe, samples: Sequence[ImageSample], image_infos: Sequence[ImageInfo]
) -> Iterator[DatasetIssue]:
    """What the order of batches will do that a person may not expect: never show pictures, or show them twice."""
    steps, batch = recipe.max_train_steps, recipe.train_batch_size
    first = make_batch_sampler(recipe, samples, image_infos).first_step(1)
    if steps < first:
        yield DatasetIssue("too few steps", "max_train_steps", f"{steps}, where {first} would show every picture once")
    for name, count in count_samples_per_bucket(samples, image_infos).items():
        if count < batch:
            yield DatasetIssue(
                "small bucket", name, f"{count} of a batch of {batch}: a batch shows pictures more than once"
            )
