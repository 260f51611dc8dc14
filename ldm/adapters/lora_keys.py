"""The keys of adapter files: kohya's, LyCORIS', diffusers' new and old ones, ComfyUI's and peft's, as two tables.

A key is a prefix (the network), a module, and a suffix (the kind of adapter, and a field of it). A module is looked up
among all the spellings that it has in any format, never parsed: in `down_blocks_0_attentions_0_proj_in` dots and
underscores cannot be told apart, and kohya's SDXL files number the blocks as the original (SGM) layout does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import NamedTuple, cast

from torch import nn

from ldm.adapters.factors import LoHa, LoKr
from ldm.checkpoints.keys import map_unet_modules
from ldm.checkpoints.tensors import TensorInfo
from ldm.nn.unet import UNet, UNetConfig

DeltaField = tuple[str | None, str]  # (kind of adapter, a row of KINDS; or None for what any kind may have, field)

DOWN_FIELDS = ("LoRA", "down"), ("LoHa", "w1_b"), ("GLoRA", "a2")  # [rank, in]
INPUT_WIDTH_FIELDS = *DOWN_FIELDS, ("Full", "diff")  # [..., in]
TEXT_ENCODERS_OF_PREFIXES = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}  # kohya's
TEXT_ENCODERS_OF_CLIP = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}  # ComfyUI's
LORA_KEY_PREFIXES: dict[str, str | None] = {  # prefix: component; a longer one stands before its own beginning
    "lycoris_": None,  # LyCORIS' own, for any network
    "diffusion_model.": "unet",  # ComfyUI's
    **{
        f"text_encoders.{clip}.{part}": component
        for clip, component in TEXT_ENCODERS_OF_CLIP.items()
        for part in ("transformer.", "")
    },
    **{f"{tool}_unet_": "unet" for tool in ("lora", "oft")},
    **{f"{tool}_{te}_": component for tool in ("lora", "oft") for te, component in TEXT_ENCODERS_OF_PREFIXES.items()},
    "unet.": "unet",
    "unet:": "unet",  # lora_diffusion's, which numbers modules
    "text_encoder:": "text_encoder",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
PEFT_KEY_PREFIX = "base_model.model."
LORA_KEY_SUFFIXES: dict[str, DeltaField] = {  # of a field, the suffix of kohya and LyCORIS comes first
    ".lora_down.weight": ("LoRA", "down"),
    ".lora_up.weight": ("LoRA", "up"),
    ".lora_mid.weight": ("LoRA", "mid"),
    **{f".hada_{f.name}": ("LoHa", f.name) for f in fields(LoHa)},
    **{f".lokr_{f.name}": ("LoKr", f.name) for f in fields(LoKr)},
    **{f".{name}.weight": ("GLoRA", name) for name in ("a1", "a2", "b1", "b2", "bm")},
    ".diff": ("Full", "diff"),
    ".w_norm": ("Full", "diff"),
    ".oft_blocks": ("OFT", "oft_blocks"),
    ".oft_diag": ("OFT", "oft_diag"),
    ".oft_R.weight": ("OFT", "oft_R"),
    ".boft_R": ("BOFT", "boft_R"),
    ".boft_s": ("BOFT", "boft_s"),
    ".on_input": ("IA3", "on_input"),
    ".ia3_l": ("IA3", "ia3_l"),
    ".diff_b": (None, "bias"),
    ".b_norm": (None, "bias"),
    ".alpha": (None, "alpha"),
    ".rescale": (None, "rescale"),
    ".dora_scale": (None, "dora_scale"),
    ".lora_A.weight": ("LoRA", "down"),
    ".lora_B.weight": ("LoRA", "up"),
    ".scalar": (None, "scalar"),
    **{suffix: (None, "up_bias") for suffix in (".lora_B.bias", ".lora_up.bias")},
    **{f".lora_magnitude_vector{end}": (None, "magnitude") for end in ("", ".weight")},
    **{f"{name}.down.weight": ("LoRA", "down") for name in (".lora", ".lora_linear_layer", "_lora")},
    **{f"{name}.up.weight": ("LoRA", "up") for name in (".lora", ".lora_linear_layer", "_lora")},
    ".weight": ("IA3", "weight"),
    ":down": ("LoRA", "down"),
    ":up": ("LoRA", "up"),
}
NEEDED_BESIDE = {".weight": ".on_input"}  # a suffix of an adapter only if the same module has the other one
FOUR_DIMENSIONAL: dict[DeltaField, DeltaField] = {("OFT", "oft_blocks"): ("BOFT", "oft_blocks")}  # by its shape
PEFT_ADAPTER_NAME_PATTERN = re.compile(
    r"(\.(?:lora_(?:A|B|magnitude_vector)|oft_R|boft_[Rs]|ia3_l))\.(?!(?:weight|bias)$)[^.]+(\.weight|\.bias|)$"
)
UNSUPPORTED_KINDS = {  # by a pattern of their keys
    "T-LoRA": r".*\.lambda_layer",
    "VeRA": r".*\.vera_lambda_[bd]",
    "OFT of peft before 0.16": r".*\.oft_r",
}
KOHYA_KEY_SUFFIXES = {delta_field: suffix for suffix, delta_field in reversed(LORA_KEY_SUFFIXES.items())}
ATTENTION_LAYERS = "to_q", "to_k", "to_v", "to_out.0"
TRANSFORMER_LAYERS = (
    *(f"attn1.{name}" for name in ATTENTION_LAYERS),
    "ff.net.0.proj",
    *(f"attn2.{name}" for name in ATTENTION_LAYERS),
)
NUMBERED_MODULES: dict[
    str, dict[str, tuple[str, tuple[str, ...]]]
] = {  # by component: how paths of modules begin and end, in order, and their layers
    "unet": {part: (r"\.transformer_blocks\.\d+$", TRANSFORMER_LAYERS) for part in ("down", "up", "mid")},
    "text_encoder": {"": (r"\.self_attn$", ("k_proj", "v_proj", "q_proj", "out_proj"))},
}
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


def parse_lora_keys(infos: Mapping[str, TensorInfo]) -> dict[str, LoRAKey]:
    """The keys of any format among the names of a file's tensors."""
    return {name: key for name in infos if (key := _parse_lora_key(name, infos))}


