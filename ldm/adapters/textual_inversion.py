"""Textual-inversion embeddings: the vectors that a new word stands for, from the files that people share.

Textual inversion: new words whose vectors learn, in the vocabulary of a text encoder that does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.tensors import SafetensorsFile, open_safetensors, save_tensors

SDXL_EMBEDDING_KEYS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
}  # a tensor of SDXL's files: the folder of its tower
WEBUI_EMBEDDING_KEY = "emb_params"  # the only tensor of a file of the web UI


def load_embeddings(path: Path) -> dict[str, Tensor]:
    """Vectors [n, C], float32, by the folder of the text encoder that they are for.

    A file holds `clip_l` and `clip_g` (SDXL), or one tensor for the only text encoder: `emb_params` (the web UI's,
    kohya's) or under the word itself (diffusers'). ValueError, naming the file, for anything else; a pickle among it.
    """
    file = open_safetensors(path)
    names = _text_encoders_by_key(file)
    for name in names:
        dtype, shape = file.tensor_infos[name][:2]
        if not dtype.is_floating_point or len(shape) not in (1, 2) or 0 in shape:
            raise ValueError(f"{path}: {name} is {dtype} of shape {list(shape)}, expected real vectors [n, width]")
    tensors = dict(file.iter_tensors())
    found = {folder: tensors[name].float().reshape(-1, tensors[name].shape[-1]) for name, folder in names.items()}
    if len({len(vectors) for vectors in found.values()}) > 1:
        raise ValueError(f"{path}: {' and '.join(f'{len(a)} vectors for {name}' for name, a in found.items())}")
    if not all(vectors.isfinite().all() for vectors in found.values()):
        raise ValueError(f"{path}: holds numbers that are not finite")
    return found


def _text_encoders_by_key(file: SafetensorsFile) -> dict[str, str]:
    """Tensors of a file: folders."""
    if set(file.tensor_infos) == set(SDXL_EMBEDDING_KEYS):
        return SDXL_EMBEDDING_KEYS
    if len(file.tensor_infos) == 1 and not set(file.tensor_infos) & set(SDXL_EMBEDDING_KEYS):
        return dict.fromkeys(file.tensor_infos, "text_encoder")
    names = sorted(file.tensor_infos)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ValueError(
        f"{file.path}: not an embedding: holds {', '.join(names[:3]) or 'nothing'}{more}, expected one tensor, "
        f"or {' and '.join(SDXL_EMBEDDING_KEYS)}"
    )


def read_placeholder_token(path: Path) -> str:
    """The word that a file says it is: diffusers' name of the tensor, or the header's; else the file's stem."""
    file = open_safetensors(path)
    names = [name for name in _text_encoders_by_key(file) if name not in (*SDXL_EMBEDDING_KEYS, WEBUI_EMBEDDING_KEY)]
    return next(iter(names), file.metadata.get("name", "*").replace("*", "") or path.stem)


def save_embeddings(path: Path, placeholder_token: str, embeddings: Mapping[str, Tensor]) -> None:
    """Write what `load_embeddings` reads: for one text encoder under the word itself, as diffusers does."""
    names = (
        {folder: name for name, folder in SDXL_EMBEDDING_KEYS.items()}
        if len(embeddings) > 1
        else dict.fromkeys(embeddings, placeholder_token)
    )
    save_tensors({names[folder]: vectors for folder, vectors in embeddings.items()}, path, torch.float32)


class ExtendedEmbedding(nn.Module):
    """A table of vectors [n, C], and behind it `extract_placeholder_embeddings` [m, C] that learn: Gal et al. 2022 (arXiv:2208.01618)."""

    def __init__(self, table: nn.Embedding, first: Tensor) -> None:
        super().__init__()
        self.table = table
        self.vectors = nn.Parameter(first.detach().float().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [B, T, C], in the dtype of the table, of token ids [B, T] below n + m."""
        n = self.table.num_embeddings
        own = self.table(ids.clamp(max=n - 1))
        return torch.where((ids >= n)[..., None], self.vectors[(ids - n).clamp(min=0)].to(own), own)
