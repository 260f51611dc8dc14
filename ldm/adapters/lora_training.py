"""LoRA layers of peft for training: injected into networks, and read out as changes of their modules.

A module of its own, as peft takes long to import and generating images does not need it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraConv2dLayer
from torch import Tensor, nn

from ldm.adapters.factors import LoRA
from ldm.adapters.lora import ModuleDelta
from ldm.errors import choose

LORA_TARGET_PATTERNS = {  # ends of module paths: diffusers' names in the U-Net, transformers' in the text encoders
    "attention": r"\.(to_q|to_k|to_v|to_out\.0|q_proj|k_proj|v_proj|out_proj)$",
    "feed-forward": r"\.(proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|fc1|fc2)$",
    "convolutions": r"\.(conv|conv1|conv2|conv_shortcut)$",
}
PEFT_ADAPTER_NAME = "default"  # peft's own


class AnyLayoutDoRAConv(DoraConv2dLayer):
    """peft's layer, which takes views of its factors and so fails where the optimizer keeps them in channels_last."""

    def get_lora_weight(self, lora_A: nn.Conv2d, lora_B: nn.Conv2d, adapter_name: str | None = None) -> Tensor:
        """B A as a matrix [out, in k k]."""
        return lora_B.weight.flatten(1) @ lora_A.weight.flatten(1)


def inject_lora(network: nn.Module, targets: Sequence[str], rank: int, alpha: float | None, use_dora: bool) -> None:
    """Add trainable LoRA layers, in place, to the modules of some rows of LORA_TARGET_PATTERNS, and freeze the rest.

    LoRA (Hu et al. 2021, arXiv:2106.09685), or DoRA (Liu et al. 2024, arXiv:2402.09353); B = 0, A is sampled by
    torch's global generator. ValueError for an unknown row.
    """
    patterns = [choose(LORA_TARGET_PATTERNS, name, "targets") for name in targets]
    layers = [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if paths := [path for path in layers if any(re.search(pattern, path) for pattern in patterns)]:
        config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=paths, use_dora=use_dora)
        inject_adapter_in_model(config, network)
    for module in network.modules():
        if type(module) is DoraConv2dLayer:
            module.__class__ = AnyLayoutDoRAConv
        if isinstance(module, LoraLayer) and module.get_base_layer().weight.dtype != torch.float32:
            _init_in_float32(module)


@torch.no_grad()
def _init_in_float32(layer: LoraLayer) -> None:
    """Give a layer float32 factors, where peft has rounded them to the dtype of the frozen weight."""
    for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        part.float()
    layer.reset_lora_parameters(PEFT_ADAPTER_NAME, init_lora_weights=True)
    if PEFT_ADAPTER_NAME in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[PEFT_ADAPTER_NAME].weight  # of W + 0
        magnitude.copy_(layer.get_base_layer().weight.float().flatten(1).norm(dim=1).view_as(magnitude))


def extract_lora_deltas(network: nn.Module, component: str) -> dict[str, ModuleDelta]:
    """The changes that the LoRA layers of a network make, by component/path, on the host."""
    layers = {path: module for path, module in network.named_modules() if isinstance(module, LoraLayer)}
    return {f"{component}/{path}": _read_lora_layer(layer) for path, layer in layers.items()}


def _read_lora_layer(layer: LoraLayer) -> ModuleDelta:
    down, up = (weights[PEFT_ADAPTER_NAME].weight.detach().cpu() for weights in (layer.lora_A, layer.lora_B))
    magnitude = None
    if PEFT_ADAPTER_NAME in layer.lora_magnitude_vector:
        flat = layer.lora_magnitude_vector[PEFT_ADAPTER_NAME].weight.detach().cpu()
        magnitude = flat.reshape(-1, *(down.ndim - 1) * [1])
    return ModuleDelta(LoRA(down, up), float(layer.lora_alpha[PEFT_ADAPTER_NAME]), magnitude)
