"""Folders of images: captions in a metadata file, beside the images, in folder names (kohya), or one for all."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ldm.config import ImageDataConfig
from ldm.data.shards import import_pyarrow, is_saved_dataset, open_parquet_files, open_saved_dataset, open_tars
from ldm.data.sources import (
    CAPTION_SUFFIXES,
    MASK_SUFFIX,
    DatasetIssue,
    FileSlice,
    ImageSample,
    ImageSource,
    decode_utf8,
    deduplicate,
    find_missing_columns,
    is_ignored,
    is_image_file,
    is_mask_file,
    skipped_file_issue,
    validate_caption,
)
from ldm.errors import error_text

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json")
KOHYA_METADATA_PATTERN = re.compile(r"meta_\w+\.json")  # of kohya's tools: {image: {"caption": ..., "tags": ...}}
KOHYA_FOLDER_PATTERN = re.compile(r"(\d+)_(.+)")  # <repeats>_<class tokens>
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
CSV_DELIMITERS = (",", ";", "\t")
MAX_REPEATS = 1000  # above this, the number in a folder's name is likely a year or a count
FileIndex = Mapping[str, Path]  # by path below the source, with slashes, in Unicode's NFC


def open_image_sources(data: ImageDataConfig) -> ImageSource:
    """The images in `data.train_data_dir` with their captions, each folder's format detected, and all issues.

    Formats: a folder with metadata.jsonl, .csv or .parquet; a folder of images with captions beside them (.txt,
    .caption), in folders named <repeats>_<class tokens> (kohya), or without any; a folder of webdataset tars, or one
    tar; a folder of parquet files that hold the images; a folder by `datasets.save_to_disk`. Keys from the second
    folder on are prefixed with its number: "2:a.png".
    """
    samples: list[ImageSample] = []
    issues: list[DatasetIssue] = []
    for number, path in enumerate(data.train_data_dir, 1):
        prefix = f"{number}:" if number > 1 else ""
        source = _open_source(path, data)
        if not source.samples and not any(issue.severity == "error" for issue in source.issues):
            issues.append(DatasetIssue("no images", prefix + path.name, "no images in it"))
        samples += [replace(sample, key=prefix + sample.key) for sample in source.samples]
        issues += [issue._replace(key=prefix + issue.key, strict=data.strict) for issue in source.issues]
    return ImageSource(samples, issues)


def split_key(key: str) -> tuple[int, str]:
    """A key's folder, counted from 0, and its path below that folder."""
    number, colon, path = key.partition(":")
    return (int(number) - 1, path) if colon and number.isdigit() else (0, key)


def _open_source(path: Path, data: ImageDataConfig) -> ImageSource:
    if path.is_file() and path.name.lower().endswith(TAR_SUFFIXES):
        return open_tars([path], data)
    if not path.is_dir():
        return ImageSource((), (DatasetIssue("missing folder", path.name, f"{path} is neither a folder nor a tar"),))
    if is_saved_dataset(path):
        return open_saved_dataset(path, data)
    issues: list[DatasetIssue] = []
    files = list_files(path, issues)
    tars = [file for name, file in files.items() if name.lower().endswith(TAR_SUFFIXES)]
    tables = list_metadata_files(files)
    parquets = {name: file for name, file in files.items() if name.lower().endswith(".parquet")}
    if tars:
        source = open_tars(tars, data)
        issues += [DatasetIssue("skipped", name, "lies beside tars") for name in files if files[name] not in tars]
    elif tables:
        source = open_metadata_folders(files, tables, data)
    elif parquets and not any(map(is_image_file, files)):
        source = open_parquet_files(parquets, data)
        issues += [DatasetIssue("skipped", name, "lies beside parquet files") for name in files if name not in parquets]
    else:
        source = open_sidecar_folder(files, data)
    return ImageSource(source.samples, [*issues, *source.issues])


def list_files(root: Path, issues: list[DatasetIssue]) -> FileIndex:
    """All files below a folder by relative path; an issue for each link that leads back to a parent.

    Links are followed after everything else, and each folder is listed once, however many links lead to it.
    """
    files: dict[str, Path] = {}
    links: deque[tuple[str, str, tuple[str, ...]]] = deque([(str(root), "", ())])
    seen: set[str] = set()
    while links:
        path, prefix, ancestors = links.popleft()
        real = os.path.realpath(path)
        if real in ancestors:
            issues.append(DatasetIssue("symlink loop", prefix.rstrip("/"), f"leads back to {real}"))
        elif real in seen:
            issues.append(DatasetIssue("skipped", prefix.rstrip("/"), f"leads to {real}, which is listed already"))
        else:
            files |= _iter_files(Path(path), prefix, (*ancestors, real), issues, links, seen)
    return dict(sorted(files.items()))


