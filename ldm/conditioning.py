"""Conditioning: what a network is conditioned on, one row per picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KeysValues = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Conditioning:
    """Text as a network sees it: `context` [B, T, C], and, once projected, each cross-attention's keys and values.

    `keys_values` holds one (k, v) pair [B, T, inner] for every cross-attention in the order in which the network meets
    them; it depends on the text alone, so one projection serves all steps of all pictures with that text. `added`
    [B, D] is what a network of SDXL's kind adds to its timestep: the whole text as one vector, and the sizes.
    """

    context: Tensor
    keys_values: KeysValues | None = None
    added: Tensor | None = None

    def __len__(self) -> int:
        return self.context.shape[0]

    def map(self, f) -> Conditioning:
        """`f` applied to every tensor."""
        pairs = self.keys_values
        return Conditioning(
            f(self.context),
            None if pairs is None else tuple((f(k), f(v)) for k, v in pairs),
            None if self.added is None else f(self.added),
        )

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return self.map(lambda a: a[rows])

    def to(self, *args) -> Conditioning:
        return self.map(lambda a: a.to(*args))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of several conditionings, in order; texts of one length. ValueError where only some have `added`."""
        if len(parts) == 1:
            return parts[0]
        vectors = [p.added for p in parts if p.added is not None]
        if len(vectors) not in (0, len(parts)):
            raise ValueError(f"conditioning: {len(vectors)} of {len(parts)} parts have an added vector")
        context, added = torch.cat([p.context for p in parts]), torch.cat(vectors) if vectors else None
        if any(p.keys_values is None for p in parts):
            return Conditioning(context, added=added)
        layers = zip(*(p.keys_values or () for p in parts), strict=True)
        pairs = tuple((torch.cat([k for k, _ in kv]), torch.cat([v for _, v in kv])) for kv in layers)
        return Conditioning(context, pairs, added)

    @staticmethod
    def chain(parts: Sequence[Conditioning]) -> Conditioning:
        """Texts one behind another along T, row by row; the first one's `added` is the whole's, as in A1111."""
        if len(parts) == 1:
            return parts[0]
        context, added = torch.cat([p.context for p in parts], dim=1), parts[0].added
        if any(p.keys_values is None for p in parts):
            return Conditioning(context, added=added)
        layers = zip(*(p.keys_values or () for p in parts), strict=True)
        pairs = tuple((torch.cat([k for k, _ in kv], 1), torch.cat([v for _, v in kv], 1)) for kv in layers)
        return Conditioning(context, pairs, added)
