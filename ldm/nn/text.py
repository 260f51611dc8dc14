"""Text: CLIP's tokenizer and its two towers, from transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

import ldm.nn._torchvision  # noqa: F401  must come before transformers
from ldm.nn.prompts import Token, cut, parse

from tokenizers.pre_tokenizers import ByteLevel  # isort: skip
from tokenizers.trainers import BpeTrainer  # isort: skip
from transformers import (  # isort: skip
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_CHUNKS = 64  # of one prompt
NO_MEAN = 1e-2  # of the mean absolute value: less is rounding


class Chunk(NamedTuple):
    """What the text tower reads at a time: BOS, tokens, EOS and padding, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Tower:
    """A text encoder as a U-Net reads it.

    The U-Net attends to the output of layer `layer`, counted from the end, after the final norm where `final_norm`;
    `projected`, it also takes the pooled vector, and `model` is a CLIPTextModelWithProjection.
    """

    model: PreTrainedModel
    tokenizer: CLIPTokenizer
    layer: int = -1
    final_norm: bool = True
    projected: bool = False


def tokens(tokenizer: CLIPTokenizer, prompts: Sequence[str], padding: str = "max_length") -> Tensor:
    """Token ids [B, T], cut to the tokenizer's own length and padded to it (or to the "longest" of these)."""
    return tokenizer(
        list(prompts),
        padding=padding,
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids


def embed(text: CLIPTextModel, ids: Tensor) -> Tensor:
    """The last layer's states after the final norm, [B, T, C]: what Stable Diffusion 1.x attends to."""
    return text(ids.to(text.device)).last_hidden_state


def chunks(tokenizer: CLIPTokenizer, prompt: str) -> tuple[Chunk, ...]:
    """A prompt of any length, with weights as `parse` reads them, in chunks of the tokenizer's own length.

    A section begins a chunk, and a long one is divided by `cut`. ValueError for a character that the vocabulary cannot
    spell and for more than 64 chunks.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("prompt: not valid UTF-8") from None
    sections = [
        [Token(k, weight) for text, weight in section for k in _spelled(tokenizer, text)] for section in parse(prompt)
    ]
    if len(sections) > 1 and not sections[-1]:
        sections.pop()  # nothing follows the last BREAK
    size, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(",</w>")
    pieces = [piece for section in sections for piece in cut(section, size, comma)]
    if len(pieces) > MAX_CHUNKS:
        raise ValueError(f"prompt {prompt[:40]!r}...: {len(pieces)} chunks of {size} tokens, at most {MAX_CHUNKS}")
    return tuple(_framed(tokenizer, piece) for piece in pieces)


def _spelled(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """The ids of a text without BOS and EOS."""
    read = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
    for k, (start, end) in zip(read.input_ids, read.offset_mapping, strict=True):
        if k == tokenizer.unk_token_id and text[start:end] != tokenizer.unk_token:
            raise ValueError(f"prompt: {text[start:end]!r} cannot be spelled in the model's vocabulary")
    return read.input_ids


def _framed(tokenizer: CLIPTokenizer, piece: Sequence[Token]) -> Chunk:
    room = tokenizer.model_max_length - 2 - len(piece)
    ids = [tokenizer.bos_token_id, *(token.id for token in piece), tokenizer.eos_token_id]
    weights = [1.0, *(token.weight for token in piece), 1.0]
    return Chunk((*ids, *room * [tokenizer.pad_token_id]), (*weights, *room * [1.0]))


def embed_chunk(text: CLIPTextModel, chunk: Chunk) -> Tensor:
    """The states of a chunk's tokens [1, T, C], weighted."""
    return weighted(embed(text, torch.tensor([chunk.ids])), torch.tensor([chunk.weights]))


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """States z [B, T, C] times the weights w [B, T] of their tokens, each row's mean restored: w z mean(z) / mean(w z).

    The "original" emphasis of AUTOMATIC1111's web UI, which takes the means over a whole batch; here they are each
    row's own. Where a row has no mean to restore (a final norm without bias leaves none), it is w z. Weights of 1 give
    z back, bit for bit. `weights` lie on the host.
    """
    if (weights == 1).all():
        return states
    z = states.float()
    scaled = z * weights.to(z)[..., None]
    mean, after, size = (a.mean((-2, -1), keepdim=True) for a in (z, scaled, scaled.abs()))
    return (scaled * torch.where(after.abs() > NO_MEAN * size, mean / after, 1.0)).to(states)


def text_model(config: Mapping[str, Any]) -> CLIPTextModel:
    """A text tower with random weights, from the fields of a `text_encoder/config.json`."""
    return CLIPTextModel(CLIPTextConfig(**config))


def clip_towers(
    text: Mapping[str, Any], vision: Mapping[str, Any], projection_dim: int, tokenizer: CLIPTokenizer
) -> CLIPModel:
    """Both towers of CLIP (Radford et al. 2021), random, the text tower for this tokenizer's vocabulary."""
    vocabulary = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": projection_dim,
    }
    config = CLIPConfig(
        text_config={**text, **vocabulary},
        vision_config={**vision, "projection_dim": projection_dim},
        projection_dim=projection_dim,
    )
    # eager attention: on a CPU the flash kernel's backward pass takes half of a step at these lengths
    return CLIPModel._from_config(config, attn_implementation="eager")


def unit_vectors(clip: CLIPModel, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, H, W] in [-1, 1] and token ids [B, T] as vectors of length one, [B, D] each."""
    pictures = clip.visual_projection(clip.vision_model(images).pooler_output)
    captions = clip.text_projection(clip.text_model(ids).pooler_output)
    return normalize(pictures, dim=-1), normalize(captions, dim=-1)


def towers(clip: CLIPModel) -> dict[str, PreTrainedModel]:
    """The trained towers as transformers' own classes, by the name of the folder that holds each."""
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict(clip.text_model.state_dict())
    image = CLIPVisionModelWithProjection(clip.config.vision_config)
    image.vision_model.load_state_dict(clip.vision_model.state_dict())
    image.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    return {"text_encoder": text, "image_encoder": image}


def learn_vocabulary(captions: Iterable[str], size: int, context_length: int) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's own form (Radford et al. 2021, section 2.4), learnt from captions.

    `size` tokens at most: 256 bytes, the same ending a word, the merges, and two specials, which come last.
    """
    alphabet = sorted(ByteLevel.alphabet())
    single = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    learner = CLIPTokenizer().backend_tokenizer
    learner.train_from_iterator(
        captions,
        BpeTrainer(
            vocab_size=size - len(alphabet) - 2,  # the trainer counts plain bytes, and not those that end a word
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    merged = [a + b for a, b in model["merges"]]
    vocab = {word: k for k, word in enumerate([*single, *merged, BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=[(a, b) for a, b in model["merges"]], model_max_length=context_length)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
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
        "pad_token": EOS,
        "unk_token": EOS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer from its folder, never from a hub."""
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
