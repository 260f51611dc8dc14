"""Learnable: of a pretrained model what learns, and nothing else; and what it reads of captions."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints.formats import Checkpoint
from ldm.conditioning import Conditioning
from ldm.data.latent_cache import LatentCache, blake2b_hexdigest
from ldm.nn.prompts import PlaceholderTokens
from ldm.nn.text_encoders import TextEncoder, add_special_tokens, join_text_embeddings, tokenize_with_placeholders

CAPTION_CACHE_SIZE = 4096  # of which the embeddings stay at hand

CaptionTokenIds = tuple[tuple[int, ...], ...]  # of one caption, for each text encoder


class TokenizedCaptions(NamedTuple):
    """Captions of a batch as token ids; the sizes [B, 6] that SDXL is told; `shown` [B], 0 where a caption is empty."""

    token_ids: list[CaptionTokenIds]
    time_ids: Tensor
    nonempty: Tensor


class TrainableModel(nn.Module):
    """The parameters of a model that learn, and they alone: its networks are no modules of this one.

    So a checkpoint, an average and a parallel wrapper hold what learns; a copy of it shares all the rest.
    """

    def __init__(self, model: Checkpoint) -> None:
        super().__init__()
        self.full_model = model
        for folder, network in model.networks.items():
            for name, parameter in network.named_parameters():
                if parameter.requires_grad:
                    register_nested_parameter(self, f"{folder}.{name}", parameter)

    def forward(self, x: Tensor, t: Tensor, text: Conditioning | TokenizedCaptions) -> Tensor:
        """The U-Net's output; texts are read here where the text encoders learn."""
        return self.full_model.unet(
            x, t, text if isinstance(text, Conditioning) else encode_captions(self.full_model, text)
        )

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """Those of the networks too: an optimizer asks which are embeddings, the loop which save memory."""
        yield from super().modules(remove_duplicate)
        for network in self.full_model.networks.values():
            yield from network.modules()

    def train(self, mode: bool = True) -> TrainableModel:
        """A network that learns as a whole is in training mode; one that is frozen never is."""
        for network in self.full_model.networks.values():
            network.train(mode and all(p.requires_grad for p in network.parameters()))
        return super().train(mode)

    def __deepcopy__(self, memo: dict[int, object]) -> TrainableModel:
        own = set(map(id, self.parameters()))
        for network in self.full_model.networks.values():
            frozen = (a for a in chain(network.parameters(), network.buffers()) if id(a) not in own)
            memo |= {id(a): a for a in frozen}
        memo |= {
            id(part): part for part in (self.full_model.vae, *(t.tokenizer for t in self.full_model.text_encoders))
        }
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin


def register_nested_parameter(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, in bare modules."""
    *parents, last = name.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)


def cast_frozen_parameters(network: nn.Module, dtype: torch.dtype) -> None:
    """Give what is frozen in a network a dtype, and what learns float32."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def tokenize_caption(
    text_encoders: Sequence[TextEncoder], caption: str, placeholder_tokens: PlaceholderTokens
) -> CaptionTokenIds:
    """A caption as each text encoder reads it, cut to its length and padded; its text is plain, without weights.

    ValueError for a character that the vocabulary lacks.
    """
    first = text_encoders[0].tokenizer
    tokens = tokenize_with_placeholders(first, caption, placeholder_tokens)[: first.model_max_length - 2]
    chunk = add_special_tokens(first, tokens)
    return tuple(tuple(tower.pad_chunk(chunk)[0][0].tolist()) for tower in text_encoders)


def encode_captions(model: Checkpoint, captions: TokenizedCaptions) -> Conditioning:
    """The conditioning of captions, by the text encoders as they are now."""
    ids = (torch.tensor([row[k] for row in captions.token_ids]) for k in range(len(model.text_encoders)))
    embeddings = (encoder.encode_ids(rows) for encoder, rows in zip(model.text_encoders, ids, strict=True))
    return make_caption_conditioning(model, *join_text_embeddings(embeddings), captions)


def make_caption_conditioning(
    model: Checkpoint, context: Tensor, pooled: Tensor | None, captions: TokenizedCaptions
) -> Conditioning:
    """A conditioning of states [B, T, C]; an empty caption is zeros where no prompt is, when the model draws."""
    if model.force_zeros_for_empty_prompt:
        shown = captions.nonempty.to(context)
        context, pooled = context * shown[:, None, None], None if pooled is None else pooled * shown[:, None]
    if pooled is None or model.unet.add_embedding is None:
        return Conditioning(context)
    return Conditioning(context, vector=model.unet.make_vector(pooled, captions.time_ids.to(pooled.device)))


class CachedTextEncoder:
    """Captions as frozen text encoders read them, each alone, so that none depends on its batch; kept on disk."""

    def __init__(self, model: Checkpoint, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self._lookup = lru_cache(CAPTION_CACHE_SIZE)(self._load_or_encode)

    def __call__(self, captions: TokenizedCaptions) -> Conditioning:
        rows = [
            self._lookup(tuple(map(tuple, ids))) for ids in captions.token_ids
        ]  # a loader of batches makes lists of tuples
        width = sum(tower.model.config.hidden_size for tower in self.model.text_encoders)
        room = len(captions.token_ids[0][0]) * width
        states = torch.stack([row[:room] for row in rows]).unflatten(1, (-1, width))
        pooled = torch.stack([row[room:] for row in rows]) if len(rows[0]) > room else None
        return make_caption_conditioning(self.model, states, pooled, captions)

    def _load_or_encode(self, ids: CaptionTokenIds) -> Tensor:
        """States and pooled vector in one row, in float32 on the device."""
        (row,) = self.cache.get_or_compute([blake2b_hexdigest(json.dumps(ids))], lambda _: [self._encode(ids)])
        return torch.tensor(row, device=self.model.unet.conv_in.weight.device)

    @torch.no_grad()
    def _encode(self, ids: CaptionTokenIds) -> np.ndarray:
        embeddings = (
            encoder.encode_ids(torch.tensor([row])) for encoder, row in zip(self.model.text_encoders, ids, strict=True)
        )
        states, pooled = join_text_embeddings(embeddings)
        return torch.cat([a.flatten() for a in (states, pooled) if a is not None]).float().cpu().numpy()


def text_encoder_settings(model: Checkpoint) -> Mapping[str, object]:
    """What the reading of captions depends on beside weights: the layers that are read."""
    return {
        str(k): [tower.layer_idx, tower.final_norm, tower.with_projection]
        for k, tower in enumerate(model.text_encoders)
    }