def _iter_files(
    folder: Path,
    prefix: str,
    ancestors: tuple[str, ...],
    issues: list[DatasetIssue],
    links: deque[tuple[str, str, tuple[str, ...]]],
    seen: set[str],
) -> Iterator[tuple[str, Path]]:
    """The files of a folder and the folders in it; links to folders are added to `links`, what is listed to `seen`."""
    seen.add(ancestors[-1])
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        issues.append(DatasetIssue("unreadable", prefix.rstrip("/"), error.strerror or "cannot be read"))
        return
    for entry in entries:
        key = prefix + unicodedata.normalize("NFC", entry.name)
        if is_ignored(entry.name):
            issues.append(DatasetIssue("skipped", key, "hidden, or a system file"))
        elif entry.is_dir() and entry.is_symlink():
            links.append((entry.path, f"{key}/", ancestors))
        elif entry.is_dir():
            real = os.path.realpath(entry.path)
            yield from _iter_files(Path(entry.path), f"{key}/", (*ancestors, real), issues, links, seen)
        elif entry.is_file():
            yield key, Path(entry.path)
        else:
            what = "a link to nothing" if entry.is_symlink() else "not a file"
            issues.append(DatasetIssue("missing file", key, what))


def strip_extension(name: str) -> str:
    """A path without its suffix, or without `.mask.png`."""
    return name[: -len(MASK_SUFFIX)] if is_mask_file(name) else str(PurePosixPath(name).with_suffix(""))


def list_metadata_files(files: FileIndex) -> list[str]:
    """The metadata files of a folder and of those below; kohya's only where there is no other."""
    usual = [name for known in METADATA_FILES for name in files if PurePosixPath(name).name == known]
    return usual or [name for name in files if KOHYA_METADATA_PATTERN.fullmatch(PurePosixPath(name).name)]


def open_metadata_folders(files: FileIndex, tables: Sequence[str], data: ImageDataConfig) -> ImageSource:
    """Images and captions of each folder that has a metadata file, which lists what is below it."""
    by_folder: dict[str, str] = {}
    samples: list[ImageSample] = []
    issues: list[DatasetIssue] = []
    for table in tables:
        if (first := by_folder.setdefault(table[: -len(PurePosixPath(table).name)], table)) != table:
            return ImageSource((), (DatasetIssue("two metadata files", table, f"there is {first} too"),))
    owner = {name: max((f for f in by_folder if name.startswith(f)), key=len, default=None) for name in files}
    for folder, table in by_folder.items():
        own = {name[len(folder) :]: file for name, file in files.items() if owner[name] == folder}
        source = open_metadata_folder(own, table[len(folder) :], data)
        samples += [replace(sample, key=folder + sample.key) for sample in source.samples]
        issues += [issue._replace(key=folder + issue.key) for issue in source.issues]
    for name in (name for name in files if owner[name] is None):
        stray = DatasetIssue("not listed", name, "in no folder with a metadata file")
        issues.append(stray if is_image_file(name) else skipped_file_issue(name))
    return ImageSource(samples, issues)


def open_metadata_folder(files: FileIndex, metadata_file: str, data: ImageDataConfig) -> ImageSource:
    """Images and captions as a metadata file lists them; an issue for each image that it does not list."""
    issues: list[DatasetIssue] = []
    rows = read_metadata_rows(files[metadata_file], issues)
    columns = sorted({name for row in rows for name in row.values})
    wrong = find_missing_columns(data, "file_name", columns, metadata_file) if rows else []
    if wrong or not rows:
        return ImageSource((), issues + wrong)
    masks = {strip_extension(name): name for name in filter(is_mask_file, files)}
    samples, used = [], {metadata_file}
    for row in rows:
        name = _resolve_file_cell(row, data.image_column or "file_name", files, issues)
        if name is None:
            continue
        text = validate_caption(name, row.values.get(data.caption_column), data.instance_prompt, issues)
        mask = masks.get(strip_extension(name))
        if row.values.get(data.mask_column):
            mask = _resolve_file_cell(row, data.mask_column, files, issues)
        used |= {name} if mask is None else {name, mask}
        if text is not None:
            read_mask = FileSlice(files[mask]) if mask and data.masks == "file" else None
            samples.append(ImageSample(name, text, FileSlice(files[name]), read_mask))
    for name in (name for name in files if name not in used):
        unlisted = DatasetIssue("not listed", name, f"not in {metadata_file}")
        issues.append(unlisted if is_image_file(name) else skipped_file_issue(name))
    return ImageSource(deduplicate(samples, issues), issues)


