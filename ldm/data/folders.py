"""Folders of pictures: captions in a metadata file, beside the pictures, in kohya's folder names, or one for all."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.data.sources import (
    CAPTION_SUFFIXES,
    MASK_SUFFIX,
    READABLE_IMAGE_SUFFIXES,
    DatasetIssue,
    FileSlice,
    ImageSample,
    ImageSource,
    SourceOptions,
    decode_utf8,
    deduplicate,
    is_ignored,
    missing_column,
    skipped_file_issue,
    validate_caption,
)
from ldm.data.tables import (
    METADATA_FILES,
    UNSUPPORTED_METADATA_FILE,
    TableRow,
    collect_column_names,
    is_saved_dataset,
    open_parquet_files,
    open_saved_dataset,
    read_metadata_rows,
)
from ldm.data.tars import open_tar

KOHYA_FOLDER_PATTERN = re.compile(r"(\d+)_(.+)")  # <repeats>_<class tokens>
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_REPEATS = 1000  # beyond which the number in a folder's name is likely a year or a count
FileIndex = Mapping[str, Path]  # by path below the source, with slashes, in Unicode's NFC


def open_image_sources(paths: Sequence[Path], options: SourceOptions | None = None) -> ImageSource:
    """All pictures in some places, each told by its content, with their captions and with all that is wrong.

    A place is a folder with metadata.jsonl, .csv or .parquet; a folder of pictures with captions beside them
    (.txt, .caption), in folders named <repeats>_<class tokens> (kohya), or without any; a folder of webdataset tars, or
    one tar; a folder of parquet files that hold the pictures; or a data set that `datasets` saved. Keys from the second
    place on begin with its number.
    """
    samples: list[ImageSample] = []
    faults: list[DatasetIssue] = []
    for number, path in enumerate(paths, 1):
        prefix = f"{number}:" if number > 1 else ""
        found = _open_path(Path(path), options or SourceOptions())
        if not found.samples and not any(fault.is_fatal for fault in found.issues):
            faults.append(DatasetIssue("no pictures", prefix + path.name, "no pictures in it"))
        samples += [replace(sample, key=prefix + sample.key) for sample in found.samples]
        faults += [fault._replace(key=prefix + fault.key) for fault in found.issues]
    return ImageSource(samples, faults)


def _open_path(path: Path, options: SourceOptions) -> ImageSource:
    if path.is_file() and path.name.lower().endswith(TAR_SUFFIXES):
        return open_tars([path], options)
    if not path.is_dir():
        return ImageSource((), (DatasetIssue("missing folder", path.name, f"{path} is neither a folder nor a tar"),))
    if is_saved_dataset(path):
        return open_saved_dataset(path, options)
    faults: list[DatasetIssue] = []
    files = list_files(path, faults)
    tars = [file for name, file in files.items() if name.lower().endswith(TAR_SUFFIXES)]
    tables = [name for name in METADATA_FILES if name in files]
    parquets = {name: file for name, file in files.items() if name.lower().endswith(".parquet")}
    if tars:
        found = open_tars(tars, options)
        faults += [
            DatasetIssue("skipped", name, "lies beside tars") for name, file in files.items() if file not in tars
        ]
    elif len(tables) > 1:
        found = ImageSource((), (DatasetIssue("two metadata files", tables[1], f"there is {tables[0]} too"),))
    elif tables:
        found = open_metadata_folder(files, tables[0], options)
    elif parquets and not any(map(is_image_file, files)):
        found = open_parquet_files(parquets, options)
        faults += [DatasetIssue("skipped", name, "lies beside parquet files") for name in files if name not in parquets]
    elif UNSUPPORTED_METADATA_FILE in files:
        what = "not read: the file must be metadata.jsonl, one object a line"
        found = ImageSource((), (DatasetIssue("metadata.json", UNSUPPORTED_METADATA_FILE, what),))
    else:
        found = open_sidecar_folder(files, options)
    return ImageSource(found.samples, [*faults, *found.issues])


def open_tars(paths: Sequence[Path], options: SourceOptions) -> ImageSource:
    """The samples of some tars together, by their keys."""
    faults: list[DatasetIssue] = []
    samples = [sample for path in sorted(paths) for sample in open_tar(path, options, faults)]
    return ImageSource(deduplicate(samples, faults), faults)


def list_files(root: Path, issues: list[DatasetIssue]) -> FileIndex:
    """The files below a folder, by name; links are followed, those that lead back to where they are are faults."""
    return dict(sorted(_iter_files(root, "", (os.path.realpath(root),), issues)))


def _iter_files(
    folder: Path, prefix: str, ancestors: tuple[str, ...], issues: list[DatasetIssue]
) -> Iterator[tuple[str, Path]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        issues.append(DatasetIssue("unreadable", prefix.rstrip("/"), error.strerror or "cannot be read"))
        return
    for entry in entries:
        key = prefix + unicodedata.normalize("NFC", entry.name)
        if is_ignored(entry.name):
            issues.append(DatasetIssue("skipped", key, "hidden, or made by a machine"))
        elif entry.is_dir():
            real = os.path.realpath(entry.path)
            if real in ancestors:
                issues.append(DatasetIssue("symlink loop", key, f"leads back to {real}"))
            else:
                yield from _iter_files(Path(entry.path), f"{key}/", (*ancestors, real), issues)
        elif entry.is_file():
            yield key, Path(entry.path)
        else:
            issues.append(
                DatasetIssue("missing file", key, "a link to nothing" if entry.is_symlink() else "not a file")
            )


def is_image_file(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in READABLE_IMAGE_SUFFIXES and not name.lower().endswith(MASK_SUFFIX)


def strip_extension(name: str) -> str:
    """A name without its ending, or without all of a mask's."""
    return name[: -len(MASK_SUFFIX)] if name.lower().endswith(MASK_SUFFIX) else str(PurePosixPath(name).with_suffix(""))


