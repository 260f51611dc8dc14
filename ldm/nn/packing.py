"""Convolutions and linear maps whose weights, in inference on a CPU, lie in the order that oneDNN computes in.

PyTorch reorders a convolution's weight at every call, which takes half the time of a 3x3 convolution of 1,280 channels
at 8x8, and three quarters at 4x4. Here the first call without gradients packs it, and frees the plain weight. Whoever
asks for that gets it back bit for bit (`weight`, `parameters`, `state_dict`, `to`, `deepcopy`, pickle), and the next
call packs it again. A weight that someone still holds, as an optimizer does, stays plain, since it may change.
"""

from __future__ import annotations

import threading
import weakref
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.hardware import preferred_dtype

MIN_LINEAR_SIZE = 2**16 + 1  # of a float32 weight: below it oneDNN takes longer to start than it saves
CPU = torch.device("cpu")
_LOCK = threading.RLock()  # of every change between plain and packed: threads may share a network


class PackedWeight(NamedTuple):
    """A weight in oneDNN's order, and what its plain parameter was."""

    data: Tensor  # opaque: a layout of its own
    shape: torch.Size
    stride: tuple[int, ...]
    requires_grad: bool

    def unpack(self) -> nn.Parameter:
        with torch.inference_mode(False), torch.no_grad():  # or it could not be trained
            plain = torch.empty_strided(self.shape, self.stride, dtype=self.data.dtype)
            plain.copy_(self.data.to_dense().view(self.shape))
        return nn.Parameter(plain, self.requires_grad)


@cache
def packing_unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why weights of this dtype stay plain on this machine, or None: known only by packing, computing and unpacking."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"not for {str(dtype).removeprefix('torch.')}"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if dtype not in (torch.float32, preferred_dtype(CPU)):
        return "this CPU does not multiply bfloat16"
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.linspace(-1, 1, 8 * 8 * 9).reshape(8, 8, 3, 3).to(dtype)
        x = torch.linspace(-1, 1, 2 * 8 * 25).reshape(2, 8, 5, 5).to(dtype)
        try:
            for kernel, inputs in ((weight, x), (weight[..., 0, 0], x[:, :, 0, 0])):
                packed = (_reorder_conv if kernel.ndim == 4 else _reorder_linear)(kernel, (1, 1), (1, 1))
                run = _run_conv if kernel.ndim == 4 else _run_linear
                expected = nn.functional.conv2d(x, weight, padding=1) if kernel.ndim == 4 else inputs @ kernel.T
                torch.testing.assert_close(run(inputs, packed, None, (1, 1), (1, 1)), expected)
                torch.testing.assert_close(packed.to_dense(), kernel, rtol=0, atol=0)
        except (AttributeError, RuntimeError, NotImplementedError, AssertionError) as error:
            return f"this build of torch: {str(error).strip().splitlines()[0]}"
    return None


class PackableModule(nn.Module):
    """A module with a `weight` that is packed by the first call without gradients, where that is possible and pays.

    While packed, `weight` is not among the raw parameters; every reader of `_parameters`, which is what torch's own
    methods read, and of `weight` unpacks it first.
    """

    _packed: PackedWeight | None = None  # instances store theirs, or none

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        with _LOCK:
            self._unpack()
            return self.__dict__["_parameters"]

    @_parameters.setter
    def _parameters(self, value: dict[str, nn.Parameter | None]) -> None:
        self.__dict__["_parameters"] = value

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and name in (parameters := self._parameters):
            return parameters[name]
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: the module with its plain weight."""
        with _LOCK:
            self._unpack()
            return dict(self.__dict__)

    def _unpack(self) -> None:
        if packed := self.__dict__.pop("_packed", None):
            self.__dict__["_parameters"] = {"weight": packed.unpack(), **self.__dict__["_parameters"]}

    def packed_weight(self, x: Tensor) -> Tensor | None:
        """The packed weight for an input x, made now if there is none yet; None where the plain one is to be used."""
        if torch.is_grad_enabled() or type(x) is not Tensor or x.device != CPU or torch.compiler.is_compiling():
            return None
        if not torch.backends.mkldnn.enabled or torch.is_autocast_enabled("cpu"):
            return None
        packed = self._packed or (self._pack() if self._is_packable(x.dtype) else None)
        return packed.data if packed is not None and packed.data.dtype == x.dtype else None

    def _pack(self) -> PackedWeight | None:
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            if packed := self._packed:
                return packed
            parameters = self.__dict__["_parameters"]
            weight = parameters["weight"]
            if type(weight) is not nn.Parameter or weight.device != CPU or weight.grad is not None or vars(weight):
                return None
            if not self._is_packable(weight.dtype) or packing_unavailable_reason(weight.dtype):
                return None
            plain, holders, requires_grad = weight.detach(), weakref.ref(weight), weight.requires_grad
            del weight, parameters["weight"]
            if (held := holders()) is not None:
                self.__dict__["_parameters"] = {"weight": held, **parameters}
                return None
            packed = PackedWeight(self._reorder(plain), plain.shape, plain.stride(), requires_grad)
            self.__dict__["_packed"] = packed
            return packed

    def _is_packable(self, dtype: torch.dtype) -> bool:
        raise NotImplementedError

    def _reorder(self, weight: Tensor) -> Tensor:
        raise NotImplementedError


class Conv2d(PackableModule, nn.Conv2d):
    """torch's, packed in inference on a CPU; of kernel size 1 it is then a linear map of the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or (packed := self.packed_weight(x)) is None:
            return super().forward(x)
        if self._is_pointwise:
            return _run_linear(x.permute(0, 2, 3, 1), packed, self.bias).permute(0, 3, 1, 2)
        return _run_conv(x, packed, self.bias, self.padding, self.stride)

    @property
    def _is_pointwise(self) -> bool:
        return self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    def _is_packable(self, dtype: torch.dtype) -> bool:
        return self.groups == 1 and self.dilation == (1, 1) and not isinstance(self.padding, str)

    def _reorder(self, weight: Tensor) -> Tensor:
        if self._is_pointwise:
            return _reorder_linear(weight.flatten(1))
        return _reorder_conv(weight, self.padding, self.stride)


class Linear(PackableModule, nn.Linear):
    """torch's, packed in inference on a CPU where that pays."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed_weight(x)
        return super().forward(x) if packed is None else _run_linear(x, packed, self.bias)

    def _is_packable(self, dtype: torch.dtype) -> bool:
        return dtype != torch.float32 or self.in_features * self.out_features >= MIN_LINEAR_SIZE

    def _reorder(self, weight: Tensor) -> Tensor:
        return _reorder_linear(weight)


def _reorder_conv(weight: Tensor, padding: Any, stride: Any) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, (1, 1), 1, None)


def _reorder_linear(weight: Tensor, *_: Any) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _run_conv(x: Tensor, packed: Tensor, bias: Tensor | None, padding: Any, stride: Any) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, padding, stride, (1, 1), 1, "none", [], "")


def _run_linear(x: Tensor, packed: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
