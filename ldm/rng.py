"""Noise: one generator per image, so that an image depends on its own seed and on nothing else."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

TORCH_SEEDS = 2**32  # torch's CPU generator keeps the low 32 bits of a seed
BROWNIAN_TREE_LEVELS = 18  # levels of the Brownian tree beyond the distance to the nearer end
MAX_BROWNIAN_TREE_DEPTH = 44


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits, BLAKE2b over the parts: the same in every process, machine and version.

    Random numbers of a sample are keyed by (seed, sample, times seen, purpose), so that they do not depend on batch or
    process.
    """
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big") >> 1


def derive_uniform(*parts: int | str) -> float:
    """A number in [0, 1), a function of the parts alone: `derive_seed` / 2^63, rounded down to 53 bits."""
    return (derive_seed(*parts) >> 10) / 2**53


def torch_seed(seed: int) -> int:
    """A seed of 32 bits for torch's CPU generator, which keeps no more: from 2**32 on, a hash of the whole seed."""
    return seed if 0 <= seed < TORCH_SEEDS else derive_seed("torch", seed) % TORCH_SEEDS


def make_normal_stream(seed: int) -> Callable[[torch.Size], Tensor]:
    """Consecutive draws of N(0, I), float32 on the CPU, from one seed of up to 64 bits.

    Below 2**32 they are those of torch's CPU generator. That keeps the low 32 bits of a seed alone, so seeds above are
    the keys of a Philox generator, in a stream (0) that no node of `BrownianPath` has.
    """
    if seed < TORCH_SEEDS:
        generator = torch.Generator().manual_seed(seed)
        return lambda shape: torch.randn(shape, generator=generator)
    rng = philox(seed, 0)
    return lambda shape: torch.from_numpy(rng.standard_normal(tuple(shape), np.float32))


def philox(seed: int, stream: int) -> np.random.Generator:
    """The generator of a numbered stream of a seed, each below 2**64."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


class Noise:
    """N(0, I) for a batch of images; row i comes from seed i alone, whatever the batch.

    `noise(like)` is new noise; `noise.between(like, sigma, to_sigma)` reads one fixed Brownian path per image.
    Generated in float32 on the CPU, then moved to the device and dtype of the argument [B, ...], which has one row per
    seed.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.streams = [make_normal_stream(seed) for seed in seeds]
        self.brownian_paths = [BrownianPath(seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """New noise. Row i of the first call is diffusers' initial latent of seed i, for seeds below 2**32.

        That is `torch.randn([1, C, h, w], generator=torch.Generator().manual_seed(seed))`.
        """
        self._check_batch_size(like)
        rows = [draw(like.shape[1:]) for draw in self.streams]
        return torch.stack(rows).to(like, non_blocking=like.is_cuda)

    def between(self, like: Tensor, sigma: float, to_sigma: float) -> Tensor:
        """The unit-variance increment of the images' Brownian paths from noise scale sigma to to_sigma.

        A finer grid refines the same path. 1 >= sigma > to_sigma > 0.
        """
        self._check_batch_size(like)
        shape = like.shape[1:]
        gain = 1 / to_sigma**2 - 1 / sigma**2  # SNR at to_sigma minus SNR at sigma
        ends = [(path.value_at(sigma, shape), path.value_at(to_sigma, shape)) for path in self.brownian_paths]
        return (torch.stack([b - a for a, b in ends]) / math.sqrt(gain)).to(like, non_blocking=like.is_cuda)

    def _check_batch_size(self, like: Tensor) -> None:
        if len(like) != len(self.streams):
            raise ValueError(f"{len(like)} images, but {len(self.streams)} noise streams")


class BrownianPath:
    """A Brownian motion B in the clock SNR = alpha^2 / sigma^2, a pure function of (seed, shape).

    SNR is the clock in which the noise of the reverse SDE is Brownian: for x_0 held fixed, x alpha / sigma^2 gains
    B(SNR') - B(SNR). By Doob's transform B = b(sigma^2) / sigma^2 with b a Brownian bridge on [0, 1], which a dyadic
    tree of midpoints gives (Levy's construction; Li et al. 2020, algorithm 3, a virtual Brownian tree).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._cache: dict[tuple[float, torch.Size], Tensor] = {}

    def value_at(self, sigma: float, shape: torch.Size) -> Tensor:
        """B at the noise scale sigma in (0, 1], float32."""
        key = sigma, shape
        if key not in self._cache:
            if len(self._cache) > 2:  # a sampler reads the ends of each step, and its middle: one is of the step before
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = torch.from_numpy(self._bridge(sigma**2, tuple(shape)) / np.float32(sigma**2))
        return self._cache[key]

    def _bridge(self, u: float, shape: tuple[int, ...]) -> np.ndarray:
        low, high, node = 0.0, 1.0, 1
        left = right = np.zeros(shape, np.float32)
        nearer = min(u, 1 - u)
        depth = min(MAX_BROWNIAN_TREE_DEPTH, BROWNIAN_TREE_LEVELS - math.floor(math.log2(nearer))) if nearer > 0 else 0
        for _ in range(depth):
            middle = (low + high) / 2
            rng = philox(self.seed, node)
            spread = np.float32(math.sqrt(high - low) / 2)
            value = (left + right) / 2 + spread * rng.standard_normal(shape, np.float32)
            if u < middle:
                high, right, node = middle, value, 2 * node
            else:
                low, left, node = middle, value, 2 * node + 1
        share = np.float32((u - low) / (high - low))
        return (1 - share) * left + share * right
