"""The kinds of adapters: what the tensors of each compute from a weight W, its change D(W) before alpha and DoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

FactorsT = TypeVar("FactorsT", bound="Factors")


@dataclass(frozen=True)
class LoRA:
    """B A of rank r: Hu et al. 2021 (arXiv:2106.09685), eq. 3. A is `down` [r, in], B is `up` [out, r].

    For a convolution A has the kernel and B is 1x1. With `mid` T [r, r, h, w] both are 1x1 (Tucker decomposition):
    sum_ij B_oi T_ijhw A_jc, LoCon: Yeh et al. 2024 (arXiv:2309.14859).
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def kernel(self) -> Tensor:
        """A, [r, in, ...]: `down`, contracted with `mid` if there is one."""
        return self.down if self.mid is None else torch.einsum("ij...,jc->ic...", self.mid, self.down.flatten(1))

    def unscaled_delta(self, weight: Tensor) -> Tensor:
        return self.up.flatten(1) @ self.kernel.flatten(1)


@dataclass(frozen=True)
class LoHa:
    """(B1 A1) * (B2 A2), a Hadamard product: Hyeon-Woo et al. 2022 (arXiv:2108.06098), prop. 1; a is B, b is A.

    With T1 and T2 (`t1`, `t2` [r, r, h, w]) each factor of a convolution is sum_ij a_io T_ijhw b_jc: prop. 3.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.w1_b)

    def unscaled_delta(self, weight: Tensor) -> Tensor:
        return rebuild_tucker(self.t1, self.w1_a, self.w1_b) * rebuild_tucker(self.t2, self.w2_a, self.w2_b)


@dataclass(frozen=True)
class LoKr:
    """W1 (x) W2, a Kronecker product, each factor whole or a product a b: Yeh et al. 2024 (arXiv:2309.14859).

    If both are whole there is no rank, and alpha has no effect. With T2 (`t2`) W2 is sum_ij a_io T_ijhw b_jc.
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int | None:
        b = self.w1_b if self.w1_b is not None else self.w2_b
        return None if b is None else len(b)

    def unscaled_delta(self, weight: Tensor) -> Tensor:
        w1 = rebuild_tucker(None, self.w1_a, self.w1_b) if self.w1 is None else self.w1
        w2 = rebuild_tucker(self.t2, self.w2_a, self.w2_b) if self.w2 is None else self.w2
        return torch.kron(w1.reshape(*w1.shape, *(w2.ndim - w1.ndim) * [1]), w2.contiguous())


@dataclass(frozen=True)
class Full:
    """The whole difference of the weight, without factors."""

    diff: Tensor

    @property
    def rank(self) -> None:
        return None

    def unscaled_delta(self, weight: Tensor) -> Tensor:
        return self.diff


@dataclass(frozen=True)
class GLoRA:
    """W A1 A2 + B1 B2: Chavan et al. 2023 (arXiv:2306.07967); `a1` [in, r], `a2` [r, in], `b1` [out, r].

    A mixes the inputs of a convolution alike at each place of its kernel, which `b2` [r, in, ...] or T (`bm`) has.
    """

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    bm: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.a2)

    def unscaled_delta(self, weight: Tensor) -> Tensor:
        change = torch.einsum("oi...,ij,jc->oc...", weight, self.a1.flatten(1), self.a2.flatten(1))
        return change + LoRA(self.b2, self.b1, self.bm).unscaled_delta(weight).reshape(weight.shape)


@dataclass(frozen=True)
class IA3:
    """diag(l) W, or W diag(l) if `on_input`: Liu et al. 2022 (arXiv:2205.05638), section 3.3; `weight` [n] is l - 1."""

    weight: Tensor
    on_input: bool

    @property
    def rank(self) -> None:
        return None

    def unscaled_delta(self, weight: Tensor) -> Tensor:
        shape = [1, -1] if self.on_input else [-1, 1]
        return weight * self.weight.reshape(*shape, *(weight.ndim - 2) * [1])