class TableRow(NamedTuple):
    """One row of a table: where it is, for messages, and its values by column."""

    key: str
    values: dict[str, Any]


def read_metadata_rows(path: Path, issues: list[DatasetIssue]) -> list[TableRow]:
    """The rows of a metadata file; an issue with its line for each that cannot be read."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet, ".json": _read_json}
    return list(readers[path.suffix](path, issues))


def _read_json(path: Path, issues: list[DatasetIssue]) -> Iterator[TableRow]:
    """A list of objects, or kohya's object of images, of which `caption` is the text, else `tags`."""
    text = decode_utf8(path.read_bytes(), path.name, issues)
    try:
        values = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        issues.append(DatasetIssue("malformed line", path.name, f"not JSON ({error_text(error)})"))
        return
    if isinstance(values, dict) and all(isinstance(value, dict) for value in values.values()):
        values = [
            {"file_name": name, "text": value.get("caption", value.get("tags")), **value}
            for name, value in values.items()
        ]
    if text is not None and not isinstance(values, list):
        issues.append(DatasetIssue("malformed line", path.name, "neither a list of objects nor an object of images"))
        return
    for number, value in enumerate(values or [], 1):
        if isinstance(value, dict):
            yield TableRow(f"{path.name}:{number}", value)
        else:
            issues.append(DatasetIssue("malformed line", f"{path.name}:{number}", "not a JSON object"))


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
            issues.append(DatasetIssue("not UTF-8", key, "the line is not UTF-8"))
            continue
        except (ValueError, RecursionError) as error:
            issues.append(DatasetIssue("malformed line", key, f"not JSON ({error})"))
            continue
        if isinstance(values, dict):
            yield TableRow(key, values)
        else:
            issues.append(DatasetIssue("malformed line", key, "not a JSON object"))


def _read_csv(path: Path, issues: list[DatasetIssue]) -> Iterator[TableRow]:
    text = decode_utf8(path.read_bytes(), path.name, issues)
    if text is None:
        return
    first_line = text.lstrip("\r\n").splitlines()[0] if text.strip() else ""
    delimiter = max(CSV_DELIMITERS, key=lambda mark: len(next(csv.reader([first_line], delimiter=mark), [])))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        header = next(reader, [])
        for cells in filter(None, reader):
            key = f"{path.name}:{reader.line_num}"
            if len(cells) == len(header):
                yield TableRow(key, dict(zip(header, cells, strict=True)))
            else:
                issues.append(DatasetIssue("unequal line", key, f"{len(cells)} cells under {len(header)} columns"))
    except csv.Error as error:
        issues.append(DatasetIssue("malformed line", f"{path.name}:{reader.line_num}", str(error)))


def _read_parquet(path: Path, issues: list[DatasetIssue]) -> Iterator[TableRow]:
    pa = import_pyarrow(path)
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        issues.append(DatasetIssue("malformed line", path.name, f"not parquet ({str(error).splitlines()[0]})"))
        return
    yield from (TableRow(f"{path.name}:{k + 1}", values) for k, values in enumerate(rows))


def _resolve_file_cell(row: TableRow, column: str, files: FileIndex, issues: list[DatasetIssue]) -> str | None:
    """The file that a cell names; None with an issue if there is no such file below the folder."""
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        issues.append(DatasetIssue("missing file", row.key, f"the row has no {column}"))
        return None
    spellings = dict.fromkeys(_normalize_path(text, files) for text in (value, value.replace("\\", "/")))
    for name in spellings:
        if name in files:
            return name
    for name in spellings:
        key, index = name.casefold(), _index_spellings(tuple(files))
        if len(found := index.get(key, ())) == 1:
            issues.append(DatasetIssue("other spelling", row.key, f"no file {value}: {found[0]} is used"))
            return found[0]
    if any(os.path.isabs(name) or name.split("/")[0] == ".." for name in spellings):
        issues.append(DatasetIssue("outside", row.key, f"{value} leads out of the folder"))
    else:
        issues.append(DatasetIssue("missing file", row.key, f"no file {value}"))
    return None


def _normalize_path(text: str, files: FileIndex) -> str:
    """A path as the index has it; an absolute one below the folder is made relative."""
    name = unicodedata.normalize("NFC", os.path.normpath(text.strip()))
    root = _root_of(files) if os.path.isabs(name) else ""
    return name.removeprefix(root) if root else name


