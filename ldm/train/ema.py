"""Moving averages of the weights.

Averages of any length after the training, from snapshots of two: Karras et al. 2024 (arXiv:2312.02696), sec. 3."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.files import atomic_write

EMARate = Callable[[int], float]  # how far the average moves towards the weights after `step` updates


def exponential_ema_rate(decay: float) -> EMARate:
    """1 - d with d = min(decay, (1 + step) / (10 + step)): the young forget faster."""
    return lambda step: 1 - min(decay, (1 + step) / (10 + step))


def power_ema_rate(sigma_rel: float) -> EMARate:
    """1 - (1 - 1 / step)^(gamma + 1): the weights of step tau count as tau^gamma (Karras et al. 2024, eqs. 2 and 3)."""
    exponent = sigma_rel_to_gamma(sigma_rel) + 1
    return lambda step: 1 - (1 - 1 / step) ** exponent


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The power whose profile has the deviation sigma_rel, as a share of the training's length.

    sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, its largest root (Karras et al. 2024, eq. 6 and algorithm 2).
    ValueError outside (0, 0.2887), the deviation of the plain mean.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel {sigma_rel}: must lie between 0 and {12**-0.5:.4f}, the plain mean's")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class EMAModel:
    """theta' <- theta' + rate(step) (theta - theta'), beside a model that learns."""

    def __init__(self, model: nn.Module, rate: EMARate) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.rate = rate

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the weights after `step` updates; buffers are copied."""
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), self.rate(step))
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)


SIGMA_RELS = (0.05, 0.10)  # what is tracked: enough for all between, and somewhat beyond


class EMAProfile(NamedTuple):
    """How a power-function average weighs the past: p(tau) = (gamma + 1) tau^gamma / step^(gamma + 1), tau < step."""

    step: int
    gamma: float


class EMASnapshot(NamedTuple):
    """A file with the average of a profile."""

    path: Path
    profile: EMAProfile


def save_ema_snapshot(folder: Path, step: int, sigma_rel: float, model: nn.Module, dtype: torch.dtype) -> None:
    """Publish an average after `step` updates as `averages/<step>-<sigma_rel>.safetensors`."""
    tensors = {
        name: value.to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    with atomic_write(folder / "averages" / f"{step:08d}-{sigma_rel:.3f}.safetensors") as draft:
        save_file(tensors, draft)


def list_ema_snapshots(folder: Path) -> list[EMASnapshot]:
    """The snapshots of a run, oldest first."""
    found = []
    for path in sorted((folder / "averages").glob("*.safetensors")):
        step, _, sigma_rel = path.stem.partition("-")
        found.append(EMASnapshot(path, EMAProfile(int(step), sigma_rel_to_gamma(float(sigma_rel)))))
    return found


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
    """The average of relative deviation sigma_rel over the first `step` updates (None: all), as a float32 state dict.

    `folder` is a run's whose recipe had `posthoc_steps`. ValueError where it holds no snapshots up to there.
    """
    found = [s for s in list_ema_snapshots(folder) if step is None or s.profile.step <= step]
    if not found:
        raise ValueError(f"{folder}: no snapshots under averages/: train with posthoc_steps")
    last = step or max(s.profile.step for s in found)
    shares = solve_posthoc_coefficients([s.profile for s in found], EMAProfile(last, sigma_rel_to_gamma(sigma_rel)))
    return _weighted_sum({s.path: float(x) for s, x in zip(found, shares, strict=True)})


def _weighted_sum(weights: Mapping[Path, float]) -> dict[str, Tensor]:
    """The weighted sum of the tensors in files, one file in memory at a time; of integers, the last file's."""
    total: dict[str, Tensor] = {}
    for path, share in weights.items():
        for name, value in load_file(path).items():
            if value.is_floating_point():
                total[name] = total.get(name, torch.zeros(())) + share * value.float()
            else:
                total[name] = value
    return total
