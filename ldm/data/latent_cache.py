"""A cache on disk of what frozen networks compute: latents and text embeddings, by the hash of their inputs."""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm.files import atomic_write

HEADER_BYTES, CRC_BYTES = 128, 4  # [dtype, shape] as JSON before an array's own bytes, CRC-32 after them
Compute = Callable[[list[int]], Sequence[np.ndarray]]


class LatentCache:
    """Arrays by key, one file each, in a folder per network; several processes may fill it at once, without locks.

    An entry is written to a temporary file and renamed, so that it is complete or absent; if two processes write the
    same one, the last stays. A corrupt entry fails its CRC-32 and is computed again.
    """

    def __init__(self, folder: Path, namespace: str) -> None:
        """`namespace` identifies all that the arrays depend on beside their keys: see `hash_network_weights`."""
        self.folder = Path(folder) / namespace

    def get_or_compute(self, keys: Sequence[str], compute: Compute) -> list[np.ndarray]:
        """The arrays of some keys; `compute(rows)` returns those of `keys[row]` that are missing.

        Cached arrays are memory-mapped and read-only. An array keeps its dtype and shape.
        """
        found = {key: array for key in dict.fromkeys(keys) if (array := self._read(key)) is not None}
        if rows := [keys.index(key) for key in dict.fromkeys(keys) if key not in found]:
            for row, array in zip(rows, compute(rows), strict=True):
                self._write(keys[row], array)
                found[keys[row]] = array
        return [found[key] for key in keys]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npy"  # not numpy's format: a JSON header, the array's bytes, a CRC

    def _read(self, key: str) -> np.ndarray | None:
        try:
            with open(self._path(key), "rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):  # no file, or an empty one
            return None
        body, check = data[:-CRC_BYTES], data[-CRC_BYTES:]
        if zlib.crc32(body) != int.from_bytes(check, "big"):
            return None
        dtype, shape = json.loads(bytes(body[:HEADER_BYTES]))
        return np.frombuffer(body, dtype, offset=HEADER_BYTES).reshape(shape)

    def _write(self, key: str, array: np.ndarray) -> None:
        head = json.dumps([array.dtype.str, array.shape]).encode().ljust(HEADER_BYTES)
        body = head + np.ascontiguousarray(array).tobytes()
        with atomic_write(self._path(key)) as draft:
            draft.write_bytes(body + zlib.crc32(body).to_bytes(CRC_BYTES, "big"))


def blake2b_hexdigest(*parts: bytes | str) -> str:
    """BLAKE2b of the parts with their lengths, so that ("ab", "c") and ("a", "bc") differ; 32 hexadecimal digits."""
    return _hash_parts(parts)


def _hash_parts(parts: Iterable[bytes | memoryview | str]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = memoryview(part.encode() if isinstance(part, str) else part)
        hasher.update(data.nbytes.to_bytes(8, "big"))
        hasher.update(data)
    return hasher.hexdigest()


def hash_network_weights(network: nn.Module, *extra: Any) -> str:
    """A digest of a network's weights (name, dtype and bytes, on any device) and of `extra` JSON values."""

    def parts() -> Iterator[memoryview | str]:  # one tensor in memory at a time
        yield json.dumps(extra, sort_keys=True)
        for name, value in sorted(network.state_dict().items()):
            yield f"{name} {value.dtype} {tuple(value.shape)}"
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return _hash_parts(parts())
