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

from ldm.data.samples import Fault, File, Options, Sample, Source, captioned, lacking, utf8

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
WRONG_METADATA = "metadata.json"


class Row(NamedTuple):
    """One row of a table: where it is, for messages, and its values by column."""

    key: str
    values: dict[str, Any]


def read_rows(path: Path, faults: list[Fault]) -> list[Row]:
    """The rows of a metadata file; what cannot be read is a fault with its line."""
    return list({".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix](path, faults))


def _jsonl(path: Path, faults: list[Fault]) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        key = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            faults.append(Fault("not UTF-8", key, "the line is not UTF-8"))
            continue
        except (ValueError, RecursionError) as error:
            faults.append(Fault("malformed line", key, f"not JSON ({error})"))
            continue
        if isinstance(values, dict):
            yield Row(key, values)
        else:
            faults.append(Fault("malformed line", key, "not a JSON object"))


def _csv(path: Path, faults: list[Fault]) -> Iterator[Row]:
    text = utf8(path.read_bytes(), path.name, faults)
    if text is None:
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        for cells in filter(None, reader):
            key = f"{path.name}:{reader.line_num}"
            if len(cells) == len(header):
                yield Row(key, dict(zip(header, cells, strict=True)))
            else:
                faults.append(Fault("unequal line", key, f"{len(cells)} cells under {len(header)} columns"))
    except csv.Error as error:
        faults.append(Fault("malformed line", f"{path.name}:{reader.line_num}", str(error)))


def _parquet(path: Path, faults: list[Fault]) -> Iterator[Row]:
    pa = arrow(path)
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        faults.append(Fault("malformed line", path.name, f"not parquet ({str(error).splitlines()[0]})"))
        return
    yield from (Row(f"{path.name}:{k + 1}", values) for k, values in enumerate(rows))


def arrow(path: Path) -> Any:
    """pyarrow; ValueError with the cure where it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path}: needs pyarrow: pip install 'ldm[data]'") from None
    return pyarrow


def saved(folder: Path) -> bool:
    """Did `datasets.save_to_disk` write this folder?"""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


@dataclass(frozen=True, slots=True)
class Cell:
    """The picture in one cell of an arrow file, whose column holds {bytes, path} or bytes."""

    file: Path
    column: str
    row: int

    def __call__(self) -> bytes:
        return content(_table(self.file)[self.column][self.row].as_py(), self)


@dataclass(frozen=True, slots=True)
class GroupCell:
    """The picture in one cell of a parquet file: `row` counts from its row group, which is read as a whole."""

    file: Path
    column: str
    row: int
    group: int

    def __call__(self) -> bytes:
        return content(_group(self.file, self.group, self.column)[self.row].as_py(), self)


def content(value: Any, cell: Cell | GroupCell) -> bytes:
    """The picture in a cell's value, {bytes, path} or bytes; OSError where there is none."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        return File(Path(value["path"]))()
    if not isinstance(data, bytes):
        raise OSError(f"{cell.file}: row {cell.row} of {cell.column!r} holds no picture")
    return data


@lru_cache(maxsize=2)
def _group(file: Path, group: int, column: str) -> Any:
    """A column of a parquet file's row group."""
    pa = arrow(file)
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file).read_row_group(group, [column])[column]
    except pa.ArrowException as error:
        raise OSError(f"{file}: {str(error).splitlines()[0]}") from None


@lru_cache(maxsize=16)
def _table(file: Path) -> Any:
    """A file of an arrow stream, memory-mapped: its cells are read when they are asked for."""
    pa = arrow(file)
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def open_saved(folder: Path, options: Options) -> Source:
    """A `datasets` directory; of a dictionary of splits, the one called train. Its keys are row numbers."""
    faults: list[Fault] = []
    pa = arrow(folder)
    if (folder / "dataset_dict.json").is_file():
        folder = folder / "train"
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / entry["filename"] for entry in state["_data_files"]]
        tables = [_table(file) for file in files]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return Source((), (Fault("torn data set", folder.name, f"not a saved data set ({error})"),))
    image, caption, mask = (options.columns.image or "image", *options.columns[1:])
    names = tables[0].column_names if tables else []
    for column in (image, caption) if options.caption is None else (image,):
        if column not in names:
            return Source((), (lacking(column, names, folder.name),))
    samples: list[Sample] = []
    count = 0
    for file, table in zip(files, tables, strict=True):
        texts = table[caption].to_pylist() if caption in names else [None] * len(table)
        for row, found in enumerate(texts):
            key = f"row-{count + row:07d}"
            text = captioned(key, found, options.caption, faults)
            shade = Cell(file, mask, row) if options.masks == "file" and _filled(table, mask, row) else None
            if text is not None and not _filled(table, image, row):
                faults.append(Fault("missing file", key, "the row has no picture"))
            elif text is not None:
                samples.append(Sample(key, text, Cell(file, image, row), shade))
        count += len(table)
    return Source(samples, faults)


def open_parquets(files: Mapping[str, Path], options: Options) -> Source:
    """Parquet files whose rows hold pictures, as hubs keep them; a key is the file's name and the row's number."""
    faults: list[Fault] = []
    samples = [sample for name, path in files.items() for sample in _parquet_samples(name, path, options, faults)]
    return Source(samples, faults)


def _parquet_samples(name: str, path: Path, options: Options, faults: list[Fault]) -> Iterator[Sample]:
    pa = arrow(path)
    from pyarrow import parquet

    image, caption, mask = (options.columns.image or "image", *options.columns[1:])
    row = 0
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        for column in (image, caption) if options.caption is None else (image,):
            if column not in names:
                return faults.append(lacking(column, names, name))
        masked = options.masks == "file" and mask in names
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            texts = file.read_row_group(group, [caption])[caption].to_pylist() if caption in names else [None] * count
            for k, found in enumerate(texts):
                key, row = f"{name}:{row:07d}", row + 1
                text = captioned(key, found, options.caption, faults)
                if text is not None:
                    shade = masked and _group(path, group, mask)[k].is_valid and GroupCell(path, mask, k, group)
                    yield Sample(key, text, GroupCell(path, image, k, group), shade or None)
    except (pa.ArrowException, OSError) as error:
        faults.append(Fault("torn data set", name, f"not parquet ({str(error).splitlines()[0]})"))


def _filled(table: Any, column: str, row: int) -> bool:
    return column in table.column_names and table[column][row].is_valid


def columns_of(rows: Sequence[Row]) -> set[str]:
    """All columns that any row has."""
    return {name for row in rows for name in row.values}