def open_metadata_folder(files: FileIndex, metadata_file: str, options: SourceOptions) -> ImageSource:
    """Pictures and captions as a metadata file lists them; pictures that it does not list are faults."""
    faults: list[DatasetIssue] = []
    rows = read_metadata_rows(files[metadata_file], faults)
    image, caption, mask = (options.columns.image or "file_name", *options.columns[1:])
    present = sorted(collect_column_names(rows))
    wrong = [c for c in (image, *([caption] if options.default_caption is None else [])) if c not in present]
    if wrong or not rows:
        return ImageSource((), faults + [missing_column(column, present, metadata_file) for column in wrong if rows])
    masks = {strip_extension(name): name for name in files if name.lower().endswith(MASK_SUFFIX)}
    samples, used = [], set()
    for row in rows:
        name = _resolve_file_cell(row, image, files, faults)
        if name is None:
            continue
        text = validate_caption(name, row.values.get(caption), options.default_caption, faults)
        shade = (
            _resolve_file_cell(row, mask, files, faults) if row.values.get(mask) else masks.get(strip_extension(name))
        )
        used |= {name, shade}
        if text is not None:
            told = FileSlice(files[shade]) if shade and options.masks == "file" else None
            samples.append(ImageSample(name, text, FileSlice(files[name]), told))
    faults += [unlisted_file_issue(name, metadata_file) for name in files if name not in used and name != metadata_file]
    return ImageSource(deduplicate(samples, faults), faults)


def unlisted_file_issue(name: str, metadata_file: str) -> DatasetIssue:
    """Why a file that the metadata file does not name is left out."""
    if name.lower().endswith(MASK_SUFFIX):
        return DatasetIssue("mask without picture", name, "no picture of that name")
    return (
        DatasetIssue("no caption", name, f"not in {metadata_file}") if is_image_file(name) else skipped_file_issue(name)
    )


