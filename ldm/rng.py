"""Noise: one generator per image, so that a picture depends on its own seed and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Noise = Callable[[Tensor], Tensor]  # like randn_like; row i is drawn from image i's own generator


def stream(seed: int) -> torch.Generator:
    """The randomness of one image, on the CPU: the same numbers for every device."""
    return torch.Generator().manual_seed(seed)


def noise_from(streams: Sequence[torch.Generator]) -> Noise:
    """Noise whose row i continues `streams[i]`: pictures join and leave a batch with their own stream.

    Drawn as float32 on the CPU, then moved to the device and dtype of the argument [B, ...].
    Raises ValueError where the number of rows is not the number of streams.
    """

    def noise(like: Tensor) -> Tensor:
        if len(like) != len(streams):
            raise ValueError(f"{len(like)} images, but {len(streams)} noise streams")
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in streams]).to(like)

    return noise


def noise_for(seeds: Sequence[int]) -> Noise:
    """Noise of fresh streams: row i of the first draw is diffusers' latent of seed i.

    That is `torch.randn([1, C, h, w], generator=torch.Generator().manual_seed(seed))`.
    """
    return noise_from([stream(seed) for seed in seeds])
