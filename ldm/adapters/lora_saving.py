"""Adapters written in the dialect of a tool: one rule for each, and what it has no names for is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.adapters.lora import Adapter, LoRA, ModuleDelta, get_tensor_fields, map_factors
from ldm.adapters.lora_keys import KOHYA_KEY_SUFFIXES, PEFT_KEY_PREFIX, NetworkDict, add_text_model_prefix, to_sgm_name
from ldm.checkpoints.hub import PEFT_CONFIG_NAME, PEFT_LORA_NAME
from ldm.errors import choose
from ldm.files import atomic_write, write_json

LORA_ADAPTER_METADATA_KEY = "lora_adapter_metadata"  # a key of the header
KOHYA_BASE_MODEL_VERSIONS = {
    "sd1": "sd_v1",
    "sd2": "sd_v2",
    "sdxl": "sdxl_base_v1-0",
}  # by the beginning of a family's name


def save_adapter(
    adapter: Adapter, dst: Path, lora_format: str, networks: NetworkDict, family: str | None = None
) -> None:
    """Write an adapter of these networks in a dialect, a row of DIALECTS, whole or not at all.

    "kohya" and "diffusers" are a safetensors file, "peft" is a folder with one for each network. `family` is written to
    kohya's metadata. ValueError for what the dialect has no names for.
    """
    choose(LORA_FORMATS, lora_format, "dialect")(adapter, dst, networks, family)


def _save_kohya(adapter: Adapter, dst: Path, networks: NetworkDict, family: str | None) -> None:
    """kohya's names and LyCORIS'; SDXL's U-Net by those of its makers. Each tensor is as the file had it."""
    values: dict[str, Tensor] = {}
    for target, delta in adapter.deltas.items():
        name = _kohya_module_name(target, networks)
        values |= {
            name + KOHYA_KEY_SUFFIXES[part]: a.contiguous()
            for part, a in _delta_tensors(delta, _module_weight(target, networks))
        }
    plain = all(isinstance(d.factors, LoRA) and d.dora_scale is None for d in adapter.deltas.values())
    metadata = {
        **{name: value for name, value in adapter.metadata.items() if name != LORA_ADAPTER_METADATA_KEY},
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
    }
    if pairs := Counter((d.factors.rank, d.alpha) for d in adapter.deltas.values() if d.factors and d.factors.rank):
        ((rank, alpha), _), *_ = pairs.most_common(1)
        metadata |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{rank if alpha is None else alpha:g}"}
    if family is not None:
        line = family.split("-")[0]
        metadata |= {"ss_base_model_version": KOHYA_BASE_MODEL_VERSIONS[line], "ss_v2": str(line == "sd2")}
    _publish_safetensors(values, dst, metadata)


def _kohya_module_name(target: str, networks: NetworkDict) -> str:
    """A module as kohya names it: SDXL's, which has two text encoders, otherwise than the others'."""
    folder, path = target.split("/")
    xl = "text_encoder_2" in networks
    if folder == "unet":
        return "lora_unet_" + (to_sgm_name(path, networks[folder]) if xl else path).replace(".", "_")
    prefix = {"text_encoder": "lora_te1_" if xl else "lora_te_", "text_encoder_2": "lora_te2_"}[folder]
    return prefix + add_text_model_prefix(path).replace(".", "_")


def _delta_tensors(delta: ModuleDelta, weight: Tensor) -> Iterator[tuple[tuple[type | None, str], Tensor]]:
    """The tensors of a change by the part that each is; those of LoRA in the shape of a layer like the module's."""
    if delta.factors is not None:
        factors = _reshape_to_layers(delta.factors, weight) if isinstance(delta.factors, LoRA) else delta.factors
        yield from (((type(factors), name), a) for name, a in get_tensor_fields(factors).items())
        if rank := delta.factors.rank:
            yield (None, "alpha"), torch.tensor(float(rank if delta.alpha is None else delta.alpha))
    if delta.dora_scale is not None:
        yield (None, "dora_scale"), delta.dora_scale
    if delta.bias is not None:
        yield (None, "bias"), delta.bias


def _reshape_to_layers(lora: LoRA, weight: Tensor) -> LoRA:
    """The factors as weights of a linear map, or of convolutions of which one has the kernel."""
    if weight.ndim == 2:
        return map_factors(lora, lambda a: a.flatten(1))
    down, up = (a.flatten(1)[..., None, None] for a in (lora.down, lora.up))
    return LoRA(down if lora.mid is not None else lora.down.reshape(lora.rank, *weight.shape[1:]), up, lora.mid)


