"""Textual inversion: new words whose vectors learn, in the vocabulary of a text encoder that does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExtendedEmbedding(nn.Module):
    """A table of vectors [n, C], and behind it `extract_placeholder_embeddings` [m, C] that learn: Gal et al. 2022 (arXiv:2208.01618)."""

    def __init__(self, table: nn.Embedding, first: Tensor) -> None:
        super().__init__()
        self.table = table
        self.vectors = nn.Parameter(first.detach().float().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [B, T, C], in the dtype of the table, of token ids [B, T] below n + m."""
        n = self.table.num_embeddings
        own = self.table(ids.clamp(max=n - 1))
        return torch.where((ids >= n)[..., None], self.vectors[(ids - n).clamp(min=0)].to(own), own)
