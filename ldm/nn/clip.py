"""CLIP's text encoder (Radford et al. 2021, arXiv:2103.00020); parameters are named as in transformers' files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import split_heads


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): Hendrycks & Gimpel 2016 (arXiv:1606.08415), section 2."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPTextConfig:
    """The fields of a `text_encoder/config.json` that its results depend on, with transformers' defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"text encoder hidden_act {self.hidden_act!r}: choose from {', '.join(ACTIVATIONS)}")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"text encoder hidden_size {self.hidden_size}: not a multiple of {heads} heads")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CLIPTextConfig:
        """The fields of a config.json; others are passed over."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {"model_type": "clip_text_model", **asdict(self)}


class CLIPTextOutput(NamedTuple):
    """The last layer's output after the final norm; the embeddings and each layer's output, [B, T, C] each."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]


def build_embedding(size: int, width: int) -> nn.Embedding:
    """torch's Embedding, without initial values on the meta device, for which torch would import its compiler."""
    weight = torch.empty(size, width)
    return nn.Embedding(size, width, _weight=weight if weight.is_meta else nn.init.normal_(weight))


class CLIPTextEmbeddings(nn.Module):
    """The sum of the embeddings of tokens and of their positions."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = build_embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = build_embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[-1]]


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and those before it."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (split_heads(a, self.heads).transpose(1, 2) for a in projections)  # [B, H, T, D]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CausalSelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The layers; returns the input and the output of each."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class CLIPTextTransformer(nn.Module):
    """Token ids [B, T] to a `CLIPTextOutput`."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> CLIPTextOutput:
        states = self.encoder(self.embeddings(ids))
        return CLIPTextOutput(self.final_layer_norm(states[-1]), states)


class CLIPTextModel(nn.Module):
    """The text encoder of CLIP; `with_projection`, with the linear map of its pooled vector as well."""

    def __init__(self, config: CLIPTextConfig, with_projection: bool = False) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)
        if with_projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> CLIPTextOutput:
        return self.text_model(ids)

    @property
    def dtype(self) -> torch.dtype:
        return self.text_model.final_layer_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.text_model.final_layer_norm.weight.device