def _save_diffusers(adapter: Adapter, dst: Path, networks: NetworkDict, family: str | None) -> None:
    """diffusers' names of today; alpha is multiplied into B, as no version of diffusers reads it from such a file."""
    values: dict[str, Tensor] = {}
    for folder, parts in _peft_state_dicts(adapter, networks, "diffusers").items():
        values |= {
            f"{folder}.{name if folder == 'unet' else add_text_model_prefix(name)}": a for name, a in parts.items()
        }
    _publish_safetensors(
        values, dst, {name: text for name, text in adapter.metadata.items() if name != LORA_ADAPTER_METADATA_KEY}
    )


def _save_peft(adapter: Adapter, dst: Path, networks: NetworkDict, family: str | None) -> None:
    """A folder for each network, of a model of transformers 5 and diffusers, as PeftModel.from_pretrained takes it."""
    with atomic_write(dst) as draft:
        for folder, parts in _peft_state_dicts(adapter, networks, "peft").items():
            ranks = {name.removesuffix(".lora_A.weight"): len(a) for name, a in parts.items() if ".lora_A." in name}
            config = {
                "peft_type": "LORA",
                "r": max(ranks.values()),
                "lora_alpha": max(ranks.values()),
                "rank_pattern": ranks,
                "alpha_pattern": ranks,
                "target_modules": list(ranks),
                "use_dora": any(".lora_magnitude_vector" in name for name in parts),
                "inference_mode": True,
            }
            (draft / folder).mkdir(parents=True)
            save_file(
                {PEFT_KEY_PREFIX + name: a for name, a in parts.items()},
                draft / folder / PEFT_LORA_NAME,
                {"format": "pt"},
            )
            write_json(config, draft / folder / PEFT_CONFIG_NAME)


def _peft_state_dicts(adapter: Adapter, networks: NetworkDict, lora_format: str) -> dict[str, dict[str, Tensor]]:
    """By folder and peft's name the tensors of LoRA with alpha = rank, DoRA's magnitude among them."""
    found: dict[str, dict[str, Tensor]] = {}
    for target, delta in adapter.deltas.items():
        folder, path = target.split("/")
        weight = _module_weight(target, networks)
        thin, m = _fold_scale(delta, weight), delta.dora_scale
        if thin is None or delta.bias is not None or (m is not None and len(m) != len(weight)):
            kind = type(delta.factors).__name__ if thin is None else "a bias" if delta.bias is not None else "old DoRA"
            raise ValueError(f"{target}: {kind} has no name in {lora_format}'s dialect: only kohya's has all")
        parts = {"lora_A.weight": thin.down, "lora_B.weight": thin.up}
        if m is not None:
            parts["lora_magnitude_vector"] = m.flatten() if weight.ndim == 2 else m.transpose(0, 1)
        found.setdefault(folder, {}).update({f"{path}.{name}": a.contiguous() for name, a in parts.items()})
    if len({d.dora_scale is None for d in adapter.deltas.values()}) > 1:
        raise ValueError(
            f"DoRA of some modules and LoRA of others has no form in {lora_format}'s dialect: only kohya's has all"
        )
    return found


def _fold_scale(delta: ModuleDelta, weight: Tensor) -> LoRA | None:
    """The change as a LoRA without `mid` whose scale is 1, or None: B times the scale, in float32 where it must be."""
    if not isinstance(delta.factors, LoRA):
        return None
    lora = delta.factors
    down = lora.down if lora.mid is None else map_factors(lora, Tensor.float).kernel
    up = lora.up.float() * delta.scale
    kept = up.to(lora.up.dtype)
    return _reshape_to_layers(LoRA(down, kept if kept.float().equal(up) else up), weight)


def _module_weight(target: str, networks: NetworkDict) -> Tensor:
    folder, path = target.split("/")
    return cast(Tensor, networks[folder].get_submodule(path).weight)


def _publish_safetensors(values: Mapping[str, Tensor], dst: Path, metadata: Mapping[str, str]) -> None:
    with atomic_write(dst) as draft:
        save_file(dict(values), draft, {"format": "pt", **metadata})


LORA_FORMATS: dict[str, Callable[[Adapter, Path, NetworkDict, str | None], None]] = {
    "kohya": _save_kohya,
    "diffusers": _save_diffusers,
    "peft": _save_peft,
}
