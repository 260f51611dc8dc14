"""The resources that training needs, from recipe and network configurations: memory, disk, steps and epochs."""

from __future__ import annotations

import copy
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.audit.caption_checks import count_tokens
from ldm.audit.image_checks import MAX_UPSCALE
from ldm.audit.memory import (
    PeakMemory,
    cpu_autocast,
    encoding_bytes,
    make_conditioning,
    materialize,
    parameter_bytes,
    sampling_bytes,
)
from ldm.checkpoints.families import LoadOptions
from ldm.checkpoints.formats import CPU_DEVICE, PICTO_PATH, Checkpoint, choose_dtypes, read_model_spec
from ldm.checkpoints.networks import NUM_TIME_IDS, ModelSpec, load_weights, select_weights
from ldm.config import FinetuneObjective, Recipe
from ldm.data.buckets import ImageSize, format_size
from ldm.data.image_dataset import ImageInfo, make_batch_sampler
from ldm.data.sources import DatasetIssue, ImageSample
from ldm.hardware import (
    MIXED_PRECISION_DTYPES,
    best_device,
    memory_bytes,
    preferred_dtype,
    resolve_frozen_dtype,
    resolve_mixed_precision,
    to_device,
)
from ldm.nn.prompts import PlaceholderTokens
from ldm.nn.tokenizer import CLIPTokenizer
from ldm.nn.unet import native_size
from ldm.nn.vae import AutoencoderKL, latent_shape, vae_scale_factor
from ldm.pipeline.pipeline import choose_dtype
from ldm.train.methods import FINETUNE_METHODS, float32_components
from ldm.train.task import trainable_parameters
from ldm.train.trainable import TokenizedCaptions, TrainableModel, cast_frozen_parameters

FP32_BYTES, FP16_BYTES = 4, 2
OPTIMIZER_STATE_BYTES = {
    "adamw8bit": 2,
    "prodigy": 4 * FP32_BYTES,
    "muon": FP32_BYTES,
    "lion": FP32_BYTES,
}  # per parameter
ADAM_STATE_BYTES = 2 * FP32_BYTES  # of all others
# Python and libraries, on a CPU: scripts/bench_memory.py
PROCESS_BYTES, TRAINING_PROCESS_BYTES = 340_000_000, 660_000_000
HEAP_HOLES = 0.5  # bytes without use for each in use, in malloc's heap at a training's peak: likewise
SAMPLED_TOGETHER = 8  # images at most: `Pipeline`'s batch size


@dataclass(frozen=True)
class ModelConfig:
    """A pretrained model on the meta device, how it is fine-tuned, its tokenizer, and the tokens to be learned."""

    spec: ModelSpec
    objective: FinetuneObjective
    tokenizer: CLIPTokenizer
    placeholder_tokens: PlaceholderTokens

    @property
    def vae_scale_factor(self) -> int:
        """The side of a latent in pixels."""
        return vae_scale_factor(self.spec.networks["vae"])

    @cached_property
    def num_trainable_parameters(self) -> int:
        """The number of parameters that the objective trains."""
        return sum(p.numel() for p in trainable_parameters(TrainableModel(self.prepare())).values())

    def prepare(self) -> Checkpoint:
        """The model on the meta device, as it is trained: frozen weights in their dtype, and what the method adds."""
        frozen = resolve_frozen_dtype(self.objective.frozen_dtype, best_device())
        dtypes = choose_dtypes(self.spec, frozen, float32_components(self.objective))
        memo: dict[int, Any] = {}
        networks = {name: copy.deepcopy(network, memo) for name, network in self.spec.networks.items()}
        for name, network in networks.items():
            to_device(network, torch.device("meta"), dtypes[name]).requires_grad_(False)
        encoders = tuple(factory(networks[name]) for name, factory in self.spec.text_encoder_factories.items())
        networks["unet"].attention = self.objective.attention
        # what is predicted, and under which SDE, takes no memory
        model = Checkpoint(networks["unet"], networks["vae"], encoders, None, None)  # type: ignore[arg-type]
        model = FINETUNE_METHODS[self.objective.method].prepare(model, self.objective)
        for network in model.networks.values():
            cast_frozen_parameters(network, frozen)
        return model

    def load_vae(self) -> AutoencoderKL:
        """The autoencoder with its weights, float32 on the CPU; no other network's are read."""
        vae = self.spec.networks["vae"]
        groups = [select_weights(group, {"vae"}) for group in self.spec.shard_groups]
        load_weights({"vae": vae}, groups, CPU_DEVICE, {"vae": torch.float32})
        return vae


