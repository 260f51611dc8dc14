"""Task: what one training learns. The loop knows nothing else about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]
Figures = Mapping[str, float | Tensor]


class Task(Protocol):
    """A model, its data and its loss. `batch(k)` is a pure function of k: the data's order is computed, not stored."""

    @property
    def model(self) -> nn.Module:
        """What learns."""
        ...

    def batch(self, k: int) -> Batch:
        """Batch k, made in a worker process: arrays and strings on the host."""
        ...

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """The loss to descend, and figures for the log; `model` is `self.model` or a parallel wrapper of it."""
        ...

    def validate(self, model: Any) -> dict[str, float]:
        """Figures on held-out data, with the averaged weights."""
        ...

    def export(self, model: Any, folder: Path) -> None:
        """Write the averaged weights to a new folder, as `weights/` holds them."""
        ...
