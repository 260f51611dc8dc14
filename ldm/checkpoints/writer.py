"""safetensors files written one tensor at a time, in any order: the header needs names, dtypes and shapes alone.

The format is that of `ldm.checkpoints.tensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ldm.checkpoints.tensors import SAFETENSORS_DTYPES

SAFETENSORS_DTYPE_NAMES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}


class SafetensorsWriter:
    """A safetensors file of tensors that are known by dtype and shape (on the meta device will do), to be filled.

    Real numbers are written in `dtype`, where it is not None. Closed without an exception the file is whole: each
    tensor was given, once.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        like = {name: self._cast(a.to("meta")) for name, a in tensors.items()}
        self.pending = dict(sorted(like.items(), key=lambda item: -item[1].itemsize))  # each at a multiple of its size
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self.tensor_offsets, end = {}, 0
        for name, tensor in self.pending.items():
            if tensor.dtype not in SAFETENSORS_DTYPE_NAMES:
                raise ValueError(f"{name} has dtype {tensor.dtype}, which safetensors files do not have")
            self.tensor_offsets[name], end = end, end + tensor.numel() * tensor.itemsize
            offsets = [self.tensor_offsets[name], end]
            entries[name] = {
                "dtype": SAFETENSORS_DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
        header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("wb", buffering=0)
        self.file.write(len(header).to_bytes(8, "little") + header)
        self.data_offset = 8 + len(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place, of the shape and dtype that were said."""
        wanted, tensor = self.pending.pop(name), self._cast(tensor)
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
        view = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.file.seek(self.data_offset + self.tensor_offsets[name])
        while len(view):
            view = view[self.file.write(view) :]

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        assert kind or not self.pending, f"{[*self.pending][:3]} were not written"
