"""Learner: one optimizer step at a time, the same however its batch is split over processes and parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ldm.config import Recipe
from ldm.hardware import to_device
from ldm.nn.unet import UNet
from ldm.train.ema import SIGMA_RELS, EMAModel, exponential_ema_rate, power_ema_rate
from ldm.train.optimizers import compute_lr_factor, create_optimizer
from ldm.train.state import TrainState
from ldm.train.task import Batch, SampleKey, TrainingTask


def split_rows(recipe: Recipe, task: TrainingTask, rank: int, num_processes: int) -> list[range]:
    """The rows of every batch that a process learns from: one contiguous range for each accumulated part.

    ValueError where there are more parts than rows, or the loss needs a batch whole.
    """
    size, parts = recipe.train_batch_size, recipe.gradient_accumulation_steps
    n = num_processes * parts
    if n > size:
        raise ValueError(
            f"train_batch_size {size}: fewer than {num_processes} processes times {parts} accumulated parts"
        )
    if n > 1 and not task.supports_accumulation:
        raise ValueError("this loss compares the rows of a batch: one process, gradient_accumulation_steps 1")
    return [range(i * size // n, (i + 1) * size // n) for i in range(rank * parts, (rank + 1) * parts)]


def create_ema_models(model: nn.Module, recipe: Recipe) -> dict[str, EMAModel]:
    """The averages that a recipe asks for, by name; `ema` is what is validated and exported."""
    kinds = {"ema": exponential_ema_rate(recipe.ema_decay)}
    if recipe.posthoc_steps:
        kinds |= {f"average-{sigma_rel:.3f}": power_ema_rate(sigma_rel) for sigma_rel in SIGMA_RELS}
    return {name: EMAModel(model, kind) for name, kind in kinds.items()}


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Ask a network to compute its activations again in the backward pass; ValueError where it cannot."""
    able = [module for module in model.modules() if isinstance(module, UNet)]
    if not able:
        raise ValueError("gradient_checkpointing: the U-Net alone can")
    for module in able:
        module.gradient_checkpointing = True


class Trainer:
    """A task's model, its optimizer and its averages in one process of a training.

        g = sum over all rows of grad loss_row / train_batch_size

    in whatever parts; each step needs one host question and, among processes, one exchange beside the gradients'.
    """

    def __init__(self, recipe: Recipe, task: TrainingTask, accelerator: Accelerator) -> None:
        self.recipe, self.task, self.accelerator = recipe, task, accelerator
        self.row_ranges = split_rows(recipe, task, accelerator.process_index, accelerator.num_processes)
        to_device(task.model, accelerator.device).train()
        if recipe.gradient_checkpointing:
            enable_gradient_checkpointing(task.model)
        optimizer = create_optimizer(task.model, recipe)
        self.state = TrainState(task.model, create_ema_models(task.model, recipe), optimizer, accelerator.scaler)

    def prepare(self) -> None:
        """Wrap what learns for this process, once its state is loaded."""
        self.model, self.optimizer = self.accelerator.prepare(self.task.model, self.state.optimizer)

    def train_step(self, micro_batches: Sequence[Batch], stop_requested: bool) -> bool:
        """Update once from this process's parts of a batch; true where any process was asked to stop.

        ValueError, with the weights as they were, where the loss or its gradient is not finite: it names the samples.
        """
        state = self.state
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * compute_lr_factor(state.step, self.recipe)
        sums = self._backward(micro_batches)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        figures, stop = self._reduce_metrics(sums, norm, stop_requested)
        # a gradient that overflows float16 is the scaler's own matter: it leaves the step out
        if not (math.isfinite(figures["loss"]) and (state.scaler or math.isfinite(figures["gradient_norm"]))):
            self._raise_not_finite(figures)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        for average in state.ema_models.values():
            average.update(state.model, state.step)
        state.pending_metrics.append(figures)
        return stop

    def _backward(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The gradient of all parts, and this process's part of the figures."""
        size = self.recipe.train_batch_size
        sums: dict[str, Tensor] = {}
        for k, batch in enumerate(micro_batches):
            waits = k < len(micro_batches) - 1  # the last part alone exchanges gradients
            with self.accelerator.no_sync(self.model) if waits else nullcontext():
                losses, figures = self.task.compute_loss(self.model, batch)
                # DistributedDataParallel takes the processes' mean; the batch's is over all their rows
                self.accelerator.backward(losses.sum() * (self.accelerator.num_processes / size))
            for name, values in {"loss": losses, **figures}.items():
                sums[name] = sums.get(name, 0.0) + values.detach().float().sum() / size
        return sums

    def _reduce_metrics(
        self, sums: Mapping[str, Tensor], grad_norm: Tensor, stop_requested: bool
    ) -> tuple[dict[str, float], bool]:
        """The figures of the whole batch on the host, and whether any process was asked to stop."""
        told = torch.stack([*sums.values(), sums["loss"].new_tensor(float(stop_requested))])
        told = self.accelerator.reduce(told, "sum")
        *values, votes, norm_ = torch.cat([told, grad_norm.detach().to(told).reshape(1)]).tolist()
        loss, *others = sums
        return dict(zip([loss, *others], values, strict=True)) | {"gradient_norm": norm_}, votes > 0

    def _raise_not_finite(self, metrics: Mapping[str, float]) -> None:
        names = gather_object([f"{v.sample_id} (visit {v.times_seen})" for v in self._find_bad_samples()])
        self.optimizer.zero_grad()
        said = f"the loss is {metrics['loss']:g} and its gradient's norm {metrics['gradient_norm']:g}"
        blame = ", ".join(names) if names else "no sample by itself"
        raise ValueError(f"step {self.state.step + 1}: {said}; not finite: {blame}; nothing was changed")

    def _find_bad_samples(self) -> list[SampleKey]:
        """This process's rows whose loss or gradient is not finite when they are alone."""
        rows = (
            [range(i, i + 1) for part in self.row_ranges for i in part]
            if self.task.supports_accumulation
            else self.row_ranges
        )
        return [visit for row in rows for visit in self._find_bad_rows(self.task.make_batch(self.state.step, row))]

    def _find_bad_rows(self, batch: Batch) -> Sequence[SampleKey]:
        self.task.model.zero_grad()
        with self.accelerator.autocast():
            losses, _ = self.task.compute_loss(self.task.model, batch)
        losses.sum().backward()
        gradients = [p.grad.isfinite().all() for p in self.task.model.parameters() if p.grad is not None]
        fine = losses.isfinite() & torch.stack(gradients).all()
        return [visit for visit, good in zip(batch["visits"], fine.tolist(), strict=True) if not good]
