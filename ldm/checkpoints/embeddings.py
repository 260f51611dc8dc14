"""Textual-inversion embeddings: the vectors that a new word stands for, from the files that people share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.files import save_tensors
from ldm.checkpoints.tensors import TensorFile, open_tensors

TOWERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # a tensor of SDXL's files: the folder of its tower
WEB_UI = "emb_params"  # the only tensor of a file of the web UI


def load_embeddings(path: Path) -> dict[str, Tensor]:
    """Vectors [n, C], float32, by the folder of the text encoder that they are for.

    A file holds `clip_l` and `clip_g` (SDXL), or one tensor for the only text encoder: `emb_params` (the web UI's,
    kohya's) or under the word itself (diffusers'). ValueError, naming the file, for anything else; a pickle among it.
    """
    file = open_tensors(path)
    names = _towers(file)
    for name in names:
        dtype, shape = file.slots[name][:2]
        if not dtype.is_floating_point or len(shape) not in (1, 2) or 0 in shape:
            raise ValueError(f"{path}: {name} is {dtype} of shape {list(shape)}, expected real vectors [n, width]")
    tensors = dict(file.read())
    found = {folder: tensors[name].float().reshape(-1, tensors[name].shape[-1]) for name, folder in names.items()}
    if len({len(vectors) for vectors in found.values()}) > 1:
        raise ValueError(f"{path}: {' and '.join(f'{len(a)} vectors for {name}' for name, a in found.items())}")
    if not all(vectors.isfinite().all() for vectors in found.values()):
        raise ValueError(f"{path}: holds numbers that are not finite")
    return found


def _towers(file: TensorFile) -> dict[str, str]:
    """Tensors of a file: folders."""
    if set(file.slots) == set(TOWERS):
        return TOWERS
    if len(file.slots) == 1 and not set(file.slots) & set(TOWERS):
        return dict.fromkeys(file.slots, "text_encoder")
    names = sorted(file.slots)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ValueError(
        f"{file.path}: not an embedding: holds {', '.join(names[:3]) or 'nothing'}{more}, expected one tensor, "
        f"or {' and '.join(TOWERS)}"
    )


def word_of(path: Path) -> str:
    """The word that a file says it is: diffusers' name of the tensor, or the header's; else the file's stem."""
    file = open_tensors(path)
    names = [name for name in _towers(file) if name not in (*TOWERS, WEB_UI)]
    return next(iter(names), file.metadata.get("name", "*").replace("*", "") or path.stem)


def save_embeddings(path: Path, word: str, found: Mapping[str, Tensor]) -> None:
    """Write what `load_embeddings` reads: for one text encoder under the word itself, as diffusers does."""
    names = {folder: name for name, folder in TOWERS.items()} if len(found) > 1 else dict.fromkeys(found, word)
    save_tensors({names[folder]: vectors for folder, vectors in found.items()}, path, torch.float32)
