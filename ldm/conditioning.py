"""Conditioning: what a network is conditioned on, one row per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KVCache = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Conditioning:
    """The inputs of a network beside x and the timestep.

    `context` [B, T, C] are the text encoders' hidden states. `kv_cache` holds the keys and values [B, T, inner] of
    every cross-attention, in the order of the network's layers: they depend on the text alone, so one projection serves
    all steps of all images with that text. `vector` [B, D] is SDXL's pooled text and size embedding, added to the
    timestep's. `concat` [B, K, h, w] are an inpainting network's input channels beside x: the mask, and the latents of
    the known image. `guidance` [B] is the guidance scale, for a network that was distilled to take it as an input.
    """

    context: Tensor
    kv_cache: KVCache | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return self.context.shape[0]

    def map(self, f) -> Conditioning:
        """`f` applied to every tensor."""
        pairs = self.kv_cache
        return Conditioning(
            f(self.context),
            None if pairs is None else tuple((f(k), f(v)) for k, v in pairs),
            None if self.vector is None else f(self.vector),
            None if self.concat is None else f(self.concat),
            None if self.guidance is None else f(self.guidance),
        )

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return self.map(lambda a: a[rows])

    def to(self, *args) -> Conditioning:
        return self.map(lambda a: a.to(*args))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of several conditionings, in order, of one text length.

        ValueError where only some have `vector`, `concat` or `guidance`.
        """
        if len(parts) == 1:
            return parts[0]
        return Conditioning(
            torch.cat([p.context for p in parts]),
            _cat_kv_caches(parts, 0),
            _cat_optional([p.vector for p in parts], "vector"),
            _cat_optional([p.concat for p in parts], "concat"),
            _cat_optional([p.guidance for p in parts], "guidance"),
        )

    @staticmethod
    def cat_context(parts: Sequence[Conditioning]) -> Conditioning:
        """Contexts concatenated along T, row by row; everything else is the first part's, as in A1111."""
        if len(parts) == 1:
            return parts[0]
        return replace(parts[0], context=torch.cat([p.context for p in parts], 1), kv_cache=_cat_kv_caches(parts, 1))


def _cat_kv_caches(parts: Sequence[Conditioning], dim: int) -> KVCache | None:
    """All parts' keys and values concatenated; None where one has none: the network then projects the whole."""
    if any(p.kv_cache is None for p in parts):
        return None
    layers = zip(*(p.kv_cache or () for p in parts), strict=True)
    return tuple((torch.cat([k for k, _ in kv], dim), torch.cat([v for _, v in kv], dim)) for kv in layers)


def _cat_optional(tensors: Sequence[Tensor | None], name: str) -> Tensor | None:
    """Rows concatenated, of all parts or of none."""
    present = [t for t in tensors if t is not None]
    if len(present) not in (0, len(tensors)):
        raise ValueError(f"conditioning: {len(present)} of {len(tensors)} parts have {name}")
    return torch.cat(present) if present else None
