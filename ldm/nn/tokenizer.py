"""CLIP's tokenizer (Radford et al. 2021, section 2.4): byte-level BPE in lower case, read and written as files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# CLIP's merges: the first 48,894 of bpe_simple_vocab_16e6.txt
MERGES_FILE = Path(__file__).with_name("clip_merges.txt.gz")
MODEL_MAX_LENGTH = 77
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
Merges = Sequence[tuple[str, str]]


def build_bpe(vocab: Mapping[str, int], merges: Merges) -> Tokenizer:
    """CLIP's byte-level BPE over a vocabulary: NFC, blanks as one, lower case, words, bytes, merges."""
    bpe = BPE(dict(vocab), list(merges), unk_token=EOS, continuing_subword_prefix="", end_of_word_suffix="</w>")
    backend = Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


class CLIPTokenizer:
    """Texts to token ids; BOS and EOS in a text are themselves, the padding token is tokenized like any other.

    `added_tokens` follow the vocabulary and are found in texts as they are written. ValueError where BOS, EOS or the
    padding token is not in the vocabulary, and for merges that do not fit it.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Merges,
        pad_token: str = EOS,
        model_max_length: int = MODEL_MAX_LENGTH,
        added_tokens: Sequence[str] = (),
    ) -> None:
        try:
            self.backend = build_bpe(vocab, merges)
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"vocabulary and merges do not fit: {error}") from None
        self.base_vocab, self.merges, self.model_max_length = dict(vocab), list(merges), model_max_length
        for token in (BOS, EOS):
            if token not in vocab:
                raise ValueError(f"{token} is not in the vocabulary")
        self.backend.add_special_tokens([BOS, EOS])
        self.backend.add_tokens(list(added_tokens))
        self.vocab = self.backend.get_vocab(with_added_tokens=True)
        self.pad_token = pad_token
        if pad_token not in self.vocab:
            raise ValueError(f"padding token {pad_token!r} is not in the vocabulary")

    def __len__(self) -> int:
        return len(self.vocab)

    @property
    def bos_token_id(self) -> int:
        return self.vocab[BOS]

    @property
    def eos_token_id(self) -> int:
        return self.vocab[EOS]

    @property
    def pad_token_id(self) -> int:
        return self.vocab[self.pad_token]

    def token_to_id(self, token: str) -> int:
        """The id of a token, that of EOS where it is unknown."""
        return self.vocab.get(token, self.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """The ids of a text without BOS and EOS; ValueError for a character outside the vocabulary, or half of one."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("prompt: not valid UTF-8") from None
        encoding = self.backend.encode(text, add_special_tokens=False)
        for k, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if k == self.eos_token_id and text[start:end] != EOS:
                raise ValueError(f"prompt: {text[start:end]!r} cannot be spelled in the model's vocabulary")
        return encoding.ids

    def to_transformers(self) -> Any:
        """transformers' own CLIPTokenizer with this vocabulary, padding and length, for code that asks for one."""
        from transformers import CLIPTokenizer as TransformersTokenizer

        tokenizer = TransformersTokenizer(vocab=self.base_vocab, merges=self.merges)
        tokenizer.model_max_length, tokenizer.pad_token = self.model_max_length, self.pad_token
        return tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts between BOS and EOS, of any length; unknown characters are EOS."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [[self.bos_token_id, *encoding.ids, self.eos_token_id] for encoding in encodings]

    def pad(self, sequences: Sequence[Sequence[int]], longest: bool = False) -> Tensor:
        """Ids [B, T], each row cut to T - 1 and EOS and padded to T: `model_max_length`, or the longest's length."""
        rows = [
            [*ids[: self.model_max_length - 1], self.eos_token_id] if len(ids) > self.model_max_length else ids
            for ids in sequences
        ]
        length = max(map(len, rows), default=0) if longest else self.model_max_length
        return torch.tensor([[*ids, *(length - len(ids)) * [self.pad_token_id]] for ids in rows])


def build_clip_tokenizer(pad_token_id: int) -> CLIPTokenizer:
    """The tokenizer of all text encoders of Stable Diffusion: 49,408 tokens, padding to 77 with the token of that id.

    The vocabulary is CLIP's own (Radford et al. 2021); texts are read as OpenAI's and open_clip's tokenizers read them,
    except that HTML entities and broken Unicode are not repaired. ValueError for an unknown token id.
    """
    with gzip.open(MERGES_FILE, "rt", encoding="utf-8") as file:
        merges = [(a, b) for a, b in map(str.split, file)]
    tokens = list(vocab := build_clip_vocab(merges))
    if not 0 <= pad_token_id < len(tokens):
        raise ValueError(f"padding with token {pad_token_id}: must be from 0 to {len(tokens) - 1}")
    return CLIPTokenizer(vocab, merges, tokens[pad_token_id])


def build_clip_vocab(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """CLIP's token ids: the 256 bytes, the bytes that end a word, the merges, BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges), BOS, EOS]
    return {token: k for k, token in enumerate(tokens)}


def save_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write vocab.json and merges.txt, which every version of transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = dict(sorted(tokenizer.base_vocab.items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges)])
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
    """The tokenizer of a local folder, from tokenizer.json or vocab.json and merges.txt, with its added tokens.

    KeyError, TypeError and ValueError where the files are not those of a tokenizer of CLIP.
    """
    config, special = (_read_object(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    if (path := folder / "tokenizer.json").is_file():
        content = _read_object(path)
        vocab, pairs = content["model"]["vocab"], content["model"]["merges"]
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in pairs]
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    else:
        vocab = _read_object(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        added = {}
    decoder = config.get("added_tokens_decoder") or {}
    added |= {token["content"]: int(k) for k, token in decoder.items()} | _read_object(folder / "added_tokens.json")
    pad = config.get("pad_token") or special.get("pad_token") or EOS
    extra = sorted((k, token) for token, k in added.items() if token not in vocab)
    if [k for k, _ in extra] != list(range(len(vocab), len(vocab) + len(extra))):
        raise ValueError(f"added tokens {[token for _, token in extra]}: their ids do not follow the vocabulary's")
    return CLIPTokenizer(
        vocab,
        [(a, b) for a, b in merges],
        pad["content"] if isinstance(pad, dict) else pad,
        config.get("model_max_length", MODEL_MAX_LENGTH),  # unchecked; transformers writes 1e30 for no limit
        [token for _, token in extra],
    )


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, which was checked to be one; an empty one where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
