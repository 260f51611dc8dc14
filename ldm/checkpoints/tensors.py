"""Read and write safetensors files, one tensor at a time.

The format: the header's length (8 bytes, little endian), a JSON object of names with dtype, shape and offsets, the
data. The header is validated before memory is allocated. The content decides what a file is, never its name.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import error_text, parse_json
from ldm.files import atomic_write, write_json

if TYPE_CHECKING:
    from hashlib import _Hash

DIFFUSERS_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FP8_DTYPES = torch.float8_e4m3fn, torch.float8_e5m2
FP8_SCALE_SUFFIXES = ".scale_weight", ".weight_scale"  # ComfyUI's, in place of ".weight"
SAFETENSORS_DTYPE_NAMES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
MAX_NUMEL = 2**63  # torch's own limit, which holds for the sides of an empty tensor too
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_HEADER_STRINGS = 500_000  # of JSON; a tensor has five, and the largest models have some 10,000 tensors
MAX_HEADER_COMMAS = 20 * MAX_HEADER_STRINGS
MAX_TENSOR_DIMS = 64  # torch's own limit
PICKLE_MESSAGE = (
    "{what}; it may run code when it is read, so it is not: `ldm convert --trust FILE DST` makes weights of it"
)
FOREIGN_MAGIC_BYTES = {  # first bytes of what is often mistaken for weights
    b"PK\x03\x04": PICKLE_MESSAGE.format(what="a zip archive, as torch.save writes"),
    **{bytes([0x80, k]): PICKLE_MESSAGE.format(what="a pickle") for k in range(2, 6)},
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"<": "an HTML page, not the file itself",
    b"GGUF": "a GGUF file, which is not supported",
}


class TensorInfo(NamedTuple):
    """The dtype, shape and bytes `start` to `end` of a tensor in the data of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file by its header; no tensor is in memory but the `scales` that some are multiplied by."""

    path: Path
    metadata: Mapping[str, str]
    tensor_infos: Mapping[str, TensorInfo]
    data_offset: int
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    def meta_tensors(self) -> dict[str, Tensor]:
        """The tensors without their values, on the meta device."""
        dtypes = {name: torch.float32 if name in self.scales else a.dtype for name, a in self.tensor_infos.items()}
        infos = self.tensor_infos.items()
        return {name: torch.empty(a.shape, dtype=dtypes[name], device="meta") for name, a in infos}

    def map_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each name and tensor, mapped from the file one at a time: to be copied, as the file may change later.

        ValueError where the file has become shorter.
        """
        with self.path.open("rb") as file:
            for name, info in self.tensor_infos.items():
                start, size = self.data_offset + info.start, info.end - info.start
                page = start - start % mmap.ALLOCATIONGRANULARITY
                if not size:
                    yield name, torch.empty(info.shape, dtype=info.dtype)
                    continue
                try:
                    data = mmap.mmap(file.fileno(), start - page + size, access=mmap.ACCESS_COPY, offset=page)
                except ValueError:
                    raise ValueError(f"{self.path}: ends before the last byte of {name}") from None
                raw = torch.frombuffer(data, dtype=torch.uint8, offset=start - page)
                aligned = raw if start % info.dtype.itemsize == 0 else raw.clone()
                yield name, self._scale(name, aligned.view(info.dtype).reshape(info.shape))

    def iter_tensors(self, hasher: _Hash | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each name and tensor on the host, in the file's order; `hasher` is updated with every byte of the file.

        ValueError where the file ends early.
        """
        with self.path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
            head = file.read(self.data_offset)
            pending = hashing.submit(hasher.update, head) if hasher else None
            for name, info in self.tensor_infos.items():
                data = torch.empty(info.end - info.start, dtype=torch.uint8)
                view, filled = data.numpy().data, 0
                while filled < len(view):
                    if not (n := file.readinto(view[filled:])):
                        raise ValueError(f"{self.path}: ends before the last byte of {name}")
                    filled += n
                if hasher and pending:
                    pending.result()  # one tensor behind the disk, so that no more than one waits
                    pending = hashing.submit(hasher.update, view)
                yield name, self._scale(name, data.view(info.dtype).reshape(info.shape))
            if pending:
                pending.result()

    def _scale(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.float() * self.scales[name] if name in self.scales else tensor


def dequantize(file: SafetensorsFile) -> SafetensorsFile:
    """The file with the scales of its fp8 weights, one for the tensor or one for each row: weight times scale."""
    scales = {}
    for name, info in file.tensor_infos.items():
        suffix = next((suffix for suffix in FP8_SCALE_SUFFIXES if name.endswith(suffix)), None)
        weight = file.tensor_infos.get(f"{name.removesuffix(suffix)}.weight") if suffix else None
        if suffix is None or weight is None or weight.dtype not in FP8_DTYPES:
            continue
        count = math.prod(info.shape)
        if count not in (1, weight.shape[0] if weight.shape else 1) or not info.dtype.is_floating_point:
            raise ValueError(f"{file.path}: {name} has shape {list(info.shape)}, expected one scale, or one a row")
        with file.path.open("rb") as opened:
            opened.seek(file.data_offset + info.start)
            data = bytearray(opened.read(info.end - info.start))
        scale = torch.frombuffer(data, dtype=info.dtype).float()
        shape = [count, *[1] * (len(weight.shape) - 1)] if count > 1 else []
        scales[f"{name.removesuffix(suffix)}.weight"] = scale.reshape(shape)
    return replace(file, scales=scales)


def open_safetensors(path: Path) -> SafetensorsFile:
    """A safetensors file by its header; ValueError in one line for anything else, such as a pickle."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            if start[8:9] != b"{" or length + 8 > size or length > MAX_HEADER_BYTES:
                raise ValueError(f"{path}: {_describe_foreign_file(start, size)}")
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: {error_text(error)}") from None
    try:
        num_strings = (header.count(b'"') - header.count(b'\\"')) // 2
        if num_strings > MAX_HEADER_STRINGS or header.count(b",") > MAX_HEADER_COMMAS:  # seconds, gigabytes to parse
            raise ValueError(f"a header of {num_strings} strings, {MAX_HEADER_STRINGS} at most")
        entries = parse_json(header)
        metadata = entries.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
        infos = {name: _parse_tensor_info(name, entry) for name, entry in entries.items()}
        infos = dict(sorted(infos.items(), key=lambda item: item[1][2:]))
        end = 0
        for name, info in infos.items():
            if info.start != end:
                raise ValueError(f"{name} begins at byte {info.start} of the data, expected {end}")
            end = info.end
        if (data := size - 8 - length) != end:
            raise ValueError(f"{data} bytes of data, expected {end}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    return SafetensorsFile(path, metadata, infos, 8 + length)


def _describe_foreign_file(start: bytes, size: int) -> str:
    """What a file is that does not begin as a safetensors file."""
    if not size:
        return "not a whole safetensors file (0 bytes)"
    known = (what for beginning, what in FOREIGN_MAGIC_BYTES.items() if start.startswith(beginning))
    return next(known, "not a whole safetensors file (it does not begin with a header)")


def _parse_tensor_info(name: str, entry: Any) -> TensorInfo:
    """An entry of the header; ValueError where it is not consistent."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"{name} has dtype {entry['dtype']}, which is not supported")
    if isinstance(entry["shape"], list) and len(entry["shape"]) > MAX_TENSOR_DIMS:
        raise ValueError(f"{name} has {len(entry['shape'])} dimensions, of {MAX_TENSOR_DIMS} at most")
    numbers = [*entry["shape"], *entry["data_offsets"]] if isinstance(entry["shape"], list) else [-1]
    if len(entry["data_offsets"]) != 2 or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{name} has an invalid shape or data_offsets")
    dtype, shape, (start, end) = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if math.prod(filter(None, shape)) >= MAX_NUMEL:
        raise ValueError(f"{name} has shape {list(shape)}, too large")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{name} has {end - start} bytes, expected {math.prod(shape) * dtype.itemsize}")
    return TensorInfo(dtype, shape, start, end)


def order_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they lie in a file: each at a multiple of the size of its numbers."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A file of the same bytes for the same tensors and metadata, whole or not at all, with the hashes of its tensors.

    These are kohya's `sshs_model_hash` and ModelSpec's `modelspec.hash_sha256`: the SHA-256 of all after the header.
    safetensors' own `save_file` writes its metadata in a random order.
    """
    tensors = order_tensors({name: tensors[name].contiguous() for name in sorted(tensors)})
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(view_bytes(tensor))
    stated = {name: text for name, text in metadata.items() if name != "sshs_legacy_hash"}
    hashes = {"sshs_model_hash": digest.hexdigest(), "modelspec.hash_sha256": f"0x{digest.hexdigest()}"}
    header = {"format": "pt", **stated, **hashes}
    with atomic_write(path) as draft, SafetensorsWriter(draft, tensors, header) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def view_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, on the host."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class SafetensorsWriter:
    """Write a safetensors file tensor by tensor, in any order; `tensors` give names, dtypes and shapes (may be meta).

    Floating-point tensors are cast to `dtype`, if it is not None. On leaving its context every tensor must have been
    written, once.
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
        self.pending = order_tensors(like)
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self.tensor_offsets, end = {}, 0
        for name, tensor in self.pending.items():
            if tensor.dtype not in SAFETENSORS_DTYPE_NAMES:
                raise ValueError(f"{name} has dtype {tensor.dtype}, which safetensors files do not have")
            self.tensor_offsets[name], end = end, end + tensor.numel() * tensor.itemsize
            code, offsets = SAFETENSORS_DTYPE_NAMES[tensor.dtype], [self.tensor_offsets[name], end]
            entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": offsets}
        header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("wb", buffering=0)
        self.file.write(len(header).to_bytes(8, "little") + header)
        self.data_offset = 8 + len(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the announced shape and dtype at its offset."""
        expected, tensor = self.pending.pop(name), self._cast(tensor)
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        view = view_bytes(tensor)
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


def add_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """A component's configuration; a text encoder's with the dtype that it is loaded in where none is chosen.

    transformers 5 would take that of the weights, and diffusers makes the U-Net beside it float32.
    """
    if not is_text_encoder_config(config):
        return dict(config)
    return {**{name: value for name, value in config.items() if name != "torch_dtype"}, "dtype": "float32"}


def is_text_encoder_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a CLIP text encoder."""
    classes = config.get("architectures")
    names = [config.get("model_type"), *(classes if isinstance(classes, list) else [])]
    return any(isinstance(name, str) and name.lower().startswith(("clip_text", "cliptext")) for name in names)


def save_module(module: nn.Module, config: Mapping[str, Any], folder: Path, name: str = DIFFUSERS_WEIGHTS_NAME) -> None:
    """Write `config.json` and the weights of one component to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(module.state_dict(), folder / name)
    write_json(add_dtype(config), folder / "config.json")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = torch.float16) -> None:
    """Write a safetensors file, floating-point tensors in `dtype` (None: each in its own), one copy at a time."""
    with SafetensorsWriter(path, tensors, {"format": "pt"}, dtype) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
