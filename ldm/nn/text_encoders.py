"""CLIP's text encoders as Stable Diffusion uses them: which of their outputs, prompts in chunks, weights of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import warn_of_input
from ldm.nn.clip import CLIPTextConfig, CLIPTextModel
from ldm.nn.prompts import (
    PlaceholderTokens,
    WeightedToken,
    parse_prompt_attention,
    split_into_chunks,
    split_on_tokens,
)
from ldm.nn.tokenizer import CLIPTokenizer

MAX_PROMPT_CHUNKS = 256
MIN_RELATIVE_MEAN = 1e-2  # of the mean absolute value; a smaller mean is rounding error
NO_PLACEHOLDERS: PlaceholderTokens = MappingProxyType({})

# Hidden states [B, T, C] (diffusers' prompt_embeds) and, with a projection, the pooled vector [B, P].
TextEmbedding = tuple[Tensor, Tensor | None]


class PromptChunk(NamedTuple):
    """One input of a text encoder: BOS, tokens and EOS, and their weights."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder, and which of its outputs the U-Net takes.

    The U-Net attends to the hidden state of layer `layer_idx`, counted from the end, after the final norm if
    `final_norm`. `with_projection`, it also takes the pooled vector, which `model` projects.
    `num_dropped_layers` counts the last layers of the original model that the file leaves out as unused (1 in SD 2).
    """

    model: CLIPTextModel
    tokenizer: CLIPTokenizer
    layer_idx: int = -1
    final_norm: bool = True
    with_projection: bool = False
    num_dropped_layers: int = 0

    def encode_ids(self, ids: Tensor, clip_skip: int = 0) -> TextEmbedding:
        """States [B, T, C] and pooled vectors [B, P] of token ids [B, T].

        `clip_skip` counts as in diffusers: the states are those of layer `layer_idx - clip_skip`, counted from the end.
        The pooled vector is the projected state of the first EOS after the last layer and the final norm, whatever the
        clip skip. ValueError for a layer that does not exist.
        """
        self.check_clip_skip(clip_skip)
        ids = ids.to(self.model.device)
        output = self.model(ids)
        z = output.hidden_states[self.layer_idx - clip_skip]  # of which the last is before the final norm
        z = self.model.text_model.final_layer_norm(z) if self.final_norm else z
        if not self.with_projection:
            return z, None
        # by its id: EOS is not the greatest one where embeddings were added, and old configurations say 2
        eos = (ids == self.tokenizer.eos_token_id).int().argmax(-1)
        return z, self.model.text_projection(output.last_hidden_state[torch.arange(len(ids), device=eos.device), eos])

    def encode(self, chunk: PromptChunk, clip_skip: int = 0) -> TextEmbedding:
        """The weighted states [1, T, C] of a chunk and its padding, and the pooled vector [1, P], unweighted.

        After a final norm weighting restores the mean; without one a few channels outweigh all others, and the states
        are only multiplied ("No norm" in the web UI, recommended there for SDXL).
        """
        ids, weights = self.pad_chunk(chunk)
        states, pooled = self.encode_ids(ids, clip_skip)
        return (apply_emphasis if self.final_norm else apply_emphasis_no_norm)(states, weights), pooled

    def pad_chunk(self, chunk: PromptChunk) -> tuple[Tensor, Tensor]:
        """The ids and weights [1, T] of a chunk, padded with this encoder's own token."""
        padding = self.tokenizer.model_max_length - len(chunk.ids)
        ids = torch.tensor([[*chunk.ids, *padding * [self.tokenizer.pad_token_id]]])
        return ids, torch.tensor([[*chunk.weights, *padding * [1.0]]])

    def set_placeholder_embeddings(self, vectors: Sequence[Tensor]) -> None:
        """Make these [n, C] the rows that follow the model's own vocabulary; an empty list restores the model."""
        table = self.model.text_model.embeddings.token_embedding
        own = table.weight[: self.model.config.vocab_size]
        rows = torch.cat([own, *(a.to(own) for a in vectors)]).detach()
        table.weight = nn.Parameter(rows, own.requires_grad)
        table.num_embeddings = len(rows)

    def clip_skip_converter(self) -> Callable[[int], int]:
        """`convert_clip_skip` for this encoder, without its weights, so that it can be pickled."""
        options = {"num_dropped_layers": self.num_dropped_layers, "layer_idx": self.layer_idx}
        return partial(convert_clip_skip, num_layers=self.model.config.num_hidden_layers, **options)

    def check_clip_skip(self, clip_skip: int) -> None:
        """ValueError if a clip skip, in diffusers' numbering, leads to a layer that does not exist."""
        layers = self.model.config.num_hidden_layers
        if not 1 <= clip_skip - self.layer_idx <= layers:
            raise ValueError(
                f"clip skip {clip_skip}: must be from {1 + self.layer_idx} to {layers + self.layer_idx} for this model"
            )


def convert_clip_skip(clip_skip: int, num_layers: int, num_dropped_layers: int, layer_idx: int) -> int:
    """Convert the clip skip of the web UI and kohya to diffusers' (0 is the model's own layer, 1 the one before it).

    The former counts from the last layer: 1 is the last, 2 the one before it, which SD 2 and SDXL use by default.
    ValueError for a layer that does not exist; the last of SD 2 is not in its files.
    """
    if not 1 <= clip_skip - num_dropped_layers <= num_layers:
        layer_range = f"{1 + num_dropped_layers} to {num_layers + num_dropped_layers}, counted from the end"
        raise ValueError(f"clip skip {clip_skip}: this model has the layers {layer_range}")
    return clip_skip - num_dropped_layers + layer_idx


