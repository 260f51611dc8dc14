"""What a training needs to know of a model, its data and its loss: the loop knows nothing else about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

Batch = Mapping[str, Any]
Metrics = Mapping[str, Tensor]  # [B] each


class TrainingTask(Protocol):
    """A model, its data and its loss.

    All randomness is in the batch, keyed by (seed, sample, times seen), and `make_batch` is a pure function of its
    arguments: how rows are split over processes changes nothing, and the order of the data is computed, not stored.
    """

    supports_accumulation: bool  # False where the loss compares the rows of a batch, which then cannot be split
    model: nn.Module  # its parameters that require a gradient are trained, averaged and saved

    def make_batch(self, step: int, rows: range) -> Batch:
        """Some rows of the batch of a step, made in a worker process: arrays and strings on the host.

        `batch["sample_keys"]` is a list of their `SampleKey`.
        """
        ...

    def sample_digests(self) -> Mapping[str, str]:
        """A digest of each sample's content by its key, by which a resumed training knows whether its data changed."""
        return {}

    def compute_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss of each row [B], whose mean is minimised, and other metrics; `model` may be a parallel wrapper."""
        ...

    def validate(self) -> dict[str, float]:
        """Metrics on held-out data, with the weights that the model has now."""
        ...

    def generate_samples(self) -> Image.Image | None:
        """A contact sheet of samples, with the weights that the model has now; None where the task has none to show."""
        return None

    def export(self, folder: Path) -> None:
        """Write the weights that the model has now to a new folder, in diffusers' layout."""
        ...

    def export_samples(self, folder: Path) -> None:
        """Add samples to the folder of published weights; the weights in memory may be freed: nothing comes after."""
        return None


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of the same names and shapes; ValueError, with nothing changed, where these differ."""
    check_same_shapes(source, target)
    for name, value in target.items():
        value.copy_(source[name])


def check_same_shapes(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """ValueError where the names or shapes of tensors differ."""
    for name in sorted(source.keys() | target.keys()):
        if name not in source or name not in target or source[name].shape != target[name].shape:
            raise ValueError(f"{name}: missing on one side, or shapes differ")
