"""Metadata files of image folders: their rows, and the files below the folder that cells name."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from ldm.data.shards import import_pyarrow
from ldm.data.sources import DatasetIssue, decode_utf8, is_image_file, strip_extension
from ldm.errors import error_text, list_some
from ldm.files import MAX_FILE_BYTES

KOHYA_METADATA_PATTERN = re.compile(r"meta_\w+\.json", re.IGNORECASE)  # {image: {"caption": ..., "tags": ...}}
CSV_DELIMITERS = (",", ";", "\t", "|")
FileIndex = Mapping[str, Path]  # by path below the source, with slashes, in Unicode's NFC


class TableRow(NamedTuple):
    """One row of a table: where it is, for messages, and its values by column."""

    key: str
    values: dict[str, Any]


def list_metadata_files(files: Iterable[str]) -> list[str]:
    """The metadata files of a folder and of those below; kohya's only where there is no other."""
    names = {name: PurePosixPath(name).name.lower() for name in files}
    usual = [name for suffix in METADATA_READERS for name in names if names[name] == f"metadata{suffix}"]
    return usual or [name for name in names if KOHYA_METADATA_PATTERN.fullmatch(names[name])]


def read_metadata_rows(path: Path, issues: list[DatasetIssue]) -> list[TableRow]:
    """The rows of a metadata file; an issue with its line for each that cannot be read."""
    if path.stat().st_size > MAX_FILE_BYTES:
        issues.append(DatasetIssue("malformed file", path.name, f"more than {MAX_FILE_BYTES >> 30} GB"))
        return []
    return list(METADATA_READERS[path.suffix.lower()](path, issues))


def _read_json(path: Path, issues: list[DatasetIssue]) -> Iterator[TableRow]:
    """A list of objects, or an object of images, as kohya's tools write it, or an object per line."""
    text = decode_utf8(path.read_bytes(), path.name, issues)
    try:
        values = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        if text and text.lstrip().startswith("{") and "Extra data" in str(error):
            yield from _read_jsonl(path, issues)
        else:
            issues.append(DatasetIssue("malformed file", path.name, f"not JSON ({error_text(error)})"))
        return
    if isinstance(values, dict) and "file_name" in values:
        values = [values]
    elif isinstance(values, dict):
        values = [_image_row(name, value) for name, value in values.items()]
    if text is not None and not isinstance(values, list):
        issues.append(DatasetIssue("malformed file", path.name, "neither a list nor an object of images"))
        return
    for number, value in enumerate(values or [], 1):
        yield from _object_row(f"{path.name}:{number}", value, issues)


def _image_row(name: str, value: Any) -> dict[str, Any]:
    """A row of an object of images: its caption, or kohya's object, whose text is "caption, tags" to its trainers."""
    if not isinstance(value, dict):
        return {"file_name": name, "text": value}
    parts = [text for key in ("caption", "tags") if (text := value.get(key))]
    return {
        "file_name": name,
        "text": ", ".join(parts) if all(isinstance(p, str) for p in parts) else parts[0],
        **value,
    }


def _object_row(key: str, value: Any, issues: list[DatasetIssue]) -> Iterator[TableRow]:
    if isinstance(value, dict):
        yield TableRow(key, value)
    else:
        issues.append(DatasetIssue("malformed line", key, "not a JSON object"))


def _read_jsonl(path: Path, issues: list[DatasetIssue]) -> Iterator[TableRow]:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = (decode_utf8(data, path.name, issues) or "").encode()
    for number, line in enumerate(data.splitlines(), 1):
        key = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            issues.append(DatasetIssue("malformed line", key, "the line is not UTF-8"))
            continue
        except (ValueError, RecursionError) as error:
            issues.append(DatasetIssue("malformed line", key, f"not JSON ({error_text(error)})"))
            continue
        yield from _object_row(key, values, issues)


