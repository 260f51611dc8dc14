"""The training loop, one for every task, and the optimizer step, the same however its batch is split."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.config import Recipe
from ldm.data.batch_sampler import SampleKey
from ldm.errors import error_text
from ldm.files import atomic_write, remove_path
from ldm.hardware import to_device
from ldm.nn.unet import UNet
from ldm.train.ema import SIGMA_RELS, EMAModel, exponential_ema_rate, power_ema_rate, save_ema_snapshot
from ldm.train.model_spec import record_start
from ldm.train.optimizers import base_learning_rate, compute_lr_factor, create_optimizer
from ldm.train.progress import MetricLogger, filter_installed_trackers, log_sample_image, start_trackers
from ldm.train.state import TrainState, resolve_recipe, resume_from_checkpoint, save_checkpoint
from ldm.train.task import Batch, TrainingTask


def get_partial_state() -> PartialState:
    """This process among those of a launcher (`python -m torch.distributed.run`); the only one without a launcher."""
    return PartialState(cpu=not torch.accelerator.is_available())  # cpu: accelerate joins CPU processes only if asked


def create_accelerator(**options: object) -> Accelerator:
    """A new accelerator of this process; accelerate itself keeps the precision of the first one."""
    get_partial_state()
    AcceleratorState._reset_state()
    return Accelerator(cpu=not torch.accelerator.is_available(), **options)


def train_model(recipe: Recipe, task: TrainingTask) -> Path:
    """Train to `max_train_steps`, from the newest whole checkpoint on; returns the folder of the exported weights.

    SIGTERM and Ctrl-C save a checkpoint and raise KeyboardInterrupt: the same call again resumes. All randomness is
    keyed by (seed, sample, times seen): an interrupted training ends with the bits of an undisturbed one, and one split
    over processes, each of which calls this, with the same weights to rounding. Only the main process writes.
    """
    recipe = resolve_recipe(recipe, get_partial_state().device)
    accelerator = setup_accelerator(recipe)
    try:
        export = train_and_publish(recipe, task, accelerator)
        accelerator.free_memory()  # it holds the optimizer and the model
        if accelerator.is_main_process:
            task.export_samples(export)
        return export
    finally:
        accelerator.end_training()


def train_and_publish(recipe: Recipe, task: TrainingTask, accelerator: Accelerator) -> Path:
    """The training and the export of its averaged weights; the optimizer and the averages are freed at its end."""
    trainer = Trainer(recipe, task, accelerator)
    resume_from_checkpoint(trainer.state, recipe)
    trainer.prepare()
    if accelerator.is_main_process:
        prepare_output_dir(recipe)
    training_loop(recipe, trainer)
    export = recipe.output_dir / "export"
    if accelerator.is_main_process:
        with atomic_write(export) as draft, trainer.state.ema_models["ema"].applied_to(task.model):
            task.export(draft)
    return export


def setup_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of a recipe, whose output folder is made; ValueError where it cannot be."""
    try:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {recipe.output_dir}: {error_text(error)}") from None
    trackers = filter_installed_trackers(recipe.report_to) or None
    return create_accelerator(mixed_precision=recipe.mixed_precision, log_with=trackers, project_dir=recipe.output_dir)


