"""Exponential and power-function moving averages (EMA) of the weights, and post-hoc EMA of any length.

The latter is made from snapshots of two: Karras et al. 2024 (arXiv:2312.02696), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.checkpoints.tensors import save_tensors
from ldm.files import atomic_write
from ldm.train.task import TrainingTask, copy_tensors, trainable_parameters

EMARate = Callable[[int], float]  # step, from 1 -> how far the average moves towards the weights
SIGMA_RELS = (0.05, 0.10)  # of the averages tracked for post-hoc EMA: enough for all lengths between and some beyond


def exponential_ema_rate(decay: float) -> EMARate:
    """1 - d with d = min(decay, (1 + step) / (10 + step)): the decay is lower in the first steps."""
    return lambda step: 1 - min(decay, (1 + step) / (10 + step))


def power_ema_rate(sigma_rel: float) -> EMARate:
    """1 - (1 - 1 / step)^(gamma + 1): the weights of step tau count as tau^gamma (Karras et al. 2024, eqs. 2 and 3)."""
    exponent = sigma_rel_to_gamma(sigma_rel) + 1
    return lambda step: 1 - (1 - 1 / step) ** exponent


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The power whose profile has the standard deviation sigma_rel, relative to the training's length.

    sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, its largest root (Karras et al. 2024, eq. 6 and algorithm 2).
    ValueError outside (0, 0.2887), the deviation of the plain mean.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel {sigma_rel}: must lie between 0 and {12**-0.5:.4f}, the plain mean's")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class EMAModel:
    """The moving average of a model's trainable parameters: theta' <- theta' + rate(step) (theta - theta')."""

    def __init__(self, model: nn.Module, rate: EMARate) -> None:
        self.tensors = {name: value.detach().clone() for name, value in trainable_parameters(model).items()}
        self.rate = rate

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's weights after `step` updates."""
        weights = trainable_parameters(model).values()
        torch._foreach_lerp_(list(self.tensors.values()), list(weights), self.rate(step))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model has the averaged weights and is in evaluation mode."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)
            for module, mode in modes.items():
                module.training = mode

    def _swap(self, model: nn.Module) -> None:
        for name, parameter in trainable_parameters(model).items():
            self.tensors[name], parameter.data = parameter.data, self.tensors[name]


class EMAProfile(NamedTuple):
    """How a power-function average weighs the past: p(tau) = (gamma + 1) tau^gamma / step^(gamma + 1), tau < step."""

    step: int
    gamma: float


class EMASnapshot(NamedTuple):
    """A file with the average of a profile."""

    path: Path
    profile: EMAProfile


def save_ema_snapshot(
    folder: Path, step: int, sigma_rel: float, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Publish an average after `step` updates as `averages/<step>-<sigma_rel>.safetensors`."""
    with atomic_write(folder / "averages" / f"{step:08d}-{sigma_rel:.3f}.safetensors") as draft:
        save_tensors(tensors, draft, dtype)


def list_ema_snapshots(folder: Path) -> list[EMASnapshot]:
    """The snapshots of a run, oldest first."""
    snapshots = []
    for path in sorted((folder / "averages").glob("*.safetensors")):
        step, _, sigma_rel = path.stem.partition("-")
        snapshots.append(EMASnapshot(path, EMAProfile(int(step), sigma_rel_to_gamma(float(sigma_rel)))))
    return snapshots


def p_dot_p(a: EMAProfile, b: EMAProfile) -> float:
    """int p_a p_b dtau = (g_a + 1) (g_b + 1) (t_a / t_b)^g_b / ((g_a + g_b + 1) t_b), t_a <= t_b (ibid., app. C.2)."""
    first, last = sorted((a, b))
    share = (first.step / last.step) ** last.gamma
    return (a.gamma + 1) * (b.gamma + 1) * share / ((a.gamma + b.gamma + 1) * last.step)


def solve_posthoc_coefficients(profiles: Sequence[EMAProfile], target: EMAProfile) -> np.ndarray:
    """x that minimises int (sum_i x_i p_i - p)^2 dtau: the solution of <p_i, p_j> x = <p_i, p> (ibid., eq. 5)."""
    gram = np.array([[p_dot_p(a, b) for b in profiles] for a in profiles])
    return np.linalg.lstsq(gram, np.array([p_dot_p(a, target) for a in profiles]), rcond=None)[0]


def reconstruct_posthoc_ema(folder: Path, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The average with the relative deviation sigma_rel over the first `step` updates (None: all), float32 tensors.

    `folder` is that of a run whose recipe had `posthoc_steps`. ValueError where it holds no snapshots up to there.
    """
    snapshots = [s for s in list_ema_snapshots(folder) if step is None or s.profile.step <= step]
    if not snapshots:
        raise ValueError(f"{folder}: no snapshots under averages/: train with posthoc_steps")
    target = EMAProfile(step or max(s.profile.step for s in snapshots), sigma_rel_to_gamma(sigma_rel))
    total: dict[str, Tensor] = {}
    coefficients = solve_posthoc_coefficients([s.profile for s in snapshots], target)
    for snapshot, coefficient in zip(snapshots, coefficients.tolist(), strict=True):  # one file in memory at a time
        for name, value in load_file(snapshot.path).items():
            total[name] = total.get(name, torch.zeros(())) + coefficient * value.float()
    return total


def export_posthoc_ema(task: TrainingTask, run_dir: Path, sigma_rel: float, out: Path, step: int | None = None) -> None:
    """Export that average of a run of the task as `ldm train` exports its own; ValueError without snapshots."""
    copy_tensors(reconstruct_posthoc_ema(run_dir, sigma_rel, step), trainable_parameters(task.model))
    with atomic_write(out) as draft:
        task.export(draft)
