"""Columns of captions: metadata files beside pictures, and data sets of `datasets`, saved to disk or as parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ldm.data.sources import (
    DatasetIssue,
    FileSlice,
    ImageSample,
    ImageSource,
    SourceOptions,
    decode_utf8,
    missing_column,
    validate_caption,
)
from ldm.installation import install_command

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
UNSUPPORTED_METADATA_FILE = "metadata.json"


class TableRow(NamedTuple):
    """One row of a table: where it is, for messages, and its values by column."""

    key: str
    values: dict[str, Any]


def read_metadata_rows(path: Path, issues: list[DatasetIssue]) -> list[TableRow]:
    """The rows of a metadata file; what cannot be read is a fault with its line."""
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
    """pyarrow; ValueError with the cure where it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path}: needs pyarrow: {install_command('data')}") from None
    return pyarrow


def is_saved_dataset(folder: Path) -> bool:
    """Did `datasets.save_to_disk` write this folder?"""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


@dataclass(frozen=True, slots=True)
class ArrowCell:
    """The picture in one cell of an arrow file, whose column holds {bytes, path} or bytes."""

    file: Path
    column: str
    row: int

    def __call__(self) -> bytes:
        return read_cell_bytes(_open_arrow_table(self.file)[self.column][self.row].as_py(), self)


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """The picture in one cell of a parquet file: `row` counts from its row group, which is read as a whole."""

    file: Path
    column: str
    row: int
    row_group: int

    def __call__(self) -> bytes:
        return read_cell_bytes(_read_row_group(self.file, self.row_group, self.column)[self.row].as_py(), self)


def read_cell_bytes(value: Any, cell: ArrowCell | ParquetCell) -> bytes:
    """The picture in a cell's value, {bytes, path} or bytes; OSError where there is none."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        return FileSlice(Path(value["path"]))()
    if not isinstance(data, bytes):
        raise OSError(f"{cell.file}: row {cell.row} of {cell.column!r} holds no picture")
    return data


@lru_cache(maxsize=2)
def _read_row_group(file: Path, row_group: int, column: str) -> Any:
    """A column of a parquet file's row group."""
    pa = import_pyarrow(file)
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file).read_row_group(row_group, [column])[column]
    except pa.ArrowException as error:
        raise OSError(f"{file}: {str(error).splitlines()[0]}") from None


@lru_cache(maxsize=16)
def _open_arrow_table(file: Path) -> Any:
    """A file of an arrow stream, memory-mapped: its cells are read when they are asked for."""
    pa = import_pyarrow(file)
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def open_saved_dataset(folder: Path, options: SourceOptions) -> ImageSource:
    """A `datasets` directory; of a dictionary of splits, the one called train. Its keys are row numbers."""
    faults: list[DatasetIssue] = []
    pa = import_pyarrow(folder)
    if (folder / "dataset_dict.json").is_file():
        folder = folder / "train"
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / entry["filename"] for entry in state["_data_files"]]
        tables = [_open_arrow_table(file) for file in files]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return ImageSource((), (DatasetIssue("torn data set", folder.name, f"not a saved data set ({error})"),))
    image, caption, mask = (options.columns.image or "image", *options.columns[1:])
    names = tables[0].column_names if tables else []
    for column in (image, caption) if options.default_caption is None else (image,):
        if column not in names:
            return ImageSource((), (missing_column(column, names, folder.name),))
    samples: list[ImageSample] = []
    count = 0
    for file, table in zip(files, tables, strict=True):
        texts = table[caption].to_pylist() if caption in names else [None] * len(table)
        for row, found in enumerate(texts):
            key = f"row-{count + row:07d}"
            text = validate_caption(key, found, options.default_caption, faults)
            shade = ArrowCell(file, mask, row) if options.masks == "file" and _has_value(table, mask, row) else None
            if text is not None and not _has_value(table, image, row):
                faults.append(DatasetIssue("missing file", key, "the row has no picture"))
            elif text is not None:
                samples.append(ImageSample(key, text, ArrowCell(file, image, row), shade))
        count += len(table)
    return ImageSource(samples, faults)


def open_parquet_files(files: Mapping[str, Path], options: SourceOptions) -> ImageSource:
    """Parquet files whose rows hold pictures, as hubs keep them; a key is the file's name and the row's number."""
    faults: list[DatasetIssue] = []
    samples = [sample for name, path in files.items() for sample in _iter_parquet_samples(name, path, options, faults)]
    return ImageSource(samples, faults)


def _iter_parquet_samples(
    name: str, path: Path, options: SourceOptions, issues: list[DatasetIssue]
) -> Iterator[ImageSample]:
    pa = import_pyarrow(path)
    from pyarrow import parquet

    image, caption, mask = (options.columns.image or "image", *options.columns[1:])
    row = 0
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        for column in (image, caption) if options.default_caption is None else (image,):
            if column not in names:
                return issues.append(missing_column(column, names, name))
        masked = options.masks == "file" and mask in names
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            texts = file.read_row_group(group, [caption])[caption].to_pylist() if caption in names else [None] * count
            for k, found in enumerate(texts):
                key, row = f"{name}:{row:07d}", row + 1
                text = validate_caption(key, found, options.default_caption, issues)
                if text is not None:
                    shade = (
                        masked and _read_row_group(path, group, mask)[k].is_valid and ParquetCell(path, mask, k, group)
                    )
                    yield ImageSample(key, text, ParquetCell(path, image, k, group), shade or None)
    except (pa.ArrowException, OSError) as error:
        issues.append(DatasetIssue("torn data set", name, f"not parquet ({str(error).splitlines()[0]})"))


def _has_value(table: Any, column: str, row: int) -> bool:
    return column in table.column_names and table[column][row].is_valid


def collect_column_names(rows: Sequence[TableRow]) -> set[str]:
    """All columns that any row has."""
    return {name for row in rows for name in row.values}
