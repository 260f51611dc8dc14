"""What is drawn for the rows of a batch, keyed by (seed, sample, visit, purpose): no row depends on another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.rng import Noise, keyed, keyed_uniform
from ldm.train.task import Visit


def draw(seed: int, visits: Sequence[Visit], purpose: str, shape: Sequence[int]) -> Tensor:
    """N(0, I) for each visit, [B, *shape], float32 on the host."""
    return Noise([keyed(seed, *visit, purpose) for visit in visits])(torch.empty(len(visits), *shape))


def draw_uniform(seed: int, visits: Sequence[Visit], purpose: str) -> Tensor:
    """A number in [0, 1) for each visit, [B], float64 on the host."""
    return torch.tensor([keyed_uniform(seed, *visit, purpose) for visit in visits], dtype=torch.float64)
