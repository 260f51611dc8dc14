"""Text: CLIP's tokenizers and text towers, from transformers, as the U-Nets of Stable Diffusion read them."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from ldm.nn.prompts import (
    PlaceholderTokens,
    PromptSpan,
    WeightedToken,
    parse_prompt_attention,
    split_into_chunks,
    split_on_tokens,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES_FILE = Path(__file__).with_name(
    "clip_merges.txt.gz"
)  # CLIP's own: the first 48,894 of bpe_simple_vocab_16e6.txt
MAX_PROMPT_CHUNKS = 64  # of one prompt
MIN_RELATIVE_MEAN = 1e-2  # of the mean absolute value: less is rounding


class PromptChunk(NamedTuple):
    """What a text tower reads at a time: BOS, tokens and EOS, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder as a U-Net reads it.

    The U-Net attends to the output of layer `read_clip_skip`, counted from the end, after the final norm where `final_norm`;
    `projected`, it also takes the pooled vector, and `model` is a CLIPTextModelWithProjection. `should_drop_caption` counts the
    last layers that the model was trained with and that were left out, as nothing reads them (one in SD 2).
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

    def encode_ids(self, ids: Tensor, clip_skip: int = 0) -> tuple[Tensor, Tensor | None]:
        """What the U-Net takes from token ids [B, T]: states [B, T, C], and, where `projected`, the pooled vectors.

        `skip` is diffusers' clip_skip: the states are those of layer `layer - skip`, counted from the end. The pooled
        vector [B, P] is the last layer's state of the first EOS after the final norm, projected; no layer is skipped
        for it. ValueError for a layer that is not there.
        """
        self.check_clip_skip(clip_skip)
        ids = ids.to(self.model.device)
        read = self.text_model(
            ids, output_hidden_states=True
        )  # the last hidden state of these is before the final norm
        z = read.hidden_states[self.layer_idx - clip_skip]
        z = self.text_model.final_layer_norm(z) if self.final_norm else z
        if not self.with_projection:
            return z, None
        # by its id: EOS is not the greatest one where embeddings were added, and old configurations say 2
        eos = (ids == self.tokenizer.eos_token_id).int().argmax(-1)
        return z, self.model.text_projection(read.last_hidden_state[torch.arange(len(ids), device=eos.device), eos])

    def encode(self, chunk: PromptChunk, clip_skip: int = 0) -> tuple[Tensor, Tensor | None]:
        """The states [1, T, C] of a chunk and its padding, weighted, and the pooled vector [1, P], as it is.

        Weights keep the mean after a final norm; without one a few channels outweigh all others, and the states are
        only multiplied ("No norm" in the web UI, its advice for SDXL).
        """
        ids, weights = self.pad_chunk(chunk)
        states, pooled = self.encode_ids(ids, clip_skip)
        return (apply_emphasis if self.final_norm else apply_emphasis_no_norm)(states, weights), pooled

    def pad_chunk(self, chunk: PromptChunk) -> tuple[Tensor, Tensor]:
        """The ids and weights [1, T] of a chunk, with this tower's padding."""
        room = self.tokenizer.model_max_length - len(chunk.ids)
        ids = torch.tensor([[*chunk.ids, *room * [self.tokenizer.pad_token_id]]])
        return ids, torch.tensor([[*chunk.weights, *room * [1.0]]])

    def set_placeholder_embeddings(self, vectors: Sequence[Tensor]) -> None:
        """Let these [n, C] be all that follows the model's own token vectors; none of them is the model as it was."""
        table = self.text_model.embeddings.token_embedding
        own = table.weight[: self.model.config.vocab_size]
        rows = torch.cat([own, *(a.to(own) for a in vectors)]).detach()
        table.weight = nn.Parameter(rows, own.requires_grad)
        table.num_embeddings = len(rows)

    def check_clip_skip(self, clip_skip: int) -> None:
        """ValueError for a clip skip, in diffusers' numbering, to a layer that is not there."""
        layers = self.model.config.num_hidden_layers
        if not 1 <= clip_skip - self.layer_idx <= layers:
            raise ValueError(
                f"clip skip {clip_skip}: must be from {1 + self.layer_idx} to {layers + self.layer_idx} for this model"
            )


def convert_clip_skip(clip_skip: int, text_encoder: TextEncoder) -> int:
    """diffusers' clip_skip (0 is the model's own layer, 1 the one before it) from the web UI's and kohya's.

    Those count from the last layer: 1 is the last, 2 the one before it, which is what SD 2 and SDXL read by themselves.
    ValueError for a layer that is not there; the last of SD 2 is not.
    """
    first, last = (
        1 + text_encoder.num_dropped_layers,
        text_encoder.model.config.num_hidden_layers + text_encoder.num_dropped_layers,
    )
    if not first <= clip_skip <= last:
        raise ValueError(f"clip skip {clip_skip}: this model has the layers {first} to {last}, counted from the end")
    return clip_skip - text_encoder.num_dropped_layers + text_encoder.layer_idx


