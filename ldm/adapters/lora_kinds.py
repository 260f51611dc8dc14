"""From the tensors that a file has for a module to its change: what each kind of adapter needs, and how it is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ldm.adapters.factors import IA3, OFT, Factors, Full, GLoRA, LoHa, LoKr, LoRA, Rotation, cayley
from ldm.adapters.lora import ModuleDelta
from ldm.adapters.lora_keys import KOHYA_KEY_SUFFIXES, DeltaField

MAX_NEUMANN_TERMS = 100
Tensors = Mapping[str, Tensor]  # by field


class ModuleContext(NamedTuple):
    """A module of a network, its name in the file, and peft's configuration."""

    module: nn.Module
    name: str
    settings: Mapping[str, Any]

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.module.weight)

    def get_number(self, names: Sequence[str], pattern: str = "") -> float | None:
        """A field, or the entry of `pattern` for the end of the module's path; ValueError unless it is positive."""
        patterns = self.settings.get(pattern) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{pattern} {patterns!r}: must be an object")
        pattern_values = (value for key, value in patterns.items() if self.name_ends_with(key.removeprefix("^")))
        value = next(pattern_values, next((self.settings[name] for name in names if name in self.settings), None))
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ValueError(f"{names[0]} {value!r}: must be a positive number")
        return value

    def name_ends_with(self, end: str) -> bool:
        return f".{self.name}".endswith(f".{end}")

    def get_alpha(self, rank: int | None) -> float | None:
        """alpha, times sqrt(rank) for rsLoRA, whose scale is alpha / sqrt(rank): arXiv:2312.03732."""
        alpha = self.get_number(("lora_alpha", "alpha"), "alpha_pattern")
        return alpha * math.sqrt(rank) if alpha and rank and self.settings.get("use_rslora") else alpha

    def is_feedforward(self) -> bool:
        """Whether peft's IA3 scales this module's inputs: `feedforward_modules` are ends of its name, or a pattern."""
        names = self.settings.get("feedforward_modules") or []
        try:
            if isinstance(names, str):
                return re.fullmatch(names, self.name) is not None
            return self.name.endswith(tuple(names))
        except (re.error, TypeError) as error:
            raise ValueError(f"feedforward_modules {names!r}: {error}") from None


class AdapterKind(NamedTuple):
    """The fields that a kind needs, "a|b" for either of two, and its factors from a module's tensors by field.

    `scaled` are fields that scale the change if all that are given are scaled.
    """

    required: tuple[str, ...]
    build: Callable[[Tensors, ModuleContext], Factors]
    scaled: tuple[str, ...] = ()

    def find_missing(self, given: Set[str]) -> list[str]:
        """The fields that are needed and not given."""
        names = [name.split("|") for name in self.required]
        return [alternatives[0] for alternatives in names if not given & {*alternatives}]


def build_lokr(tensors: Tensors, context: ModuleContext) -> Factors:
    """LoKr; in peft alpha has an effect without a rank, too."""
    factors = LoKr(**tensors)
    if factors.rank is None and (r := context.get_number(("r",), "rank_pattern")):
        w1 = cast(Tensor, factors.w1).float()
        return replace(factors, w1=w1 * ((context.get_alpha(None) or r) / r))
    return factors


def build_glora(tensors: Tensors, context: ModuleContext) -> Factors:
    """GLoRA; LyCORIS before 2.0 named the factors of each product the other way round."""
    a1 = tensors["a1"]
    old = len(a1) < a1.flatten(1).shape[1]
    names = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"} if old else {}
    return GLoRA(**{names.get(name, name): a for name, a in tensors.items()})


def build_ia3(tensors: Tensors, context: ModuleContext) -> Factors:
    """LyCORIS' vector l - 1 with `on_input`, or peft's l, whose shape tells its side unless both have one size."""
    if "ia3_l" not in tensors:
        return IA3(tensors["weight"], bool(tensors["on_input"]))
    vector, (n_out, n_in) = tensors["ia3_l"], context.weight.shape[:2]
    sides = [side for side, n in ((False, n_out), (True, n_in)) if vector.numel() == n]
    return IA3(vector.float().flatten() - 1, sides[0] if len(sides) == 1 else context.is_feedforward())


