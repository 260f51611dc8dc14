"""Textual inversion: trained vectors for new tokens of a text encoder that stays frozen, and the files they come in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.tensors import SafetensorsFile, open_safetensors, save_tensors
from ldm.errors import list_some

SDXL_EMBEDDING_KEYS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # key: text encoder
WEBUI_EMBEDDING_KEY = "emb_params"  # the only tensor of AUTOMATIC1111's files


def load_embeddings(path: Path) -> dict[str, Tensor]:
    """Vectors [n, C], float32, by the text encoder that they are for.

    A file holds `clip_l` and `clip_g` (SDXL), or one tensor for the only text encoder: `emb_params` (AUTOMATIC1111's
    web UI, kohya) or named by its placeholder token (diffusers). ValueError for any other file, a pickle too.
    """
    file = open_safetensors(path)
    keys = _text_encoders_by_key(file)
    for name in keys:
        dtype, shape = file.tensor_infos[name][:2]
        if not dtype.is_floating_point or len(shape) not in (1, 2) or 0 in shape:
            raise ValueError(f"{path}: {name} is {dtype} of shape {list(shape)}, expected real vectors [n, width]")
    tensors = dict(file.iter_tensors())
    embeddings = {component: torch.atleast_2d(tensors[name].float()) for name, component in keys.items()}
    if len({len(vectors) for vectors in embeddings.values()}) > 1:
        raise ValueError(f"{path}: {' and '.join(f'{len(a)} vectors for {name}' for name, a in embeddings.items())}")
    if not all(vectors.isfinite().all() for vectors in embeddings.values()):
        raise ValueError(f"{path}: holds numbers that are not finite")
    return embeddings


def _text_encoders_by_key(file: SafetensorsFile) -> dict[str, str]:
    names = set(file.tensor_infos)
    if names == set(SDXL_EMBEDDING_KEYS):
        return SDXL_EMBEDDING_KEYS
    if len(names) == 1 and not names & set(SDXL_EMBEDDING_KEYS):
        return dict.fromkeys(names, "text_encoder")
    raise ValueError(
        f"{file.path}: not an embedding: holds {list_some(sorted(names)) or 'nothing'}, expected one tensor, "
        f"or {' and '.join(SDXL_EMBEDDING_KEYS)}"
    )


def read_placeholder_token(path: Path) -> str:
    """The token of a file: the key of its tensor (diffusers), or the name in its header, or else the file's stem."""
    file = open_safetensors(path)
    names = [name for name in _text_encoders_by_key(file) if name not in (*SDXL_EMBEDDING_KEYS, WEBUI_EMBEDDING_KEY)]
    return next(iter(names), file.metadata.get("name", "*").replace("*", "") or path.stem)


def save_embeddings(path: Path, placeholder_token: str, embeddings: Mapping[str, Tensor]) -> None:
    """Write a file for `load_embeddings`; for one text encoder the key is the token, as in diffusers."""
    keys = {component: name for name, component in SDXL_EMBEDDING_KEYS.items()}
    single = len(embeddings) == 1
    tensors = {placeholder_token if single else keys[component]: a for component, a in embeddings.items()}
    save_tensors(tensors, path, torch.float32)


class ExtendedEmbedding(nn.Module):
    """A frozen embedding `table` [n, C] followed by trainable `vectors` [m, C]: Gal et al. 2022 (arXiv:2208.01618)."""

    def __init__(self, table: nn.Embedding, initial_vectors: Tensor) -> None:
        super().__init__()
        self.table = table
        self.vectors = nn.Parameter(initial_vectors.detach().float().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [B, T, C], in the dtype of the table, of token ids [B, T] below n + m."""
        n = self.table.num_embeddings
        own = self.table(ids.clamp(max=n - 1))
        return torch.where((ids >= n)[..., None], self.vectors[(ids - n).clamp(min=0)].to(own), own)
