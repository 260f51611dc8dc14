"""Exact tiling: the VAE in strips of rows, in bounded memory, with the result of the whole image.

What prevents tiles from being exact is the group norms, whose statistics are those of the whole image (so that tiles
that are decoded on their own differ in colour and need blending), and the self-attention, which sees all of it. Here
each layer runs over all strips before the next begins. What it writes is kept whole, in a temporary file where it is
large, and the statistics of the next norm are gathered on the way; a strip is read with the neighbouring rows that the
convolution reaches, and attention is accumulated over strips of keys (Rabe & Staats 2021, arXiv:2112.05682). Every
value is computed once, from the same sums but for their order.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_BYTES = 2**26  # of a strip; some six strips are in memory at a time
StripFn = Callable[[Tensor], Tensor]


class Reach(NamedTuple):
    """Rows of a layer's input for rows [a, b) of its output of `height` rows, and the row of `a` in what they give."""

    rows: Callable[[int, int, int], tuple[int, int, int]]
    scale: float = 1  # the output's height over the input's


POINTWISE = Reach(lambda a, b, height: (a, b, 0))
NEIGHBOURS = Reach(lambda a, b, height: (max(a - 1, 0), min(b + 1, height), min(a, 1)))
DOWN = Reach(lambda a, b, height: (2 * a, min(2 * b + 1, 2 * height), 0), 0.5)
UP = Reach(lambda a, b, height: (max(a - 1, 0) // 2, (min(b + 1, height) + 1) // 2, a - max(a - 1, 0) // 2 * 2), 2)


class ChannelMoments:
    """Mean and sum of squared deviations of each channel of what was added, float64 (Chan, Golub & LeVeque 1979)."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.deviation = torch.zeros(channels, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add values [N, C]."""
        var, mean = torch.var_mean(values.float(), dim=0, correction=0)
        count, delta = self.count + len(values), mean.double().cpu() - self.mean
        self.deviation += len(values) * (var.double().cpu() + delta**2 * (self.count / count))
        self.mean += delta * (len(values) / count)
        self.count = count

    def group_norm(self, norm: nn.GroupNorm) -> StripFn:
        """The norm of the whole, as a function of strips: x -> a x + b of each channel."""
        mean, var = self.mean.view(norm.num_groups, -1), self.deviation.view(norm.num_groups, -1) / self.count
        group_mean = mean.mean(1, keepdim=True)
        group_var = (var + (mean - group_mean) ** 2).mean(1, keepdim=True)
        a = norm.weight.double().cpu() * (group_var + norm.eps).rsqrt().expand_as(mean).flatten()
        b = norm.bias.double().cpu() - a * group_mean.expand_as(mean).flatten()
        a, b = (v.float().to(norm.weight.device)[:, None, None] for v in (a, b))
        return lambda x: torch.addcmul(b, x.float(), a).to(x.dtype)


class ActivationMap:
    """The output [C, H, W] of a layer, written and read by rows: in memory, or in an unnamed file if that is larger
    than a strip; with the moments of its channels. OSError where the folder for temporary files is full."""

    def __init__(self, channels: int, height: int, width: int, like: Tensor, tile_bytes: int) -> None:
        self.channels, self.height, self.width = channels, height, width
        self.dtype, self.device, self.tile_bytes = like.dtype, like.device, tile_bytes
        self.moments = ChannelMoments(channels)
        self.row_bytes = width * channels * like.dtype.itemsize
        is_small = height * self.row_bytes <= tile_bytes
        self.values = torch.empty(height, width, channels, dtype=like.dtype) if is_small else None
        self.file = None if is_small else tempfile.TemporaryFile()  # noqa: SIM115  # closed with this object

    @classmethod
    def of(cls, x: Tensor, tile_bytes: int) -> ActivationMap:
        """That of a tensor [1, C, H, W]."""
        _, channels, height, width = x.shape
        new = cls(channels, height, width, x, tile_bytes)
        for a, b in new.strips(new.row_bytes):
            new.write(a, x[:, :, a:b])
        return new

    def strips(self, row_bytes: int) -> Iterator[tuple[int, int]]:
        """The rows [a, b) of strips, where a row takes so many bytes."""
        rows = max(1, self.tile_bytes // row_bytes)
        return ((a, min(a + rows, self.height)) for a in range(0, self.height, rows))

    def write(self, a: int, x: Tensor) -> None:
        """Rows [1, C, b - a, W] from `a`; the strips are written once each."""
        rows = x[0].permute(1, 2, 0).to("cpu").contiguous()
        self.moments.add(rows.view(-1, self.channels))
        if self.values is not None:
            self.values[a : a + len(rows)] = rows
            return
        assert self.file is not None
        data = memory_of(rows)
        offset = a * self.row_bytes
        while data:
            try:
                written = os.pwrite(self.file.fileno(), data, offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from None
            data, offset = data[written:], offset + written

    def read(self, a: int, b: int) -> Tensor:
        """Rows [a, b) as [1, C, b - a, W], channels last, on the layer's device."""
        if self.values is not None:
            rows = self.values[a:b]
        else:
            assert self.file is not None
            rows = torch.empty(b - a, self.width, self.channels, dtype=self.dtype)
            data = memory_of(rows)
            offset = a * self.row_bytes
            while data:
                count = os.preadv(self.file.fileno(), [data], offset)
                data, offset = data[count:], offset + count
        return rows.to(self.device).permute(2, 0, 1)[None]

    def group_norm(self, norm: nn.GroupNorm) -> StripFn:
        return self.moments.group_norm(norm)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to write and to read into."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def map_strips(
    source: ActivationMap,
    layer: StripFn,
    reach: Reach = NEIGHBOURS,
    add: Callable[[int, int], Tensor] | None = None,
    widest: int = 0,
) -> ActivationMap:
    """A layer over all strips of its input, plus what `add` gives for the rows of the output.

    `widest` is the number of channels between input and output, if that is larger.
    """
    height, width = (int(side * reach.scale) for side in (source.height, source.width))
    shape = ActivationMap(1, height, width, torch.empty(0, dtype=source.dtype), source.tile_bytes)
    channels, out = max(source.channels, widest), None
    for a, b in shape.strips(channels * max(width, source.width) * source.dtype.itemsize):
        first_row, last_row, skip = reach.rows(a, b, height)
        y = layer(source.read(first_row, last_row))[:, :, skip : skip + b - a]
        if add is not None:
            y = y + add(a, b)
        if out is None:
            out = ActivationMap(y.shape[1], height, width, y, source.tile_bytes)
        out.write(a, y)
    assert out is not None
    return out


def resnet_block(block: Any, x: ActivationMap) -> ActivationMap:
    """A `ResnetBlock` without a time embedding."""
    norm1 = x.group_norm(block.norm1)
    h = map_strips(x, lambda s: block.conv1(F.silu(norm1(s), inplace=True)), widest=block.norm2.num_channels)
    norm2 = h.group_norm(block.norm2)
    shortcut = lambda a, b: block.conv_shortcut(x.read(a, b))
    return map_strips(h, lambda s: block.conv2(F.silu(norm2(s), inplace=True)), add=shortcut, widest=x.channels)


def self_attention(block: Any, x: ActivationMap) -> ActivationMap:
    """A `SpatialSelfAttention`: for each strip of queries, sums over strips of keys with a running maximum."""
    norm, channels = x.group_norm(block.group_norm), x.channels
    project = lambda linear: lambda s: linear(norm(s).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    keys, values = (map_strips(x, project(linear), POINTWISE) for linear in (block.to_k, block.to_v))
    tokens = lambda s: s.permute(0, 2, 3, 1).reshape(-1, channels).float()
    side = max(1, math.isqrt(x.tile_bytes // 4) // x.width) * x.width  # tokens of a strip: scores take a strip's bytes
    row_bytes = max(x.row_bytes, x.tile_bytes * x.width // side)

    def attend(strip: Tensor) -> Tensor:
        queries = tokens(project(block.to_q)(strip)) / math.sqrt(channels)
        top = torch.full((len(queries), 1), -torch.inf, device=x.device)
        total, sums = torch.zeros_like(top), torch.zeros_like(queries)
        for a, b in x.strips(row_bytes):
            scores = queries @ tokens(keys.read(a, b)).T
            new_top = torch.maximum(top, scores.amax(1, keepdim=True))
            scores.sub_(new_top).exp_()
            total.mul_(decay := (top - new_top).exp()).add_(scores.sum(1, keepdim=True))
            sums.mul_(decay).add_(scores @ tokens(values.read(a, b)))
            top = new_top
        out = block.to_out[0]((sums / total).to(strip.dtype))
        return strip + out.view(strip.shape[2], x.width, channels).permute(2, 0, 1)[None]

    out = ActivationMap(channels, x.height, x.width, x.read(0, 1), x.tile_bytes)
    for a, b in x.strips(row_bytes):
        out.write(a, attend(x.read(a, b)))
    return out


def mid_block(block: Any, x: ActivationMap) -> ActivationMap:
    x = resnet_block(block.resnets[0], x)
    for attention in block.attentions:
        x = self_attention(attention, x)
    return resnet_block(block.resnets[1], x)


def resolution_block(block: Any, x: ActivationMap) -> ActivationMap:
    """A `VAEBlock`."""
    for resnet in block.resnets:
        x = resnet_block(resnet, x)
    for downsample in block.downsamplers:
        x = map_strips(x, partial(downsample_strip, downsample.conv), DOWN)
    for upsample in block.upsamplers:
        x = map_strips(x, partial(upsample_strip, upsample), UP)
    return x


def downsample_strip(conv: StripFn, strip: Tensor) -> Tensor:
    """`PaddedDownsample`; strips have an odd number of rows, but the last, which the padding follows."""
    return conv(F.pad(strip, (0, 1, 0, 1 - strip.shape[2] % 2)))


def upsample_strip(upsample: Any, strip: Tensor) -> Tensor:
    return upsample(strip, [2 * side for side in strip.shape[2:]])


def run_tiled(coder: Any, x: Tensor, tile_bytes: int) -> Tensor:
    """The output of the VAE's `Encoder` or `Decoder`, [B, C, H, W] -> [B, C', H', W'], image by image.

    Temporary memory beside the networks is a few times `tile_bytes`, whatever the size of the image; the temporary
    files are of three times the largest activation (0.5 GB for 1024 x 1024 pixels of Stable Diffusion's in float32).
    """
    return torch.cat([_run_image(coder, image[None], tile_bytes) for image in x])


def _run_image(coder: Any, image: Tensor, tile_bytes: int) -> Tensor:
    x = map_strips(ActivationMap.of(image, tile_bytes), coder.conv_in, widest=coder.conv_in.out_channels)
    if hasattr(coder, "up_blocks"):
        x = mid_block(coder.mid_block, x)
    for block in coder.up_blocks if hasattr(coder, "up_blocks") else coder.down_blocks:
        x = resolution_block(block, x)
    if hasattr(coder, "down_blocks"):
        x = mid_block(coder.mid_block, x)
    norm = x.group_norm(coder.conv_norm_out)
    out = map_strips(x, lambda s: coder.conv_out(F.silu(norm(s), inplace=True)))
    return out.read(0, out.height)
