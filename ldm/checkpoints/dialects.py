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

from ldm.checkpoints.names import unet_names
from ldm.nn.lora import Full, LoHa, LoKr, LoRA
from ldm.nn.unet import UNet, UNetConfig

Networks = Mapping[str, nn.Module]  # by folder
Part = tuple[type | None, str]  # of a change: a field of its factors, by their kind, or what any kind may have

PREFIXES = {  # what a name begins with: the folder of the network
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
PEFT = "base_model.model."
PARTS: dict[str, Part] = {  # what a name ends with: the part; kohya's and LyCORIS' end comes first
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
NEEDS: dict[type, tuple[str, ...]] = {  # what makes a change whole
    LoRA: ("down", "up"),
    LoHa: ("w1_a", "w1_b", "w2_a", "w2_b"),
    LoKr: ("w1_a", "w1_b", "w2_a", "w2_b"),  # or w1, or w2
    Full: ("diff",),
}
KOHYA_ENDS = {part: end for end, part in reversed(PARTS.items())}
OLD_NAMES = ((r"\.to_out\.0$", ".to_out"), (r"\.([qkv])_proj$", r".to_\1"), (r"\.out_proj$", ".to_out"))


class Place(NamedTuple):
    """What a name says: `folder` is None where it does not say it, `module` is as it is spelled."""

    folder: str | None
    module: str
    part: Part


def place(name: str) -> Place | None:
    """A name of any dialect in its parts, or None."""
    bare = name.removeprefix(PEFT)
    prefix = next((prefix for prefix in PREFIXES if bare.startswith(prefix)), "")
    end = next((end for end in PARTS if bare.endswith(end)), None)
    if end is None:
        return None
    module = bare[len(prefix) : len(bare) - len(end)].replace(".processor", "")
    return Place(PREFIXES.get(prefix), module, PARTS[end])


def dialect(names: Iterable[str]) -> str:
    """ "kohya", "peft" or "diffusers", by the names of a file."""
    first = next(iter(names), "")
    if first.startswith("lora_"):
        return "kohya"
    return "peft" if first.startswith(PEFT) else "diffusers"


def spellings(folder: str, network: nn.Module) -> dict[str, str]:
    """Every spelling of the modules of a network that have weights: their path in it."""
    found: dict[str, str] = {}
    for path, module in network.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            for name in _spelled(folder, path, network):
                found[name] = found[name.replace(".", "_")] = path
    return found


def _spelled(folder: str, path: str, network: nn.Module) -> Iterator[str]:
    known = (path, sgm(path, network)) if folder == "unet" else (path.removeprefix("text_model."), published(path))
    for name in known:
        yield name
        yield from (re.sub(pattern, old, name) for pattern, old in OLD_NAMES)


def published(path: str) -> str:
    """A module of a text tower as published files name it: `text_model.` first, whether or not its class says so."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def sgm(path: str, unet: nn.Module) -> str:
    """A module of a U-Net as its makers' single file names it."""
    for ours, theirs in _sgm_names(cast(UNet, unet).config):
        if f"{path}.".startswith(f"{ours}."):
            return theirs + path.removeprefix(ours)
    return path


@lru_cache(maxsize=4)
def _sgm_names(config: UNetConfig) -> tuple[tuple[str, str], ...]:
    return tuple(unet_names(config))