def join_text_embeddings(embeddings: Iterable[TextEmbedding]) -> TextEmbedding:
    """The outputs of several text encoders side by side: [B, T, C1 + C2 + ...], and the pooled vectors that exist."""
    states, pooled = zip(*embeddings, strict=True)
    vectors = [vector for vector in pooled if vector is not None]
    return torch.cat(states, dim=-1), torch.cat(vectors, dim=-1) if vectors else None


def tokenize_captions(tokenizer: CLIPTokenizer, captions: Sequence[str], longest: bool = False) -> Tensor:
    """Token ids [B, T], truncated to the tokenizer's maximum length and padded to it, or to the longest of these."""
    return tokenizer.pad(tokenizer.encode_batch(captions), longest)


def warn_about_truncation(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> None:
    """Warn of the number of captions that `tokenize_captions` would truncate, and quote the first of them."""
    length = tokenizer.model_max_length
    encoded = zip(captions, tokenizer.encode_batch(captions), strict=True)
    long = [caption for caption, ids in encoded if len(ids) > length]
    if long:
        first = f"the first is {long[0][:80]!r}"
        warn_of_input(f"{len(long)} of {len(captions)} captions are cut to {length} tokens; {first}")


def tokenize_prompt(
    tokenizer: CLIPTokenizer, prompt: str, placeholder_tokens: PlaceholderTokens = NO_PLACEHOLDERS
) -> tuple[PromptChunk, ...]:
    """Tokenize a prompt of any length, weighted by `parse_prompt_attention`, into chunks of the tokenizer's length.

    A section begins a chunk, and a long one is divided by `split_into_chunks`. `placeholder_tokens` maps added tokens
    to the ids that each stands for. ValueError for a character outside the vocabulary and for more than
    `MAX_PROMPT_CHUNKS` chunks.
    """
    sections = [
        [token for s in spans for token in tokenize_with_placeholders(tokenizer, s.text, placeholder_tokens, s.weight)]
        for spans in parse_prompt_attention(prompt)
    ]
    if len(sections) > 1 and not sections[-1]:
        sections.pop()  # nothing follows the last BREAK
    size, comma = tokenizer.model_max_length - 2, tokenizer.token_to_id(",</w>")
    chunks = [chunk for section in sections for chunk in split_into_chunks(section, size, comma)]
    if (count := len(chunks)) > MAX_PROMPT_CHUNKS:
        raise ValueError(f"prompt {prompt[:40]!r}...: {count} chunks of {size} tokens, at most {MAX_PROMPT_CHUNKS}")
    return tuple(add_special_tokens(tokenizer, chunk) for chunk in chunks)


def tokenize_with_placeholders(
    tokenizer: CLIPTokenizer, text: str, placeholder_tokens: PlaceholderTokens, weight: float = 1.0
) -> list[WeightedToken]:
    """The tokens of a text without BOS and EOS, each placeholder token replaced by its ids."""
    tokens: list[WeightedToken] = []
    for part in split_on_tokens(text, placeholder_tokens):
        ids, added = (tokenizer.encode(part), False) if isinstance(part, str) else (part, True)
        tokens += (WeightedToken(k, weight, continues_placeholder=added and n > 0) for n, k in enumerate(ids))
    return tokens


def add_special_tokens(tokenizer: CLIPTokenizer, tokens: Sequence[WeightedToken]) -> PromptChunk:
    """A chunk of tokens between BOS and EOS."""
    ids = tokenizer.bos_token_id, *(token.id for token in tokens), tokenizer.eos_token_id
    return PromptChunk(ids, (1.0, *(token.weight for token in tokens), 1.0))


def apply_emphasis_no_norm(states: Tensor, weights: Tensor) -> Tensor:
    """States [B, T, C] times the weights [B, T] of their tokens, on the host; the states themselves if all are 1."""
    if (weights == 1).all():
        return states
    return (states.float() * weights.to(states.device, torch.float32)[..., None]).to(states)


def apply_emphasis(states: Tensor, weights: Tensor) -> Tensor:
    """States z [B, T, C] times the weights w [B, T] of their tokens, each row's mean restored: w z mean(z) / mean(w z).

    The "original" emphasis of AUTOMATIC1111's web UI, with the means of each row instead of the whole batch. A row
    whose mean is zero (after a final norm without bias) is w z. Weights of 1 give z back, bit for bit. `weights` are
    on the host.
    """
    if (weights == 1).all():
        return states
    z = states.float()
    wz = apply_emphasis_no_norm(z, weights)
    mean, weighted_mean, scale = (a.mean((-2, -1), keepdim=True) for a in (z, wz, wz.abs()))
    ratio = torch.where(weighted_mean.abs() > MIN_RELATIVE_MEAN * scale, mean / weighted_mean, 1.0)
    return (wz * ratio).to(states)


def build_text_encoder(config: Mapping[str, Any], with_projection: bool = False) -> CLIPTextModel:
    """A text encoder with torch's default initial weights, from the fields of a `text_encoder/config.json`."""
    return CLIPTextModel(CLIPTextConfig.from_dict(config), with_projection)
