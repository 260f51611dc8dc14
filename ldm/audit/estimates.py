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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ldm.adapters.lora_training import inject_lora
from ldm.audit.caption_checks import count_tokens
from ldm.audit.image_checks import MAX_UPSCALE
from ldm.checkpoints.families import LoadOptions
from ldm.checkpoints.formats import CPU_DEVICE, PICTO_PATH, read_model_spec
from ldm.checkpoints.networks import ModelSpec, load_weights, select_weights
from ldm.conditioning import Conditioning
from ldm.config import FinetuneObjective, Recipe
from ldm.data.buckets import ImageSize, format_size
from ldm.data.image_dataset import ImageInfo, make_batch_sampler
from ldm.data.sources import DatasetIssue, ImageSample
from ldm.hardware import MIXED_PRECISION_DTYPES, best_device, resolve_frozen_dtype, resolve_mixed_precision
from ldm.nn.prompts import PlaceholderTokens
from ldm.nn.text_encoders import CLIPTokenizer
from ldm.nn.unet import UNet
from ldm.nn.vae import AutoencoderKL, vae_scale_factor

FP32_BYTES, FP16_BYTES = 4, 2
OPTIMIZER_STATE_BYTES = {
    "adamw8bit": 2,
    "prodigy": 4 * FP32_BYTES,
    "muon": FP32_BYTES,
    "lion": FP32_BYTES,
}  # per parameter
ADAM_STATE_BYTES = 2 * FP32_BYTES  # of all others


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
        objective, networks, text_encoders = self.objective, self.spec.networks, [*self.spec.text_encoder_factories]
        if objective.method == "textual_inversion":
            return objective.num_vectors * sum(networks[name].config.hidden_size for name in text_encoders)
        names = ["unet", *(text_encoders if objective.train_text_encoder else ())]
        copies = [set_trainable(copy.deepcopy(networks[name]), objective) for name in names]
        return sum(p.numel() for network in copies for p in network.parameters() if p.requires_grad)

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
    """Bytes in memory on one device, by purpose, with the rows of one accumulation step from the largest bucket.

    Activations are those of the U-Net, counted from shapes without kernels' workspaces; activation checkpointing is
    ignored. They are affine in the batch size, so batches of 1 and 2 tell all.
    """
    trainable, networks = model_config.num_trainable_parameters, model_config.spec.networks.values()
    frozen = sum(p.numel() for network in networks for p in network.parameters())
    frozen -= trainable if model_config.objective.method == "full" else 0
    rows = -(-recipe.train_batch_size // recipe.gradient_accumulation_steps)
    bucket = max(buckets, key=math.prod)
    one, two = (estimate_activation_bytes(recipe, model_config, bucket, batch_size) for batch_size in (1, 2))
    parts = {
        "trainable_weights": trainable * FP32_BYTES,
        "gradients": trainable * FP32_BYTES,
        "optimizer": trainable * OPTIMIZER_STATE_BYTES.get(recipe.optimizer, ADAM_STATE_BYTES),
        "ema": trainable * FP32_BYTES * count_ema_copies(recipe),
        "frozen_weights": frozen * resolve_frozen_dtype(model_config.objective.frozen_dtype, best_device()).itemsize,
        "activations": one + (rows - 1) * (two - one),
    }
    return {**parts, "total": sum(parts.values())}


def estimate_disk_usage(recipe: Recipe, model_config: ModelConfig, image_infos: Sequence[ImageInfo]) -> dict[str, int]:
    """Bytes in the output folder at most, by purpose; an old checkpoint is removed after a new one is written."""
    trainable = model_config.num_trainable_parameters
    snapshots = 2 * (recipe.max_train_steps // recipe.posthoc_steps) if recipe.posthoc_steps else 0
    latents = sum(math.prod(info.placement.bucket) for info in image_infos) // model_config.vae_scale_factor**2
    latents *= recipe.image_data.center_crop * (1 + recipe.image_data.random_flip)  # random crops are not cached
    channels = model_config.spec.networks["vae"].config["latent_channels"]
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


def count_ema_copies(recipe: Recipe) -> int:
    """The moving averages that a training keeps beside its weights: one, and two for post-hoc EMA."""
    return 3 if recipe.posthoc_steps else 1


def set_trainable(network: nn.Module, objective: FinetuneObjective) -> nn.Module:
    """The network with requires_grad set as its method does, in place: all of it, LoRA adapters, or nothing."""
    network.requires_grad_(objective.method == "full")
    if objective.method == "lora":
        inject_lora(network, objective.targets, objective.rank, objective.alpha, objective.dora)
    return network


def estimate_activation_bytes(recipe: Recipe, model_config: ModelConfig, bucket: ImageSize, batch_size: int) -> int:
    """Bytes that the U-Net saves for the backward pass, beside its parameters; computed with fake tensors."""
    objective, config = model_config.objective, model_config.spec.networks["unet"].config
    width, height = (side // model_config.vae_scale_factor for side in bucket)
    text_learns = objective.train_text_encoder or objective.method == "textual_inversion"
    with torch.device("meta"):
        unet = set_trainable(UNet(config, attention=objective.attention), objective)
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet.to_empty(device="cpu")
        x = torch.zeros(batch_size, config.in_channels, height, width)
        context = torch.zeros(batch_size, model_config.tokenizer.model_max_length, config.cross_attention_dim)
        vector = torch.zeros(batch_size, config.projection_class_embeddings_input_dim or 0)
        cond = Conditioning(context.requires_grad_(text_learns), vector=vector if config.addition_embed_type else None)
        dtype = MIXED_PRECISION_DTYPES[resolve_mixed_precision(recipe.mixed_precision, best_device())]
        return measure_saved_tensor_bytes(unet, x, cond, dtype)


def measure_saved_tensor_bytes(unet: nn.Module, x: Tensor, cond: Conditioning, autocast_dtype: torch.dtype) -> int:
    """Bytes of the storages, except for the parameters', that a forward pass saves for the backward pass."""
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    saved: list[torch.UntypedStorage] = []  # holds the storages: the address of a freed one could be used again

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage())
        return tensor

    autocast = torch.autocast(x.device.type, autocast_dtype, enabled=autocast_dtype != torch.float32)
    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        unet(x, torch.zeros(len(x), device=x.device), cond)
    return sum({storage._cdata: storage.nbytes() for storage in saved if storage._cdata not in own}.values())


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
