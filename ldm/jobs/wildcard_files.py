"""Wildcard files: lists of texts by name, as lines of .txt files, or keys of YAML and JSON files, below one folder."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ldm.errors import error_text, parse_json, suggest
from ldm.jobs.schema import short_repr
from ldm.jobs.wildcards import (
    MAX_WILDCARD_NESTING,
    TemplateParser,
    TemplateParts,
    Variables,
    VariantOptions,
    build_variant_options,
    split_variant_weight,
)

WILDCARD_NAME_PATTERN = re.compile(r"(?=.{1,200}$)[\w*?][\w *?.,'&+()-]*(/[\w*?][\w *?.,'&+()-]*)*")
GLOB_SYNTAX = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
MAX_WILDCARD_FILE_BYTES = 2**24
MAX_WILDCARD_FILES = 100_000  # of a folder
MAX_WILDCARD_ENTRIES = 10**6  # of a YAML or JSON file
STRUCTURED_SUFFIXES = ".yaml", ".yml", ".json"


class WildcardFileError(ValueError):
    """What is wrong with a text of a file, after its name and line."""


WeightedText = tuple[str, float | None, str]  # where it stands, its weight if it is no part of the text, the text


class WildcardManager:
    """Parses templates whose wildcard files lie in one folder; each file is read once.

    Names are those of dynamicprompts: a .txt file's path without the suffix, or the path of keys in a YAML or JSON
    file, in any case; `*`, `?` and `**` stand for several. `notices` says what was read otherwise than as it stands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notices: dict[str, None] = {}
        self._cache: dict[str, VariantOptions] = {}
        self._load_stack: list[str] = []

    def __call__(self, text: str) -> TemplateParts:
        """The parts of a text; ValueError for what cannot be parsed, also in the files that it names."""
        return self._parse(text, {})

    def _parse(self, text: str, variables: Variables) -> TemplateParts:
        if not any(sign in text for sign in ("{", "}", "__")):
            return (text,)
        return TemplateParser(text, self.load, variables, len(self._load_stack)).parse()

    def load(self, name: str, variables: Variables) -> VariantOptions:
        """The lines of a file as options, except blank lines and those that begin with #."""
        name = name.replace("\\", "/")
        if name in self._load_stack:
            raise ValueError(f"wildcard __{name}__: includes itself ({' > '.join([*self._load_stack, name])})")
        if len(self._load_stack) >= MAX_WILDCARD_NESTING:
            raise ValueError(f"wildcard __{name}__: nested more than {MAX_WILDCARD_NESTING} deep")
        if name in self._cache and not variables:
            return self._cache[name]
        self._load_stack.append(name)
        try:
            options = build_variant_options(self._parse_entries(name, variables))
        finally:
            self._load_stack.pop()
        if not variables:
            self._cache[name] = options
        return options

    def _parse_entries(self, name: str, variables: Variables) -> Iterable[tuple[float, TemplateParts]]:
        options: list[tuple[float, TemplateParts]] = []
        for place, weight, text in self._find_texts(name):
            try:
                parts = self._parse(text, variables)
                options.append(split_variant_weight(parts) if weight is None else (weight, parts))
            except WildcardFileError:
                raise  # of a file that this one names
            except ValueError as error:
                raise WildcardFileError(f"{place}: {error}") from None
        return options

    def _find_texts(self, name: str) -> list[WeightedText]:
        if not WILDCARD_NAME_PATTERN.fullmatch(name) or ".." in name:
            raise ValueError(f"wildcard {short_repr(name)}: not the name of a file below {self.folder}")
        if any(sign in name for sign in "*?"):
            pattern = re.compile(
                re.sub(r"\\\*\\\*|\\\*|\\\?", lambda match: GLOB_SYNTAX[match[0].replace("\\", "")], re.escape(name)),
                re.IGNORECASE,
            )
            found = [known for known in sorted({*self._text_files, *self._lists}) if pattern.fullmatch(known)]
        else:
            found = self._match_case(name, self._text_files) or self._match_case(name, self._lists)
        if not found:
            hint = suggest(name, [*self._text_files, *self._lists]) or r"; \__ is text"
            raise ValueError(f"wildcard __{name}__: no file {self.folder / name}.txt{hint}")
        texts = [text for known in found for text in self._read_list(known)]
        if not texts:
            raise ValueError(f"wildcard __{name}__: {self._text_files.get(found[0], self.folder)} has no lines")
        return texts

    @staticmethod
    def _match_case(name: str, known: Iterable[str]) -> list[str]:
        same = [other for other in known if other.lower() == name.lower()]
        if len(same) > 1 and name not in same:
            raise ValueError(f"wildcard __{name}__: {' or '.join(sorted(same))}?")
        return [name] if name in same else same

    def _read_list(self, name: str) -> list[WeightedText]:
        if name not in self._text_files:
            return self._lists[name]
        path = self._text_files[name]
        lines = [line.strip() for line in re.split(r"\r\n|\r|\n", self._read_file(path))]
        return [(f"{path}:{k}", None, line) for k, line in enumerate(lines, 1) if line and not line.startswith("#")]

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """The files below the folder, by suffix."""
        files: dict[str, list[Path]] = {}
        total = 0
        for root, folders, names in os.walk(self.folder):
            folders.sort()
            for name in sorted(names):
                path = Path(root, name)
                if path.suffix.lower() in (".txt", *STRUCTURED_SUFFIXES) and path.is_file():
                    files.setdefault(path.suffix.lower(), []).append(path)
                    total += 1
            if total > MAX_WILDCARD_FILES:
                raise ValueError(f"{self.folder}: more than {MAX_WILDCARD_FILES} wildcard files")
        return files

    @cached_property
    def _text_files(self) -> dict[str, Path]:
        """The .txt files by the names of wildcards."""
        files = self._files.get(".txt", [])
        return {path.relative_to(self.folder).with_suffix("").as_posix(): path for path in files}

    @cached_property
    def _lists(self) -> dict[str, list[WeightedText]]:
        """The lists of YAML and JSON files by the names of wildcards."""
        lists: dict[str, list[WeightedText]] = {}
        for path in (path for suffix in STRUCTURED_SUFFIXES for path in self._files.get(suffix, [])):
            prefix = path.parent.relative_to(self.folder).as_posix().removeprefix(".")
            for keys, texts in flatten_lists(self._load_structured(path), path):
                name = "/".join([prefix, *keys] if prefix else keys)
                lists.setdefault(name, []).extend(texts)
        return lists

    def _load_structured(self, path: Path) -> Any:
        text = self._read_file(path)
        if path.suffix.lower() == ".json":
            return parse_json(text, str(path))
        try:
            return yaml.load(text, Loader=yaml.BaseLoader)  # every scalar is text
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise ValueError(f"{path}: not YAML: {error_text(error)}") from None

    def _read_file(self, path: Path) -> str:
        """The text of a file: UTF-8, UTF-16 with its mark, or else Latin-1, with a notice."""
        try:
            if path.stat().st_size > MAX_WILDCARD_FILE_BYTES:
                raise ValueError(f"{path}: more than {MAX_WILDCARD_FILE_BYTES} bytes")
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: {error_text(error)}") from None
        try:
            is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
        except UnicodeDecodeError:
            self.notices[f"{path}: not UTF-8: read as Latin-1"] = None
            text = data.decode("cp1252", "replace")
        if "\0" in text:
            raise ValueError(f"{path}: holds a NUL")
        return text


