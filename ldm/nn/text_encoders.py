"""CLIP's tokenizers and text encoders, from transformers, as Stable Diffusion uses them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from ldm.errors import warn_of_input
from ldm.nn.prompts import (
    PlaceholderTokens,
    WeightedToken,
    parse_prompt_attention,
    split_into_chunks,
    split_on_tokens,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# CLIP's merges: the first 48,894 of bpe_simple_vocab_16e6.txt
MERGES_FILE = Path(__file__).with_name("clip_merges.txt.gz")
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
    `final_norm`. `with_projection`, it also takes the pooled vector, and `model` is a CLIPTextModelWithProjection.
    `num_dropped_layers` counts the last layers of the original model that the file leaves out as unused (1 in SD 2).
    """

    model: PreTrainedModel
    tokenizer: CLIPTokenizer
    layer_idx: int = -1
    final_norm: bool = True
    with_projection: bool = False
    num_dropped_layers: int = 0

    @property
    def text_model(self) -> Any:
        """The CLIPTextModel itself."""
        return self.model.text_model if self.with_projection else self.model

    def encode_ids(self, ids: Tensor, clip_skip: int = 0) -> TextEmbedding:
        """States [B, T, C] and pooled vectors [B, P] of token ids [B, T].

        `clip_skip` counts as in diffusers: the states are those of layer `layer_idx - clip_skip`, counted from the end.
        The pooled vector is the projected state of the first EOS after the last layer and the final norm, whatever the
        clip skip. ValueError for a layer that does not exist.
        """
        self.check_clip_skip(clip_skip)
        ids = ids.to(self.model.device)
        output = self.text_model(ids, output_hidden_states=True)
        z = output.hidden_states[self.layer_idx - clip_skip]  # of which the last is before the final norm
        z = self.text_model.final_layer_norm(z) if self.final_norm else z
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
        table = self.text_model.embeddings.token_embedding
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


def tokenize_captions(tokenizer: CLIPTokenizer, captions: Sequence[str], padding: str = "max_length") -> Tensor:
    """Token ids [B, T], truncated to the tokenizer's maximum length and padded to it (or to the "longest" of these)."""
    length = tokenizer.model_max_length
    return tokenizer(list(captions), padding=padding, truncation=True, max_length=length, return_tensors="pt").input_ids


def warn_about_truncation(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> None:
    """Warn of the number of captions that `tokenize_captions` would truncate, and quote the first of them."""
    length = tokenizer.model_max_length
    long = [p for p in captions if len(tokenizer(p, truncation=False, verbose=False).input_ids) > length]
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
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("prompt: not valid UTF-8") from None
    sections = [
        [token for s in spans for token in tokenize_with_placeholders(tokenizer, s.text, placeholder_tokens, s.weight)]
        for spans in parse_prompt_attention(prompt)
    ]
    if len(sections) > 1 and not sections[-1]:
        sections.pop()  # nothing follows the last BREAK
    size, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(",</w>")
    chunks = [chunk for section in sections for chunk in split_into_chunks(section, size, comma)]
    if (count := len(chunks)) > MAX_PROMPT_CHUNKS:
        raise ValueError(f"prompt {prompt[:40]!r}...: {count} chunks of {size} tokens, at most {MAX_PROMPT_CHUNKS}")
    return tuple(add_special_tokens(tokenizer, chunk) for chunk in chunks)


def tokenize_with_placeholders(
    tokenizer: CLIPTokenizer, text: str, placeholder_tokens: PlaceholderTokens, weight: float = 1.0
) -> list[WeightedToken]:
    """The tokens of a text without BOS and EOS, each placeholder token replaced by its ids; errors as `tokenize`."""
    tokens: list[WeightedToken] = []
    for part in split_on_tokens(text, placeholder_tokens):
        ids, added = (tokenize(tokenizer, part), False) if isinstance(part, str) else (part, True)
        tokens += (WeightedToken(k, weight, continues_placeholder=added and n > 0) for n, k in enumerate(ids))
    return tokens


def tokenize(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """The ids of a text without BOS and EOS; ValueError for a character outside the vocabulary."""
    output = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
    for k, (start, end) in zip(output.input_ids, output.offset_mapping, strict=True):
        if k == tokenizer.unk_token_id and text[start:end] != tokenizer.unk_token:
            raise ValueError(f"prompt: {text[start:end]!r} cannot be spelled in the model's vocabulary")
    return output.input_ids


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


def build_text_encoder(
    config: Mapping[str, Any], with_projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder with random weights, from the fields of a `text_encoder/config.json`."""
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(CLIPTextConfig(**config))


def build_clip_tokenizer(pad_token_id: int) -> CLIPTokenizer:
    """The tokenizer of all text encoders of Stable Diffusion: 49,408 tokens, padding to 77 with the token of that id.

    The vocabulary is CLIP's own (Radford et al. 2021); texts are read as OpenAI's and open_clip's tokenizers read them,
    except that HTML entities and broken Unicode are not repaired. ValueError for an unknown token id.
    """
    with gzip.open(MERGES_FILE, "rt", encoding="utf-8") as file:
        merges = [(a, b) for a, b in map(str.split, file)]
    tokenizer = CLIPTokenizer(vocab=build_clip_vocab(merges), merges=merges, model_max_length=77)
    if not 0 <= pad_token_id < len(tokenizer):
        raise ValueError(f"padding with token {pad_token_id}: must be from 0 to {len(tokenizer) - 1}")
    return _set_pad_token(tokenizer, tokenizer.convert_ids_to_tokens(pad_token_id))


def build_clip_vocab(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """CLIP's token ids: the 256 bytes, the bytes that end a word, the merges, BOS and EOS."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges), BOS, EOS]
    return {token: k for k, token in enumerate(tokens)}


def _set_pad_token(tokenizer: CLIPTokenizer, token: str) -> CLIPTokenizer:
    tokenizer.pad_token = token  # passed to the constructor, transformers would cut each "!" out of texts
    return tokenizer


def save_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json and merges.txt, which every version of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.model_max_length,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": tokenizer.pad_token,
        "unk_token": EOS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer from a local folder; its padding token is tokenized like any other where it occurs in a text."""
    loaded = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if loaded.pad_token == loaded.eos_token:
        return loaded
    model = json.loads(loaded.backend_tokenizer.to_str())["model"]
    merges = [(a, b) for a, b in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=loaded.model_max_length)
    added = sorted(loaded.get_added_vocab().items(), key=lambda item: item[1])
    tokenizer.add_tokens([token for token, _ in added if token not in model["vocab"]])
    return _set_pad_token(tokenizer, loaded.pad_token)
