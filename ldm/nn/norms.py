"""Group norm that is exact on large images, and the same for an image in any batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPLIT_MAP_SIZE = 2**10  # pixels, from which torch splits a group norm between threads by rows (GroupNormKernel.cpp)
MAX_SUMMED_PIXELS = 2**18  # that torch sums well enough


class GroupNorm(nn.GroupNorm):
    """torch's, but for two kinds of maps on a CPU.

    In inference on several threads large maps are normalized one by one: each thread sums a part of all rows there, and
    where the parts end depends on their number.

    float32 maps of more than `MAX_SUMMED_PIXELS` in channels_last memory have statistics of ours: torch 2.13 adds up a
    channel's pixels one after the other in float32, so that at 1024 x 1024 the result is wrong by 2e-3 of a deviation,
    and a decoded image by 1e-3. Here a row is summed in float32, and rows in float64.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.device.type != "cpu" or x.is_contiguous():
            return self._normalize_by_torch(x)
        pixels = x.shape[2] * x.shape[3]
        if x.dtype == torch.float32 and pixels > MAX_SUMMED_PIXELS:
            return self._normalize_by_rows(x)
        return self._normalize_by_torch(x)

    def _normalize_by_torch(self, x: Tensor) -> Tensor:
        is_split = len(x) > 1 and x[0, 0].numel() >= SPLIT_MAP_SIZE and x.device.type == "cpu"
        if not is_split or torch.is_grad_enabled() or torch.get_num_threads() == 1:
            return super().forward(x)
        return torch.cat([super(GroupNorm, self).forward(row) for row in x.split(1)])

    def _normalize_by_rows(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        count = height * width * channels // self.num_groups
        by_group = lambda moments: moments.double().sum(1).view(batch, self.num_groups, -1).sum(2, keepdim=True) / count
        mean = by_group(rows.sum(2))
        var = by_group(torch.linalg.vector_norm(rows, dim=2).double().square()) - mean**2
        scale = self.weight.double().view(self.num_groups, -1) * (var + self.eps).rsqrt()
        shift = self.bias.double().view(self.num_groups, -1) - scale * mean
        scale, shift = (value.reshape(batch, channels, 1, 1).float() for value in (scale, shift))
        return torch.addcmul(shift, x, scale)
