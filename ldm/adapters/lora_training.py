"""Adapters that learn, by peft: put into networks, and read out as changes of their modules."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ldm.adapters.lora import LoRA, ModuleDelta

LORA_TARGET_PATTERNS = {  # what a path ends with: diffusers' names in the U-Net, transformers' in the text encoders
    "attention": r"\.(to_q|to_k|to_v|to_out\.0|q_proj|k_proj|v_proj|out_proj)$",
    "feed-forward": r"\.(proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|fc1|fc2)$",
    "convolutions": r"\.(conv|conv1|conv2|conv_shortcut)$",
}
PEFT_ADAPTER_NAME = "default"  # peft's own


def inject_lora(network: nn.Module, targets: Sequence[str], rank: int, alpha: float | None, use_dora: bool) -> None:
    """Put adapters on the modules that some rows of TARGETS name, in place: they alone learn, and begin as no change.

    LoRA (Hu et al. 2021, arXiv:2106.09685), or DoRA (Liu et al. 2024, arXiv:2402.09353). A is drawn by torch's global
    generator. ValueError for a row that there is not.
    """
    for name in targets:
        if name not in LORA_TARGET_PATTERNS:
            raise ValueError(f"targets {name!r}: choose from {', '.join(LORA_TARGET_PATTERNS)}")
    able = [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    paths = [path for path in able if any(re.search(LORA_TARGET_PATTERNS[name], path) for name in targets)]
    if paths:
        config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=paths, use_dora=use_dora)
        inject_adapter_in_model(config, network)


def extract_lora_deltas(network: nn.Module, component: str) -> dict[str, ModuleDelta]:
    """What the adapters in a network have learnt, by folder and path, on the host."""
    return {
        f"{component}/{path}": _read_lora_layer(module)
        for path, module in network.named_modules()
        if isinstance(module, LoraLayer)
    }


def _read_lora_layer(module: LoraLayer) -> ModuleDelta:
    down, up = (table[PEFT_ADAPTER_NAME].weight.detach().cpu() for table in (module.lora_A, module.lora_B))
    magnitude = None
    if PEFT_ADAPTER_NAME in module.lora_magnitude_vector:
        found = module.lora_magnitude_vector[PEFT_ADAPTER_NAME].weight.detach().cpu()
        magnitude = found.reshape(-1, *(down.ndim - 1) * [1])
    return ModuleDelta(LoRA(down, up), float(module.lora_alpha[PEFT_ADAPTER_NAME]), magnitude)
