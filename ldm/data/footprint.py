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
from ldm.config import Recipe, TuneObjective
from ldm.data.buckets import Size
from ldm.data.networks import Networks
from ldm.data.pictures import Surveyed
from ldm.data.samples import Fault
from ldm.hardware import MIXED, best_device, frozen_dtype, mixed
from ldm.nn.lora_train import inject
from ldm.nn.unet import UNet

FLOAT, HALF = 4, 2  # bytes
MOMENTS = {"adamw8bit": 2, "prodigy": 4 * FLOAT, "muon": FLOAT}  # bytes that an optimizer keeps of a parameter, mostly
ADAM = 2 * FLOAT


def memory(recipe: Recipe, networks: Networks, shapes: Iterable[Size]) -> dict[str, int]:
    """Bytes that training keeps, by what for; activations are those of the largest bucket's rows on one device.

    Activations are counted from shapes, the U-Net's alone and without kernels' own workspaces or what activation
    checkpointing saves of them. They are affine in the rows, so that one and two tell all.
    """
    learns, rows = trainable(recipe, networks), -(-recipe.train_batch_size // recipe.gradient_accumulation_steps)
    one, two = (activations(recipe, networks, max(shapes, key=_area), batch) for batch in (1, 2))
    parts = {
        "weights_that_learn": learns * FLOAT,
        "gradients": learns * FLOAT,
        "optimizer": learns * MOMENTS.get(recipe.optimizer, ADAM),
        "averages": learns * FLOAT * averages(recipe),
        "frozen_weights": frozen(recipe, networks),
        "activations": one + (rows - 1) * (two - one),
    }
    return {**parts, "total": sum(parts.values())}


def disk(recipe: Recipe, networks: Networks, looks: Sequence[Surveyed]) -> dict[str, int]:
    """Bytes in the output folder at the most, by what for; the oldest checkpoint goes after the newest has come."""
    learns = trainable(recipe, networks)
    snapshots = 2 * (recipe.max_train_steps // recipe.posthoc_steps) if recipe.posthoc_steps else 0
    latents = sum(_area(look.placement.bucket) for look in looks) // networks.downscale**2
    ways = recipe.folder.center_crop * (1 + recipe.folder.random_flip)  # crops at random are not kept
    checkpoint = learns * (FLOAT * (1 + averages(recipe)) + MOMENTS.get(recipe.optimizer, ADAM))
    parts = {
        "checkpoints": checkpoint * (recipe.checkpoints_total_limit + 1),
        "snapshots": learns * snapshots * (FLOAT if recipe.posthoc_dtype == "float32" else HALF),
        "latents": 2 * HALF * networks.vae.config["latent_channels"] * latents * ways,  # mean and deviation
        "export": learns * FLOAT,
    }
    return {**parts, "total": sum(parts.values())}


def room(folder: Path, needed: int) -> Iterator[Fault]:
    """A fault where a disk has fewer bytes free than are needed; the folder may not be there yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        yield Fault("disk", "output_dir", f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _area(size: Size) -> int:
    return size[0] * size[1]


def averages(recipe: Recipe) -> int:
    """How many moving averages a training keeps beside its weights."""
    return 3 if recipe.posthoc_steps else 1


def trainable(recipe: Recipe, networks: Networks) -> int:
    """How many numbers learn."""
    objective, model = tuned(recipe), networks.model
    if objective.method == "textual_inversion":
        return objective.num_vectors * sum(model.networks[name].config.hidden_size for name in model.towers)
    texts = model.towers if objective.train_text_encoder else ()
    return sum(numbers(learner(copy.deepcopy(model.networks[name]), objective), True) for name in ("unet", *texts))


def frozen(recipe: Recipe, networks: Networks) -> int:
    """Bytes of the weights that do not learn."""
    objective = tuned(recipe)
    own = trainable(recipe, networks) if objective.method == "full" else 0
    count = sum(map(numbers, networks.model.networks.values())) - own
    return count * frozen_dtype(objective.frozen_dtype, best_device()).itemsize


def learner(network: nn.Module, objective: TuneObjective) -> nn.Module:
    """A network in which what learns wants a gradient, in place: all of it, adapters, or nothing."""
    network.requires_grad_(objective.method == "full")
    if objective.method == "lora":
        inject(network, objective.targets, objective.rank, objective.alpha, objective.dora)
    return network


def tuned(recipe: Recipe) -> TuneObjective:
    """The objective of a recipe that has networks."""
    assert isinstance(recipe.objective, TuneObjective)
    return recipe.objective


def numbers(network: nn.Module, learning: bool = False) -> int:
    """How many parameters a network has, or how many of them learn."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not learning)


def activations(recipe: Recipe, networks: Networks, bucket: Size, batch: int) -> int:
    """Bytes that the backward pass of the U-Net needs of the forward pass, beside its parameters.

    Its tensors have shapes and no content, so that no memory and next to no time is spent.
    """
    objective, config = tuned(recipe), networks.model.networks["unet"].config
    width, height = (side // networks.downscale for side in bucket)
    reads = objective.train_text_encoder or objective.method == "textual_inversion"
    with torch.device("meta"):
        unet = learner(UNet(config, attention=objective.attention), objective)
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet.to_empty(device="cpu")
        x = torch.zeros(batch, config.in_channels, height, width)
        context = torch.zeros(batch, networks.tokenizer.model_max_length, config.cross_attention_dim)
        added = torch.zeros(batch, config.projection_class_embeddings_input_dim or 0)
        cond = Conditioning(context.requires_grad_(reads), added=added if config.addition_embed_type else None)
        return saved(unet, x, cond, MIXED[mixed(recipe.mixed_precision, best_device())])


def saved(unet: nn.Module, x: Tensor, cond: Conditioning, precision: torch.dtype) -> int:
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
        torch.autocast(x.device.type, precision, enabled=precision != torch.float32),
    ):
        unet(x, torch.zeros(len(x), device=x.device), cond)
    return sum(storage.nbytes() for storage in found.values())
