"""Prompts as the conditionings of a model's U-Net; each chunk of tokens is encoded and projected once."""

from __future__ import annotations

from collections.abc import Container, Sequence, Set
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.adapters.textual_inversion import count_ignored_embedding_keys, load_embeddings
from ldm.checkpoints.formats import Checkpoint
from ldm.checkpoints.networks import TEXT_ENCODERS
from ldm.conditioning import Conditioning
from ldm.errors import warn_of_input
from ldm.files import file_sha256
from ldm.nn.blocks import TransformerBlock
from ldm.nn.text_encoders import PromptChunk, join_text_embeddings, tokenize_prompt
from ldm.pipeline.request import Request, get_add_time_ids

PROMPT_CACHE_SIZE = 256  # tokenized prompts
EMBEDDING_CACHE_BYTES = 2**29  # of keys and values: 20 chunks for SDXL's U-Net, 26 MB each, or 140 for SD 1's
ZERO_CHUNK = PromptChunk((), ())  # stands for states and a pooled vector of zeros

EncodedChunk = tuple[Conditioning, Tensor | None]  # with keys and values; the pooled vector


class PlaceholderEmbedding(NamedTuple):
    """The vectors [n, C] of a placeholder token for each text encoder (None: it does not see it), and their file."""

    vectors: tuple[Tensor | None, ...]
    sha256: str
    path: Path