@dataclass(frozen=True)
class Rotation:
    """S R_m ... R_1 W, or with R on the inputs S W R_1^T ... R_m^T; each R is block-diagonal: `blocks` [m, k, n, n].

    `rescale` is S, a factor per output. In a butterfly (Liu et al. 2024, arXiv:2311.06243) the rows that a
    block of stage i mixes come from two halves of 2^i n rows, in turns of `unit` rows; without a unit they are
    consecutive.
    """

    blocks: Tensor
    rescale: Tensor | None = None
    on_input: bool = False
    unit: int | None = None

    @property
    def rank(self) -> None:
        return None

    def unscaled_delta(self, weight: Tensor) -> Tensor:
        x = weight.flatten(1)
        x = x.T if self.on_input else x
        for stage, blocks in enumerate(self.blocks):
            x = self._rotate(x, stage, blocks)
        x = x.T if self.on_input else x
        x = x if self.rescale is None else self.rescale.reshape(-1, 1) * x
        return x.reshape(weight.shape) - weight

    def _rotate(self, x: Tensor, stage: int, blocks: Tensor) -> Tensor:
        k, n, _ = blocks.shape
        if self.unit is None:
            return (blocks @ x.reshape(k, n, -1)).reshape(x.shape)
        turns = 2**stage * n // 2 // self.unit
        x = x.reshape(-1, 2, turns, self.unit, x.shape[1]).transpose(1, 2)
        y = blocks @ x.reshape(k, n, -1)
        return y.reshape(x.shape).transpose(1, 2).reshape(k * n, -1)


@dataclass(frozen=True)
class OFT:
    """R^T W in blocks of outputs, R = (I + Q) (I - Q)^-1, Q = B - B^T: Qiu et al. 2023 (arXiv:2306.07280).

    B is `oft_blocks` [k, n, n], as kohya and LyCORIS store it. ||Q|| is limited to `constraint` times the number of
    outputs (COFT) unless that is 0. With B [m, k, n, n] it is LyCORIS' BOFT, a butterfly of R.
    """

    oft_blocks: Tensor
    rescale: Tensor | None = None
    constraint: Tensor | None = None

    @property
    def rank(self) -> None:
        return None

    def unscaled_delta(self, weight: Tensor) -> Tensor:
        q = self.oft_blocks - self.oft_blocks.mT
        if self.constraint is not None:
            limit = self.constraint * len(weight) / (torch.linalg.vector_norm(q) + 1e-8)
            q = q * torch.where(limit > 0, limit.clamp(max=1), 1.0)
        if q.ndim == 3:
            return Rotation(cayley(-q)[None], self.rescale).unscaled_delta(weight)
        return Rotation(cayley(q), self.rescale, unit=1).unscaled_delta(weight)


Factors = LoRA | LoHa | LoKr | Full | GLoRA | IA3 | Rotation | OFT


def cayley(q: Tensor) -> Tensor:
    """(I + Q) (I - Q)^-1, orthogonal for a skew-symmetric Q."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand(q.shape)
    return torch.linalg.solve(eye - q, eye + q, left=False)


def rebuild_tucker(t: Tensor | None, a: Any, b: Any) -> Tensor:
    """a b, or with a kernel t [r, r, h, w] sum_ij a_io t_ijhw b_jc."""
    return a @ b if t is None else torch.einsum("ij...,io,jc->oc...", t, a, b)


def get_factor_tensors(factors: Factors) -> dict[str, Tensor]:
    """The fields that hold tensors."""
    return {name: a for name, a in vars(factors).items() if isinstance(a, Tensor)}


def map_factors(factors: FactorsT, function: Callable[[Tensor], Tensor]) -> FactorsT:
    """The factors with a function applied to each tensor."""
    return replace(factors, **{name: function(a) for name, a in get_factor_tensors(factors).items()})  # type: ignore[arg-type]
