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

from ldm.adapters.textual_inversion import load_embeddings
from ldm.checkpoints.formats import Checkpoint
from ldm.checkpoints.networks import TEXT_ENCODERS
from ldm.conditioning import Conditioning
from ldm.nn.text_encoders import PromptChunk, tokenize, tokenize_prompt

PROMPT_CACHE_SIZE = 256  # as tokens
EMBEDDING_CACHE_BYTES = 2**29  # of keys and values: 20 chunks for SDXL's U-Net, 26 MB each, or 140 for SD 1's
EncodedChunk = tuple[Conditioning, Tensor | None]  # of a chunk: with keys and values, and its pooled vector
ZERO_CHUNK = PromptChunk((), ())  # stands for states and a pooled vector of zeros


class PromptEncoder:
    """The prompts of a model, of any length and with weights, as conditionings.

    A chunk is what `tokenize_prompt` says; the model's text encoders read the same tokens, each with its own padding. It is kept
    once it has been encoded: `clear` forgets them all, when a network moves or changes. Words that `add_embedding`
    gives must not change while another thread draws.
    """

    def __init__(self, model: Checkpoint) -> None:
        tokenizers = [tower.tokenizer for tower in model.text_encoders]
        if any(other.get_vocab() != tokenizers[0].get_vocab() for other in tokenizers[1:]):
            raise ValueError(f"the vocabularies of {' and '.join(TEXT_ENCODERS)} differ")
        self.model = model
        self.embeddings: dict[str, tuple[Tensor, ...]] = {}  # word: [n, C] for each tower
        self._placeholder_tokens: dict[str, range] = {}
        self.tokenize_prompt = lru_cache(PROMPT_CACHE_SIZE)(
            partial(tokenize_prompt_or_zeros, model, self._placeholder_tokens)
        )
        self._encode_chunk = LRUCache(partial(encode_chunk, model))

    def __call__(
        self, prompt: str | None, num_chunks: int = 1, *, clip_skip: int = 0, time_ids: Tensor | None = None
    ) -> Conditioning:
        """A prompt [1, n T, C] in n chunks, with every cross-attention's keys and values.

        C is that of all text encoders together. Empty chunks fill it up to `check_expanded_length`. None is no prompt: zeros where the
        model is one of `zero_negative`, as in diffusers, and "" elsewhere. `skip` layers are left out of the text
        encoders, in diffusers' numbering. `get_add_time_ids` [1, 6] are SDXL's: original height and width, the crop's top and
        left, height and width to draw; with the first chunk's pooled vector they are `added`, where the text encoders
        give one. ValueError for a prompt that cannot be read, and for a layer that is not there.
        """
        own = self.tokenize_prompt(prompt)
        fill = self.tokenize_prompt(None if prompt is None else "") * (num_chunks - len(own))
        parts, pooled = zip(*(self._encode_chunk(chunk, clip_skip) for chunk in own + fill), strict=True)
        cond = Conditioning.cat_context(parts)
        if time_ids is None or pooled[0] is None:
            return cond
        return replace(cond, vector=self.model.unet.make_vector(pooled[0], time_ids.to(pooled[0].device)))

    def num_chunks(self, prompt: str | None, negative_prompt: str | None, guidance_scale: float | None) -> int:
        """Of the text in a row's calls, in chunks; the negative prompt counts where it guides."""
        return max(
            len(self.tokenize_prompt(text))
            for text in ((prompt,) if guidance_scale == 1 else (prompt, negative_prompt))
        )

    def clear(self) -> None:
        """Forget what was encoded."""
        self.tokenize_prompt.cache_clear()
        self._encode_chunk.clear()

    def add_embedding(self, token: str, path: Path) -> None:
        """Let a word of prompts stand for the vectors in a file (textual inversion, Gal et al. 2022, arXiv:2208.01618).

        In a prompt it may be of any case, is weighted like any word, and is kept in one chunk. ValueError where the
        model has the word already, and where the vectors are not of its text encoders' widths.
        """
        tokenizer = self.model.text_encoders[0].tokenizer
        if (
            token.lower() in map(str.lower, self.embeddings)
            or len(tokenize(tokenizer, token)) < 2
            or token != token.strip()
        ):
            raise ValueError(f"embedding {token!r}: must be a word that the model does not have yet")
        found, towers = load_embeddings(path), dict(zip(TEXT_ENCODERS, self.model.text_encoders, strict=False))
        if set(found) != set(towers):
            raise ValueError(f"{path}: an embedding for {' and '.join(found)}; this model has {' and '.join(towers)}")
        for folder, tower in towers.items():
            (n, width), wanted = found[folder].shape, tower.model.config.hidden_size
            if width != wanted:
                raise ValueError(f"{path}: vectors of width {width} for {folder}, expected {wanted}")
            if n > (room := tokenizer.model_max_length - 2):
                raise ValueError(f"{path}: {n} vectors, at most {room} are read at a time")
        self.embeddings[token] = tuple(found[folder] for folder in towers)
        self._update_placeholders()

    def remove_embedding(self, token: str) -> None:
        """Undo `add_embedding`: with the last word gone the text encoders are as they were, bit for bit."""
        if token not in self.embeddings:
            raise ValueError(f"embedding {token!r}: not added; there are {', '.join(self.embeddings) or 'none'}")
        del self.embeddings[token]
        self._update_placeholders()

    def _update_placeholders(self) -> None:
        start = self.model.text_encoders[0].model.config.vocab_size
        self._placeholder_tokens.clear()
        for word, (vectors, *_) in self.embeddings.items():
            self._placeholder_tokens[word] = range(start, start := start + len(vectors))
        for k, tower in enumerate(self.model.text_encoders):
            tower.set_placeholder_embeddings([vectors[k] for vectors in self.embeddings.values()])
        self.clear()


