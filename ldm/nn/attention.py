"""Multi-head attention by several backends: softmax(q k^T / sqrt(D)) v for each of H heads of width D.

Vaswani et al. 2017 (arXiv:1706.03762), eq. 1. The heads lie side by side in a token, q [B, N, H D], k and v
[B, T, H D] -> [B, N, H D], so that a channels_last feature map is its tokens without a copy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import choose
from ldm.installation import install_command

AttentionFn = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] -> [B, N, H, D] without a copy."""
    return x.unflatten(-1, (heads, -1))


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """torch's fused kernels; logits are float32 inside, whatever the input."""
    q, k, v = (split_heads(a, heads).transpose(1, 2) for a in (q, k, v))  # [B, H, N, D]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def math(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Two batched products around a softmax: the fastest in training on a CPU, up to about 64 tokens."""
    if q.dtype == torch.float16:  # the logits of SD 2.1 exceed its range
        return math(q.float(), k.float(), v.float(), heads).half()
    q, k, v = (split_heads(a, heads).transpose(1, 2) for a in (q, k, v))  # [B, H, N, D]
    weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def xformers(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """xformers' memory-efficient kernel (Rabe & Staats 2021, arXiv:2112.05682), on a CUDA device."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)).flatten(2)


ATTENTION_BACKENDS: dict[str, AttentionFn] = {"sdpa": sdpa, "math": math, "xformers": xformers}


def check_attention_backends() -> dict[str, str | None]:
    """Every backend by name: None if it can run on this machine, else the reason why not."""
    return {name: _unavailable_reason(name) for name in ATTENTION_BACKENDS}


def _unavailable_reason(name: str) -> str | None:
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        return f"xformers is not installed ({install_command('xformers')})"
    if name == "xformers" and not torch.cuda.is_available():
        return "xformers' kernels need a CUDA device, and none is visible"
    return None


def get_attention_backend(name: str) -> AttentionFn:
    """ATTENTION_BACKENDS[name]; ValueError for an unknown name and for a backend that cannot run on this machine."""
    attention_fn = choose(ATTENTION_BACKENDS, name, "attention")
    if reason := _unavailable_reason(name):
        raise ValueError(f"attention {name!r}: {reason}")
    return attention_fn
