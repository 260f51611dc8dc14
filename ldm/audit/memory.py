"""Memory without running: networks of fake tensors, which have shapes and no values, and the peak of what they make."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ldm.conditioning import Conditioning
from ldm.data.buckets import ImageSize
from ldm.nn.unet import UNet
from ldm.nn.vae import AutoencoderKL, decode_latents, encode_images, latent_shape

MAX_HEAP_BYTES = 2**25  # of glibc's malloc, which maps what is larger and gives that back at once


class PeakMemory(TorchDispatchMode):
    """Within the context, bytes of the storages that operations make: those alive, and the most at a time.

    `heap_peak` is that of storages small enough for malloc's heap. Storages that are there before are not counted, nor
    what a kernel takes for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.heap_alive = self.heap_peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tree_map_only(Tensor, lambda a: self._known.add(a.untyped_storage()._cdata), (args, kwargs))
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, output)
        return output

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._known:
            return
        self._known.add(key)
        self._change(size := storage.nbytes())
        self.peak, self.heap_peak = max(self.peak, self.alive), max(self.heap_peak, self.heap_alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._change(-size)

    def _change(self, size: int) -> None:
        self.alive += size
        self.heap_alive += size if abs(size) <= MAX_HEAP_BYTES else 0


def parameter_bytes(*modules: nn.Module) -> int:
    """Bytes of the parameters of modules, each once."""
    return sum(p.nbytes for p in {id(p): p for module in modules for p in module.parameters()}.values())


def materialize(module: nn.Module) -> nn.Module:
    """A module on the meta device with fake values instead, in place; for use within FakeTensorMode."""
    return module.to_empty(device="cpu")


def sampling_bytes(unet: UNet, vae: AutoencoderKL, size: ImageSize, images: int, autocast_dtype: torch.dtype) -> int:
    """Bytes beside the weights that generating images with guidance takes, of a step and of the decoder.

    Both count: the decoder has a thread, and so a heap, of its own, and malloc does not return the step's before.
    The networks are on the meta device, and are not changed; their dtype is that of the weights.
    """
    width, height = size
    unet, vae = copy.deepcopy((unet, vae))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), cpu_autocast(autocast_dtype):
        materialize(unet)
        materialize(vae)
        latents = torch.zeros(images, *latent_shape(vae, height, width))
        x = torch.zeros(2 * images, unet.config.in_channels, *latents.shape[2:])
        cond = make_conditioning(unet, 2 * images)
        with PeakMemory() as step:
            cond = unet.compute_kv_cache(cond)
            unet(x, torch.zeros(2 * images), cond)
        with PeakMemory() as decoder:
            decode_latents(vae, latents)
    return step.peak + decoder.peak


def encoding_bytes(vae: AutoencoderKL, size: ImageSize, images: int) -> int:
    """Bytes beside the weights that encoding a batch of images to latents takes."""
    vae = copy.deepcopy(vae)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        materialize(vae)
        pixels = torch.zeros(images, 3, *size[::-1])
        with PeakMemory() as memory:
            encode_images(vae, pixels)
    return memory.peak + pixels.nbytes


def make_conditioning(unet: UNet, rows: int, tokens: int = 77) -> Conditioning:
    """A conditioning of zeros, as a network takes it."""
    context = torch.zeros(rows, tokens, unet.config.cross_attention_dim)
    if not unet.config.addition_embed_type:
        return Conditioning(context)
    return Conditioning(context, vector=torch.zeros(rows, unet.config.projection_class_embeddings_input_dim or 0))


def cpu_autocast(dtype: torch.dtype) -> torch.autocast:
    """A context in which fake tensors are cast as a training's are; none for float32."""
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
