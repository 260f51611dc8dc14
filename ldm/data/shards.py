"""Images packed in shards: webdataset tars, parquet files, and the arrow files of `datasets.save_to_disk`."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.config import ImageDataConfig
from ldm.data.sources import (
    MASK_SUFFIX,
    DatasetIssue,
    FileSlice,
    ImageSample,
    ImageSource,
    decode_utf8,
    deduplicate,
    find_missing_columns,
    is_ignored,
    list_caption_suffixes,
    list_image_suffixes,
    match_column,
    skipped_file_issue,
    validate_caption,
)
from ldm.errors import error_text
from ldm.installation import install_command

TAR_EXTENSION_TYPES = (  # headers that hold the names and attributes of the next member
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
MAX_TAR_HEADER_SIZE = 1 << 20
MembersBySuffix = dict[str, tuple[str, FileSlice]]  # the members of one key of a tar: name and content by suffix


def open_tars(paths: Sequence[Path], data: ImageDataConfig) -> ImageSource:
    """The samples of tars whose members `key.jpg`, `key.txt`, `key.json` are one sample; read in place."""
    issues: list[DatasetIssue] = []
    return ImageSource(
        deduplicate((s for path in sorted(paths) for s in _open_tar(path, data, issues)), issues), issues
    )


def _open_tar(path: Path, data: ImageDataConfig, issues: list[DatasetIssue]) -> list[ImageSample]:
    """The samples of a tar; of a truncated one those before the cut, and an issue."""
    groups: dict[str, MembersBySuffix] = {}
    for name, file in _list_members(path, issues):
        base, suffix = base_plus_ext(name)
        if any(map(is_ignored, name.split("/"))):
            issues.append(DatasetIssue("hidden", name, "hidden, or a system file"))
        elif suffix in groups.setdefault(base, {}):
            issues.append(DatasetIssue("duplicate", name, f"is in {path.name} twice"))
        else:
            groups[base][suffix] = name, file
    samples = [_make_sample(members, data, issues) for members in groups.values()]
    return [sample for sample in samples if sample is not None]


def base_plus_ext(name: str) -> tuple[str, str]:
    """A member's key and suffix, `a.b/0001` and `.mask.png`: a key ends before the first dot of the last component."""
    folder, last = posixpath.split(name)
    stem, dot, suffix = last.partition(".")
    return posixpath.join(folder, stem), (dot + suffix).lower()


class _BoundedTarInfo(tarfile.TarInfo):
    """A header of a tar; ReadError, before memory is allocated, for a long name or pax record of absurd length."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        if self.type in TAR_EXTENSION_TYPES and not 0 <= self.size <= MAX_TAR_HEADER_SIZE:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def _list_members(path: Path, issues: list[DatasetIssue]) -> list[tuple[str, FileSlice]]:
    """Names of a tar's files and their slices of it; of a truncated tar those that are complete."""
    found: list[tuple[str, FileSlice]] = []
    slices: dict[str, FileSlice] = {}  # of `found`, for links
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":  # gzip
            issues.append(DatasetIssue("compressed tar", path.name, "members cannot be read in place: unpack the .gz"))
            return []
    try:
        file_size = path.stat().st_size
        with tarfile.open(path, "r:", tarinfo=_BoundedTarInfo) as tar:
            for member in tar:
                if member.size < 0 or member.offset_data + member.size > file_size:
                    raise tarfile.ReadError(f"a member of {member.size} bytes is beyond its end")
                name = posixpath.normpath(member.name)
                file_slice = slices.get(posixpath.normpath(member.linkname)) if member.islnk() else None
                if member.isfile():
                    file_slice = FileSlice(path, member.offset_data, member.size)
                if file_slice:
                    slices[name] = file_slice
                    found.append((name, file_slice))
                elif not member.isdir():
                    issues.append(DatasetIssue("skipped", name, "a link or a device"))
            if tar.offset >= file_size:
                issues.append(DatasetIssue("truncated tar", path.name, "has no end-of-archive mark"))
    except (
        tarfile.TarError,
        OverflowError,
        ValueError,
        OSError,
        MemoryError,
    ) as error:  # raised after the truncated member itself, whose sample is left out
        issues.append(DatasetIssue("truncated tar", path.name, error_text(error)))
        torn = base_plus_ext(found[-1][0])[0] if found else None
        return [member for member in found if base_plus_ext(member[0])[0] != torn]
    return found


def _make_sample(members: MembersBySuffix, data: ImageDataConfig, issues: list[DatasetIssue]) -> ImageSample | None:
    """The sample of one key; None with an issue if it has no image or no caption."""
    caption_suffixes = list_caption_suffixes(data)
    images, texts = ([members[s] for s in order if s in members] for order in (list_image_suffixes(), caption_suffixes))
    for kind, (first, *more) in (("duplicate", images), ("two captions", texts)) if images and texts else ():
        issues += [DatasetIssue(kind, name, f"there is {first[0]} too") for name, _ in more]
    if not images:
        for suffix, (name, _) in members.items():
            stray = DatasetIssue("caption without image", name, "no image of that key")
            issues.append(stray if suffix in (*caption_suffixes, ".json") else skipped_file_issue(name))
        return None
    name, file = images[0]
    num_issues = len(issues)
    text = decode_utf8(texts[0][1](), texts[0][0], issues) if texts else _read_json_caption(members, data, issues)
    if len(issues) > num_issues:
        return None
    caption = validate_caption(name, text, data.instance_prompt, issues)
    mask = members[MASK_SUFFIX][1] if data.masks == "file" and MASK_SUFFIX in members else None
    return None if caption is None else ImageSample(name, caption, file, mask)