def flatten_lists(data: Any, path: Path) -> Iterator[tuple[list[str], list[WeightedText]]]:
    """The lists in nested mappings with the keys that lead to them; a list at the top has the file's name.

    ValueError where it is nested too deeply or holds more than `MAX_WILDCARD_ENTRIES`; what is no text is left out.
    """
    pending: list[tuple[list[str], Any]] = [([], data)]
    total = 0
    while pending:
        keys, value = pending.pop()
        if isinstance(value, dict):
            if len(keys) >= MAX_WILDCARD_NESTING:
                raise ValueError(f"{path}: nested more than {MAX_WILDCARD_NESTING} deep")
            pending.extend(([*keys, str(key)], inner) for key, inner in reversed(list(value.items())))
            total += len(value)
        elif value not in (None, ""):
            items = value if isinstance(value, list) else [value]
            total += len(items)
            place = f"{path}: {'/'.join(keys)}" if keys else str(path)
            yield keys or [path.stem], [text for item in items for text in read_list_item(item, place)]
        if total > MAX_WILDCARD_ENTRIES:
            raise ValueError(f"{path}: more than {MAX_WILDCARD_ENTRIES} entries")


def read_list_item(item: Any, place: str) -> list[WeightedText]:
    """A text, or {"text": ..., "weight": ...} as dynamicprompts reads it."""
    if isinstance(item, dict):
        text, weight = item.get("text") or item.get("content"), item.get("weight", 1)
        try:
            return [(place, float(weight), text)] if isinstance(text, str) else []
        except (TypeError, ValueError):
            raise ValueError(f"{place}: weight {short_repr(weight)}: must be a number") from None
    return [(place, None, str(item))] if isinstance(item, str | int | float) and str(item).strip() else []
