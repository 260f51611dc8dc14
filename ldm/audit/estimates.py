"""Memory and disk that a training will take, counted from its recipe and the shapes of its networks.

What a training will take, before it begins: steps, epochs, buckets. Times are measured or not said."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ldm.adapters.lora_training import inject_lora
from ldm.audit.caption_checks import count_tokens
from ldm.audit.image_checks import MAX_UPSCALE, cropped_fraction
from ldm.audit.model_config import ModelConfig
from ldm.conditioning import Conditioning
from ldm.config import FinetuneObjective, Recipe
from ldm.data.batch_sampler import BucketBatchSampler
from ldm.data.buckets import ImageSize
from ldm.data.image_dataset import ImageInfo
from ldm.data.sources import DatasetIssue, ImageSample
from ldm.hardware import MIXED_PRECISION_DTYPES, best_device, resolve_frozen_dtype, resolve_mixed_precision
from ldm.nn.unet import UNet

FP32_BYTES, FP16_BYTES = 4, 2  # bytes
OPTIMIZER_STATE_BYTES = {
    "adamw8bit": 2,
    "prodigy": 4 * FP32_BYTES,
    "muon": FP32_BYTES,
}  # bytes that an optimizer keeps of a parameter, mostly
ADAM_STATE_BYTES = 2 * FP32_BYTES


def estimate_memory(recipe: Recipe, model_config: ModelConfig, buckets: Iterable[ImageSize]) -> dict[str, int]:
    """Bytes that training keeps, by what for; activations are those of the largest bucket's rows on one device.

    Activations are counted from shapes, the U-Net's alone and without kernels' own workspaces or what activation
    checkpointing saves of them. They are affine in the rows, so that one and two tell all.
    """
    learns, rows = (
        count_trainable_parameters(recipe, model_config),
        -(-recipe.train_batch_size // recipe.gradient_accumulation_steps),
    )
    one, two = (
        estimate_activation_bytes(recipe, model_config, max(buckets, key=_num_pixels), batch) for batch in (1, 2)
    )
    parts = {
        "weights_that_learn": learns * FP32_BYTES,
        "gradients": learns * FP32_BYTES,
        "optimizer": learns * OPTIMIZER_STATE_BYTES.get(recipe.optimizer, ADAM_STATE_BYTES),
        "averages": learns * FP32_BYTES * count_ema_copies(recipe),
        "frozen_weights": frozen_weight_bytes(recipe, model_config),
        "activations": one + (rows - 1) * (two - one),
    }
    return {**parts, "total": sum(parts.values())}


def estimate_disk_usage(recipe: Recipe, model_config: ModelConfig, image_infos: Sequence[ImageInfo]) -> dict[str, int]:
    """Bytes in the output folder at the most, by what for; the oldest checkpoint goes after the newest has come."""
    learns = count_trainable_parameters(recipe, model_config)
    snapshots = 2 * (recipe.max_train_steps // recipe.posthoc_steps) if recipe.posthoc_steps else 0
    latents = sum(_num_pixels(look.placement.bucket) for look in image_infos) // model_config.vae_scale_factor**2
    ways = recipe.image_data.center_crop * (1 + recipe.image_data.random_flip)  # crops at random are not kept
    checkpoint = learns * (
        FP32_BYTES * (1 + count_ema_copies(recipe)) + OPTIMIZER_STATE_BYTES.get(recipe.optimizer, ADAM_STATE_BYTES)
    )
    parts = {
        "checkpoints": checkpoint * (recipe.checkpoints_total_limit + 1),
        "snapshots": learns * snapshots * (FP32_BYTES if recipe.posthoc_dtype == "float32" else FP16_BYTES),
        "latents": 2 * FP16_BYTES * model_config.vae.config["latent_channels"] * latents * ways,  # mean and deviation
        "export": learns * FP32_BYTES,
    }
    return {**parts, "total": sum(parts.values())}


def check_disk_space(folder: Path, needed: int) -> Iterator[DatasetIssue]:
    """A fault where a disk has fewer bytes free than are needed; the folder may not be there yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        yield DatasetIssue("disk", "output_dir", f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _num_pixels(size: ImageSize) -> int:
    return size[0] * size[1]


def count_ema_copies(recipe: Recipe) -> int:
    """How many moving averages a training keeps beside its weights."""
    return 3 if recipe.posthoc_steps else 1


def count_trainable_parameters(recipe: Recipe, model_config: ModelConfig) -> int:
    """How many numbers learn."""
    objective, model = get_finetune_objective(recipe), model_config.spec
    if objective.method == "textual_inversion":
        return objective.num_vectors * sum(
            model.networks[name].config.hidden_size for name in model.text_encoder_factories
        )
    texts = model.text_encoder_factories if objective.train_text_encoder else ()
    return sum(
        count_parameters(set_trainable(copy.deepcopy(model.networks[name]), objective), True)
        for name in ("unet", *texts)
    )


def frozen_weight_bytes(recipe: Recipe, model_config: ModelConfig) -> int:
    """Bytes of the weights that do not learn."""
    objective = get_finetune_objective(recipe)
    own = count_trainable_parameters(recipe, model_config) if objective.method == "full" else 0
    count = sum(map(count_parameters, model_config.spec.networks.values())) - own
    return count * resolve_frozen_dtype(objective.frozen_dtype, best_device()).itemsize


def set_trainable(network: nn.Module, objective: FinetuneObjective) -> nn.Module:
    """A network in which what learns wants a gradient, in place: all of it, adapters, or nothing."""
    network.requires_grad_(objective.method == "full")
    if objective.method == "lora":
        inject_lora(network, objective.targets, objective.rank, objective.alpha, objective.dora)
    return network


def get_finetune_objective(recipe: Recipe) -> FinetuneObjective:
    """The objective of a recipe that has networks."""
    assert isinstance(recipe.objective, FinetuneObjective)
    return recipe.objective


def count_parameters(network: nn.Module, trainable_only: bool = False) -> int:
    """How many parameters a network has, or how many of them learn."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trainable_only)


def estimate_activation_bytes(recipe: Recipe, model_config: ModelConfig, bucket: ImageSize, batch_size: int) -> int:
    """Bytes that the backward pass of the U-Net needs of the forward pass, beside its parameters.

    Its tensors have shapes and no content, so that no memory and next to no time is spent.
    """
    objective, config = get_finetune_objective(recipe), model_config.spec.networks["unet"].config
    width, height = (side // model_config.vae_scale_factor for side in bucket)
    reads = objective.train_text_encoder or objective.method == "textual_inversion"
    with torch.device("meta"):
        unet = set_trainable(UNet(config, attention=objective.attention), objective)
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet.to_empty(device="cpu")
        x = torch.zeros(batch_size, config.in_channels, height, width)
        context = torch.zeros(batch_size, model_config.tokenizer.model_max_length, config.cross_attention_dim)
        added = torch.zeros(batch_size, config.projection_class_embeddings_input_dim or 0)
        cond = Conditioning(context.requires_grad_(reads), vector=added if config.addition_embed_type else None)
        return measure_saved_tensor_bytes(
            unet, x, cond, MIXED_PRECISION_DTYPES[resolve_mixed_precision(recipe.mixed_precision, best_device())]
        )


def measure_saved_tensor_bytes(unet: nn.Module, x: Tensor, cond: Conditioning, autocast_dtype: torch.dtype) -> int:
    """Bytes of all storages but the parameters' that a forward pass leaves for the backward pass."""
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    found: dict[int, Any] = {}  # the storages themselves: one that is freed could give its number to the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(x.device.type, autocast_dtype, enabled=autocast_dtype != torch.float32),
    ):
        unet(x, torch.zeros(len(x), device=x.device), cond)
    return sum(storage.nbytes() for storage in found.values())


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
