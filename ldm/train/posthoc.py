"""Averages of any length after the training, from snapshots of two: Karras et al. 2024 (arXiv:2312.02696), sec. 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.files import publish
from ldm.train.ema import gamma

SIGMA_RELS = (0.05, 0.10)  # what is tracked: enough for all between, and somewhat beyond


class Profile(NamedTuple):
    """How a power-function average weighs the past: p(tau) = (gamma + 1) tau^gamma / step^(gamma + 1), tau < step."""

    step: int
    gamma: float


class Snapshot(NamedTuple):
    """A file with the average of a profile."""

    path: Path
    profile: Profile


def snapshot(folder: Path, step: int, sigma_rel: float, model: nn.Module, dtype: torch.dtype) -> None:
    """Publish an average after `step` updates as `averages/<step>-<sigma_rel>.safetensors`."""
    tensors = {
        name: value.to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    with publish(folder / "averages" / f"{step:08d}-{sigma_rel:.3f}.safetensors") as draft:
        save_file(tensors, draft)


def snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots of a run, oldest first."""
    found = []
    for path in sorted((folder / "averages").glob("*.safetensors")):
        step, _, sigma_rel = path.stem.partition("-")
        found.append(Snapshot(path, Profile(int(step), gamma(float(sigma_rel)))))
    return found


def inner(a: Profile, b: Profile) -> float:
    """int p_a p_b dtau = (g_a + 1) (g_b + 1) (t_a / t_b)^g_b / ((g_a + g_b + 1) t_b), t_a <= t_b (ibid., app. C.2)."""
    first, last = sorted((a, b))
    share = (first.step / last.step) ** last.gamma
    return (a.gamma + 1) * (b.gamma + 1) * share / ((a.gamma + b.gamma + 1) * last.step)


def coefficients(known: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """x that minimises int (sum_i x_i p_i - p)^2 dtau: the solution of <p_i, p_j> x = <p_i, p> (ibid., eq. 5)."""
    gram = np.array([[inner(a, b) for b in known] for a in known])
    return np.linalg.lstsq(gram, np.array([inner(a, wanted) for a in known]), rcond=None)[0]


def posthoc(folder: Path, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of relative deviation sigma_rel over the first `step` updates (None: all), as a float32 state dict.

    `folder` is a run's whose recipe had `posthoc_steps`. ValueError where it holds no snapshots up to there.
    """
    found = [s for s in snapshots(folder) if step is None or s.profile.step <= step]
    if not found:
        raise ValueError(f"{folder}: no snapshots under averages/: train with posthoc_steps")
    last = step or max(s.profile.step for s in found)
    shares = coefficients([s.profile for s in found], Profile(last, gamma(sigma_rel)))
    return _weighted({s.path: float(x) for s, x in zip(found, shares, strict=True)})


def _weighted(shares: Mapping[Path, float]) -> dict[str, Tensor]:
    """The weighted sum of the tensors in files, one file in memory at a time; of integers, the last file's."""
    total: dict[str, Tensor] = {}
    for path, share in shares.items():
        for name, value in load_file(path).items():
            if value.is_floating_point():
                total[name] = total.get(name, torch.zeros(())) + share * value.float()
            else:
                total[name] = value
    return total
