"""Task: what one training learns. The loop knows nothing else about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image
from torch import Tensor, nn

Batch = Mapping[str, Any]
Metrics = Mapping[str, Tensor]  # [B] each


class SampleKey(NamedTuple):
    """One showing of a sample: with the seed, the key of all that is drawn for it."""

    sample_id: int | str
    times_seen: int


class TrainingTask(Protocol):
    """A model, its data and its loss.

    All that is random is in the batch, keyed by (seed, sample, visit), and `batch` is a pure function of its arguments:
    how rows are shared among processes changes nothing, and the data's order is computed, not stored.
    """

    supports_accumulation: bool  # may a batch be learnt from in parts? Not where the loss compares its rows

    @property
    def model(self) -> nn.Module:
        """What learns."""
        ...

    def make_batch(self, step: int, rows: range) -> Batch:
        """Some rows of the batch of step k, made in a worker process: arrays and strings on the host.

        `batch["visits"]` names them: a `SampleKey` each.
        """
        ...

    def compute_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss of each row [B], whose mean descends, and figures for the log, [B] too.

        `model` is `self.model` or a parallel wrapper of it.
        """
        ...

    def validate(self, model: Any) -> dict[str, float]:
        """Figures on held-out data, with the averaged weights."""
        ...

    def generate_samples(self, model: Any) -> Image.Image | None:
        """What the averaged weights draw, for the eye; None where there is nothing to draw."""
        ...

    def export(self, model: Any, folder: Path) -> None:
        """Write the averaged weights to a new folder, as `weights/` holds them."""
        ...