class LRUCache:
    """A function's latest answers by what it was asked, `limit` bytes of them at most, or one; threads may share it."""

    def __init__(
        self, function: Callable[[PromptChunk, int], EncodedChunk], max_bytes: int = EMBEDDING_CACHE_BYTES
    ) -> None:
        self.function, self.max_bytes, self.lock = function, max_bytes, Lock()
        self.entries: OrderedDict[tuple[PromptChunk, int], tuple[EncodedChunk, int]] = OrderedDict()
        self.nbytes = 0

    def __call__(self, chunk: PromptChunk, skip: int) -> EncodedChunk:
        key = chunk, skip
        with self.lock:
            if key in self.entries:
                self.entries.move_to_end(key)
                return self.entries[key][0]
        answer = self.function(chunk, skip)
        with self.lock:
            if key not in self.entries:
                self.entries[key] = answer, (size := chunk_nbytes(answer))
                self.nbytes += size
            while self.nbytes > self.max_bytes and len(self.entries) > 1:
                self.nbytes -= self.entries.popitem(last=False)[1][1]
        return answer

    def clear(self) -> None:
        """Forget them all."""
        with self.lock:
            self.entries.clear()
            self.nbytes = 0


def chunk_nbytes(answer: EncodedChunk) -> int:
    """The bytes of a chunk's tensors."""
    sizes: list[int] = []
    answer[0].map(lambda a: sizes.append(a.nbytes))
    return sum(sizes)


def tokenize_prompt_or_zeros(
    model: Checkpoint, placeholder_tokens: dict[str, range], prompt: str | None
) -> tuple[PromptChunk, ...]:
    """The chunks of a prompt, or of none."""
    if prompt is None and model.force_zeros_for_empty_prompt:
        return (ZERO_CHUNK,)
    return tokenize_prompt(model.text_encoders[0].tokenizer, prompt or "", placeholder_tokens)


def encode_chunk(model: Checkpoint, chunk: PromptChunk, clip_skip: int) -> EncodedChunk:
    """A chunk of a prompt [1, T, C] with every cross-attention's keys and values, and its pooled vector [1, P]."""
    with torch.inference_mode(False), torch.no_grad():  # kept for later calls, which may want gradients in x
        states, pooled = zip(*(tower.encode(chunk, clip_skip) for tower in model.text_encoders), strict=True)
        context = torch.cat(states, dim=-1)
        vectors = [vector for vector in pooled if vector is not None]
        whole = torch.cat(vectors, dim=-1) if vectors else None
        if chunk == ZERO_CHUNK:
            context, whole = torch.zeros_like(context), None if whole is None else torch.zeros_like(whole)
        return model.unet.compute_kv_cache(Conditioning(context)), whole
