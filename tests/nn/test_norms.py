"""Group norm is torch's on small maps, and the one of float64 on large ones."""

import pytest
import torch

from ldm.nn.norms import MAX_SUMMED_PIXELS, GroupNorm


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(16, 24), (640, 512)])
def test_group_norm_is_that_of_float64(size, memory_format):
    torch.manual_seed(0)
    norm = GroupNorm(4, 8).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (torch.randn(2, 8, *size) * 2 + 1.5).contiguous(memory_format=memory_format)
    y = norm(x)
    torch.testing.assert_close(y, norm.double()(x.double()).float(), rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=memory_format)


def test_torch_s_own_is_wrong_on_large_maps():
    """The reason for ours: delete it when this fails."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 8).requires_grad_(False)
    x = (torch.randn(1, 8, 1024, 2 * MAX_SUMMED_PIXELS // 512) * 2 + 1.5).contiguous(memory_format=torch.channels_last)
    difference = norm(x) - norm.double()(x.double()).float()
    assert difference.abs().max() > 1e-4
