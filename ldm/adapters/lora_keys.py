"""The keys of adapter files: kohya's (with LyCORIS' kinds), diffusers' new and old ones, and peft's.

A key is a prefix (the network), a module, and a suffix (the field of its change). A module is looked up among all the
spellings that it has in any format, never parsed: in `down_blocks_0_attentions_0_proj_in` dots and underscores cannot
be told apart, and kohya's SDXL files number the blocks as the original (SGM) layout does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import lru_cache
from typing import NamedTuple, cast

from torch import nn

from ldm.adapters.lora import Full, LoHa, LoKr, LoRA
from ldm.checkpoints.keys import map_unet_modules
from ldm.nn.unet import UNet, UNetConfig

DeltaField = tuple[type | None, str]  # (factor class or None, field of it or of ModuleDelta)

DOWN_FIELDS = (LoRA, "down"), (LoHa, "w1_b")  # [rank, in]
LORA_KEY_PREFIXES = {  # prefix: component; a longer one stands before its own beginning
    "lycoris_": "unet",  # LyCORIS' own, of diffusers' paths
    "diffusion_model.": "unet",  # ComfyUI's
    **{
        f"text_encoders.{clip}{part}": component
        for clip, component in {
            "clip_l.": "text_encoder",
            "clip_h.": "text_encoder",
            "clip_g.": "text_encoder_2",
        }.items()
        for part in ("transformer.", "")
    },
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
PEFT_KEY_PREFIX = "base_model.model."
LORA_KEY_SUFFIXES: dict[str, DeltaField] = {  # of a field, the suffix of kohya and LyCORIS comes first
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
    ".scalar": (None, "scalar"),
    **{suffix: (None, "up_bias") for suffix in (".lora_B.bias", ".lora_up.bias")},
    **{f".lora_magnitude_vector{end}": (None, "magnitude") for end in ("", ".weight")},
    **{f"{name}.down.weight": (LoRA, "down") for name in (".lora", ".lora_linear_layer", "_lora")},
    **{f"{name}.up.weight": (LoRA, "up") for name in (".lora", ".lora_linear_layer", "_lora")},
}
PEFT_ADAPTER_NAME_PATTERN = re.compile(
    r"(\.lora_(?:A|B|magnitude_vector))\.(?!(?:weight|bias)$)[^.]+(\.weight|\.bias|)$"
)
UNSUPPORTED_KINDS = {  # LyCORIS' kinds that multiply a weight, and others, by a pattern of their keys
    "OFT": r".*\.(oft_blocks|oft_diag)|oft_(unet|te\d?)_.*",
    "BOFT": r".*\.boft_.*",
    "IA3": r".*\.on_input|.*\.ia3_.*",
    "GLoRA": r".*\.[ab][12]\.weight",
}
REQUIRED_FACTORS: dict[type, tuple[str, ...]] = {
    LoRA: ("down", "up"),
    LoHa: ("w1_a", "w1_b", "w2_a", "w2_b"),
    LoKr: ("w1_a", "w1_b", "w2_a", "w2_b"),  # or w1 for the first two, or w2 for the last two
    Full: ("diff",),
}
KOHYA_KEY_SUFFIXES = {delta_field: suffix for suffix, delta_field in reversed(LORA_KEY_SUFFIXES.items())}
LEGACY_MODULE_NAMES = ((r"\.to_out\.0$", ".to_out"), (r"\.([qkv])_proj$", r".to_\1"), (r"\.out_proj$", ".to_out"))


class BaseModelVersion(NamedTuple):
    """A generation of Stable Diffusion: the family that stands for it, its text width, its names in metadata."""

    name: str
    family: str
    cross_attention_dim: int
    kohya_name: str
    metadata_prefixes: tuple[str, ...]


BASE_MODEL_VERSIONS = {  # by the part of a family's name before "-"
    "sd1": BaseModelVersion("SD 1.x", "sd1", 768, "sd_v1", ("sd_v1", "stable-diffusion-v1")),
    "sd2": BaseModelVersion("SD 2.x", "sd2-base", 1024, "sd_v2", ("sd_v2", "stable-diffusion-v2")),
    "sdxl": BaseModelVersion("SDXL", "sdxl", 2048, "sdxl_base_v1-0", ("sdxl_", "stable-diffusion-xl")),
}


class LoRAKey(NamedTuple):
    """A parsed key: `component` is None if it does not name one, `module` is spelled as in the file."""

    component: str | None
    module: str
    delta_field: DeltaField


def parse_lora_keys(names: Iterable[str]) -> dict[str, LoRAKey]:
    """The keys of any format among the names of a file's tensors."""
    return {name: key for name in names if (key := _parse_lora_key(name))}


def _parse_lora_key(name: str) -> LoRAKey | None:
    bare = PEFT_ADAPTER_NAME_PATTERN.sub(r"\1\2", name.removeprefix(PEFT_KEY_PREFIX))
    prefix = next((prefix for prefix in LORA_KEY_PREFIXES if bare.startswith(prefix)), "")
    suffix = next((suffix for suffix in LORA_KEY_SUFFIXES if bare.endswith(suffix)), None)
    if suffix is None:
        return None
    module = bare[len(prefix) : len(bare) - len(suffix)].replace(".processor", "")
    return LoRAKey(LORA_KEY_PREFIXES.get(prefix), module, LORA_KEY_SUFFIXES[suffix])


def find_unsupported_kind(names: Iterable[str]) -> str | None:
    """The kind of an adapter that is not supported, by its keys; None for another file."""
    names = list(names)
    return next((kind for kind, p in UNSUPPORTED_KINDS.items() if any(re.fullmatch(p, name) for name in names)), None)


def detect_lora_format(names: Iterable[str]) -> str:
    """ "kohya", "peft", "comfyui" or "diffusers", by the first name of a file's tensors."""
    first = next(iter(names), "")
    if first.startswith(("lora_", "lycoris_")):
        return "kohya"
    if first.startswith(("diffusion_model.", "text_encoders.")):
        return "comfyui"
    return "peft" if first.startswith(PEFT_KEY_PREFIX) else "diffusers"


def build_module_aliases(component: str, network: nn.Module) -> dict[str, str]:
    """Every spelling of the modules of a network that have weights, and their path in it."""
    aliases: dict[str, str] = {}
    for path, module in network.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            for name in _module_aliases(component, path, network):
                aliases[name] = aliases[name.replace(".", "_")] = path
    return aliases


def _module_aliases(component: str, path: str, network: nn.Module) -> Iterator[str]:
    names = [path.removeprefix("text_model."), add_text_model_prefix(path)]
    for name in [path, to_sgm_name(path, network)] if component == "unet" else names:
        yield name
        yield from (re.sub(pattern, old, name) for pattern, old in LEGACY_MODULE_NAMES)


def add_text_model_prefix(path: str) -> str:
    """A module of a text encoder as published files name it, with `text_model.` whether or not its class has it."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def to_sgm_name(path: str, unet: nn.Module) -> str:
    """A module of a U-Net as the original (LDM / SGM) single-file layout names it."""
    for diffusers_name, sgm in _sgm_conversion_map(cast(UNet, unet).config):
        if f"{path}.".startswith(f"{diffusers_name}."):
            return sgm + path.removeprefix(diffusers_name)
    return path


@lru_cache(maxsize=4)
def _sgm_conversion_map(config: UNetConfig) -> tuple[tuple[str, str], ...]:
    return tuple(map_unet_modules(config))
