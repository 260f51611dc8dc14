"""Devices, and the dtypes that are fast on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

# by accelerate's names
MIXED_PRECISION_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_CPU_FEATURES = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16")  # as torch names them; the last is ARM's


ACCELERATORS: dict[str, Callable[[], bool]] = {  # the devices of `auto`, the preferred first
    "cuda": lambda: torch.cuda.is_available(),
    "mps": lambda: torch.backends.mps.is_available(),  # Apple's GPUs
    "xpu": lambda: torch.xpu.is_available(),  # Intel's
}


def best_device() -> torch.device:
    """The first of `ACCELERATORS` that torch has and the machine too, else the CPU."""
    return torch.device(next((name for name, is_available in ACCELERATORS.items() if is_available()), "cpu"))


def float64_device(device: torch.device) -> torch.device:
    """Where float64 tensors of a device are: on itself, or on the CPU, for MPS has no float64, nor have most XPUs."""
    return torch.device("cpu") if device.type in ("mps", "xpu") else device


def memory_bytes(device: torch.device) -> int:
    """All memory of a device, or of the machine where it is the CPU, used or not."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def preferred_dtype(device: torch.device) -> torch.dtype:
    """The dtype of networks in reduced precision: bfloat16 where the hardware multiplies it, else float32.

    A CPU without such units takes 85 times as long for a product in bfloat16 as for one in float32 (AMD Zen 3, torch
    2.13, 1024 x 1024), one with AMX a fifth to a tenth.
    """
    return torch.bfloat16 if supports_bf16(device) else torch.float32


def supports_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported()
    if device.type == "cpu":
        features: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in early versions of torch
        return any(features.get(name) for name in BF16_CPU_FEATURES)
    return False


def autocast(device: torch.device) -> torch.autocast:
    """A context in which matrix products and convolutions run in `preferred_dtype(device)`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=preferred_dtype(device) == torch.bfloat16)


def resolve_frozen_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of frozen weights by its name in a recipe: a dtype, or auto."""
    return preferred_dtype(device) if name == "auto" else getattr(torch, name)


def resolve_mixed_precision(name: str, device: torch.device) -> str:
    """accelerate's name of a recipe's precision; auto is that of `preferred_dtype(device)`."""
    names = {dtype: name for name, dtype in MIXED_PRECISION_DTYPES.items()}
    return names[preferred_dtype(device)] if name == "auto" else name


def to_device(module: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The module on its device and in its dtype, with convolutions in channels_last memory."""
    # not module.to: diffusers' own warns of dtypes that it then does not keep
    return nn.Module.to(module, device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
