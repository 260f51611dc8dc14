"""Textual inversion: trained vectors for new tokens of a text encoder that stays frozen, and the files they come in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.tensors import open_safetensors, write_tensors
from ldm.errors import list_some

SDXL_EMBEDDING_KEYS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # key: text encoder
ENCODER_KEYS = {  # keys that name a text encoder: ComfyUI's and kohya's, and those of Replicate's trainer
    **SDXL_EMBEDDING_KEYS,
    "clip_h": "text_encoder",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
BUNDLE_PREFIX = "bundle_emb."  # OneTrainer's, of embeddings in the file of a LoRA
WEBUI_EMBEDDING_KEY = "emb_params"  # the only tensor of AUTOMATIC1111's files
PARAM_PREFIX = "string_to_param."  # of pickles of the web UI and of Gal et al., written as safetensors
IGNORED_EMBEDDING_KEYS = re.compile(r"(.+_out|string_to_token\..+|step|global_step)")
NUMBERED_KEYS = re.compile(r"(unet|text_encoder):\d+:(up|down)")  # of lora_diffusion's LoRA
NETWORK_KEYS = re.compile(
    r"(unet|text_encoder):\d+:(up|down)|.*\.(weight|bias|alpha|diff\w*|\w+_scale)|(lora|lycoris)_.*"
)  # of no embedding

Embeddings = dict[str, dict[str, Tensor]]  # by placeholder token, "" where the file names none, and text encoder


def load_embeddings(path: Path, token: str | None = None) -> dict[str, Tensor]:
    """Vectors [n, C], float32, of one placeholder token, by the text encoder that they are for.

    ValueError as `read_embeddings`; `token` is needed where the file has several.
    """
    embeddings = read_embeddings(path)
    if token in embeddings:
        return embeddings[token]
    if len(embeddings) > 1:
        raise ValueError(f"{path}: holds {len(embeddings)} tokens: choose from {', '.join(embeddings)}")
    return next(iter(embeddings.values()))


def read_embeddings(path: Path) -> Embeddings:
    """The embeddings in a file, by placeholder token and text encoder.

    A key names a text encoder (`clip_l`, `clip_g`), or else is the token of vectors for the only text encoder
    (diffusers); `emb_params` and `string_to_param.*` (the web UI, kohya) name neither. OneTrainer's LoRAs have keys
    `bundle_emb.TOKEN.clip_l` beside theirs. ValueError for any other file, a pickle too.
    """
    file = open_safetensors(path)
    keys = parse_embedding_keys(file.tensor_infos)
    if not keys:
        names = list_some(sorted(file.tensor_infos)) or "nothing"
        expected = f"one tensor, or {' and '.join(SDXL_EMBEDDING_KEYS)}"
        raise ValueError(f"{path}: not an embedding: holds {names}, expected {expected}")
    for name in keys:
        dtype, shape = file.tensor_infos[name][:2]
        if not dtype.is_floating_point or len(_vectors_shape(shape)) not in (1, 2) or 0 in shape:
            raise ValueError(f"{path}: {name} is {dtype} of shape {list(shape)}, expected floating-point [n, width]")
    embeddings: Embeddings = {}
    for name, tensor in file.iter_tensors():
        if name in keys:
            token, component = keys[name]
            vectors = torch.atleast_2d(tensor.float().reshape(_vectors_shape(tuple(tensor.shape))))
            if component in (own := embeddings.setdefault(token, {})):
                raise ValueError(f"{path}: {name} is given twice")
            own[component] = vectors
    embeddings = {token: dict(sorted(own.items())) for token, own in embeddings.items()}
    for own in embeddings.values():
        if len({len(vectors) for vectors in own.values()}) > 1:
            raise ValueError(f"{path}: {' and '.join(f'{len(a)} vectors for {name}' for name, a in own.items())}")
        if not all(vectors.isfinite().all() for vectors in own.values()):
            raise ValueError(f"{path}: holds numbers that are not finite")
    return embeddings


def parse_embedding_keys(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The placeholder token and text encoder of each key of an embedding; nothing where a key is of no embedding."""
    names = list(names)
    if bundled := _parse_bundled_keys(names):
        return bundled
    used = [name for name in names if not IGNORED_EMBEDDING_KEYS.fullmatch(name)]
    if any(NETWORK_KEYS.fullmatch(name) for name in used):
        return {}
    if encoders := [name for name in used if name in ENCODER_KEYS]:
        return {name: ("", ENCODER_KEYS[name]) for name in encoders} if encoders == used else {}
    return {name: (_token_of_key(name), "text_encoder") for name in used}


def has_bundled_embeddings(names: Iterable[str]) -> bool:
    """Whether a LoRA's file holds embeddings too."""
    return bool(_parse_bundled_keys(list(names)))


def _parse_bundled_keys(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Those of a LoRA's file: OneTrainer's with their prefix, and lora_diffusion's beside its numbered modules."""
    if any(NUMBERED_KEYS.fullmatch(name) for name in names):
        return {name: (name, "text_encoder") for name in names if not NUMBERED_KEYS.fullmatch(name)}
    parts = ((n, *n.removeprefix(BUNDLE_PREFIX).rpartition(".")[::2]) for n in names if n.startswith(BUNDLE_PREFIX))
    return {name: (token, ENCODER_KEYS[key]) for name, token, key in parts if key in ENCODER_KEYS}


def _token_of_key(name: str) -> str:
    token = name.removeprefix(PARAM_PREFIX)
    return "" if token in ("*", WEBUI_EMBEDDING_KEY) else token


def _vectors_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape [n, 1, C] or [1, n, C] as [n, C]; another as it is."""
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 and 1 in shape[:2] else shape


def count_ignored_embedding_keys(path: Path) -> int:
    """The number of a file's tensors that are not read: output embeddings of OneTrainer, counters."""
    names = open_safetensors(path).tensor_infos
    if has_bundled_embeddings(names):
        names = {name: info for name, info in names.items() if name.startswith(BUNDLE_PREFIX)}
    return len(names) - len(parse_embedding_keys(names))


def read_placeholder_tokens(path: Path) -> dict[str, str]:
    """The tokens of a file by its own names for them ("" for none): these, or the name in its header, or its stem.

    ValueError for a token that no prompt can hold.
    """
    file = open_safetensors(path)
    own = [token for token, _ in parse_embedding_keys(file.tensor_infos).values()]
    tokens = {token: token or file.metadata.get("name", "*").replace("*", "") or path.stem for token in own}
    for token in tokens.values():
        try:
            token.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}: token {token!r}: not valid UTF-8") from None
    return tokens


def read_placeholder_token(path: Path) -> str:
    """The token of a file with one; ValueError as `read_embeddings`."""
    read_embeddings(path)
    return next(iter(read_placeholder_tokens(path).values()))


def save_embeddings(
    path: Path, placeholder_token: str, embeddings: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file for `load_embeddings`; for one text encoder the key is the token, as in diffusers."""
    keys = {component: name for name, component in SDXL_EMBEDDING_KEYS.items()}
    single = len(embeddings) == 1
    tensors = {placeholder_token if single else keys[component]: a for component, a in embeddings.items()}
    write_tensors({name: a.detach().to("cpu", torch.float32) for name, a in tensors.items()}, path, metadata or {})


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