def build_oft(tensors: Tensors, context: ModuleContext) -> Factors:
    """OFT of kohya and LyCORIS, whose alpha is the constraint, LyCORIS' first, which stored R, or peft's."""
    rescale = tensors.get("rescale")
    if "oft_blocks" in tensors:
        return OFT(tensors["oft_blocks"], rescale, tensors.get("alpha"))
    if "oft_diag" in tensors:
        return Rotation(tensors["oft_diag"].mT[None], rescale)
    return Rotation(_peft_oft_blocks(tensors["oft_R"].float(), context)[None], on_input=True)


def _peft_oft_blocks(vectors: Tensor, context: ModuleContext) -> Tensor:
    """R [k, n, n] by peft's rules from the upper triangles of Q [k, n (n - 1) / 2], or [1, ...] for all blocks."""
    count = vectors.shape[-1]
    n = (1 + math.isqrt(1 + 8 * count)) // 2
    if vectors.ndim != 2 or n * (n - 1) // 2 != count:
        raise ValueError(f"{context.name} has oft_R of shape {[*vectors.shape]}, expected [k, n (n - 1) / 2]")
    q = torch.zeros(len(vectors), n, n)
    rows, columns = torch.triu_indices(n, n, 1)
    q[:, rows, columns] = vectors
    q = q - q.mT
    if context.settings.get("coft"):
        eps = (context.get_number(("eps",)) or 6e-5) / math.sqrt(len(q))
        q = q * (eps / torch.linalg.vector_norm(q, dim=(1, 2), keepdim=True)).clamp(max=1)
    blocks = _cayley_neumann(q, context) if context.settings.get("use_cayley_neumann", True) else cayley(-q)
    repeats = context.weight[0].numel() // n if len(q) == 1 else 1
    return blocks.repeat(repeats, 1, 1)


