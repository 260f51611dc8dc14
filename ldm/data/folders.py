"""Folders of images: captions in a metadata file, beside the images, in folder names (kohya), or one for all."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ldm.config import MAX_REPEATS, ImageDataConfig
from ldm.data.shards import is_saved_dataset, open_parquet_files, open_saved_dataset, open_tars
from ldm.data.sources import (
    BROKEN_KINDS,
    LENIENT_KINDS,
    DatasetIssue,
    FileSlice,
    ImageSample,
    ImageSource,
    deduplicate,
    find_missing_columns,
    is_ignored,
    is_image_file,
    is_mask_file,
    list_caption_suffixes,
    match_column,
    read_caption_file,
    skipped_file_issue,
    strip_extension,
    validate_caption,
)
from ldm.data.tables import METADATA_READERS, FileIndex, FileResolver, list_metadata_files, read_metadata_rows

KOHYA_FOLDER_PATTERN = re.compile(r"(\d+)_(.+)")  # <repeats>_<class tokens>
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def open_image_sources(data: ImageDataConfig) -> ImageSource:
    """The images in `data.train_data_dir` with their captions, each folder's format detected, and all issues.

    Formats: a folder with metadata.jsonl, .csv, .tsv, .json or .parquet, or kohya's meta_cap.json, itself or in folders
    below it; a folder of images with captions beside them (.txt, .caption), in folders named <repeats>_<class tokens>
    (kohya), or without any; a folder of webdataset tars, or one tar; a folder of parquet files that hold the images; a
    folder by `datasets.save_to_disk`. Keys from the second folder on are prefixed with its number: "2:a.png".
    """
    samples: list[ImageSample] = []
    issues: list[DatasetIssue] = []
    for number, path in enumerate(data.train_data_dir, 1):
        prefix = f"{number}:" if number > 1 else ""
        source = _open_subset(path, data, number - 1)
        found = [issue._replace(strict=data.strict) for issue in source.issues]
        if data.skip_broken:
            found = [issue.as_left_out() if issue.kind in BROKEN_KINDS else issue for issue in found]
        found += _check_whole_source(path.name, ImageSource(source.samples, found))
        samples += [replace(sample, key=prefix + sample.key) for sample in source.samples]
        issues += [issue._replace(key=prefix + issue.key) for issue in found]
    return ImageSource(samples, issues)


def _open_subset(path: Path, data: ImageDataConfig, k: int) -> ImageSource:
    """The k-th folder, as its `SubsetConfig` says."""
    options, subset = data.for_folder(k), data.subset(k)
    samples, issues = _open_source(path, options, subset.metadata_file)
    prefix, suffix = options.caption_prefix, options.caption_suffix
    if prefix or suffix:
        samples = [replace(sample, caption=f"{prefix} {sample.caption} {suffix}".strip()) for sample in samples]
    if subset.repeats is not None:
        samples = [replace(sample, repeats=subset.repeats) for sample in samples]
    return ImageSource(samples, issues)


def _check_whole_source(name: str, source: ImageSource) -> Iterator[DatasetIssue]:
    """An error where a folder has no images, or none of them a caption, and no other error says why."""
    if any(issue.severity == "error" for issue in source.issues):
        return
    if not source.samples:
        reasons = [f" ({issue.key}: {issue.what})" for issue in source.issues if issue.kind in LENIENT_KINDS]
        yield DatasetIssue("no images", name, f"no images in it that can be used{''.join(reasons[:1])}")
    elif any(issue.kind == "no caption" for issue in source.issues) and not any(s.caption for s in source.samples):
        suffixes = {issue.key: PurePosixPath(issue.key).suffix.lower() for issue in source.issues}
        tables = [key for key, suffix in suffixes.items() if suffix in METADATA_READERS and suffix != ".json"]
        hint = f", or call {tables[0]} metadata{suffixes[tables[0]]}" if tables else ""
        yield DatasetIssue("no captions", name, f"no image has a caption: give data.instance_prompt{hint}")


def split_key(key: str) -> tuple[int, str]:
    """A key's folder, counted from 0, and its path below that folder."""
    number, colon, path = key.partition(":")
    return (int(number) - 1, path) if colon and number.isdigit() else (0, key)