def _root_of(files: FileIndex) -> str:
    """The folder of an index, with a slash at its end; empty where there is none."""
    for name, path in files.items():
        whole = unicodedata.normalize("NFC", os.path.abspath(path))
        if whole.endswith("/" + name):
            return whole[: -len(name)]
    return ""


@lru_cache(maxsize=2)
def _index_spellings(names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Images by their path in small letters, with and without its suffix."""
    index: dict[str, tuple[str, ...]] = {}
    for name in filter(is_image_file, names):
        for key in {name.casefold(), strip_extension(name).casefold()}:
            index[key] = (*index.get(key, ()), name)
    return index


def open_sidecar_folder(files: FileIndex, data: ImageDataConfig) -> ImageSource:
    """Images with captions beside them, else of their kohya folder's class tokens, else the instance prompt."""
    issues: list[DatasetIssue] = []
    caption_files = [name for name in files if PurePosixPath(name).suffix.lower() in CAPTION_SUFFIXES]
    caption_files.sort(key=lambda name: not name.lower().endswith(data.caption_extension))
    captions = _index_by_stem(caption_files, "two captions", issues)
    _adopt_captions(captions, files, issues)
    masks = _index_by_stem(filter(is_mask_file, files), "two masks", issues)
    owners: dict[str, str] = {}  # the image that has a stem's caption
    samples = []
    for name in filter(is_image_file, files):
        stem = strip_extension(name)
        if stem in captions and owners.setdefault(stem, name) != name:
            issues.append(DatasetIssue("shared caption", name, f"{captions[stem]} belongs to {owners[stem]} as well"))
        owners.setdefault(stem, name)
        repeats, tokens = _parse_kohya_folder(name)
        file, fallback, text = captions.get(stem), tokens or data.instance_prompt, None
        if file is not None and (text := decode_utf8(files[file].read_bytes(), file, issues)) is None:
            continue
        text = validate_caption(file or name, text, fallback, issues)
        mask = FileSlice(files[masks[stem]]) if stem in masks and data.masks == "file" else None
        if text is not None:
            samples.append(ImageSample(name, text, FileSlice(files[name]), mask, repeats))
    strays = [file for stem, file in captions.items() if stem not in owners]
    issues += [DatasetIssue("caption without image", file, "no image of that name") for file in strays]
    known = {*captions.values(), *(file for stem, file in masks.items() if stem in owners)}
    known |= {issue.key for issue in issues}
    issues += [skipped_file_issue(name) for name in files if not is_image_file(name) and name not in known]
    folders = {sample.key.split("/")[0]: sample.repeats for sample in samples}
    what = "would be repeated {} times: rename the folder if that is not meant as repeats"
    issues += [DatasetIssue("repeats", n, what.format(r)) for n, r in folders.items() if not 0 < r <= MAX_REPEATS]
    return ImageSource(samples, issues)


def _adopt_captions(captions: dict[str, str], files: FileIndex, issues: list[DatasetIssue]) -> None:
    """Give `a.png.txt`, and `B.txt` of `b.PNG`, to images that have no caption, with a notice; in place."""
    by_case: dict[str, list[str]] = {}
    stems = [strip_extension(name) for name in files if is_image_file(name)]
    for stem in captions.keys() - set(stems):
        plain = strip_extension(stem) if is_image_file(stem) else stem
        by_case.setdefault(plain.casefold(), []).append(stem)
    for stem in stems:
        other = by_case.get(stem.casefold(), [])
        if stem not in captions and len(other) == 1:
            captions[stem] = captions[other[0]]
            issues.append(DatasetIssue("other spelling", captions[stem], f"is the caption of {stem}"))
    for stem in {stem for group in by_case.values() for stem in group}:
        if any(captions[stem] == captions.get(name) for name in stems):
            del captions[stem]


def _index_by_stem(names: Iterable[str], kind: str, issues: list[DatasetIssue]) -> dict[str, str]:
    """Files by their stem; an issue for a second one of a stem."""
    by_stem: dict[str, str] = {}
    for name in names:
        if (first := by_stem.setdefault(strip_extension(name), name)) != name:
            issues.append(DatasetIssue(kind, name, f"there is {first} too"))
    return by_stem


def _parse_kohya_folder(name: str) -> tuple[int, str | None]:
    """Repeats and class tokens by the first folder of a path."""
    match = KOHYA_FOLDER_PATTERN.fullmatch(name.split("/")[0]) if "/" in name else None
    return (int(match[1]), match[2].strip()) if match else (1, None)