class PromptEncoder:
    """Encodes prompts of any length, with weights and placeholder tokens, for a model's U-Net.

    All text encoders read the chunks of `tokenize_prompt`, each with its own padding. Encoded chunks are cached:
    `clear` the cache when a network moves or changes. Threads may share an encoder, but no placeholder token may be
    added or removed while one of them generates.
    """

    def __init__(self, model: Checkpoint) -> None:
        tokenizers = [encoder.tokenizer for encoder in model.text_encoders]
        if any(other.vocab != tokenizers[0].vocab for other in tokenizers[1:]):
            raise ValueError(f"the vocabularies of {' and '.join(TEXT_ENCODERS)} differ")
        self.model = model
        self.embeddings: dict[str, PlaceholderEmbedding] = {}
        self._placeholder_tokens: dict[str, range] = {}
        self._absent_ids: tuple[set[int], ...] = tuple(set() for _ in model.text_encoders)  # that it does not see
        tokenize_cached = partial(tokenize_prompt_or_zeros, model, self._placeholder_tokens)
        self.tokenize_prompt = lru_cache(PROMPT_CACHE_SIZE)(tokenize_cached)
        max_chunks = max(1, EMBEDDING_CACHE_BYTES // encoded_chunk_nbytes(model))
        self._encode_chunk = lru_cache(max_chunks)(partial(encode_chunk, model, self._absent_ids))

    def __call__(
        self, prompt: str | None, num_chunks: int = 1, *, clip_skip: int = 0, time_ids: Tensor | None = None
    ) -> Conditioning:
        """Encode a prompt as [1, n T, C] in n chunks, with the keys and values of every cross-attention.

        C is the width of all text encoders together; empty chunks fill up to `num_chunks`. None is the unconditional
        input: zeros for a model with `force_zeros_for_empty_prompt`, as in diffusers, else the embedding of "".
        `clip_skip` counts as in diffusers. `time_ids` [1, 6] are SDXL's micro-conditioning: with the first chunk's
        pooled vector they give `Conditioning.vector`. ValueError for a prompt that cannot be tokenized and a missing
        layer.
        """
        cond, pooled = self.encode(prompt, num_chunks, clip_skip)
        if time_ids is None or pooled is None:
            return cond
        return replace(cond, vector=self.model.unet.make_vector(pooled, time_ids.to(pooled.device)))

    def encode(
        self, prompt: str | None, num_chunks: int, clip_skip: int = 0, prompt_2: str | None = None
    ) -> EncodedChunk:
        """A prompt's states in at least that many chunks, without a vector, and the first chunk's pooled vector.

        `prompt_2` is for the second text encoder, whose states are the last, and pooled.
        """
        if prompt_2 is not None:
            width = self.model.text_encoders[0].model.config.hidden_size
            num_chunks = max(num_chunks, *(len(self.tokenize_prompt(text or "")) for text in (prompt, prompt_2)))
            first, _ = self.encode(prompt or "", num_chunks, clip_skip)
            second, pooled = self.encode(prompt_2, num_chunks, clip_skip)
            states = torch.cat([first.context[..., :width], second.context[..., width:]], -1)
            return Conditioning(states), pooled
        chunks = self.tokenize_prompt(prompt)
        chunks += self.tokenize_prompt(None if prompt is None else "") * (num_chunks - len(chunks))
        parts, vectors = zip(*(self._encode_chunk(chunk, clip_skip) for chunk in chunks), strict=True)
        return Conditioning.cat_context(parts), vectors[0]

    def encode_request(self, request: Request, num_chunks: int) -> tuple[Conditioning, Conditioning]:
        """The conditional and the unconditional row of a request; the same one twice without `uses_cfg`."""
        cond = self._encode_prompt(request, "", num_chunks)
        if self.is_distilled:
            scale = torch.tensor([request.guidance_scale], dtype=torch.float32, device=cond.context.device)
            cond = replace(cond, guidance=scale)
        return cond, self._encode_prompt(request, "negative_", num_chunks) if self.uses_cfg(request) else cond

    @property
    def is_distilled(self) -> bool:
        """Whether the U-Net takes the guidance scale as an input, and was trained to need no second evaluation."""
        return self.model.unet.config.time_cond_proj_dim is not None

    def uses_cfg(self, request: Request) -> bool:
        """Whether a request is guided by a second row, which reads its negative prompt."""
        return request.guidance_scale != 1 and not self.is_distilled

    def _encode_prompt(self, request: Request, prefix: str, num_chunks: int) -> Conditioning:
        """A request's prompt, or its negative one: the embeddings that it gives, or else the encoded text."""
        prompt, skip, time_ids = getattr(request, f"{prefix}prompt"), request.clip_skip or 0, None
        if self.model.unet.add_embedding is not None:
            time_ids = get_add_time_ids(request, prefix)
        embeds = getattr(request, f"{prefix}prompt_embeds")
        if embeds is None:
            return self(prompt, num_chunks, clip_skip=skip, time_ids=time_ids)
        context = embeds[None].to(self.model.unet.device, self.model.unet.dtype)
        if missing := num_chunks - self._count_chunks(embeds):
            context = torch.cat([context, self("", missing, clip_skip=skip).context.to(context)], 1)
        cond = self.model.unet.compute_kv_cache(Conditioning(context))
        if time_ids is None:
            return cond
        pooled = getattr(request, f"{prefix}pooled_prompt_embeds")[None].to(context)
        return replace(cond, vector=self.model.unet.make_vector(pooled, time_ids.to(pooled.device)))

    def num_chunks(self, request: Request) -> int:
        """The length of a request's prompts in chunks; the negative prompt counts where it is read (`uses_cfg`)."""
        prompts = [(request.prompt, request.prompt_embeds), (request.negative_prompt, request.negative_prompt_embeds)]
        return max(
            len(self.tokenize_prompt(text)) if embeds is None else self._count_chunks(embeds)
            for text, embeds in prompts[: 2 if self.uses_cfg(request) else 1]
        )

    def _count_chunks(self, embeds: Tensor) -> int:
        return len(embeds) // self.model.text_encoders[0].tokenizer.model_max_length

    def check_embeddings(self, request: Request) -> None:
        """ValueError for embeddings of another width or length than the model's, and for pooled ones that lack."""
        length = self.model.text_encoders[0].tokenizer.model_max_length
        width = self.model.unet.config.cross_attention_dim
        for prefix in ("", "negative_"):
            embeds, pooled = (getattr(request, f"{prefix}{kind}prompt_embeds") for kind in ("", "pooled_"))
            if embeds is None:
                if pooled is not None:
                    raise ValueError(f"{prefix}pooled_prompt_embeds: needs {prefix}prompt_embeds beside it")
                continue
            shape = list(embeds.shape)
            if len(shape) != 2 or not shape[0] or shape[0] % length or shape[1] != width:
                raise ValueError(f"{prefix}prompt_embeds: shape {shape}, expected [n {length}, {width}]")
            if pooled is None and self.model.unet.add_embedding is not None:
                raise ValueError(f"{prefix}pooled_prompt_embeds: this model needs them beside {prefix}prompt_embeds")

    def clear(self) -> None:
        """Empty the caches."""
        self.tokenize_prompt.cache_clear()
        self._encode_chunk.cache_clear()

    def is_in_vocabulary(self, token: str) -> bool:
        """Whether a token is one of the model's own, and so cannot be a placeholder."""
        return len(self.model.text_encoders[0].tokenizer.encode(token)) < 2

    def add_embedding(self, token: str, path: Path, own_token: str | None = None) -> None:
        """Add a placeholder token with the vectors in a file (textual inversion, Gal et al. 2022, arXiv:2208.01618).

        In prompts it is matched in any case, weighted like any word, and never split between chunks. A text encoder
        that the file has no vectors for does not see it, as in ComfyUI. `own_token` is the file's name for it, needed
        where it holds several. ValueError if the vocabulary has it already, and if the vectors do not have the widths
        of the model's text encoders.
        """
        encoders = dict(zip(TEXT_ENCODERS, self.model.text_encoders, strict=False))
        tokenizer = self.model.text_encoders[0].tokenizer
        known = token.lower() in map(str.lower, self.embeddings) or self.is_in_vocabulary(token)
        if known or token != token.strip():
            hint = "" if not token.strip() else f": say TOKEN={path}"
            raise ValueError(f"embedding {token!r}: must be a word that the model does not have yet{hint}")
        vectors = load_embeddings(path, own_token)
        if not set(vectors) & set(encoders):
            raise ValueError(
                f"{path}: an embedding for {' and '.join(vectors)}; this model has {' and '.join(encoders)}"
            )
        for name in [name for name in encoders if name in vectors]:
            (n, width), expected = vectors[name].shape, encoders[name].model.config.hidden_size
            if width != expected:
                raise ValueError(f"{path}: vectors of width {width} for {name}, expected {expected}")
            if n > (limit := tokenizer.model_max_length - 2):
                raise ValueError(f"{path}: {n} vectors, at most {limit} fit in a chunk")
        self._warn_of_partial_use(path, vectors.keys(), encoders.keys())
        self.embeddings[token] = PlaceholderEmbedding(tuple(map(vectors.get, encoders)), file_sha256(path), path)
        self._update_placeholders()

    @staticmethod
    def _warn_of_partial_use(path: Path, given: Set[str], encoders: Set[str]) -> None:
        """A warning that names text encoders without vectors, vectors without a text encoder, and what is not read."""
        notes = [f"{name} does not see it (no vectors)" for name in sorted(encoders - given)]
        notes += [f"its vectors for {name} have no use in this model" for name in sorted(given - encoders)]
        if count := count_ignored_embedding_keys(path):
            notes.append(f"{count} of its tensors are not read")
        if notes:
            warn_of_input(f"embedding {path}: {'; '.join(notes)}")

    def remove_embedding(self, token: str) -> None:
        """Undo `add_embedding`: without placeholder tokens the text encoders are as loaded, bit for bit."""
        if token not in self.embeddings:
            raise ValueError(f"embedding {token!r}: not added; there are {', '.join(self.embeddings) or 'none'}")
        del self.embeddings[token]
        self._update_placeholders()

    def _update_placeholders(self) -> None:
        start = self.model.text_encoders[0].model.config.vocab_size
        self._placeholder_tokens.clear()
        for token, (vectors, *_) in self.embeddings.items():
            count = max(len(a) for a in vectors if a is not None)
            self._placeholder_tokens[token] = range(start, start := start + count)
        for k, encoder in enumerate(self.model.text_encoders):
            absent = self._absent_ids[k]
            absent.clear()
            rows = []
            for (vectors, *_), ids in zip(self.embeddings.values(), self._placeholder_tokens.values(), strict=True):
                if (own := vectors[k]) is None:
                    absent.update(ids)
                    own = torch.zeros(len(ids), encoder.model.config.hidden_size)
                rows.append(own)
            encoder.set_placeholder_embeddings(rows)
        self.clear()


def tokenize_prompt_or_zeros(
    model: Checkpoint, placeholder_tokens: dict[str, range], prompt: str | None
) -> tuple[PromptChunk, ...]:
    """The chunks of a prompt; of None, ZERO_CHUNK or those of "", as the model's unconditional input is."""
    if prompt is None and model.force_zeros_for_empty_prompt:
        return (ZERO_CHUNK,)
    return tokenize_prompt(model.text_encoders[0].tokenizer, prompt or "", placeholder_tokens)


def encode_chunk(
    model: Checkpoint, absent_ids: Sequence[Container[int]], chunk: PromptChunk, clip_skip: int
) -> EncodedChunk:
    """A chunk [1, T, C] with the keys and values of every cross-attention, and its pooled vector [1, P].

    Each text encoder reads it without its `absent_ids`.
    """
    seen = [drop_tokens(chunk, absent) for absent in absent_ids]
    with torch.inference_mode(False), torch.no_grad():  # cached for later calls, which may want gradients in x
        context, pooled = join_text_embeddings(
            encoder.encode(own, clip_skip) for encoder, own in zip(model.text_encoders, seen, strict=True)
        )
        if chunk == ZERO_CHUNK:
            context, pooled = torch.zeros_like(context), None if pooled is None else torch.zeros_like(pooled)
        return model.unet.compute_kv_cache(Conditioning(context)), pooled


def drop_tokens(chunk: PromptChunk, ids: Container[int]) -> PromptChunk:
    """A chunk without the tokens of these ids."""
    pairs = [(k, weight) for k, weight in zip(chunk.ids, chunk.weights, strict=True) if k not in ids]
    return PromptChunk(tuple(k for k, _ in pairs), tuple(weight for _, weight in pairs))


def encoded_chunk_nbytes(model: Checkpoint) -> int:
    """The bytes of an encoded chunk: its states, and the keys and values of every cross-attention."""
    kv_width = sum(2 * m.norm2.weight.numel() for m in model.unet.modules() if isinstance(m, TransformerBlock))
    width = model.unet.config.cross_attention_dim + kv_width
    return model.text_encoders[0].tokenizer.model_max_length * width * model.unet.dtype.itemsize