def _cayley_neumann(q: Tensor, context: ModuleContext) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^(m - 1), the series by which peft approximates its Cayley transform, of m terms."""
    terms = context.get_number(("num_cayley_neumann_terms",)) or 5
    if terms > MAX_NEUMANN_TERMS:
        raise ValueError(f"num_cayley_neumann_terms {terms!r}: must be at most {MAX_NEUMANN_TERMS}")
    eye = torch.eye(q.shape[-1]).expand(q.shape)
    if terms < 3:
        return eye + 2 * q * (terms == 2)
    power, total = q @ q, eye + 2 * q + 2 * q @ q
    for _ in range(3, int(terms) - 1):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def build_boft(tensors: Tensors, context: ModuleContext) -> Factors:
    """LyCORIS' BOFT, or peft's, which is on the inputs and changes n / 2 rows at a time."""
    if "oft_blocks" in tensors:
        return build_oft(tensors, context)
    r = tensors["boft_R"].float()
    unit = r.shape[-1] // 2 if len(r) > 1 else None
    return Rotation(cayley((r.mT - r) / 2), tensors.get("boft_s"), on_input=True, unit=unit)


KINDS = {
    "LoRA": AdapterKind(("down", "up"), lambda tensors, _: LoRA(**tensors), ("up",)),
    "LoHa": AdapterKind(("w1_a", "w1_b", "w2_a", "w2_b"), lambda tensors, _: LoHa(**tensors), ("w1_a",)),
    "LoKr": AdapterKind(("w1_a|w1", "w1_b|w1", "w2_a|w2", "w2_b|w2"), build_lokr, ("w1", "w1_a")),
    "Full": AdapterKind(("diff",), lambda tensors, _: Full(**tensors), ("diff",)),
    "GLoRA": AdapterKind(("a1", "a2", "b1", "b2"), build_glora, ("a1", "b1")),
    "IA3": AdapterKind(("weight|ia3_l", "on_input|ia3_l"), build_ia3, ("weight",)),
    "OFT": AdapterKind(("oft_blocks|oft_diag|oft_R",), build_oft),
    "BOFT": AdapterKind(("boft_R|oft_blocks",), build_boft),
}
KINDS_WITH_CONSTRAINT = "OFT", "BOFT"  # whose alpha and rescale are theirs


def find_incomplete_reason(fields: Iterable[DeltaField]) -> str | None:
    """What a change lacks, or has too much of; None if it is complete."""
    given = set(fields)
    kinds = {kind for kind, _ in given if kind}
    if len(kinds) > 1:
        return f"is given as {' and '.join(sorted(kinds))}"
    if not kinds:
        return None if given <= {(None, "bias")} else "has no factors"
    kind = kinds.pop()
    if (None, "rescale") in given and kind not in KINDS_WITH_CONSTRAINT:
        return f"has a rescale, which {kind} does not take"
    if (None, "scalar") in given and not KINDS[kind].scaled:
        return f"has a scalar, which {kind} does not take"
    missing = KINDS[kind].find_missing({name for _, name in given})
    return f"lacks {' and '.join(KOHYA_KEY_SUFFIXES[kind, name][1:] for name in missing)}" if missing else None


def build_delta(fields: Mapping[DeltaField, Tensor], context: ModuleContext) -> ModuleDelta:
    """The change of a module by its tensors in a file."""
    kind = next((kind for kind, _ in fields if kind), None)
    others = {name: a for (owner, name), a in fields.items() if not owner}
    factors = _build_factors(kind, fields, others, context) if kind else None
    alpha = float(others["alpha"]) if "alpha" in others else context.get_alpha(factors.rank if factors else None)
    magnitude = _reshape_dora_magnitude(others, context.weight.ndim)
    delta = ModuleDelta(factors, alpha, magnitude, others.get("bias"), _peft_ia3_bias_scale(fields, factors, context))
    return replace(delta, bias=delta.scale * others["up_bias"].float()) if "up_bias" in others else delta


def _build_factors(
    kind: str, fields: Mapping[DeltaField, Tensor], others: dict[str, Tensor], context: ModuleContext
) -> Factors:
    """The factors of a kind, which takes its own from the fields that any kind may have."""
    tensors = {name: a for (owner, name), a in fields.items() if owner}
    if kind in KINDS_WITH_CONSTRAINT:
        tensors |= {name: others.pop(name) for name in ("alpha", "rescale") if name in others}
    if "scalar" in others:
        scalar = others["scalar"].float().reshape(())
        tensors |= {name: tensors[name].float() * scalar for name in KINDS[kind].scaled if name in tensors}
    try:
        return KINDS[kind].build(tensors, context)
    except (RuntimeError, IndexError):  # of torch, for tensors of another number of dimensions
        sizes = " and ".join(str([*a.shape]) for a in tensors.values())
        raise ValueError(f"{context.name} has tensors of shape {sizes}, which are no {kind}") from None


def _peft_ia3_bias_scale(
    fields: Mapping[DeltaField, Tensor], factors: Factors | None, context: ModuleContext
) -> Tensor | None:
    """peft's IA3 on the outputs of a module scales them with its bias; LyCORIS' merges into the weight alone."""
    if not isinstance(factors, IA3) or ("IA3", "ia3_l") not in fields or factors.on_input:
        return None
    return None if getattr(context.module, "bias", None) is None else factors.weight


def _reshape_dora_magnitude(fields: Mapping[str, Tensor], ndim: int) -> Tensor | None:
    """DoRA's magnitude: one number per output or, in older files of LyCORIS, of shape [1, in], per input."""
    if "magnitude" in fields:
        return fields["magnitude"].reshape(-1, *(ndim - 1) * [1])
    if (m := fields.get("dora_scale")) is None:
        return None
    per_input = m.ndim > 1 and len(m) == 1 != m.numel()
    return m.reshape(*([1] if per_input else []), -1, *(ndim - 1 - per_input) * [1])
