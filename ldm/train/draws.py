"""What is drawn for the rows of a batch, keyed by (seed, sample, visit, purpose): no row depends on another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.rng import Noise, derive_seed, derive_uniform
from ldm.train.task import SampleKey


def sample_normal(seed: int, sample_keys: Sequence[SampleKey], purpose: str, shape: Sequence[int]) -> Tensor:
    """N(0, I) for each visit, [B, *shape], float32 on the host."""
    return Noise([derive_seed(seed, *visit, purpose) for visit in sample_keys])(torch.empty(len(sample_keys), *shape))


def sample_uniform(seed: int, sample_keys: Sequence[SampleKey], purpose: str) -> Tensor:
    """A number in [0, 1) for each visit, [B], float64 on the host."""
    return torch.tensor([derive_uniform(seed, *visit, purpose) for visit in sample_keys], dtype=torch.float64)
