"""Prompts as a model's U-Net is conditioned on them, each chunk encoded and projected once."""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from ldm.checkpoints.formats import Checkpoint
from ldm.conditioning import Conditioning
from ldm.nn.text import Chunk, chunks, embed_chunk

CHUNKS_KEPT = 256  # whose keys and values stay at hand


class Texts:
    """The prompts of a model, of any length and with weights, as conditionings.

    A chunk is what `chunks` says. It is kept once it has been encoded: `clear` forgets them all, when a network moves
    or changes.
    """

    def __init__(self, model: Checkpoint) -> None:
        self.chunks = lru_cache(CHUNKS_KEPT)(partial(chunks, model.towers[0].tokenizer))
        self._projected = lru_cache(CHUNKS_KEPT)(partial(projected, model))

    def __call__(self, prompt: str, length: int = 1) -> Conditioning:
        """A prompt [1, n T, C] in n chunks, with every cross-attention's keys and values.

        Empty chunks fill it up to `length`. ValueError for a prompt that cannot be read.
        """
        own = self.chunks(prompt)
        return Conditioning.chain([self._projected(chunk) for chunk in own + self.chunks("") * (length - len(own))])

    def length(self, prompt: str, negative: str, scale: float | None) -> int:
        """Of the text in a row's calls, in chunks; the negative prompt counts where it guides."""
        return max(len(self.chunks(text)) for text in ((prompt,) if scale == 1 else (prompt, negative)))

    def clear(self) -> None:
        """Forget what was encoded."""
        self.chunks.cache_clear()
        self._projected.cache_clear()


def projected(model: Checkpoint, chunk: Chunk) -> Conditioning:
    """A chunk of a prompt [1, T, C] with every cross-attention's keys and values."""
    with torch.inference_mode(False), torch.no_grad():  # kept for later calls, which may want gradients in x
        return model.unet.project(Conditioning(embed_chunk(model.towers[0].model, chunk)))