def tokenize_captions(tokenizer: CLIPTokenizer, captions: Sequence[str], padding: str = "max_length") -> Tensor:
    """Token ids [B, T], cut to the tokenizer's own length and padded to it (or to the "longest" of these)."""
    return tokenizer(
        list(captions),
        padding=padding,
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids


def warn_about_truncation(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> None:
    """A warning that tells how many of the prompts `tokenize_captions` would cut, and the first of them."""
    room = tokenizer.model_max_length
    long = [p for p in captions if len(tokenizer(p, truncation=False, verbose=False).input_ids) > room]
    if long:
        first = f"the first is {long[0][:80]!r}"
        warnings.warn(f"{len(long)} of {len(captions)} captions are cut to {room} tokens; {first}", stacklevel=2)


def tokenize_prompt(
    tokenizer: CLIPTokenizer, prompt: str, placeholder_tokens: PlaceholderTokens = MappingProxyType({})
) -> tuple[PromptChunk, ...]:
    """A prompt of any length, with weights as `parse` reads them, in chunks of the tokenizer's own length.

    A section begins a chunk, and a long one is divided by `cut`. `words` are added to the vocabulary, with the ids that
    each stands for. ValueError for a character that the vocabulary cannot spell and for more than 64 chunks.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("prompt: not valid UTF-8") from None
    sections = [
        [token for part in section for token in _tokenize_span(tokenizer, part, placeholder_tokens)]
        for section in parse_prompt_attention(prompt)
    ]
    if len(sections) > 1 and not sections[-1]:
        sections.pop()  # nothing follows the last BREAK
    size, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(",</w>")
    pieces = [piece for section in sections for piece in split_into_chunks(section, size, comma)]
    if len(pieces) > MAX_PROMPT_CHUNKS:
        raise ValueError(
            f"prompt {prompt[:40]!r}...: {len(pieces)} chunks of {size} tokens, at most {MAX_PROMPT_CHUNKS}"
        )
    return tuple(_add_special_tokens(tokenizer, piece) for piece in pieces)


def _tokenize_span(
    tokenizer: CLIPTokenizer, span: PromptSpan, placeholder_tokens: PlaceholderTokens
) -> Iterator[WeightedToken]:
    for stretch in split_on_tokens(span.text, placeholder_tokens):
        if isinstance(stretch, str):
            yield from (WeightedToken(k, span.weight) for k in tokenize(tokenizer, stretch))
        else:
            yield from (WeightedToken(k, span.weight, continues_placeholder=n > 0) for n, k in enumerate(stretch))


def tokenize(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """The ids of a text without BOS and EOS; ValueError for a character that the vocabulary lacks."""
    read = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
    for k, (start, end) in zip(read.input_ids, read.offset_mapping, strict=True):
        if k == tokenizer.unk_token_id and text[start:end] != tokenizer.unk_token:
            raise ValueError(f"prompt: {text[start:end]!r} cannot be spelled in the model's vocabulary")
    return read.input_ids


def _add_special_tokens(tokenizer: CLIPTokenizer, piece: Sequence[WeightedToken]) -> PromptChunk:
    ids = tokenizer.bos_token_id, *(token.id for token in piece), tokenizer.eos_token_id
    return PromptChunk(ids, (1.0, *(token.weight for token in piece), 1.0))


def apply_emphasis_no_norm(states: Tensor, weights: Tensor) -> Tensor:
    """States [B, T, C] times the weights [B, T] of their tokens, which lie on the host; weights of 1 are no change."""
    if (weights == 1).all():
        return states
    return (states.float() * weights.to(states.device, torch.float32)[..., None]).to(states)


def apply_emphasis(states: Tensor, weights: Tensor) -> Tensor:
    """States z [B, T, C] times the weights w [B, T] of their tokens, each row's mean restored: w z mean(z) / mean(w z).

    The "original" emphasis of AUTOMATIC1111's web UI, which takes the means over a whole batch; here they are each
    row's own. Where a row has no mean to restore (a final norm without bias leaves none), it is w z. Weights of 1 give
    z back, bit for bit. `weights` lie on the host.
    """
    if (weights == 1).all():
        return states
    z = states.float()
    wz = apply_emphasis_no_norm(z, weights)
    mean, after, size = (a.mean((-2, -1), keepdim=True) for a in (z, wz, wz.abs()))
    return (wz * torch.where(after.abs() > MIN_RELATIVE_MEAN * size, mean / after, 1.0)).to(states)


def build_text_encoder(
    config: Mapping[str, Any], with_projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text tower with random weights, from the fields of a `text_encoder/config.json`."""
    kind = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    return kind(CLIPTextConfig(**config))


def build_clip_tokenizer(pad_token_id: int) -> CLIPTokenizer:
    """The tokenizer of all of Stable Diffusion's towers, 49,408 tokens, padding to 77 with the token of that id.

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
    """CLIP's ids: 256 bytes, the same ending a word, the merges, BOS and EOS."""
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges), BOS, EOS]
    return {word: k for k, word in enumerate(words)}


def _set_pad_token(tokenizer: CLIPTokenizer, token: str) -> CLIPTokenizer:
    """The tokenizer with that token as its padding."""
    tokenizer.pad_token = token  # not on making it: transformers would cut each "!" out of texts, which ends a word
    return tokenizer


def save_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """CLIP's classic files, vocab.json and merges.txt, which every version of transformers reads."""
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
    """A tokenizer from its folder, never from a hub; what pads is a token like any other where a text has it."""
    read = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if read.pad_token == read.eos_token:
        return read
    model = json.loads(read.backend_tokenizer.to_str())["model"]
    merges = [(a, b) for a, b in model["merges"]]
    plain = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=read.model_max_length)
    added = sorted(read.get_added_vocab().items(), key=lambda item: item[1])
    plain.add_tokens([token for token, _ in added if token not in model["vocab"]])
    return _set_pad_token(plain, read.pad_token)
