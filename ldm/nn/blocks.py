"""Building blocks of the U-Net and the VAE; attributes are named as in diffusers, so that its state dicts load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import AttentionFn, sdpa
from ldm.nn.norms import GroupNorm
from ldm.nn.packing import Conv2d, Linear

KVPair = tuple[Tensor, Tensor]
VECTOR_SIZE = 64  # elements, of the longest loop over vectors: two of bfloat16 with AVX512


def independent_parts(x: Tensor) -> Sequence[Tensor]:
    """x [B, ...] whole, or its rows where a function of all would not give each what it gives that row alone.

    On a CPU the elements that fill no vector, at the end of x or of a thread's part of it, are computed by other code.
    """
    threads = torch.get_num_threads()
    if len(x) == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return (x,)
    return (x,) if threads <= 2 and x[0].numel() % (threads * VECTOR_SIZE) == 0 else x.split(1)


def silu(x: Tensor) -> Tensor:
    """silu(x), in the memory of x where no gradient needs it: for a tensor that nobody else reads."""
    if torch.is_grad_enabled():
        return F.silu(x)
    for part in independent_parts(x):
        F.silu(part, inplace=True)
    return x


def gelu(x: Tensor) -> Tensor:
    """gelu(x), in the memory of x where no gradient needs it: for a tensor that nobody else reads."""
    if torch.is_grad_enabled():
        return F.gelu(x)
    for part in independent_parts(x):
        torch.ops.aten.gelu_(part)
    return x


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the memory of x where no gradient needs it: for an x that nobody else reads."""
    return x + y if torch.is_grad_enabled() or x.dtype != y.dtype else x.add_(y)


def apply_rowwise(f: Callable[..., Tensor], *rows: Tensor | None) -> Tensor:
    """f of each row [B, C] alone, in inference on a CPU: products of few rows sum in an order that depends on B."""
    first = cast(Tensor, rows[0])
    if len(first) == 1 or first.device.type != "cpu" or torch.is_grad_enabled():
        return f(*rows)
    return torch.cat([f(*(a if a is None else a[k : k + 1] for a in rows)) for k in range(len(first))])


class SinusoidalEmbedding(nn.Module):
    """Sinusoidal timestep embedding: t -> (cos w_i t, sin w_i t), w_i = 10000^(-i / (n - shift)), i < n = width / 2.

    Vaswani et al. 2017, sec. 3.5; Ho et al. 2020, app. B. t [B] -> [B, width], float32.
    """

    def __init__(self, width: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> None:
        super().__init__()
        self.width, self.flip_sin_to_cos, self.freq_shift = width, flip_sin_to_cos, freq_shift

    def forward(self, t: Tensor) -> Tensor:
        n = self.width // 2
        i = torch.arange(n, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10_000) * i / (n - self.freq_shift))
        return sincos(t.float()[:, None] * frequencies, self.flip_sin_to_cos)