def load_model_config(recipe: Recipe) -> ModelConfig:
    """A recipe's model. ValueError for a missing or wrong file, or an objective that does not fine-tune a model."""
    objective = recipe.objective
    if not isinstance(objective, FinetuneObjective):
        raise ValueError(f"objective {objective.kind} is not trained on image folders; use kind: tune")
    options = LoadOptions(revision=objective.revision, variant=objective.variant)
    spec = read_model_spec(objective.pretrained_model_name_or_path or PICTO_PATH, options)
    name, make_text_encoder = next(iter(spec.text_encoder_factories.items()))
    token = objective.placeholder_token if objective.method == "textual_inversion" else None
    placeholder_tokens = {token: tuple(range(objective.num_vectors))} if token else {}
    return ModelConfig(spec, objective, make_text_encoder(spec.networks[name]).tokenizer, placeholder_tokens)


def estimate_memory(recipe: Recipe, model_config: ModelConfig, buckets: Iterable[ImageSize]) -> dict[str, int]:
    """Bytes in memory on one device at the peak, by purpose; on a CPU with the process's own.

    `activations` are a step's, with the rows of one accumulation step from the largest bucket; `sampling` is what
    encoding images, or generating those of a class or of validation prompts, takes beyond a step, be it before, between
    or after the steps. They come from shapes. `allocator` is what malloc's heap holds without use. Processes that load
    data are not counted.
    """
    trainable, bucket = model_config.num_trainable_parameters, max(buckets, key=math.prod)
    weights = parameter_bytes(*model_config.prepare().networks.values())
    rows = -(-recipe.train_batch_size // recipe.gradient_accumulation_steps)
    parts = {
        "trainable_weights": trainable * FP32_BYTES,
        "gradients": trainable * FP32_BYTES,
        "optimizer": trainable * OPTIMIZER_STATE_BYTES.get(recipe.optimizer, ADAM_STATE_BYTES),
        "ema": trainable * FP32_BYTES * count_ema_copies(recipe),
        "frozen_weights": weights - trainable * FP32_BYTES,
    }
    on_cpu, step = best_device().type == "cpu", measure_step(recipe, model_config, bucket, rows)
    kept = sum(parts.values()) - parts["gradients"]
    beside = max(
        weights + before_training_bytes(recipe, model_config, bucket, rows) - kept,
        beside_steps_bytes(recipe, model_config, bucket, rows),
        after_training_bytes(recipe, model_config) - kept,
    )
    parts["activations"] = step.peak - parts["gradients"]
    parts["allocator"] = int(HEAP_HOLES * step.heap_peak) if on_cpu else 0
    parts["sampling"] = max(0, beside - step.peak - parts["allocator"])
    parts["process"] = TRAINING_PROCESS_BYTES if on_cpu else 0
    return {**parts, "total": sum(parts.values())}


def before_training_bytes(recipe: Recipe, model_config: ModelConfig, bucket: ImageSize, rows: int) -> int:
    """Bytes beside the weights that class images, and latents that are cached, take before there is an optimizer."""
    model, objective, data = model_config.prepare(), model_config.objective, recipe.image_data
    needed = [encoding_bytes(model.vae, bucket, recipe.train_batch_size)] if data.center_crop else [0]
    if objective.prior_preservation and objective.num_class_images:
        unet = model_config.spec.networks["unet"]
        images, size = min(SAMPLED_TOGETHER, objective.num_class_images), (data.resolution, data.resolution)
        dtype = next(model.unet.parameters()).dtype if objective.method == "full" else model.vae.dtype
        unet = to_device(copy.deepcopy(unet), torch.device("meta"), dtype)
        needed.append(sampling_bytes(unet, model.vae, size, images, torch.float32))
    return max(needed)


def beside_steps_bytes(recipe: Recipe, model_config: ModelConfig, bucket: ImageSize, rows: int) -> int:
    """Bytes that encoding a batch, and generating images of the validation prompts, take beside all that is kept."""
    model = model_config.prepare()
    needed = [0 if recipe.image_data.center_crop else encoding_bytes(model.vae, bucket, rows)]
    if prompts := recipe.validation_prompts:
        images, dtype = min(SAMPLED_TOGETHER, len(prompts)), preferred_dtype(best_device())
        needed.append(sampling_bytes(model.unet, model.vae, sample_size(model_config), images, dtype))
    return max(needed)


def after_training_bytes(recipe: Recipe, model_config: ModelConfig) -> int:
    """Bytes of the model card's samples: a pipeline in its default dtype, with what an adapter's merging keeps.

    The training's own networks are freed before.
    """
    if not recipe.validation_prompts:
        return 0
    dtype = choose_dtype("auto", best_device())
    networks = copy_networks(model_config.spec, dtype)
    named = [pair for network in model_config.prepare().networks.values() for pair in network.named_parameters()]
    merged = sum(p.numel() for name, p in named if name.endswith(".base_layer.weight")) * dtype.itemsize
    images, size = min(SAMPLED_TOGETHER, len(recipe.validation_prompts)), sample_size(model_config)
    sampled = sampling_bytes(networks["unet"], networks["vae"], size, images, torch.float32)
    return parameter_bytes(*networks.values()) + merged + sampled


def sample_size(model_config: ModelConfig) -> ImageSize:
    """Width and height of the images of validation prompts: the model's own."""
    height, width = native_size(model_config.spec.networks["unet"].config)
    return width * model_config.vae_scale_factor, height * model_config.vae_scale_factor


def measure_step(recipe: Recipe, model_config: ModelConfig, bucket: ImageSize, rows: int) -> PeakMemory:
    """What a forward and a backward pass take beside the weights, gradients included, with fake tensors."""
    objective, tokenizer = model_config.objective, model_config.tokenizer
    model, dtype = (
        model_config.prepare(),
        MIXED_PRECISION_DTYPES[resolve_mixed_precision(recipe.mixed_precision, best_device())],
    )
    model.unet.gradient_checkpointing = recipe.gradient_checkpointing
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = TrainableModel(model)
        materialize(trained)
        x = torch.zeros(rows, model.unet.config.in_channels, *latent_shape(model.vae, bucket[1], bucket[0])[1:])
        text: Any = make_conditioning(model.unet, rows, tokenizer.model_max_length)
        if objective.train_text_encoder or objective.method == "textual_inversion":
            ids = [torch.zeros(rows, tokenizer.model_max_length, dtype=torch.long) for _ in model.text_encoders]
            text = TokenizedCaptions(ids, torch.ones(rows), torch.zeros(rows, NUM_TIME_IDS))
        with PeakMemory() as memory:
            with cpu_autocast(dtype):
                output = trained(x, torch.zeros(rows), text)
            output.float().square().mean().backward()
    return memory


def copy_networks(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """A model's networks on the meta device, in the dtypes in which a pipeline of that dtype has them."""
    dtypes = choose_dtypes(spec, dtype)
    return {n: to_device(copy.deepcopy(a), torch.device("meta"), dtypes[n]) for n, a in spec.networks.items()}


def estimate_generation(spec: ModelSpec, dtype: torch.dtype, sizes: Iterable[ImageSize]) -> dict[str, int]:
    """Bytes at the peak of loading a model, and of generating one image of each size with guidance, on one device."""
    networks = copy_networks(spec, dtype)
    loaded = parameter_bytes(*networks.values()) + (PROCESS_BYTES if best_device().type == "cpu" else 0)
    unet, vae = networks["unet"], networks["vae"]
    generated = {format_size(size): loaded + sampling_bytes(unet, vae, size, 1, torch.float32) for size in sizes}
    return {"load": loaded, **generated}


def estimate_disk_usage(recipe: Recipe, model_config: ModelConfig, image_infos: Sequence[ImageInfo]) -> dict[str, int]:
    """Bytes in the output folder at most, by purpose; an old checkpoint is removed after a new one is written."""
    trainable = model_config.num_trainable_parameters
    snapshots = 2 * (recipe.max_train_steps // recipe.posthoc_steps) if recipe.posthoc_steps else 0
    latents = sum(math.prod(info.placement.bucket) for info in image_infos) // model_config.vae_scale_factor**2
    latents *= recipe.image_data.center_crop * (1 + recipe.image_data.random_flip)  # random crops are not cached
    channels = model_config.spec.networks["vae"].config.latent_channels
    optimizer = OPTIMIZER_STATE_BYTES.get(recipe.optimizer, ADAM_STATE_BYTES)
    checkpoint = trainable * (FP32_BYTES * (1 + count_ema_copies(recipe)) + optimizer)
    parts = {
        "checkpoints": checkpoint * (recipe.checkpoints_total_limit + 1),
        "ema_snapshots": trainable * snapshots * (FP32_BYTES if recipe.posthoc_dtype == "float32" else FP16_BYTES),
        "latent_cache": 2 * FP16_BYTES * channels * latents,  # mean and standard deviation
        "export": trainable * FP32_BYTES,
    }
    return {**parts, "total": sum(parts.values())}


def check_disk_space(folder: Path, needed: int) -> Iterator[DatasetIssue]:
    """An issue if the folder's disk has fewer bytes free than needed; the folder may not exist yet."""
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        what = f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        yield DatasetIssue("disk space", "output_dir", what)


def check_memory(needed: int) -> Iterator[DatasetIssue]:
    """An issue if the device has less memory than needed, used or not."""
    device = best_device()
    if needed > (total := memory_bytes(device)):
        what = f"{needed / 1e9:.1f} GB are needed, the {device.type} has {total / 1e9:.1f} GB"
        yield DatasetIssue("memory", "recipe", what)


def count_ema_copies(recipe: Recipe) -> int:
    """The moving averages that a training keeps beside its weights: one, and two for post-hoc EMA."""
    return 3 if recipe.posthoc_steps else 1


def count_samples_per_bucket(samples: Sequence[ImageSample], image_infos: Sequence[ImageInfo]) -> dict[str, int]:
    """The samples of an epoch, repeats included, by bucket size."""
    counts: Counter[ImageSize] = Counter()
    for sample, info in zip(samples, image_infos, strict=True):
        counts[info.placement.bucket] += sample.repeats
    return {format_size(bucket): count for bucket, count in sorted(counts.items())}


def estimate_schedule(
    recipe: Recipe, samples: Sequence[ImageSample], image_infos: Sequence[ImageInfo]
) -> dict[str, Any]:
    """Steps and epochs, the buckets, and what they do to the images."""
    epoch, batch_size = sum(sample.repeats for sample in samples), recipe.train_batch_size
    counts = count_samples_per_bucket(samples, image_infos)
    return {
        "images": len(samples),
        "samples_per_epoch": epoch,
        "steps": recipe.max_train_steps,
        "steps_per_epoch": epoch / batch_size,
        "epochs": recipe.max_train_steps * batch_size / epoch,
        "buckets": counts,
        "remainders": {name: count % batch_size for name, count in counts.items()},
        "cropped_fraction": sum(info.placement.cropped_fraction for info in image_infos) / len(image_infos),
        "enlarged_images": sum(i.placement.resized_size[0] / i.size[0] > MAX_UPSCALE for i in image_infos),
    }


def summarize_caption_lengths(samples: Sequence[ImageSample], model_config: ModelConfig) -> dict[str, Any]:
    """Lengths of the tokenizable captions, in tokens."""
    lengths = []
    for sample in samples:
        with suppress(ValueError):
            lengths.append(count_tokens(sample.caption, model_config.tokenizer, model_config.placeholder_tokens))
    limit = model_config.tokenizer.model_max_length
    summary = {"median": median(lengths or [0]), "longest": max(lengths, default=0), "limit": limit}
    return {**summary, "truncated": sum(length > limit for length in lengths)}


def check_schedule(
    recipe: Recipe, samples: Sequence[ImageSample], image_infos: Sequence[ImageInfo]
) -> Iterator[DatasetIssue]:
    """Issues for images that training never reaches, and buckets smaller than a batch."""
    steps, batch_size = recipe.max_train_steps, recipe.train_batch_size
    epoch = make_batch_sampler(samples, image_infos, batch_size, recipe.seed).first_step(1)
    if steps < epoch:
        yield DatasetIssue("too few steps", "max_train_steps", f"{steps}, but {epoch} show every image once")
    for name, count in count_samples_per_bucket(samples, image_infos).items():
        if count < batch_size:
            what = f"{count} samples, the batch size is {batch_size}: a batch has images more than once"
            yield DatasetIssue("small bucket", name, what)
