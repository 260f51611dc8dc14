"""Memory and disk that a training will take, counted from its recipe and the shapes of its networks."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ldm.conditioning import Conditioning
from ldm.config import Recipe, FinetuneObjective
from ldm.data.buckets import ImageSize
from ldm.data.networks import ModelConfig
from ldm.data.pictures import ImageInfo
from ldm.data.samples import DatasetIssue
from ldm.hardware import MIXED_PRECISION_DTYPES, best_device, resolve_frozen_dtype, resolve_mixed_precision
from ldm.nn.lora_train import inject_lora
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
