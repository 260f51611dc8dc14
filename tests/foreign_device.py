"""A device that this machine lacks, simulated: its tensors say that they are there, and compute on the CPU.

As on Apple's MPS there is no float64, and tensors of two devices do not mix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class ForeignTensor(Tensor):
    """A tensor of a device; `host` holds its numbers."""

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> ForeignTensor:
        if real.dtype == torch.float64:
            raise TypeError(f"Cannot convert a {device.type} Tensor to float64 dtype")
        size, layout = real.size(), {"strides": real.stride(), "storage_offset": real.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, size, dtype=real.dtype, device=device, **layout)

    def __init__(self, real: Tensor, device: torch.device) -> None:
        self.host = real

    def tolist(self):
        return self.host.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """In another thread than the one that has the device as its context."""
        tensors = (v for v in tree_flatten((args, kwargs))[0] if type(v) is cls)
        return SimulatedDevice(next(tensors).device).__torch_dispatch__(func, types, args, kwargs)


class SimulatedDevice(TorchDispatchMode):
    """Within this context `device` exists; `moved` counts the operations there."""

    def __init__(self, device: str | torch.device) -> None:
        super().__init__()
        self.device, self.operations = torch.device(device), 0

    def to(self, module: nn.Module) -> nn.Module:
        """A module's parameters and buffers on the device, in place."""
        with self:
            for part in module.modules():
                for name, value in part._parameters.items():
                    if value is not None:
                        moved = ForeignTensor(value.detach().clone(), self.device)
                        part._parameters[name] = nn.Parameter(moved, value.requires_grad)
                for name, value in part._buffers.items():
                    part._buffers[name] = value if value is None else ForeignTensor(value, self.device)
        return module

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        target = kwargs.get("device")
        is_copy = func is torch.ops.aten.copy_.default or func is torch.ops.aten._to_copy.default
        if not is_copy and any(type(t) is ForeignTensor for t in tensors):
            self.operations += 1
            others = [t for t in tensors if type(t) is not ForeignTensor and t.dim()]
            assert not others, f"{func}: tensors of two devices"
        there = any(type(t) is ForeignTensor for t in tensors) if target is None else target == self.device
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None)
        args, kwargs = tree_map(lambda v: v.host if type(v) is ForeignTensor else v, (args, kwargs))
        result = func(*args, **kwargs)
        if not there or func is torch.ops.aten._local_scalar_dense.default:
            return result
        return tree_map(lambda v: ForeignTensor(v, self.device) if isinstance(v, Tensor) else v, result)
