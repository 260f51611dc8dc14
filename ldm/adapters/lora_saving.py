"""Writes adapters in the format of a tool: kohya's, diffusers' or peft's; what a format has no keys for is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.adapters.factors import IA3, OFT, LoRA, Rotation, get_factor_tensors, map_factors
from ldm.adapters.lora import Adapter, ModuleDelta, NetworkDict, get_module_weight
from ldm.adapters.lora_keys import (
    BASE_MODEL_VERSIONS,
    KOHYA_KEY_SUFFIXES,
    PEFT_KEY_PREFIX,
    DeltaField,
    add_text_model_prefix,
    to_sgm_name,
)
from ldm.checkpoints.hub import PEFT_CONFIG_NAME, PEFT_LORA_NAME
from ldm.checkpoints.tensors import write_tensors
from ldm.errors import choose
from ldm.files import atomic_write, write_json

LORA_ADAPTER_METADATA_KEY = "lora_adapter_metadata"  # of the header: peft's configuration


def save_adapter(
    adapter: Adapter, dst: Path, lora_format: str, networks: NetworkDict, family: str | None = None
) -> None:
    """Write an adapter of these networks in a format, a row of LORA_FORMATS, whole or not at all.

    "kohya" and "diffusers" are a safetensors file, "peft" is a folder with one per network. `family` is written to
    kohya's metadata. ValueError for a change that the format has no keys for.
    """
    choose(LORA_FORMATS, lora_format, "LoRA format")(adapter, dst, networks, family)


def _save_kohya(adapter: Adapter, dst: Path, networks: NetworkDict, family: str | None) -> None:
    """kohya's and LyCORIS' keys, for SDXL's U-Net by SGM module names; every tensor unchanged but for its shape."""
    tensors: dict[str, Tensor] = {}
    for target, delta in adapter.deltas.items():
        module = _kohya_module_name(target, networks)
        for delta_field, a in _delta_tensors(target, delta, get_module_weight(networks, target)).items():
            tensors[module + KOHYA_KEY_SUFFIXES[delta_field]] = a.contiguous()
    deltas = adapter.deltas.values()
    only_lora = all(isinstance(d.factors, LoRA) and d.dora_scale is None for d in deltas)
    metadata = {**_foreign_metadata(adapter), "ss_network_module": "networks.lora" if only_lora else "lycoris.kohya"}
    if pairs := Counter((d.factors.rank, d.alpha) for d in deltas if d.factors and d.factors.rank):
        ((rank, alpha), _), *_ = pairs.most_common(1)
        metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{rank if alpha is None else alpha:g}"}
    if family is not None:
        version = family.split("-")[0]
        metadata |= {"ss_base_model_version": BASE_MODEL_VERSIONS[version].kohya_name, "ss_v2": str(version == "sd2")}
    write_tensors(tensors, dst, metadata)


def _kohya_module_name(target: str, networks: NetworkDict) -> str:
    """A module as kohya names it, for models with two text encoders (SDXL) otherwise than for the others."""
    component, path = target.split("/")
    xl = "text_encoder_2" in networks
    if component == "unet":
        return "lora_unet_" + (to_sgm_name(path, networks[component]) if xl else path).replace(".", "_")
    prefix = {"text_encoder": "lora_te1_" if xl else "lora_te_", "text_encoder_2": "lora_te2_"}[component]
    return prefix + add_text_model_prefix(path).replace(".", "_")


def _delta_tensors(target: str, delta: ModuleDelta, weight: Tensor) -> dict[DeltaField, Tensor]:
    """The tensors of a change; those of LoRA in the shape of a layer like the module's."""
    tensors: dict[DeltaField, Tensor] = {}
    match delta.factors:
        case None:
            pass
        case Rotation(blocks, rescale, on_input=False, unit=None) if len(blocks) == 1:
            parts = {("OFT", "oft_diag"): blocks[0].mT, (None, "rescale"): rescale}
            tensors |= {delta_field: a for delta_field, a in parts.items() if a is not None}
        case Rotation():
            raise ValueError(f"{target}: an OFT or BOFT of peft has no key in kohya's format")
        case IA3() if delta.bias_scale is not None:
            raise ValueError(f"{target}: an IA3 of peft that scales a bias has no key in kohya's format")
        case OFT(blocks, rescale, constraint):
            parts = {("OFT", "oft_blocks"): blocks, (None, "rescale"): rescale, (None, "alpha"): constraint}
            tensors |= {delta_field: a for delta_field, a in parts.items() if a is not None}
        case IA3(vector, on_input):
            shape = [-1] if weight.ndim == 2 else [1, -1, *(weight.ndim - 2) * [1]]
            tensors["IA3", "weight"], tensors["IA3", "on_input"] = vector.reshape(shape), torch.tensor(int(on_input))
        case factors:
            shaped = _reshape_to_layers(factors, weight) if isinstance(factors, LoRA) else factors
            tensors |= {(type(shaped).__name__, name): a for name, a in get_factor_tensors(shaped).items()}
            if rank := factors.rank:
                tensors[None, "alpha"] = torch.tensor(float(rank if delta.alpha is None else delta.alpha))
    optional = {"dora_scale": delta.dora_scale, "bias": delta.bias}
    return tensors | {(None, name): a for name, a in optional.items() if a is not None}


