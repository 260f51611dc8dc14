"""Adapters: small changes of a model's weights, merged into them and taken out again bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

FactorsT = TypeVar("FactorsT", bound="Factors")
AdapterWeight = float | tuple[float, float]  # of an adapter, or its two: of the U-Net and of the text encoders


@dataclass(frozen=True)
class LoRA:
    """B A, a map through r dimensions: Hu et al. 2021 (arXiv:2106.09685), eq. 3. A is `down` [r, in], B `up` [out, r].

    Of a convolution, A has the kernel and B is 1x1. With `mid` T [r, r, h, w] both are 1x1 (Tucker's decomposition):
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
        """A, with the kernel that `mid` may hold, [r, in, ...]."""
        return self.down if self.mid is None else torch.einsum("ij...,jc->ic...", self.mid, self.down.flatten(1))

    def unscaled_delta(self) -> Tensor:
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

    def unscaled_delta(self) -> Tensor:
        return rebuild_tucker(self.t1, self.w1_a, self.w1_b) * rebuild_tucker(self.t2, self.w2_a, self.w2_b)


@dataclass(frozen=True)
class LoKr:
    """W1 (x) W2, a Kronecker product whose factors are whole or a b: Yeh et al. 2024 (arXiv:2309.14859).

    Where neither is a b there is no rank, and alpha means nothing. With T2 (`t2`) W2 is sum_ij a_io T_ijhw b_jc.
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
        thin = self.w1_b if self.w1_b is not None else self.w2_b
        return None if thin is None else len(thin)

    def unscaled_delta(self) -> Tensor:
        w1 = rebuild_tucker(None, self.w1_a, self.w1_b) if self.w1 is None else self.w1
        w2 = rebuild_tucker(self.t2, self.w2_a, self.w2_b) if self.w2 is None else self.w2
        return torch.kron(w1.reshape(*w1.shape, *(w2.ndim - w1.ndim) * [1]), w2.contiguous())


@dataclass(frozen=True)
class Full:
    """The change itself."""

    diff: Tensor

    @property
    def rank(self) -> None:
        return None

    def unscaled_delta(self) -> Tensor:
        return self.diff


Factors = LoRA | LoHa | LoKr | Full


def rebuild_tucker(t: Tensor | None, a: Any, b: Any) -> Tensor:
    """a b, or with a kernel t [r, r, h, w] sum_ij a_io t_ijhw b_jc."""
    return a @ b if t is None else torch.einsum("ij...,io,jc->oc...", t, a, b)


@dataclass(frozen=True)
class ModuleDelta:
    """The change of one module: of its weight by `factors`, of its bias by `bias`.

    `dora_scale` m has the weight's number of dimensions, and size 1 along those whose norm it replaces.
    """

    factors: Factors | None = None
    alpha: float | None = None
    dora_scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def scale(self) -> float:
        """alpha / rank, 1 where either is not said."""
        rank = self.factors.rank if self.factors else None
        return 1.0 if self.alpha is None or not rank else self.alpha / rank

    def delta_weight(self, base: Tensor) -> Tensor:
        """The change D of a weight W, float32 on its device: D = scale * product, in W's shape.

        With m it is DoRA's, m (W + D) / (||W + D|| + eps) - W: Liu et al. 2024 (arXiv:2402.09353), eq. 5, with the
        norm over the inputs (or, in old files, the outputs) and LyCORIS' eps, float32's own.
        """
        w = base.float()
        if self.factors is None:
            return torch.zeros_like(w)
        change = self.scale * map_factors(self.factors, lambda a: a.to(w)).unscaled_delta().reshape(w.shape)
        if self.dora_scale is None:
            return change
        v, m = w + change, self.dora_scale.to(w)
        norm = torch.linalg.vector_norm(v, dim=[k for k, n in enumerate(m.shape) if n == 1], keepdim=True)
        return v * (m / (norm + torch.finfo(v.dtype).eps)) - w

    def shape_error(self, module: nn.Module) -> str | None:
        """What hinders the change of a module, or None; no value is looked at."""
        weight, bias = cast(Tensor, module.weight), cast(Tensor | None, getattr(module, "bias", None))
        if self.bias is not None and (bias is None or bias.shape != self.bias.shape):
            expected = "none" if bias is None else str([*bias.shape])
            return f"changes a bias of shape {[*self.bias.shape]}, expected {expected}"
        if self.factors is None:
            return None
        factors = map_factors(self.factors, lambda a: a.to("meta", torch.float32))
        try:
            shape = factors.unscaled_delta().shape if factors.rank != 0 else torch.Size()
        except (RuntimeError, IndexError):  # torch's words for sizes that do not meet
            shape = torch.Size()
        if not shape or shape[0] != len(weight) or shape.numel() != weight.numel():
            sizes = " and ".join(str([*a.shape]) for a in get_tensor_fields(self.factors).values())
            return f"has factors of shape {sizes}, which make no weight of shape {[*weight.shape]}"
        m = self.dora_scale
        if m is not None and [n for n, k in zip(m.shape, weight.shape, strict=True) if n not in (1, k)]:
            return f"has a dora_scale of shape {[*m.shape]}, expected one number for each output of {[*weight.shape]}"
        return None


@dataclass(frozen=True, eq=False)
class Adapter:
    """Changes of a model's modules, each by its folder and path (`unet/down_blocks.0.attentions.0.proj_in`).

    `compute_webui_hash` is what AUTOMATIC1111's web UI knows its file by.
    """

    name: str
    deltas: Mapping[str, ModuleDelta]
    sha256: str = ""
    webui_hash: str = ""
    lora_format: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


class AdapterMerger:
    """The adapters of a model, merged into its weights: W' = W + sum_i w_i D_i(W), in float32 and rounded once.

    Each D_i is of the base W alone, DoRA's too, whatever else is loaded: weight w of DoRA goes w of the way from W to
    its own weight, and what is set again is the same again, bit for bit. The base of what is changed is kept on the
    host and put back as it was. Parameters stay where they are in memory. Whatever fails changes nothing.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.networks = networks
        self.loaded: Mapping[str, tuple[Adapter, AdapterWeight]] = {}
        self.base_weights: dict[str, Tensor] = {}  # parameter: its values without adapters

    def load(self, adapter: Adapter, weight: AdapterWeight = 1.0) -> None:
        """Add an adapter; ValueError where its name is taken or it does not fit."""
        if adapter.name in self.loaded:
            raise ValueError(f"adapter {adapter.name!r}: there is one of that name")
        if faults := find_shape_errors(adapter.deltas, self.networks):
            raise ValueError(f"adapter {adapter.name!r}: {summarize_faults(faults)}")
        self._replace_adapters({**self.loaded, adapter.name: (adapter, check_adapter_weight(adapter.name, weight))})

    def set_weights(self, weights: Mapping[str, AdapterWeight]) -> None:
        """Weights by name; an adapter that is not named gets 0, as by diffusers' set_adapters."""
        for name in weights:
            self._check_loaded(name)
        chosen = {name: check_adapter_weight(name, weight) for name, weight in weights.items()}
        self._replace_adapters({name: (adapter, chosen.get(name, 0.0)) for name, (adapter, _) in self.loaded.items()})

    def unload(self, name: str | None = None) -> None:
        """Take out one adapter, or all."""
        if name is not None:
            self._check_loaded(name)
        self._replace_adapters({k: loaded for k, loaded in self.loaded.items() if name is not None and k != name})

    def _check_loaded(self, name: str) -> None:
        if name not in self.loaded:
            raise ValueError(f"adapter {name!r}: choose from {', '.join(self.loaded) or 'none'}")

    @torch.no_grad()
    def _replace_adapters(self, wanted: Mapping[str, tuple[Adapter, AdapterWeight]]) -> None:
        before = self.loaded
        names = [name for name in {**before, **wanted} if before.get(name) != wanted.get(name)]
        changed = sorted({key for name in names for key in iter_changed_parameters(({**before, **wanted})[name][0])})
        try:
            for key in changed:
                self._merge_parameter(key, wanted)
            self.loaded = wanted
        except BaseException:
            for key in changed:
                self._merge_parameter(key, before)
            raise
        finally:
            used = {key for adapter, _ in self.loaded.values() for key in iter_changed_parameters(adapter)}
            self.base_weights = {key: values for key, values in self.base_weights.items() if key in used}

    def _merge_parameter(self, key: str, wanted: Mapping[str, tuple[Adapter, AdapterWeight]]) -> None:
        """Give a parameter the values that it has with these adapters."""
        target, kind = key.rsplit(".", 1)
        folder, path = target.split("/")
        parameter = self.networks[folder].get_parameter(f"{path}.{kind}")
        if key not in self.base_weights:
            self.base_weights[key] = parameter.detach().to("cpu", copy=True)
        base = self.base_weights[key].to(parameter.device)
        value = base.float()
        for adapter, weight in wanted.values():
            if (delta := adapter.deltas.get(target)) and (w := get_component_weight(weight, folder)):
                change = delta.delta_weight(base) if kind == "weight" else delta.bias
                value = value if change is None else value + w * change.to(value)
        parameter.copy_(value)


def iter_changed_parameters(adapter: Adapter) -> Iterator[str]:
    """What an adapter changes, by folder and name (`unet/conv_in.weight`)."""
    for target, delta in adapter.deltas.items():
        if delta.factors is not None:
            yield f"{target}.weight"
        if delta.bias is not None:
            yield f"{target}.bias"


def get_component_weight(weight: AdapterWeight, component: str) -> float:
    """The weight of an adapter in one network."""
    return weight[component != "unet"] if isinstance(weight, tuple) else weight


def check_adapter_weight(name: str, weight: AdapterWeight) -> AdapterWeight:
    """The weight; ValueError unless it is finite."""
    if not all(math.isfinite(get_component_weight(weight, folder)) for folder in ("unet", "text_encoder")):
        raise ValueError(f"adapter {name!r}: weight {weight}: must be finite")
    return weight


def find_shape_errors(deltas: Mapping[str, ModuleDelta], networks: Mapping[str, nn.Module]) -> list[str]:
    """What hinders changes of these networks, one line for each target."""
    modules = {f"{folder}/{path}": m for folder, network in networks.items() for path, m in network.named_modules()}
    found = {target: delta.shape_error(modules[target]) for target, delta in deltas.items() if target in modules}
    unknown = [f"no module {target}" for target in deltas if target not in modules]
    return unknown + [f"{target} {why}" for target, why in found.items() if why]


def summarize_faults(faults: Sequence[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")


def get_tensor_fields(factors: Factors) -> dict[str, Tensor]:
    """The fields of a record that are tensors."""
    return {f.name: a for f in fields(factors) if isinstance(a := getattr(factors, f.name), Tensor)}


def map_factors(factors: FactorsT, change: Callable[[Tensor], Tensor]) -> FactorsT:
    """The record with each of its tensors changed."""
    return replace(factors, **{name: change(a) for name, a in get_tensor_fields(factors).items()})  # type: ignore[arg-type]