class GaussianFourierProjection(nn.Module):
    """Random Fourier features of timesteps: t -> (cos 2 pi w_i t, sin 2 pi w_i t), Gaussian w_i.

    Tancik et al. 2020 (arXiv:2006.10739), sec. 3; Song et al. 2021 (arXiv:2011.13456), app. G.
    t [B] -> [B, width], float32; w is not trained.
    """

    def __init__(self, width: int, flip_sin_to_cos: bool = True) -> None:
        super().__init__()
        self.width, self.flip_sin_to_cos = width, flip_sin_to_cos
        self.weight = nn.Parameter(torch.empty(width // 2), requires_grad=False)
        nn.init.normal_(self.weight, std=16 / 1000)  # Song et al.: 16, for times that end at 1

    def _apply(self, fn, recurse: bool = True):
        # Move, but stay float32: at t = 999 a bfloat16 frequency would turn the phase by radians.
        return super()._apply(lambda a: a.to(fn(a).device), recurse)

    def forward(self, t: Tensor) -> Tensor:
        return sincos(t.float()[:, None] * self.weight * 2 * math.pi, self.flip_sin_to_cos)


def sincos(phase: Tensor, flip_sin_to_cos: bool) -> Tensor:
    return torch.cat([phase.cos(), phase.sin()] if flip_sin_to_cos else [phase.sin(), phase.cos()], dim=-1)


class TimestepEmbedding(nn.Module):
    """A two-layer perceptron, [B, width] -> [B, out], of x or of x + W cond, cond [B, cond_width]."""

    def __init__(self, width: int, out: int, cond_width: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.cond_proj = nn.Linear(cond_width, width, bias=False) if cond_width else None
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(h))), h = conv(silu(norm(x))) + proj(emb); emb [B, E] is already past its silu.

    Without an embedding (`emb` None) h is the convolution alone.

    Ho et al. 2020 (arXiv:2006.11239), app. B. With `scale_shift` norm(h) becomes norm(h) (1 + a) + b, (a, b) =
    proj(emb), and h is the convolution alone: Dhariwal & Nichol 2021 (arXiv:2105.05233), sec. 3.1.
    """

    def __init__(self, dim: int, out: int, emb: int | None, groups: int, eps: float, scale_shift: bool = False) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, dim, eps)
        self.conv1 = Conv2d(dim, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, 2 * out if scale_shift else out) if emb is not None else None
        self.norm2 = GroupNorm(groups, out, eps)
        self.conv2 = Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = Conv2d(dim, out, 1) if dim != out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        shift = None
        if self.time_emb_proj is not None and emb is not None:
            shift = apply_rowwise(self.time_emb_proj, emb)[..., None, None]
        if shift is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(add(h, shift))
        return add(self.conv2(silu(h)), self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve height and width, rounding up, by a strided convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour interpolation to a given size, then a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention of tokens [B, N, C] to the keys and values of a context [B, T, K]."""

    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_fn: AttentionFn = sdpa
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context, dim, bias=False)
        self.to_v = Linear(context, dim, bias=False)
        self.to_out = nn.Sequential(Linear(dim, dim))

    def project_kv(self, context: Tensor) -> KVPair:
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, kv: KVPair) -> Tensor:
        return self.to_out(self.attention_fn(self.to_q(x), *kv, self.heads))


class GEGLU(nn.Module):
    """a gelu(b), (a, b) = proj(x): Shazeer 2020 (arXiv:2002.05202), eq. 6."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj(x).chunk(2, dim=-1)
        b = gelu(b.contiguous())  # on a CPU a strided gelu and its gradient take twice as long
        return a * b if torch.is_grad_enabled() else b.mul_(a)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each x + f(norm(x)), on tokens [B, N, C]."""

    def __init__(self, dim: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context_kv: KVPair) -> Tensor:
        h = self.norm1(x)
        x = add(self.attn1(h, self.attn1.project_kv(h)), x)
        x = add(self.attn2(self.norm2(x), context_kv), x)
        return add(self.ff(self.norm3(x)), x)


class SpatialTransformer(nn.Module):
    """x + transformer(norm(x)) over the pixels of [B, C, H, W]: Rombach et al. 2022 (arXiv:2112.10752), app. E.2.1.

    The projections in and out are 1x1 convolutions (SD 1) or, where `linear`, linear maps of tokens (SD 2).
    """

    def __init__(self, dim: int, context: int, heads: int, depth: int, groups: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, dim, eps=1e-6)
        self.proj_in: nn.Module = Linear(dim, dim) if linear else Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(dim, context, heads) for _ in range(depth))
        self.proj_out: nn.Module = Linear(dim, dim) if linear else Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, kv_pairs: Iterator[KVPair]) -> Tensor:
        size = x.shape[-2:]
        h = self.norm(x)
        h = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, next(kv_pairs))
        h = to_feature_map(self.proj_out(h), size) if self.linear else self.proj_out(to_feature_map(h, size))
        return add(h, x)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C]; contiguous without a copy where x is channels_last."""
    return x.flatten(2).transpose(1, 2)


def to_feature_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, H W, C] -> [B, C, H, W], channels_last without a copy, and to torch as well where B is 1."""
    return x.reshape(-1, x.shape[-1]).view(len(x), *size, -1).permute(0, 3, 1, 2)