def prepare_output_dir(recipe: Recipe) -> None:
    """Write the resolved recipe and the day of the start; remove unfinished files of a run that was killed."""
    for pattern in (".*.part", ".*.old", "averages/.*.part"):
        for draft in recipe.output_dir.glob(pattern):
            remove_path(draft)
    record_start(recipe.output_dir)
    with atomic_write(recipe.output_dir / "recipe.json") as draft:
        draft.write_text(json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n")


def training_loop(recipe: Recipe, trainer: Trainer) -> None:
    """All remaining steps, with logging, validation, snapshots and checkpoints between them."""
    accelerator, state = trainer.accelerator, trainer.state
    is_main = accelerator.is_main_process
    start_trackers(accelerator, recipe, state.step)
    logger = MetricLogger(recipe.output_dir / "log.jsonl", state.step, recipe, accelerator.log, is_main)
    with logger, InterruptHandler() as interrupt:
        for micro_batches in iterate_batches(trainer.task, state.step, recipe, trainer.row_ranges, state.batch_offset):
            stop = trainer.train_step(micro_batches, interrupt.stop_requested)
            logger.update_progress(state.step)
            if state.step % recipe.logging_steps == 0:
                logger.log_metrics(state.step, average_metrics(state.pending_metrics))
                state.pending_metrics.clear()
            if is_main and is_due(state.step, recipe.validation_steps, recipe):
                log_validation(trainer, logger)
            if is_main and is_due(state.step, recipe.posthoc_steps, recipe):
                save_ema_snapshots(trainer)
            if stop or is_due(state.step, recipe.checkpointing_steps, recipe):
                if is_main:
                    save_checkpoint(state, recipe)
                accelerator.wait_for_everyone()  # torchrun kills the other ranks when one exits
            if stop:
                raise KeyboardInterrupt


def is_due(step: int, interval: int, recipe: Recipe) -> bool:
    """True every `interval` steps (0: never) and after the last step."""
    return interval > 0 and (step % interval == 0 or step == recipe.max_train_steps)


def average_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over some steps."""
    return {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}


def log_validation(trainer: Trainer, logger: MetricLogger) -> None:
    """Log the metrics of the averaged weights on held-out data, and a contact sheet of samples."""
    task, step = trainer.task, trainer.state.step
    with trainer.state.ema_models["ema"].applied_to(task.model):
        logger.write_metrics(step, {f"val_{k}": v for k, v in task.validate().items()}, force_print=True)
        sheet = task.generate_samples()
    if sheet is not None:
        with atomic_write(trainer.recipe.output_dir / "samples.png") as draft:
            sheet.save(draft, "PNG")
        log_sample_image(trainer.accelerator, sheet, step)


def ema_name(sigma_rel: float) -> str:
    return f"average-{sigma_rel:.3f}"


def save_ema_snapshots(trainer: Trainer) -> None:
    """Publish snapshots of the power-function averages."""
    recipe, state = trainer.recipe, trainer.state
    for sigma_rel in SIGMA_RELS:
        tensors = state.ema_models[ema_name(sigma_rel)].tensors
        save_ema_snapshot(recipe.output_dir, state.step, sigma_rel, tensors, getattr(torch, recipe.posthoc_dtype))


class _BatchDataset(Dataset):
    def __init__(self, task: TrainingTask) -> None:
        self.task = task

    def __getitem__(self, part: tuple[int, range]) -> Batch:
        return self.task.make_batch(*part)


def iterate_batches(
    task: TrainingTask, start_step: int, recipe: Recipe, row_ranges: Sequence[range], batch_offset: int = 0
) -> Iterator[list[Batch]]:
    """A process's parts of the batches of steps `start_step` to the last, made ahead by worker processes.

    The batch of a step is number `step + batch_offset`.
    """
    workers, steps = recipe.dataloader_num_workers, range(start_step, recipe.max_train_steps)
    parts: Any = ((step + batch_offset, rows) for step in steps for rows in row_ranges)
    ignore = _ignore_signals if workers else None
    batches = iter(DataLoader(_BatchDataset(task), None, sampler=parts, num_workers=workers, worker_init_fn=ignore))
    for _ in steps:
        yield [next(batches) for _ in row_ranges]


def _ignore_signals(worker_id: int) -> None:
    """Leave signals to the loop: Ctrl-C reaches every process of the terminal, and a dead worker would end the run."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class InterruptHandler:
    """Within the context SIGTERM and SIGINT only set `stop_requested`: the loop ends between two steps."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> InterruptHandler:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[number] = signal.signal(number, self._request_stop)
        return self

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self.stop_requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)


def split_rows(recipe: Recipe, task: TrainingTask, rank: int, num_processes: int) -> list[range]:
    """The rows of every batch that a process trains on: one contiguous range per accumulation step.

    ValueError where there are more parts than rows, or the loss needs its batch whole.
    """
    size, parts = recipe.train_batch_size, recipe.gradient_accumulation_steps
    n = num_processes * parts
    if n > size:
        raise ValueError(
            f"train_batch_size {size}: fewer than {num_processes} processes times {parts} accumulation steps"
        )
    if n > 1 and not task.supports_accumulation:
        raise ValueError("this loss needs the whole batch: use one process and gradient_accumulation_steps 1")
    return [range(i * size // n, (i + 1) * size // n) for i in range(rank * parts, (rank + 1) * parts)]


def create_ema_models(task: TrainingTask, recipe: Recipe) -> dict[str, EMAModel]:
    """The averages of a recipe, by the names of their files; `ema` is the one that is validated and exported."""
    rates = {"ema": exponential_ema_rate(recipe.ema_decay)}
    if recipe.posthoc_steps:
        rates |= {ema_name(sigma_rel): power_ema_rate(sigma_rel) for sigma_rel in SIGMA_RELS}
    return {name: EMAModel(task.model, rate) for name, rate in rates.items()}


class Trainer:
    """A task's model, its optimizer and its averages in one process of a training.

        g = sum over all rows of grad loss_row / train_batch_size

    however the rows are split; a step waits for the device once and, among processes, reduces once more than gradients.
    """

    def __init__(self, recipe: Recipe, task: TrainingTask, accelerator: Accelerator) -> None:
        self.recipe, self.task, self.accelerator = recipe, task, accelerator
        self.row_ranges = split_rows(recipe, task, accelerator.process_index, accelerator.num_processes)
        to_device(task.model, accelerator.device)
        if recipe.gradient_checkpointing:
            unets = [module for module in task.model.modules() if isinstance(module, UNet)]
            if not unets:
                raise ValueError("gradient_checkpointing: only a U-Net supports it")
            for unet in unets:
                unet.gradient_checkpointing = True
        optimizer = create_optimizer(task.model, recipe)
        emas, digests = create_ema_models(task, recipe), task.sample_digests()
        self.state = TrainState(task.model, emas, optimizer, accelerator.scaler, sample_digests=digests)

    def prepare(self) -> None:
        """Wrap model and optimizer for this process, after their state is loaded."""
        self.model, self.optimizer = self.accelerator.prepare(self.task.model, self.state.optimizer)

    def train_step(self, micro_batches: Sequence[Batch], stop_requested: bool) -> bool:
        """Update once from this process's parts of a batch; true where any process was asked to stop.

        ValueError, with the weights unchanged, where the loss or its gradient is not finite: it names the samples.
        """
        state = self.state
        for group in self.optimizer.param_groups:
            group["lr"] = base_learning_rate(group, self.recipe) * compute_lr_factor(state.step, self.recipe)
        sums = self._backward(micro_batches)
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        metrics, stop = self._reduce_metrics(sums, grad_norm, stop_requested)
        # a gradient that overflows float16 is the scaler's matter: it skips the step
        if not (math.isfinite(metrics["loss"]) and (state.scaler or math.isfinite(metrics["gradient_norm"]))):
            self._raise_not_finite(metrics)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        for ema in state.ema_models.values():
            ema.update(state.model, state.step)
        state.pending_metrics.append(metrics)
        return stop

    def _backward(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Accumulate the gradient of all parts; this process's share of the metrics."""
        size = self.recipe.train_batch_size
        sums: dict[str, Tensor] = {}
        for k, batch in enumerate(micro_batches):
            is_last = k == len(micro_batches) - 1  # gradients are exchanged after the last part alone
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                losses, metrics = self.task.compute_loss(self.model, batch)
                # DistributedDataParallel takes the processes' mean; the batch's is over all their rows
                self.accelerator.backward(losses.sum() * (self.accelerator.num_processes / size))
            for name, values in {"loss": losses, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + values.detach().float().sum() / size
        return sums

    def _reduce_metrics(
        self, sums: Mapping[str, Tensor], grad_norm: Tensor, stop_requested: bool
    ) -> tuple[dict[str, float], bool]:
        """The metrics of the whole batch on the host, and whether any process was asked to stop."""
        values = torch.stack([*sums.values(), sums["loss"].new_tensor(float(stop_requested))])
        values = self.accelerator.reduce(values, "sum")
        *totals, stop_requests, norm = torch.cat([values, grad_norm.detach().to(values).reshape(1)]).tolist()
        return {**dict(zip(sums, totals, strict=True)), "gradient_norm": norm}, stop_requests > 0

    def _raise_not_finite(self, metrics: Mapping[str, float]) -> None:
        bad = [f"{key.sample_id} (seen {key.times_seen} times before)" for key in self._find_bad_samples()]
        names = ", ".join(gather_object(bad))
        blame = f"not finite: {names}" if names else "no single sample is not finite by itself"
        self.optimizer.zero_grad()
        values = f"the loss is {metrics['loss']:g} and its gradient's norm {metrics['gradient_norm']:g}"
        raise ValueError(f"step {self.state.step + 1}: {values}; {blame}; the weights are unchanged")

    def _find_bad_samples(self) -> list[SampleKey]:
        """This process's rows whose loss or gradient is not finite when they are alone."""
        ranges = self.row_ranges
        if self.task.supports_accumulation:
            ranges = [range(i, i + 1) for rows in ranges for i in rows]
        batch = self.state.step + self.state.batch_offset
        return [key for rows in ranges for key in self._find_bad_rows(self.task.make_batch(batch, rows))]

    def _find_bad_rows(self, batch: Batch) -> Sequence[SampleKey]:
        self.task.model.zero_grad()
        with self.accelerator.autocast():
            losses, _ = self.task.compute_loss(self.task.model, batch)
        losses.sum().backward()
        gradients = [p.grad.isfinite().all() for p in self.task.model.parameters() if p.grad is not None]
        finite = losses.isfinite() & torch.stack(gradients).all()
        return [key for key, good in zip(batch["sample_keys"], finite.tolist(), strict=True) if not good]
