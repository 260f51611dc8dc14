"""Conditioning: what a network is conditioned on, one row per picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KVCache = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Conditioning:
    """Text as a network sees it: `context` [B, T, C], and, once projected, each cross-attention's keys and values.

    `keys_values` holds one (k, v) pair [B, T, inner] for every cross-attention in the order in which the network meets
    them; it depends on the text alone, so one projection serves all steps of all pictures with that text. `added`
    [B, D] is what a network of SDXL's kind adds to its timestep: the whole text as one vector, and the sizes.
    `num_concat_channels` [B, K, h, w] is what a network that inpaints is shown beside x: the mask, and the latents of what is
    known.
    """

    context: Tensor
    kv_cache: KVCache | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None

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
        )

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return self.map(lambda a: a[rows])

    def to(self, *args) -> Conditioning:
        return self.map(lambda a: a.to(*args))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of several conditionings, in order; texts of one length.

        ValueError where only some have `added`, or `num_concat_channels`.
        """
        if len(parts) == 1:
            return parts[0]
        return Conditioning(
            torch.cat([p.context for p in parts]),
            _cat_kv_caches(parts, 0),
            _cat_optional([p.vector for p in parts], "an added vector"),
            _cat_optional([p.concat for p in parts], "channels"),
        )

    @staticmethod
    def cat_context(parts: Sequence[Conditioning]) -> Conditioning:
        """Texts one behind another along T, row by row; what else the first one has is the whole's, as in A1111."""
        if len(parts) == 1:
            return parts[0]
        return replace(parts[0], context=torch.cat([p.context for p in parts], 1), kv_cache=_cat_kv_caches(parts, 1))


def _cat_kv_caches(parts: Sequence[Conditioning], dim: int) -> KVCache | None:
    """All parts' keys and values joined; None where one has none, for the network projects the whole then."""
    if any(p.kv_cache is None for p in parts):
        return None
    layers = zip(*(p.kv_cache or () for p in parts), strict=True)
    return tuple((torch.cat([k for k, _ in kv], dim), torch.cat([v for _, v in kv], dim)) for kv in layers)


def _cat_optional(tensors: Sequence[Tensor | None], name: str) -> Tensor | None:
    """Rows joined, of all parts or of none."""
    given = [t for t in tensors if t is not None]
    if len(given) not in (0, len(tensors)):
        raise ValueError(f"conditioning: {len(given)} of {len(tensors)} parts have {name}")
    return torch.cat(given) if given else None