def _resolve_file_cell(row: TableRow, column: str, files: FileIndex, issues: list[DatasetIssue]) -> str | None:
    """The file that a cell names, None with a fault where there is none, or none below the folder."""
    value: Any = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        issues.append(DatasetIssue("missing file", row.key, f"the row has no {column}"))
        return None
    name = unicodedata.normalize("NFC", os.path.normpath(value.strip()))
    if os.path.isabs(name) or name.split("/")[0] == "..":
        issues.append(DatasetIssue("outside", row.key, f"{value} leads out of the folder"))
    elif name in files:
        return name
    else:
        same = next((other for other in files if other.casefold() == name.casefold()), None)
        issues.append(
            DatasetIssue("missing file", row.key, f"no file {value}" + (f"; there is {same}" if same else ""))
        )
    return None


def open_sidecar_folder(files: FileIndex, options: SourceOptions) -> ImageSource:
    """Pictures with captions beside them; without one, a kohya folder's class tokens, or the caption for all."""
    faults: list[DatasetIssue] = []
    texts = _index_by_stem(
        (name for name in files if PurePosixPath(name).suffix.lower() in CAPTION_SUFFIXES), "two captions", faults
    )
    masks = _index_by_stem((name for name in files if name.lower().endswith(MASK_SUFFIX)), "two masks", faults)
    owners: dict[str, str] = {}
    samples = []
    for name in filter(is_image_file, files):
        base = strip_extension(name)
        if base in texts and owners.setdefault(base, name) != name:
            faults.append(DatasetIssue("shared caption", name, f"{texts[base]} is {owners[base]}'s as well"))
            continue
        owners[base] = name
        repeats, tokens = _parse_kohya_folder(name)
        text = _read_sidecar_caption(name, texts.get(base), files, tokens or options.default_caption, faults)
        mask = FileSlice(files[masks[base]]) if base in masks and options.masks == "file" else None
        if text is not None:
            samples.append(ImageSample(name, text, FileSlice(files[name]), mask, repeats))
    for kind, strays in (("caption without picture", texts), ("mask without picture", masks)):
        faults += [
            DatasetIssue(kind, strays[base], "no picture of that name") for base in strays.keys() - owners.keys()
        ]
    known = {*texts.values(), *masks.values(), *(fault.key for fault in faults)}
    faults += [skipped_file_issue(name) for name in files if not is_image_file(name) and name not in known]
    return ImageSource(samples, faults + _check_repeats(samples))


def _read_sidecar_caption(
    name: str, caption_file: str | None, files: FileIndex, fallback: str | None, issues: list[DatasetIssue]
) -> str | None:
    """A picture's caption from the file beside it, None with a fault where that cannot be used."""
    if caption_file is None:
        return validate_caption(name, None, fallback, issues)
    text = decode_utf8(files[caption_file].read_bytes(), caption_file, issues)
    return None if text is None else validate_caption(caption_file, text, fallback, issues)


def _index_by_stem(names: Iterator[str], kind: str, issues: list[DatasetIssue]) -> dict[str, str]:
    """Files by their stem; a second one of a stem is a fault."""
    found: dict[str, str] = {}
    for name in names:
        if strip_extension(name) in found:
            issues.append(DatasetIssue(kind, name, f"there is {found[strip_extension(name)]} too"))
        found.setdefault(strip_extension(name), name)
    return found


def _parse_kohya_folder(name: str) -> tuple[int, str | None]:
    """Repeats and class tokens by the first folder of a path."""
    match = KOHYA_FOLDER_PATTERN.fullmatch(name.split("/")[0]) if "/" in name else None
    return (int(match[1]), match[2].strip()) if match else (1, None)


def _check_repeats(samples: Sequence[ImageSample]) -> list[DatasetIssue]:
    folders = {sample.key.split("/")[0]: sample.repeats for sample in samples}
    what = "would be repeated {} times: rename the folder if that is no number of repeats"
    return [DatasetIssue("repeats", n, what.format(r)) for n, r in folders.items() if not 0 < r <= MAX_REPEATS]
