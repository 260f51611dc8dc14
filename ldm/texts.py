"""Prompts as a model's U-Net is conditioned on them, each chunk encoded and projected once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from ldm.checkpoints.embeddings import load_embeddings
from ldm.checkpoints.formats import TEXT_ENCODERS, Checkpoint
from ldm.conditioning import Conditioning
from ldm.nn.text import Chunk, chunks, spelled

CHUNKS_KEPT = 256  # as tokens
BYTES_KEPT = 2**29  # of keys and values: 20 chunks for SDXL's U-Net, 26 MB each, or 140 for SD 1's
Encoded = tuple[Conditioning, Tensor | None]  # of a chunk: with keys and values, and its pooled vector
ZEROS = Chunk((), ())  # stands for states and a pooled vector of zeros


class Texts:
    """The prompts of a model, of any length and with weights, as conditionings.

    A chunk is what `chunks` says; the model's text encoders read the same tokens, each with its own padding. It is kept
    once it has been encoded: `clear` forgets them all, when a network moves or changes. Words that `add_embedding`
    gives must not change while another thread draws.
    """

    def __init__(self, model: Checkpoint) -> None:
        tokenizers = [tower.tokenizer for tower in model.towers]
        if any(other.get_vocab() != tokenizers[0].get_vocab() for other in tokenizers[1:]):
            raise ValueError(f"the vocabularies of {' and '.join(TEXT_ENCODERS)} differ")
        self.model = model
        self.embeddings: dict[str, tuple[Tensor, ...]] = {}  # word: [n, C] for each tower
        self._words: dict[str, range] = {}
        self.chunks = lru_cache(CHUNKS_KEPT)(partial(read, model, self._words))
        self._encoded = Kept(partial(encoded, model))

    def __call__(
        self, prompt: str | None, length: int = 1, *, skip: int = 0, time_ids: Tensor | None = None
    ) -> Conditioning:
        """A prompt [1, n T, C] in n chunks, with every cross-attention's keys and values.

        C is that of all text encoders together. Empty chunks fill it up to `length`. None is no prompt: zeros where the
        model is one of `zero_negative`, as in diffusers, and "" elsewhere. `skip` layers are left out of the text
        encoders, in diffusers' numbering. `time_ids` [1, 6] are SDXL's: original height and width, the crop's top and
        left, height and width to draw; with the first chunk's pooled vector they are `added`, where the text encoders
        give one. ValueError for a prompt that cannot be read, and for a layer that is not there.
        """
        own = self.chunks(prompt)
        fill = self.chunks(None if prompt is None else "") * (length - len(own))
        parts, pooled = zip(*(self._encoded(chunk, skip) for chunk in own + fill), strict=True)
        cond = Conditioning.chain(parts)
        if time_ids is None or pooled[0] is None:
            return cond
        return replace(cond, added=self.model.unet.added(pooled[0], time_ids.to(pooled[0].device)))

    def length(self, prompt: str | None, negative: str | None, scale: float | None) -> int:
        """Of the text in a row's calls, in chunks; the negative prompt counts where it guides."""
        return max(len(self.chunks(text)) for text in ((prompt,) if scale == 1 else (prompt, negative)))

    def clear(self) -> None:
        """Forget what was encoded."""
        self.chunks.cache_clear()
        self._encoded.clear()

    def add_embedding(self, word: str, path: Path) -> None:
        """Let a word of prompts stand for the vectors in a file (textual inversion, Gal et al. 2022, arXiv:2208.01618).

        In a prompt it may be of any case, is weighted like any word, and is kept in one chunk. ValueError where the
        model has the word already, and where the vectors are not of its text encoders' widths.
        """
        tokenizer = self.model.towers[0].tokenizer
        if word.lower() in map(str.lower, self.embeddings) or len(spelled(tokenizer, word)) < 2 or word != word.strip():
            raise ValueError(f"embedding {word!r}: must be a word that the model does not have yet")
        found, towers = load_embeddings(path), dict(zip(TEXT_ENCODERS, self.model.towers, strict=False))
        if set(found) != set(towers):
            raise ValueError(f"{path}: an embedding for {' and '.join(found)}; this model has {' and '.join(towers)}")
        for folder, tower in towers.items():
            (n, width), wanted = found[folder].shape, tower.model.config.hidden_size
            if width != wanted:
                raise ValueError(f"{path}: vectors of width {width} for {folder}, expected {wanted}")
            if n > (room := tokenizer.model_max_length - 2):
                raise ValueError(f"{path}: {n} vectors, at most {room} are read at a time")
        self.embeddings[word] = tuple(found[folder] for folder in towers)
        self._extend()

    def remove_embedding(self, word: str) -> None:
        """Undo `add_embedding`: with the last word gone the text encoders are as they were, bit for bit."""
        if word not in self.embeddings:
            raise ValueError(f"embedding {word!r}: not added; there are {', '.join(self.embeddings) or 'none'}")
        del self.embeddings[word]
        self._extend()

    def _extend(self) -> None:
        start = self.model.towers[0].model.config.vocab_size
        self._words.clear()
        for word, (vectors, *_) in self.embeddings.items():
            self._words[word] = range(start, start := start + len(vectors))
        for k, tower in enumerate(self.model.towers):
            tower.extend([vectors[k] for vectors in self.embeddings.values()])
        self.clear()


class Kept:
    """A function's latest answers by what it was asked, `limit` bytes of them at most, or one; threads may share it."""

    def __init__(self, ask: Callable[[Chunk, int], Encoded], limit: int = BYTES_KEPT) -> None:
        self.ask, self.limit, self.lock = ask, limit, Lock()
        self.answers: OrderedDict[tuple[Chunk, int], tuple[Encoded, int]] = OrderedDict()
        self.size = 0

    def __call__(self, chunk: Chunk, skip: int) -> Encoded:
        key = chunk, skip
        with self.lock:
            if key in self.answers:
                self.answers.move_to_end(key)
                return self.answers[key][0]
        answer = self.ask(chunk, skip)
        with self.lock:
            if key not in self.answers:
                self.answers[key] = answer, (size := occupied(answer))
                self.size += size
            while self.size > self.limit and len(self.answers) > 1:
                self.size -= self.answers.popitem(last=False)[1][1]
        return answer

    def clear(self) -> None:
        """Forget them all."""
        with self.lock:
            self.answers.clear()
            self.size = 0


def occupied(answer: Encoded) -> int:
    """The bytes of a chunk's tensors."""
    sizes: list[int] = []
    answer[0].map(lambda a: sizes.append(a.nbytes))
    return sum(sizes)


def read(model: Checkpoint, words: dict[str, range], prompt: str | None) -> tuple[Chunk, ...]:
    """The chunks of a prompt, or of none."""
    if prompt is None and model.zero_negative:
        return (ZEROS,)
    return chunks(model.towers[0].tokenizer, prompt or "", words)


def encoded(model: Checkpoint, chunk: Chunk, skip: int) -> Encoded:
    """A chunk of a prompt [1, T, C] with every cross-attention's keys and values, and its pooled vector [1, P]."""
    with torch.inference_mode(False), torch.no_grad():  # kept for later calls, which may want gradients in x
        states, pooled = zip(*(tower.encode(chunk, skip) for tower in model.towers), strict=True)
        context = torch.cat(states, dim=-1)
        vectors = [vector for vector in pooled if vector is not None]
        whole = torch.cat(vectors, dim=-1) if vectors else None
        if chunk == ZEROS:
            context, whole = torch.zeros_like(context), None if whole is None else torch.zeros_like(whole)
        return model.unet.project(Conditioning(context)), whole
