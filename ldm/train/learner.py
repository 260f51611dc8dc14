"""Learner: one optimizer step at a time, the same however its batch is split over processes and parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ldm.checkpoints.files import place
from ldm.config import Recipe
from ldm.nn.unet import UNet
from ldm.train.ema import Average, exponential, power
from ldm.train.optimizers import optimizer_for
from ldm.train.posthoc import SIGMA_RELS
from ldm.train.schedules import rate
from ldm.train.state import State
from ldm.train.task import Batch, Task, Visit


def shares(recipe: Recipe, task: Task, rank: int, processes: int) -> list[range]:
    """The rows of every batch that a process learns from: one contiguous range for each accumulated part.

    ValueError where there are more parts than rows, or the loss needs a batch whole.
    """
    size, parts = recipe.train_batch_size, recipe.gradient_accumulation_steps
    n = processes * parts
    if n > size:
        raise ValueError(f"train_batch_size {size}: fewer than {processes} processes times {parts} accumulated parts")
    if n > 1 and not task.divisible:
        raise ValueError("this loss compares the rows of a batch: one process, gradient_accumulation_steps 1")
    return [range(i * size // n, (i + 1) * size // n) for i in range(rank * parts, (rank + 1) * parts)]


def averages(model: nn.Module, recipe: Recipe) -> dict[str, Average]:
    """The averages that a recipe asks for, by name; `ema` is what is validated and exported."""
    kinds = {"ema": exponential(recipe.ema_decay)}
    if recipe.posthoc_steps:
        kinds |= {f"average-{sigma_rel:.3f}": power(sigma_rel) for sigma_rel in SIGMA_RELS}
    return {name: Average(model, kind) for name, kind in kinds.items()}


def checkpoint_activations(model: nn.Module) -> None:
    """Ask a network to compute its activations again in the backward pass; ValueError where it cannot."""
    able = [module for module in model.modules() if isinstance(module, UNet)]
    if not able:
        raise ValueError("gradient_checkpointing: the U-Net alone can")
    for module in able:
        module.checkpointing = True


class Learner:
    """A task's model, its optimizer and its averages in one process of a training.

        g = sum over all rows of grad loss_row / train_batch_size

    in whatever parts; each step needs one host question and, among processes, one exchange beside the gradients'.
    """

    def __init__(self, recipe: Recipe, task: Task, accelerator: Accelerator) -> None:
        self.recipe, self.task, self.accelerator = recipe, task, accelerator
        self.rows = shares(recipe, task, accelerator.process_index, accelerator.num_processes)
        place(task.model, accelerator.device).train()
        if recipe.gradient_checkpointing:
            checkpoint_activations(task.model)
        optimizer = optimizer_for(task.model, recipe)
        self.state = State(task.model, averages(task.model, recipe), optimizer, accelerator.scaler)

    def prepare(self) -> None:
        """Wrap what learns for this process, once its state is loaded."""
        self.model, self.optimizer = self.accelerator.prepare(self.task.model, self.state.optimizer)

    def step(self, parts: Sequence[Batch], asked: bool) -> bool:
        """Update once from this process's parts of a batch; true where any process was asked to stop.

        ValueError, with the weights as they were, where the loss or its gradient is not finite: it names the samples.
        """
        state = self.state
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * rate(state.step, self.recipe)
        sums = self._descend(parts)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        figures, stop = self._agree(sums, norm, asked)
        # a gradient that overflows float16 is the scaler's own matter: it leaves the step out
        if not (math.isfinite(figures["loss"]) and (state.scaler or math.isfinite(figures["gradient_norm"]))):
            self._refuse(figures)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        for average in state.averages.values():
            average.update(state.model, state.step)
        state.figures.append(figures)
        return stop

    def _descend(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """The gradient of all parts, and this process's part of the figures."""
        size = self.recipe.train_batch_size
        sums: dict[str, Tensor] = {}
        for k, batch in enumerate(parts):
            waits = k < len(parts) - 1  # the last part alone exchanges gradients
            with self.accelerator.no_sync(self.model) if waits else nullcontext():
                losses, figures = self.task.loss(self.model, batch)
                # DistributedDataParallel takes the processes' mean; the batch's is over all their rows
                self.accelerator.backward(losses.sum() * (self.accelerator.num_processes / size))
            for name, values in {"loss": losses, **figures}.items():
                sums[name] = sums.get(name, 0.0) + values.detach().float().sum() / size
        return sums

    def _agree(self, sums: Mapping[str, Tensor], norm: Tensor, asked: bool) -> tuple[dict[str, float], bool]:
        """The figures of the whole batch on the host, and whether any process was asked to stop."""
        told = torch.stack([*sums.values(), sums["loss"].new_tensor(float(asked))])
        told = self.accelerator.reduce(told, "sum")
        *values, votes, norm_ = torch.cat([told, norm.detach().to(told).reshape(1)]).tolist()
        loss, *others = sums
        return dict(zip([loss, *others], values, strict=True)) | {"gradient_norm": norm_}, votes > 0

    def _refuse(self, figures: Mapping[str, float]) -> None:
        names = gather_object([f"{v.sample} (visit {v.number})" for v in self._blamed()])
        self.optimizer.zero_grad()
        said = f"the loss is {figures['loss']:g} and its gradient's norm {figures['gradient_norm']:g}"
        blame = ", ".join(names) if names else "no sample by itself"
        raise ValueError(f"step {self.state.step + 1}: {said}; not finite: {blame}; nothing was changed")

    def _blamed(self) -> list[Visit]:
        """This process's rows whose loss or gradient is not finite when they are alone."""
        rows = [range(i, i + 1) for part in self.rows for i in part] if self.task.divisible else self.rows
        return [visit for row in rows for visit in self._faults(self.task.batch(self.state.step, row))]

    def _faults(self, batch: Batch) -> Sequence[Visit]:
        self.task.model.zero_grad()
        with self.accelerator.autocast():
            losses, _ = self.task.loss(self.task.model, batch)
        losses.sum().backward()
        gradients = [p.grad.isfinite().all() for p in self.task.model.parameters() if p.grad is not None]
        fine = losses.isfinite() & torch.stack(gradients).all()
        return [visit for visit, good in zip(batch["visits"], fine.tolist(), strict=True) if not good]
