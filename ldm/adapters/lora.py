"""Adapters of every kind (LoRA, LoKr, OFT, ...): merged ("fused") into a model's weights, and removed bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ldm.adapters.factors import Factors, get_factor_tensors, map_factors
from ldm.errors import list_some

NetworkDict = Mapping[str, nn.Module]  # by component
AdapterWeight = float | tuple[float, float]  # one weight, or two: of the U-Net and of the text encoders


@dataclass(frozen=True)
class ModuleDelta:
    """The change of one module: of its weight by `factors`, of its bias b by `bias` + `bias_scale` * b.

    DoRA's magnitude `dora_scale` m has the weight's number of dimensions, and size 1 along those that its norm is over.
    """

    factors: Factors | None = None
    alpha: float | None = None
    dora_scale: Tensor | None = None
    bias: Tensor | None = None
    bias_scale: Tensor | None = None

    @property
    def scale(self) -> float:
        """alpha / rank, or 1 if either is None."""
        rank = self.factors.rank if self.factors else None
        return 1.0 if self.alpha is None or not rank else self.alpha / rank

    def delta_weight(self, base: Tensor) -> Tensor:
        """The change D of a weight W, in float32, on its device and in its shape: scale * product of the factors.

        With m it is DoRA's, m (W + D) / (||W + D|| + eps) - W: Liu et al. 2024 (arXiv:2402.09353), eq. 5, the norm
        being over the inputs (or, in old files, the outputs), with LyCORIS' eps, that of float32.
        """
        w = base.float()
        if self.factors is None:
            return torch.zeros_like(w)
        delta = self.scale * map_factors(self.factors, lambda a: a.to(w)).unscaled_delta(w).reshape(w.shape)
        if self.dora_scale is None:
            return delta
        v, m = w + delta, self.dora_scale.to(w)
        norm = torch.linalg.vector_norm(v, dim=[k for k, n in enumerate(m.shape) if n == 1], keepdim=True)
        return v * (m / (norm + torch.finfo(v.dtype).eps)) - w

    def delta_bias(self, base: Tensor) -> Tensor:
        """The change of a bias, in float32."""
        b = base.float()
        change = torch.zeros_like(b) if self.bias is None else self.bias.to(b)
        return change if self.bias_scale is None else change + self.bias_scale.to(b) * b

    def shape_error(self, module: nn.Module) -> str | None:
        """Why the change does not fit a module, or None; only shapes are read."""
        weight, bias = cast(Tensor, module.weight), cast(Tensor | None, getattr(module, "bias", None))
        for change in (self.bias, self.bias_scale):
            if change is not None and (bias is None or bias.shape != change.shape):
                expected = "none" if bias is None else str([*bias.shape])
                return f"changes a bias of shape {[*change.shape]}, expected {expected}"
        if self.factors is None:
            return None
        factors = map_factors(self.factors, lambda a: a.to("meta", torch.float32))
        try:
            meta = torch.empty(weight.shape, device="meta")
            shape = factors.unscaled_delta(meta).shape if factors.rank != 0 else torch.Size()
        except (RuntimeError, IndexError, ValueError):  # of torch, for factors that cannot be multiplied
            shape = torch.Size()
        if not shape or shape[0] != len(weight) or shape.numel() != weight.numel():
            sizes = " and ".join(str([*a.shape]) for a in get_factor_tensors(self.factors).values())
            return f"has factors of shape {sizes}, which do not fit a weight of shape {[*weight.shape]}"
        m = self.dora_scale
        if m is not None and [n for n, k in zip(m.shape, weight.shape, strict=True) if n not in (1, k)]:
            return f"has a dora_scale of shape {[*m.shape]}, expected one number per output of {[*weight.shape]}"
        return None


@dataclass(frozen=True, eq=False)
class Adapter:
    """Changes of a model's modules by target, component/path (`unet/down_blocks.0.attentions.0.proj_in`).

    `sha256` is that of its files, `webui_hash` the hash by which AUTOMATIC1111's web UI refers to it.
    """

    name: str
    deltas: Mapping[str, ModuleDelta]
    sha256: str = ""
    webui_hash: str = ""
    lora_format: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


class AdapterMerger:
    """The adapters of a model, fused into its weights: W' = W + sum_i w_i D_i(W), in float32 and rounded once.

    Each D_i is computed from the base weight W alone, DoRA's too, so that setting the same weights again gives the same
    bits. The base values of changed parameters are kept on the host. Parameters stay where they are in memory. If
    anything fails, nothing has changed.
    """

    def __init__(self, networks: NetworkDict) -> None:
        self.networks = networks
        self.loaded: Mapping[str, tuple[Adapter, AdapterWeight]] = {}
        self.base_weights: dict[str, Tensor] = {}  # by parameter (`unet/conv_in.weight`): its values without adapters

    def load(self, adapter: Adapter, weight: AdapterWeight = 1.0) -> None:
        """Add an adapter; ValueError if its name is taken or it does not fit."""
        if adapter.name in self.loaded:
            raise ValueError(f"adapter {adapter.name!r}: an adapter of that name is loaded already: give NAME=FILE")
        if faults := find_shape_errors(adapter.deltas, self.networks):
            raise ValueError(f"adapter {adapter.name!r}: {list_some(faults)}")
        self._replace_adapters({**self.loaded, adapter.name: (adapter, check_adapter_weight(adapter.name, weight))})

    def set_weights(self, weights: Mapping[str, AdapterWeight]) -> None:
        """Set weights by name; the other adapters get 0, as by diffusers' set_adapters."""
        for name in weights:
            self._check_loaded(name)
        chosen = {name: check_adapter_weight(name, weight) for name, weight in weights.items()}
        self._replace_adapters({name: (adapter, chosen.get(name, 0.0)) for name, (adapter, _) in self.loaded.items()})

    def unload(self, name: str | None = None) -> None:
        """Remove one adapter, or all."""
        if name is not None:
            self._check_loaded(name)
        self._replace_adapters({k: loaded for k, loaded in self.loaded.items() if name is not None and k != name})

    def _check_loaded(self, name: str) -> None:
        if name not in self.loaded:
            raise ValueError(f"adapter {name!r}: choose from {', '.join(self.loaded) or 'none'}")

    @torch.no_grad()
    def _replace_adapters(self, wanted: Mapping[str, tuple[Adapter, AdapterWeight]]) -> None:
        before = self.loaded
        both = {**before, **wanted}
        names = [name for name in both if before.get(name) != wanted.get(name)]
        changed = sorted({key for name in names for key in iter_changed_parameters(both[name][0])})
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
        """Set a parameter to its base values plus the changes of these adapters."""
        target, kind = key.rsplit(".", 1)
        component, path = target.split("/")
        parameter = self.networks[component].get_parameter(f"{path}.{kind}")
        if key not in self.base_weights:
            self.base_weights[key] = parameter.detach().to("cpu", copy=True)
        base = self.base_weights[key].to(parameter.device)
        value = base.float()
        for adapter, weight in wanted.values():
            if (delta := adapter.deltas.get(target)) and (w := get_component_weight(weight, component)):
                change = delta.delta_weight(base) if kind == "weight" else delta.delta_bias(base)
                value = value + w * change
        parameter.copy_(value)