def _read_json_caption(members: MembersBySuffix, data: ImageDataConfig, issues: list[DatasetIssue]) -> Any:
    """The value of the caption column in a sample's `.json` member, if it has one."""
    if ".json" not in members:
        return None
    name, file = members[".json"]
    try:
        values = json.loads(file().decode("utf-8-sig"))
    except UnicodeDecodeError:
        issues.append(DatasetIssue("not UTF-8", name, "not UTF-8"))
        return None
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        issues.append(DatasetIssue("malformed line", name, f"not JSON ({what})"))
        return None
    values = values if isinstance(values, dict) else {}
    issues += find_missing_columns(data, None, values, name)
    return values.get(match_column(data.caption_column, values))


def import_pyarrow(path: Path | None = None) -> Any:
    """pyarrow; ValueError that names the path and says how to install it."""
    try:
        import pyarrow
    except ImportError:
        place = f"{path}: " if path else ""
        raise ValueError(f"{place}needs pyarrow: {install_command('data')}") from None
    return pyarrow


def is_saved_dataset(folder: Path) -> bool:
    """Was a folder written by `datasets.save_to_disk`?"""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


@dataclass(frozen=True, slots=True)
class TableCell:
    """Reads the image in a cell, {bytes, path} or bytes, of an arrow file, or of a row group of a parquet file."""

    file: Path
    column: str
    row: int  # from the start of the row group
    row_group: int | None = None

    def __call__(self) -> bytes:
        value = _read_column(self.file, self.column, self.row_group)[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            return FileSlice(Path(value["path"]))()
        if not isinstance(data, bytes):
            raise OSError(f"{self.file}: row {self.row} of {self.column!r} holds no image")
        return data


def _read_column(file: Path, column: str, row_group: int | None) -> Any:
    """A column of an arrow file (no row group), memory-mapped, or of a parquet file's row group, read as a whole."""
    return _open_arrow_table(file)[column] if row_group is None else _read_row_group(file, column, row_group)


@lru_cache(maxsize=2)
def _read_row_group(file: Path, column: str, row_group: int) -> Any:
    pa = import_pyarrow(file)
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file).read_row_group(row_group, [column])[column]
    except pa.ArrowException as error:
        raise OSError(f"{file}: {str(error).splitlines()[0]}") from None


@lru_cache(maxsize=16)
def _open_arrow_table(file: Path) -> Any:
    pa = import_pyarrow(file)
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def open_saved_dataset(folder: Path, data: ImageDataConfig) -> ImageSource:
    """The samples that `datasets.save_to_disk` wrote, of the split "train" if it has splits; keys are row numbers."""
    issues: list[DatasetIssue] = []
    pa = import_pyarrow(folder)
    if (folder / "dataset_dict.json").is_file():
        folder = folder / "train"
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
        tables = {file: _open_arrow_table(file) for file in files}
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return ImageSource((), (DatasetIssue("corrupt dataset", folder.name, f"not a saved dataset ({error})"),))
    columns = [name for table in [*tables.values()][:1] for name in table.column_names]
    if wrong := find_missing_columns(data, "image", columns, folder.name):
        return ImageSource((), wrong)
    samples: list[ImageSample] = []
    first = 0
    for file, table in tables.items():
        keys = [f"row-{first + row:07d}" for row in range(len(table))]
        samples += _iter_samples(file, None, keys, columns, data, issues)
        first += len(table)
    return ImageSource(samples, issues)


def open_parquet_files(files: Mapping[str, Path], data: ImageDataConfig) -> ImageSource:
    """The samples of parquet files that hold images, as on the hub; a key is the file's name and the row's number."""
    issues: list[DatasetIssue] = []
    samples = [sample for name, path in files.items() for sample in _iter_parquet(name, path, data, issues)]
    return ImageSource(samples, issues)


def _iter_parquet(name: str, path: Path, data: ImageDataConfig, issues: list[DatasetIssue]) -> Iterator[ImageSample]:
    pa = import_pyarrow(path)
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if wrong := find_missing_columns(data, "image", columns, name):
            return issues.extend(wrong)
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            keys = [f"{name}:{first + row:07d}" for row in range(count)]
            yield from _iter_samples(path, group, keys, columns, data, issues)
            first += count
    except (pa.ArrowException, OSError) as error:
        issues.append(DatasetIssue("corrupt dataset", name, f"not parquet ({str(error).splitlines()[0]})"))


def _iter_samples(
    file: Path,
    row_group: int | None,
    keys: Sequence[str],
    columns: Sequence[str],
    data: ImageDataConfig,
    issues: list[DatasetIssue],
) -> Iterator[ImageSample]:
    """The samples of an arrow file, or of a row group of a parquet file; `keys` are those of its rows."""
    image, caption, mask = (
        match_column(name, columns) for name in (data.image_column or "image", data.caption_column, data.mask_column)
    )
    captions = _read_column(file, caption, row_group).to_pylist() if caption in columns else [None] * len(keys)
    masks = _read_column(file, mask, row_group) if data.masks == "file" and mask in columns else None
    images = _read_column(file, image, None) if row_group is None else None  # reading a group would read all images
    for row, (key, value) in enumerate(zip(keys, captions, strict=True)):
        text = validate_caption(key, value, data.instance_prompt, issues)
        if text is not None and images is not None and not images[row].is_valid:
            issues.append(DatasetIssue("missing file", key, "the row has no image"))
        elif text is not None:
            has_mask = masks is not None and masks[row].is_valid
            read_mask = TableCell(file, mask, row, row_group) if has_mask else None
            yield ImageSample(key, text, TableCell(file, image, row, row_group), read_mask)
