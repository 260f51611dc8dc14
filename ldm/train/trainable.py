"""The trained part of a pretrained model, and its captions: tokenized, encoded, cached where encoders are frozen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints.formats import Checkpoint
from ldm.conditioning import Conditioning
from ldm.data.latent_cache import LatentCache, blake2b_hexdigest
from ldm.nn.prompts import PlaceholderTokens
from ldm.nn.text_encoders import TextEncoder, add_special_tokens, join_text_embeddings, tokenize_with_placeholders

CAPTION_CACHE_SIZE = 4096  # captions whose embeddings stay in memory


class TokenizedCaptions(NamedTuple):
    """The captions of a batch: token ids [B, T] for each text encoder, whether each is not empty [B], SDXL's sizes."""

    token_ids: Sequence[Tensor]
    nonempty: Tensor
    time_ids: Tensor | None = None  # [B, 6]


class TrainableModel(nn.Module):
    """A pretrained model's networks as one module, of which some parameters require a gradient."""

    def __init__(self, model: Checkpoint) -> None:
        super().__init__()
        self.full_model = model
        for name, network in model.networks.items():
            self.add_module(name, network)
            network.train(all(p.requires_grad for p in network.parameters()))  # frozen layers stay as in inference
        frozen = (name for name, parameter in self.named_parameters() if not parameter.requires_grad)
        # DistributedDataParallel broadcasts everything else when it begins, and buffers before each forward pass
        self._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in self.named_buffers())]

    def forward(self, x: Tensor, t: Tensor, text: Conditioning | TokenizedCaptions) -> Tensor:
        """The U-Net's output; captions are encoded here where text encoders are trained."""
        cond = text if isinstance(text, Conditioning) else encode_captions(self.full_model, text)
        return self.full_model.unet(x, t, cond)


def cast_frozen_parameters(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen parameters of a network to a dtype, the trainable ones to float32."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def tokenize_for_training(
    text_encoders: Sequence[TextEncoder],
    captions: Sequence[str],
    placeholder_tokens: PlaceholderTokens,
    time_ids: Tensor | None = None,
) -> TokenizedCaptions:
    """Captions as plain text, without weights, truncated to one chunk and padded as each text encoder wants.

    ValueError for a character that the vocabulary lacks.
    """
    tokenizer = text_encoders[0].tokenizer
    chunks = []
    for caption in captions:
        tokens = tokenize_with_placeholders(tokenizer, caption, placeholder_tokens)
        chunks.append(add_special_tokens(tokenizer, tokens[: tokenizer.model_max_length - 2]))
    token_ids = [torch.cat([encoder.pad_chunk(chunk)[0] for chunk in chunks]) for encoder in text_encoders]
    return TokenizedCaptions(token_ids, torch.tensor([float(bool(caption)) for caption in captions]), time_ids)


def encode_captions(model: Checkpoint, captions: TokenizedCaptions) -> Conditioning:
    """The conditioning of captions, by the model's text encoders."""
    states, pooled = _encode_ids(model, captions.token_ids)
    return make_caption_conditioning(model, states, pooled, captions)


def _encode_ids(model: Checkpoint, token_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    encoders = zip(model.text_encoders, token_ids, strict=True)
    return join_text_embeddings(encoder.encode_ids(ids) for encoder, ids in encoders)


def make_caption_conditioning(
    model: Checkpoint, context: Tensor, pooled: Tensor | None, captions: TokenizedCaptions
) -> Conditioning:
    """A conditioning of states [B, T, C]; an empty caption is zeros where the model samples so without a prompt."""
    if model.force_zeros_for_empty_prompt:
        nonempty = captions.nonempty.to(context)
        context, pooled = context * nonempty[:, None, None], None if pooled is None else pooled * nonempty[:, None]
    if pooled is None or captions.time_ids is None or model.unet.add_embedding is None:
        return Conditioning(context)
    return Conditioning(context, vector=model.unet.make_vector(pooled, captions.time_ids.to(pooled.device)))


class CachedTextEncoder:
    """Captions encoded by frozen text encoders, each alone, so that none depends on its batch; cached on disk."""

    def __init__(self, model: Checkpoint, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        self._lookup = lru_cache(CAPTION_CACHE_SIZE)(self._load_or_encode)

    def __call__(self, captions: TokenizedCaptions) -> Conditioning:
        token_ids = zip(*(ids.tolist() for ids in captions.token_ids), strict=True)
        rows = [self._lookup(json.dumps(ids)) for ids in token_ids]
        width = sum(encoder.model.config.hidden_size for encoder in self.model.text_encoders)
        size = captions.token_ids[0].shape[1] * width  # of the states; the pooled vector follows
        states = torch.stack([row[:size] for row in rows]).unflatten(1, (-1, width))
        pooled = torch.stack([row[size:] for row in rows]) if len(rows[0]) > size else None
        return make_caption_conditioning(self.model, states, pooled, captions)

    def _load_or_encode(self, ids: str) -> Tensor:
        """States and pooled vector of one caption in one row, float32 on the device."""
        (row,) = self.cache.get_or_compute([blake2b_hexdigest(ids)], lambda _: [self._encode(json.loads(ids))])
        return torch.tensor(row, device=self.model.unet.device)

    @torch.no_grad()
    def _encode(self, ids: list[list[int]]) -> np.ndarray:
        states, pooled = _encode_ids(self.model, [torch.tensor([row]) for row in ids])
        parts = [states.flatten()] if pooled is None else [states.flatten(), pooled.flatten()]
        return torch.cat(parts).float().cpu().numpy()


def text_encoder_settings(model: Checkpoint) -> dict[str, object]:
    """What the encoding of captions depends on beside weights, for the key of its cache."""
    return {str(k): [e.layer_idx, e.final_norm, e.with_projection] for k, e in enumerate(model.text_encoders)}