def _reshape_to_layers(lora: LoRA, weight: Tensor) -> LoRA:
    """The factors as weights of linear layers, or of convolutions of which one has the kernel."""
    if weight.ndim == 2:
        return map_factors(lora, lambda a: a.flatten(1))
    down, up = (a.flatten(1)[..., None, None] for a in (lora.down, lora.up))
    return LoRA(down if lora.mid is not None else lora.down.reshape(lora.rank, *weight.shape[1:]), up, lora.mid)


def _save_diffusers(adapter: Adapter, dst: Path, networks: NetworkDict, family: str | None) -> None:
    """diffusers' present keys; alpha is multiplied into B, as no version of diffusers reads it from such a file."""
    tensors: dict[str, Tensor] = {}
    for component, state_dict in _peft_state_dicts(adapter, networks, "diffusers").items():
        for name, a in state_dict.items():
            tensors[f"{component}.{name if component == 'unet' else add_text_model_prefix(name)}"] = a
    write_tensors(tensors, dst, _foreign_metadata(adapter))


def _save_peft(adapter: Adapter, dst: Path, networks: NetworkDict, family: str | None) -> None:
    """A folder per network, which PeftModel.from_pretrained takes for a model of diffusers or transformers 5."""
    with atomic_write(dst) as draft:
        for component, state_dict in _peft_state_dicts(adapter, networks, "peft").items():
            ranks = {
                name.removesuffix(".lora_A.weight"): len(a) for name, a in state_dict.items() if ".lora_A." in name
            }
            config = {
                "peft_type": "LORA",
                "r": max(ranks.values()),
                "lora_alpha": max(ranks.values()),
                "rank_pattern": ranks,
                "alpha_pattern": ranks,
                "target_modules": list(ranks),
                "use_dora": any(".lora_magnitude_vector" in name for name in state_dict),
                "inference_mode": True,
            }
            folder = draft / component
            folder.mkdir(parents=True)
            keyed = {PEFT_KEY_PREFIX + name: a for name, a in state_dict.items()}
            save_file(keyed, folder / PEFT_LORA_NAME, {"format": "pt"})
            write_json(config, folder / PEFT_CONFIG_NAME)


def _peft_state_dicts(adapter: Adapter, networks: NetworkDict, lora_format: str) -> dict[str, dict[str, Tensor]]:
    """By component and peft's key the tensors of LoRA with alpha = rank, and DoRA's magnitude."""
    state_dicts: dict[str, dict[str, Tensor]] = {}
    for target, delta in adapter.deltas.items():
        component, path = target.split("/")
        weight = get_module_weight(networks, target)
        lora, m = _fold_scale(delta, weight), delta.dora_scale
        if lora is None or delta.bias is not None or (m is not None and len(m) != len(weight)):
            kind = type(delta.factors).__name__ if lora is None else "a bias" if delta.bias is not None else "old DoRA"
            raise ValueError(f"{target}: {kind} has no key in {lora_format}'s format: only kohya's has all")
        tensors = {"lora_A.weight": lora.down, "lora_B.weight": lora.up}
        if m is not None:
            tensors["lora_magnitude_vector"] = m.flatten() if weight.ndim == 2 else m.transpose(0, 1)
        keyed = {f"{path}.{name}": a.contiguous() for name, a in tensors.items()}
        state_dicts.setdefault(component, {}).update(keyed)
    if len({d.dora_scale is None for d in adapter.deltas.values()}) > 1:
        raise ValueError(f"{lora_format}'s format cannot mix DoRA and LoRA modules: only kohya's can")
    return state_dicts


def _fold_scale(delta: ModuleDelta, weight: Tensor) -> LoRA | None:
    """The change as LoRA of scale 1 without `mid`, B in float32 if scaling it rounds; None if it is not LoRA."""
    if not isinstance(delta.factors, LoRA):
        return None
    lora = delta.factors
    down = lora.down if lora.mid is None else map_factors(lora, Tensor.float).kernel
    up = lora.up.float() * delta.scale
    rounded = up.to(lora.up.dtype)
    return _reshape_to_layers(LoRA(down, rounded if rounded.float().equal(up) else up), weight)


def _foreign_metadata(adapter: Adapter) -> dict[str, str]:
    """The header's metadata but for peft's configuration, which the written tensors no longer follow."""
    return {name: text for name, text in adapter.metadata.items() if name != LORA_ADAPTER_METADATA_KEY}


LORA_FORMATS: dict[str, Callable[[Adapter, Path, NetworkDict, str | None], None]] = {
    "kohya": _save_kohya,
    "diffusers": _save_diffusers,
    "peft": _save_peft,
}
