"""Tables of captions: metadata files beside images, and images in arrow and parquet files (Hugging Face datasets)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ldm.config import ImageDataConfig
from ldm.data.sources import (
    DatasetIssue,
    FileSlice,
    ImageSample,
    ImageSource,
    decode_utf8,
    missing_columns,
    validate_caption,
)

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
UNSUPPORTED_METADATA_FILE = "metadata.json"


class TableRow(NamedTuple):
    """One row of a table: where it is, for messages, and its values by column."""

    key: str
    values: dict[str, Any]


def read_metadata_rows(path: Path, issues: list[DatasetIssue]) -> list[TableRow]:
    """The rows of a metadata file; an issue with its line for each that cannot be read."""
    return list({".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix](path, issues))


def _read_jsonl(path: Path, issues: list[DatasetIssue]) -> Iterator[TableRow]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
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
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
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


def import_pyarrow(path: Path) -> Any:
    """pyarrow; ValueError that says how to install it."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path}: needs pyarrow: pip install 'ldm[data]'") from None
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
        tables = {file: _open_arrow_table(file) for file in (folder / e["filename"] for e in state["_data_files"])}
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return ImageSource((), (DatasetIssue("corrupt dataset", folder.name, f"not a saved dataset ({error})"),))
    columns = [name for table in [*tables.values()][:1] for name in table.column_names]
    if wrong := missing_columns(required_columns(data, "image"), columns, folder.name):
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
        if wrong := missing_columns(required_columns(data, "image"), columns, name):
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
    image, caption, mask = data.image_column or "image", data.caption_column, data.mask_column
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


def required_columns(data: ImageDataConfig, image: str) -> list[str]:
    """The columns that a table must have: the images', `image` by default, and the captions' if there is no prompt."""
    return [data.image_column or image, *([data.caption_column] if data.instance_prompt is None else [])]
