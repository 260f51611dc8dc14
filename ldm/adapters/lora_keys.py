"""The names that tensors of adapters have: kohya's (LyCORIS' kinds too), diffusers' new and old ones, and peft's.

A name is a prefix (which network), a module, and an end (which part of its change). A module is found by every spelling
that it has in some dialect, never by taking a name apart: dots and underscores of `down_blocks_0_attentions_0_proj_in`
cannot be told from one another, and SDXL's files of kohya count blocks as its makers' single file does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import NamedTuple, cast

from torch import nn

from ldm.adapters.lora import Full, LoHa, LoKr, LoRA
from ldm.checkpoints.keys import map_unet_modules
from ldm.nn.unet import UNet, UNetConfig

NetworkDict = Mapping[str, nn.Module]  # by folder
DeltaField = tuple[type | None, str]  # of a change: a field of its factors, by their kind, or what any kind may have

LORA_KEY_PREFIXES = {  # what a name begins with: the folder of the network
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
PEFT_KEY_PREFIX = "base_model.model."
LORA_KEY_SUFFIXES: dict[str, DeltaField] = {  # what a name ends with: the part; kohya's and LyCORIS' end comes first
    ".lora_down.weight": (LoRA, "down"),
    ".lora_up.weight": (LoRA, "up"),
    ".lora_mid.weight": (LoRA, "mid"),
    **{f".hada_{f.name}": (LoHa, f.name) for f in fields(LoHa)},
    **{f".lokr_{f.name}": (LoKr, f.name) for f in fields(LoKr)},
    ".diff": (Full, "diff"),
    ".w_norm": (Full, "diff"),
    ".diff_b": (None, "bias"),
    ".b_norm": (None, "bias"),
    ".alpha": (None, "alpha"),
    ".dora_scale": (None, "dora_scale"),
    ".lora_A.weight": (LoRA, "down"),
    ".lora_B.weight": (LoRA, "up"),
    ".lora_A.default.weight": (LoRA, "down"),
    ".lora_B.default.weight": (LoRA, "up"),
    ".lora_B.bias": (None, "up_bias"),
    ".lora_magnitude_vector": (None, "magnitude"),
    ".lora_magnitude_vector.weight": (None, "magnitude"),
    ".lora_magnitude_vector.default.weight": (None, "magnitude"),
    ".lora.down.weight": (LoRA, "down"),
    ".lora.up.weight": (LoRA, "up"),
    ".lora_linear_layer.down.weight": (LoRA, "down"),
    ".lora_linear_layer.up.weight": (LoRA, "up"),
    "_lora.down.weight": (LoRA, "down"),
    "_lora.up.weight": (LoRA, "up"),
}
REQUIRED_FACTORS: dict[type, tuple[str, ...]] = {  # what makes a change whole
    LoRA: ("down", "up"),
    LoHa: ("w1_a", "w1_b", "w2_a", "w2_b"),
    LoKr: ("w1_a", "w1_b", "w2_a", "w2_b"),  # or w1, or w2
    Full: ("diff",),
}
KOHYA_KEY_SUFFIXES = {part: end for end, part in reversed(LORA_KEY_SUFFIXES.items())}
LEGACY_MODULE_NAMES = ((r"\.to_out\.0$", ".to_out"), (r"\.([qkv])_proj$", r".to_\1"), (r"\.out_proj$", ".to_out"))


class LoRAKey(NamedTuple):
    """What a name says: `folder` is None where it does not say it, `module` is as it is spelled."""

    component: str | None
    module: str
    delta_field: DeltaField


def parse_lora_key(name: str) -> LoRAKey | None:
    """A name of any dialect in its parts, or None."""
    bare = name.removeprefix(PEFT_KEY_PREFIX)
    prefix = next((prefix for prefix in LORA_KEY_PREFIXES if bare.startswith(prefix)), "")
    end = next((end for end in LORA_KEY_SUFFIXES if bare.endswith(end)), None)
    if end is None:
        return None
    module = bare[len(prefix) : len(bare) - len(end)].replace(".processor", "")
    return LoRAKey(LORA_KEY_PREFIXES.get(prefix), module, LORA_KEY_SUFFIXES[end])


def detect_lora_format(names: Iterable[str]) -> str:
    """ "kohya", "peft" or "diffusers", by the names of a file."""
    first = next(iter(names), "")
    if first.startswith("lora_"):
        return "kohya"
    return "peft" if first.startswith(PEFT_KEY_PREFIX) else "diffusers"


def build_module_aliases(component: str, network: nn.Module) -> dict[str, str]:
    """Every spelling of the modules of a network that have weights: their path in it."""
    found: dict[str, str] = {}
    for path, module in network.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            for name in _module_aliases(component, path, network):
                found[name] = found[name.replace(".", "_")] = path
    return found


def _module_aliases(component: str, path: str, network: nn.Module) -> Iterator[str]:
    known = (
        (path, to_sgm_name(path, network))
        if component == "unet"
        else (path.removeprefix("text_model."), add_text_model_prefix(path))
    )
    for name in known:
        yield name
        yield from (re.sub(pattern, old, name) for pattern, old in LEGACY_MODULE_NAMES)


def add_text_model_prefix(path: str) -> str:
    """A module of a text tower as published files name it: `text_model.` first, whether or not its class says so."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def to_sgm_name(path: str, unet: nn.Module) -> str:
    """A module of a U-Net as its makers' single file names it."""
    for ours, theirs in _sgm_conversion_map(cast(UNet, unet).config):
        if f"{path}.".startswith(f"{ours}."):
            return theirs + path.removeprefix(ours)
    return path


@lru_cache(maxsize=4)
def _sgm_conversion_map(config: UNetConfig) -> tuple[tuple[str, str], ...]:
    return tuple(map_unet_modules(config))