def _read_csv(path: Path, issues: list[DatasetIssue]) -> Iterator[TableRow]:
    """The rows below a header, with the delimiter that gives it most columns."""
    text = decode_utf8(path.read_bytes(), path.name, issues)
    if text is None:
        return
    first_line = text.lstrip("\r\n").splitlines()[0] if text.strip() else ""
    delimiter = max(CSV_DELIMITERS, key=lambda mark: len(next(csv.reader([first_line], delimiter=mark), [])))
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, strict=True, delimiter=delimiter, skipinitialspace=delimiter != "\t")
    try:
        header = [name.strip() for name in next(filter(None, reader), [])]
        for cells in reader:
            key = f"{path.name}:{reader.line_num}"
            if len(cells) == len(header) and any(map(str.strip, cells)):
                yield TableRow(key, dict(zip(header, cells, strict=True)))
            elif any(map(str.strip, cells)):
                issues.append(DatasetIssue("unequal line", key, f"{len(cells)} cells under {len(header)} columns"))
    except csv.Error as error:
        issues.append(DatasetIssue("malformed file", f"{path.name}:{reader.line_num}", str(error)))


def _read_parquet(path: Path, issues: list[DatasetIssue]) -> Iterator[TableRow]:
    pa = import_pyarrow(path)
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        issues.append(DatasetIssue("malformed file", path.name, f"not parquet ({str(error).splitlines()[0]})"))
        return
    yield from (TableRow(f"{path.name}:{k + 1}", values) for k, values in enumerate(rows))


METADATA_READERS: dict[str, Callable[[Path, list[DatasetIssue]], Iterator[TableRow]]] = {  # of metadata.<suffix>
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".json": _read_json,
}


class FileResolver:
    """The files of a folder by the names that cells of its table give them.

    Names have slashes of either kind, and may lack the image's suffix; an absolute path may lie in the folder. With a
    notice, letters of another case are taken, another suffix of images, and the end of a path on another machine.
    """

    def __init__(self, files: FileIndex) -> None:
        self.files = files
        self.root = _root_of(files)
        self.by_stem: dict[str, list[str]] = {}
        self.by_spelling: dict[str, list[str]] = {}  # in small letters, with and without the suffix
        for name in filter(is_image_file, files):
            stem = strip_extension(name)
            self.by_stem.setdefault(stem, []).append(name)
            for key in {name.casefold(), stem.casefold()}:
                self.by_spelling.setdefault(key, []).append(name)

    def __call__(self, row: TableRow, column: str, issues: list[DatasetIssue]) -> str | None:
        """The file that a cell names; None with an issue if there is no such file below the folder."""
        value = row.values.get(column)
        value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(value, str) or not value.strip():
            issues.append(DatasetIssue("missing file", row.key, f"the row has no {column}"))
            return None
        spellings = dict.fromkeys(self._normalize(text) for text in (value, value.replace("\\", "/")))
        if exact := [name for name in spellings if name in self.files]:
            return exact[0]
        if len(found := [match for name in spellings for match in self.by_stem.get(name, ())]) == 1:
            return found[0]
        found = next((near for name in spellings for tail in _iter_tails(name) if (near := self._near(tail))), [])
        if len(found) == 1:
            issues.append(DatasetIssue("other spelling", row.key, f"no file {value}: {found[0]} is used"))
            return found[0]
        is_outside = not found and any(_is_absolute(name) or name.split("/")[0] == ".." for name in spellings)
        what = f"no file {value}, but {list_some(found)}" if found else f"no file {value}"
        issue = ("outside", f"{value} leads out of the folder") if is_outside else ("missing file", what)
        issues.append(DatasetIssue(issue[0], row.key, issue[1]))
        return None

    def _normalize(self, text: str) -> str:
        """A path as the index has it; an absolute one below the folder is made relative."""
        name = unicodedata.normalize("NFC", os.path.normpath(text.strip()))
        return name.removeprefix(self.root) if self.root and os.path.isabs(name) else name

    def _near(self, name: str) -> list[str]:
        """The images of a name but for case, else of its stem."""
        stem = strip_extension(name) if is_image_file(name) else name
        return self.by_spelling.get(name.casefold()) or self.by_spelling.get(stem.casefold()) or []


def _root_of(files: FileIndex) -> str:
    """The folder of an index, with a slash at its end; empty where there is none."""
    for name, path in files.items():
        whole = unicodedata.normalize("NFC", os.path.abspath(path))
        if whole.endswith("/" + name):
            return whole[: -len(name)]
    return ""


def _is_absolute(name: str) -> bool:
    return os.path.isabs(name) or PureWindowsPath(name).is_absolute()


def _iter_tails(name: str) -> Iterator[str]:
    """A path, and of an absolute one its ends, from the longest: a folder may have moved from another machine."""
    parts = name.split("/") if _is_absolute(name) else [name]
    yield from ("/".join(parts[k:]) for k in range(len(parts)))
