"""Kinds of files of prompts: each is read as rows, one at a time, and a row knows its line."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import yaml

from ldm.data.tables import arrow
from ldm.jobs import options
from ldm.jobs.fields import Values, from_web, named, value_of, values
from ldm.jobs.lines import Fault, Line, lines

MAX_YAML = 2**22  # bytes: it is read whole
MAX_PICTURES = 10**8  # of one record, and combinations of one product
NULL = "tag:yaml.org,2002:null"
MANY = 256  # rows of a parquet file that are held at a time


class Row(NamedTuple):
    """A record's line, and how to read its values; that raises ValueError for what is wrong with them."""

    line: int
    read: Callable[[], Values]


Reader = Callable[[BinaryIO], Iterator[Row]]


def text(file: BinaryIO) -> Iterator[Row]:
    """A prompt a line, with options as `ldm.jobs.options.read` says; # begins a comment."""
    for line in filled(file):
        if not line.data.lstrip().startswith(b"#"):
            yield Row(line.number, partial(lambda line: values(options.read(line.text())), line))


def objects(file: BinaryIO) -> Iterator[Row]:
    """A JSON object a line."""
    for line in filled(file):
        yield Row(line.number, partial(from_json, line))


def filled(file: BinaryIO) -> Iterator[Line]:
    return (line for line in lines(file) if line.data.strip())


def from_json(line: Line) -> Values:
    """The values in a line; ValueError where it is no JSON object, or a key is given twice."""
    try:
        record = DECODER.decode(line.text())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return values(record)


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]} is given twice")
    return found


def number(digits: str) -> int | float:
    """A whole number; one that no field can hold is read as a float, which takes no time."""
    return int(digits) if len(digits) < 40 else float(digits)


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_int=number)


def cells(file: BinaryIO) -> Iterator[Row]:
    """CSV under a row of the fields' names; an empty cell goes unsaid."""
    reader = csv.reader((line.text() for line in lines(file)), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise Fault(line, f"not CSV: {error}") from None
        if row and header:
            yield Row(line, partial(under, header, row))
        elif row:
            header = checked(line, [cell.strip() for cell in row])


def under(header: Sequence[str], row: Sequence[str]) -> Values:
    """The values of cells under their names."""
    if len(row) != len(header):
        raise ValueError(f"{len(row)} cells under {len(header)} columns")
    return values({name: cell.strip() or None for name, cell in zip(header, row, strict=True)})


def checked(line: int, names: list[str]) -> list[str]:
    """Columns' names as they are; Fault for one that is no field, and where none is the prompt."""
    try:
        found = named(names)
    except ValueError as error:
        raise Fault(line, str(error)) from None
    if "prompt" not in found:
        raise Fault(line, f"no column 'prompt' among {', '.join(map(repr, names))}")
    return names


def columns(file: BinaryIO) -> Iterator[Row]:
    """Parquet, some rows at a time; a row's number stands for its line."""
    pa = arrow(Path(file.name))
    from pyarrow import parquet

    row = 0
    try:
        table = parquet.ParquetFile(file)
        checked(0, table.schema_arrow.names)
        for batch in table.iter_batches(MANY, use_threads=False):
            for record in batch.to_pylist():
                row += 1
                yield Row(row, partial(values, record))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Fault(row + 1 if row else 0, f"not parquet: {str(error).splitlines()[0]}") from None


def combinations(file: BinaryIO) -> Iterator[Row]:
    """YAML: every combination of the fields' values, each a value or a list of them, a scalar being read as in text.

    The fields are combined in the order of the file, the last varying fastest, but for seeds, which vary faster still.
    A combination has its prompt's line.
    """
    axes: dict[str, list[tuple[int, Any]]] = {}
    faults: list[Fault] = []
    for name, key, node in entries(root(file)):
        axes[name] = []
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            line = item.start_mark.line + 1
            try:
                value = plain(item)
                unsaid = value is None and name != "prompt"
                axes[name].append((line, None if unsaid else value_of(name, key, value)))
            except ValueError as error:
                faults.append(Fault(line, str(error)))
    if faults:
        yield from map(failing, faults)
        return
    if "seed" in axes:
        axes["seed"] = [(0, tuple(run for _, runs in axes["seed"] for run in runs or ()) or None)]
    if (n := math.prod(map(len, axes.values()))) > MAX_PICTURES:
        raise Fault(0, f"{n} combinations, at most {MAX_PICTURES} are drawn")
    for chosen in product(*axes.values()):
        found = dict(zip(axes, chosen, strict=True))
        settings = {name: value for name, (_, value) in found.items() if value is not None}
        yield Row(found["prompt"][0], partial(lambda settings: {**settings, **from_web(settings)}, settings))


def failing(fault: Fault) -> Row:
    """A row that cannot be read."""

    def read() -> Values:
        raise fault

    return Row(fault.line, read)


def root(file: BinaryIO) -> yaml.MappingNode:
    """The mapping that a YAML file is."""
    try:
        node = yaml.compose("".join(bounded(lines(file))), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Fault(mark.line + 1 if mark else 0, f"not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise Fault(0, f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise Fault(1, "not YAML of fields and their values")
    return node


def bounded(file: Iterable[Line]) -> Iterator[str]:
    size = 0
    for line in file:
        size += len(line.data)
        if size > MAX_YAML:
            raise Fault(line.number, f"more than {MAX_YAML} bytes; longer lists belong into .txt or .jsonl")
        yield line.text()


def entries(node: yaml.MappingNode) -> Iterator[tuple[str, str, yaml.Node]]:
    """(field, key, value) of a mapping; Fault for an unknown key, for two of one field, and for no prompt."""
    keys: list[str] = []
    for key, value in node.value:
        keys.append(key.value if isinstance(key, yaml.ScalarNode) else "...")
        try:
            name = list(named(keys))[-1]
        except ValueError as error:
            raise Fault(key.start_mark.line + 1, str(error)) from None
        yield name, keys[-1], value
    if "prompt" not in named(keys):
        raise Fault(0, "no prompts in it")


def plain(node: yaml.Node) -> str | list[Any] | None:
    """A scalar as text, None where it is null; a list as one of these."""
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [plain(item) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("nested too deeply: a value or a list of values is needed")
    return None if node.tag == NULL else node.value


READERS: dict[str, Reader] = {
    ".txt": text,
    ".jsonl": objects,
    ".ndjson": objects,
    ".csv": cells,
    ".parquet": columns,
    ".yaml": combinations,
    ".yml": combinations,
}