def _parse_lora_key(name: str, infos: Mapping[str, TensorInfo]) -> LoRAKey | None:
    bare = PEFT_ADAPTER_NAME_PATTERN.sub(r"\1\2", name.removeprefix(PEFT_KEY_PREFIX))
    prefix = next((prefix for prefix in LORA_KEY_PREFIXES if bare.startswith(prefix)), "")
    suffix = next((suffix for suffix in LORA_KEY_SUFFIXES if bare.endswith(suffix)), None)
    if suffix is None:
        return None
    if suffix in NEEDED_BESIDE and name.removesuffix(suffix) + NEEDED_BESIDE[suffix] not in infos:
        return None
    delta_field = LORA_KEY_SUFFIXES[suffix]
    if len(infos[name].shape) == 4:
        delta_field = FOUR_DIMENSIONAL.get(delta_field, delta_field)
    module = bare[len(prefix) : len(bare) - len(suffix)].replace(".processor", "")
    return LoRAKey(LORA_KEY_PREFIXES.get(prefix), module, delta_field)


def find_unsupported_kind(names: Iterable[str]) -> str | None:
    """The kind of an adapter that is not supported, by its keys; None for another file."""
    names = list(names)
    return next((kind for kind, p in UNSUPPORTED_KINDS.items() if any(re.fullmatch(p, name) for name in names)), None)


def detect_lora_format(names: Iterable[str]) -> str:
    """ "kohya", "peft", "comfyui", "lora_diffusion" or "diffusers", by the first key among a file's tensors."""
    first = next((name for name in names if not name.startswith("<")), "")
    if first.startswith(("unet:", "text_encoder:")):
        return "lora_diffusion"
    if first.startswith(("lora_", "lycoris_", "oft_")):
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
    return aliases | {str(k): path for k, path in enumerate(number_modules(component, network))}


def number_modules(component: str, network: nn.Module) -> list[str]:
    """The modules in the order by which lora_diffusion (cloneofsimo) numbers them, that of diffusers in 2023.

    There the middle block comes after the others, and the feed-forward layer between the two attentions.
    """
    paths = [path for path, _ in network.named_modules()]
    return [
        f"{path}.{name}"
        for start, (end, names) in NUMBERED_MODULES.get(component, {}).items()
        for path in paths
        if path.startswith(start) and re.search(end, path)
        for name in names
    ]


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