def iter_changed_parameters(adapter: Adapter) -> Iterator[str]:
    """The parameters that an adapter changes, by component/name (`unet/conv_in.weight`)."""
    for target, delta in adapter.deltas.items():
        if delta.factors is not None:
            yield f"{target}.weight"
        if delta.bias is not None or delta.bias_scale is not None:
            yield f"{target}.bias"


def get_component_weight(weight: AdapterWeight, component: str) -> float:
    """The weight of an adapter in one network."""
    return weight[component != "unet"] if isinstance(weight, tuple) else weight


def check_adapter_weight(name: str, weight: AdapterWeight) -> AdapterWeight:
    """The weight, as one number where a pair is of two equal ones; ValueError unless it is finite."""
    if not all(math.isfinite(get_component_weight(weight, component)) for component in ("unet", "text_encoder")):
        raise ValueError(f"adapter {name!r}: weight {weight}: must be finite")
    return weight[0] if isinstance(weight, tuple) and weight[0] == weight[1] else weight


def find_shape_errors(deltas: Mapping[str, ModuleDelta], networks: NetworkDict) -> list[str]:
    """Why changes do not fit these networks, one line per target."""
    modules = {f"{component}/{path}": m for component, net in networks.items() for path, m in net.named_modules()}
    errors = {target: delta.shape_error(modules[target]) for target, delta in deltas.items() if target in modules}
    unknown = [f"no module {target}" for target in deltas if target not in modules]
    return unknown + [f"{target} {why}" for target, why in errors.items() if why]


def get_module_weight(networks: NetworkDict, target: str) -> Tensor:
    """The weight of the module component/path."""
    component, path = target.split("/")
    return cast(Tensor, networks[component].get_submodule(path).weight)
