"""Every attention back end is the formula softmax(q k^T / sqrt(D)) v, in every dtype."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from ldm.nn.attention import ATTENTION_BACKENDS, check_attention_backends, get_attention_backend

HERE = ["sdpa", "math"]  # on a CPU; xformers has none of it


def draw(*shape: int, scale: float = 1, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(q, k, v, heads):
    """One row, one head, one query at a time, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out, width = torch.zeros_like(q), q.shape[-1] // heads
    for b in range(q.shape[0]):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for n in range(q.shape[1]):
                logits = (k[b, :, part] * q[b, n, part]).sum(-1) / math.sqrt(width)
                weights = (logits - logits.max()).exp()
                weights = weights / weights.sum()
                out[b, n, part] = (weights[:, None] * v[b, :, part]).sum(0)
    return out


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_equals_the_definition(name, dtype, tolerance):
    q, k, v = (draw(2, n, 12, seed=seed).to(dtype) for seed, n in enumerate((5, 7, 7)))
    out = ATTENTION_BACKENDS[name](q, k, v, 3)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_definition(q, k, v, 3), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", HERE)
def test_order_of_keys_is_immaterial(name):
    q, k, v = draw(2, 5, 12), draw(2, 7, 12, seed=1), draw(2, 7, 12, seed=2)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        ATTENTION_BACKENDS[name](q, k, v, 3), ATTENTION_BACKENDS[name](q, k[:, order], v[:, order], 3)
    )


@pytest.mark.parametrize("name", HERE)
def test_float16_logits_beyond_its_range(name):
    """float16 ends at 65504, these scaled logits at 1e5; SD 2.1 has such at 768 pixels."""
    q, k, v = (draw(1, 6, 64, scale=256, seed=seed).half() for seed in range(3))
    assert (q.double() @ k.double().transpose(1, 2) / 8).abs().max() > 65504
    torch.testing.assert_close(
        ATTENTION_BACKENDS[name](q, k, v, 1).double(), by_definition(q, k, v, 1), atol=0, rtol=1e-3
    )


def test_xformers_is_given_its_documented_layout(monkeypatch):
    """A stand-in with the documented signature: [B, tokens, heads, width] in and out."""

    def memory_efficient_attention(q, k, v):
        logits = torch.einsum("bnhd,bthd->bhnt", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhnt,bthd->bnhd", logits.softmax(-1), v)

    stand_in = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=stand_in))
    monkeypatch.setitem(sys.modules, "xformers.ops", stand_in)
    q, k, v = draw(2, 5, 12), draw(2, 7, 12, seed=1), draw(2, 7, 12, seed=2)
    torch.testing.assert_close(ATTENTION_BACKENDS["xformers"](q, k, v, 3), ATTENTION_BACKENDS["math"](q, k, v, 3))


@pytest.mark.skipif(
    check_attention_backends()["xformers"] is not None, reason=str(check_attention_backends()["xformers"])
)
def test_xformers_itself():
    q, k, v = (draw(2, n, 24, seed=seed).bfloat16() for seed, n in enumerate((5, 7, 7)))
    out = ATTENTION_BACKENDS["xformers"](q.cuda(), k.cuda(), v.cuda(), 3)
    torch.testing.assert_close(out.cpu().double(), by_definition(q, k, v, 3), atol=3e-2, rtol=0)


def test_back_ends_that_cannot_be_used_say_why():
    assert check_attention_backends().keys() == ATTENTION_BACKENDS.keys()
    assert all(check_attention_backends()[name] is None for name in HERE)
    with pytest.raises(ValueError, match=r"'flash'.*choose from sdpa, math, xformers"):
        get_attention_backend("flash")
    for name, reason in check_attention_backends().items():
        if reason is None:
            assert get_attention_backend(name) is ATTENTION_BACKENDS[name]
        else:
            with pytest.raises(ValueError, match=f"'{name}': {name}"):
                get_attention_backend(name)
