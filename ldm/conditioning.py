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
    them; it depends on the text alone, so one projection serves all steps of all pictures with that text.
    """

    context: Tensor
    keys_values: KeysValues | None = None

    def __len__(self) -> int:
        return self.context.shape[0]

    def map(self, f) -> Conditioning:
        """`f` applied to every tensor."""
        pairs = self.keys_values
        return Conditioning(f(self.context), None if pairs is None else tuple((f(k), f(v)) for k, v in pairs))

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return self.map(lambda a: a[rows])

    def to(self, *args) -> Conditioning:
        return self.map(lambda a: a.to(*args))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of several conditionings, in order; texts of one length only."""
        if len(parts) == 1:
            return parts[0]
        context = torch.cat([p.context for p in parts])
        if any(p.keys_values is None for p in parts):
            return Conditioning(context)
        layers = zip(*(p.keys_values or () for p in parts), strict=True)
        return Conditioning(
            context, tuple((torch.cat([k for k, _ in kv]), torch.cat([v for _, v in kv])) for kv in layers)
        )