def _open_source(path: Path, data: ImageDataConfig, metadata_file: Path | None = None) -> ImageSource:
    """The images of a folder or a tar, its format detected; `metadata_file` lists them, where it is given."""
    if path.is_file() and path.name.lower().endswith(TAR_SUFFIXES):
        return open_tars([path], data)
    if not path.is_dir():
        return ImageSource((), (DatasetIssue("missing folder", path.name, f"{path} is neither a folder nor a tar"),))
    if is_saved_dataset(path):
        return open_saved_dataset(path, data)
    issues: list[DatasetIssue] = []
    files = list_files(path, issues)
    if metadata_file is not None:
        return _open_listed(files, metadata_file, data, issues)
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


def _open_listed(
    files: FileIndex, metadata_file: Path, data: ImageDataConfig, issues: Sequence[DatasetIssue]
) -> ImageSource:
    """The images of a folder as a table says, which may lie elsewhere."""
    if metadata_file.suffix.lower() not in METADATA_READERS or not metadata_file.is_file():
        kinds = ", ".join(METADATA_READERS)
        return ImageSource((), (DatasetIssue("missing file", str(metadata_file), f"no table in a file: {kinds}"),))
    inside = next((name for name, file in files.items() if file.samefile(metadata_file)), metadata_file.name)
    source = open_metadata_folder({**files, inside: metadata_file}, inside, data)
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
        kind = _kind_of(entry)
        if is_ignored(entry.name):
            issues.append(DatasetIssue("hidden", key, "hidden, or a system file"))
        elif kind == "link to a folder":
            links.append((entry.path, f"{key}/", ancestors))
        elif kind == "folder":
            real = os.path.join(ancestors[-1], entry.name)
            yield from _iter_files(Path(entry.path), f"{key}/", (*ancestors, real), issues, links, seen)
        elif kind == "file":
            yield key, Path(entry.path)
        else:
            issues.append(DatasetIssue("missing file", key, kind))


def _kind_of(entry: os.DirEntry[str]) -> str:
    """What an entry of a folder is, or what is wrong with it."""
    try:
        if entry.is_dir():
            return "link to a folder" if entry.is_symlink() else "folder"
        if entry.is_file():
            return "file"
    except OSError as error:
        return f"a link that cannot be followed ({error.strerror})"
    return "a link to nothing" if entry.is_symlink() and not os.path.exists(entry.path) else "not a file"


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
    if not rows and not issues:
        wrong = [DatasetIssue("no images", metadata_file, "no rows in it, or no header above them")]
    if wrong or not rows:
        return ImageSource((), issues + wrong)
    image_column, caption_column, mask_column = (
        match_column(name, columns)
        for name in (data.image_column or "file_name", data.caption_column, data.mask_column)
    )
    resolve = FileResolver(files)
    masks = {strip_extension(name): name for name in filter(is_mask_file, files)}
    samples, used = [], {metadata_file}
    for row in rows:
        name = resolve(row, image_column, issues)
        if name is None:
            continue
        text = validate_caption(name, row.values.get(caption_column), data.instance_prompt, issues)
        mask = masks.get(strip_extension(name))
        if row.values.get(mask_column):
            mask = resolve(row, mask_column, issues)
        used |= {name} if mask is None else {name, mask}
        if text is not None:
            read_mask = FileSlice(files[mask]) if mask and data.masks == "file" else None
            samples.append(ImageSample(name, text, FileSlice(files[name]), read_mask))
    for name in (name for name in files if name not in used):
        unlisted = DatasetIssue("not listed", name, f"not in {metadata_file}")
        issues.append(unlisted if is_image_file(name) else skipped_file_issue(name))
    return ImageSource(deduplicate(samples, issues), issues)


def open_sidecar_folder(files: FileIndex, data: ImageDataConfig) -> ImageSource:
    """Images with captions beside them, else of their kohya folder's class tokens, else the instance prompt."""
    issues: list[DatasetIssue] = []
    suffixes = list_caption_suffixes(data)
    caption_files = [name for name in files if PurePosixPath(name).suffix.lower() in suffixes]
    caption_files.sort(key=lambda name: suffixes.index(PurePosixPath(name).suffix.lower()))
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
        if file is not None and (text := read_caption_file(files[file], file, issues)) is None:
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
