"""Adapters in prompts, by the web UI's tags: <lora:name:weight>, of files in a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from ldm.adapters.lora import AdapterWeight

TAG_PATTERN = re.compile(r"<(?:lora|lyco):([^<>:]+)((?::[^<>:]*)*)>")
MAX_FILES = 100_000  # of a folder


class LoraTag(NamedTuple):
    """An adapter by its name and weights; as text, the tag."""

    name: str
    weight: float = 1.0  # the U-Net's
    text_weight: float | None = None  # the text encoders'; None: the same

    def __str__(self) -> str:
        is_pair = self.text_weight is not None and self.text_weight != self.weight
        return f"<lora:{self.name}:{f'{self.text_weight:g}:' if is_pair else ''}{self.weight:g}>"

    @property
    def adapter_weight(self) -> AdapterWeight:
        return self.weight if self.text_weight is None else (self.weight, self.text_weight)


def split_lora_tags(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """A prompt without its tags, and these; ValueError for a weight that is no number.

    <lora:name:a> is weight a everywhere, <lora:name:a:b> a for the text encoders and b for the U-Net; te= and unet=
    name the two (extensions-builtin/Lora/extra_networks_lora.py of the web UI).
    """
    tags = tuple(_parse_tag(match) for match in TAG_PATTERN.finditer(prompt))
    return (TAG_PATTERN.sub("", prompt).strip() if tags else prompt), tags


def _parse_tag(match: re.Match[str]) -> LoraTag:
    numbers: dict[str, float] = {}
    for k, part in enumerate(match[2].split(":")[1:]):
        key, equals, value = part.rpartition("=")
        try:
            numbers[key.strip() if equals else ("te", "unet", "dyn")[min(k, 2)]] = float(value)
        except ValueError:
            raise ValueError(f"{match[0]:.60}: the weight {value!r:.20} is not a number") from None
    text = numbers.get("te", 1.0)
    unet = numbers.get("unet", text)
    return LoraTag(match[1].strip(), unet, None if unet == text else text)


class AdapterOwner(Protocol):
    """What tags are applied to: a pipeline."""

    def load_lora_weights(self, path: Path, weight: AdapterWeight, adapter_name: str) -> None: ...

    def _weights(self) -> dict[str, AdapterWeight]: ...

    def _set_weights(self, weights: Mapping[str, AdapterWeight]) -> None: ...


class TaggedAdapters:
    """The adapters that tags may name: those that are loaded, and the files of a folder, which are loaded once."""

    def __init__(self, owner: AdapterOwner, folder: Path | None) -> None:
        self.owner, self.folder = owner, folder
        self.own_weights = owner._weights()
        self.files = {} if folder is None else index_adapter_files(folder)

    def load(self, tags: Iterable[LoraTag]) -> tuple[LoraTag, ...]:
        """Load the files of tags, with weight 0; the tags for which there is none."""
        unknown = list[LoraTag]()
        for tag in tags:
            if tag.name in self.owner._weights():
                continue
            if path := self.files.get(tag.name.lower()):
                self.owner.load_lora_weights(path, 0.0, tag.name)
            else:
                unknown.append(tag)
        return tuple(unknown)

    def apply(self, tags: Sequence[LoraTag]) -> None:
        """Give adapters the weights of tags, and those without a tag what they had before any."""
        weights = {name: self.own_weights.get(name, 0.0) for name in self.owner._weights()}
        weights |= {tag.name: tag.adapter_weight for tag in tags}
        if weights != self.owner._weights():
            self.owner._set_weights(weights)


def index_adapter_files(folder: Path) -> dict[str, Path]:
    """The .safetensors files below a folder, by name and by path below it, both in small letters and without suffix."""
    if not folder.is_dir():
        raise ValueError(f"--lora-dir {folder}: not a folder")
    files: dict[str, Path] = {}
    paths = sorted(folder.rglob("*.safetensors"))
    if len(paths) > MAX_FILES:
        raise ValueError(f"--lora-dir {folder}: {len(paths)} files, at most {MAX_FILES} are read")
    for path in paths:
        relative = path.relative_to(folder).with_suffix("")
        files |= {
            relative.as_posix().lower(): path,
            **({} if path.stem.lower() in files else {path.stem.lower(): path}),
        }
    return files
