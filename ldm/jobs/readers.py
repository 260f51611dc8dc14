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

from ldm.data.tables import import_pyarrow
from ldm.jobs.lines import ParseError, RawLine, read_lines
from ldm.jobs.schema import FieldValues, map_keys_to_fields, parse_field, parse_prompt_line, parse_record
from ldm.metadata import resolve_a1111_sampler

MAX_YAML_BYTES = 2**22  # bytes: it is read whole
MAX_IMAGES_PER_RECORD = 10**8  # of one record, and combinations of one product
YAML_NULL_TAG = "tag:yaml.org,2002:null"
PARQUET_BATCH_ROWS = 256  # rows of a parquet file that are held at a time


class PromptRow(NamedTuple):
    """A record's line, and how to read its values; that raises ValueError for what is wrong with them."""

    line: int
    parse: Callable[[], FieldValues]


PromptReader = Callable[[BinaryIO], Iterator[PromptRow]]


def read_text_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """A prompt a line, with options as `ldm.jobs.schema.parse_prompt_line` says; # begins a comment."""
    for line in iter_nonblank_lines(file):
        if not line.data.lstrip().startswith(b"#"):
            yield PromptRow(line.number, partial(lambda line: parse_record(parse_prompt_line(line.decode())), line))


def read_jsonl_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """A JSON object a line."""
    for line in iter_nonblank_lines(file):
        yield PromptRow(line.number, partial(parse_json_line, line))


def iter_nonblank_lines(file: BinaryIO) -> Iterator[RawLine]:
    return (line for line in read_lines(file) if line.data.strip())


def parse_json_line(line: RawLine) -> FieldValues:
    """The values in a line; ValueError where it is no JSON object, or a key is given twice."""
    try:
        record = JSON_DECODER.decode(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return parse_record(record)


def reject_duplicate_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]} is given twice")
    return found


def parse_json_int(digits: str) -> int | float:
    """A whole number; one that no field can hold is read as a float, which takes no time."""
    return int(digits) if len(digits) < 40 else float(digits)


JSON_DECODER = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys, parse_int=parse_json_int)


def read_csv_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """CSV under a row of the fields' names; an empty cell goes unsaid."""
    reader = csv.reader((line.decode() for line in read_lines(file)), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ParseError(line, f"not CSV: {error}") from None
        if row and header:
            yield PromptRow(line, partial(parse_csv_row, header, row))
        elif row:
            header = check_header(line, [cell.strip() for cell in row])


def parse_csv_row(header: Sequence[str], row: Sequence[str]) -> FieldValues:
    """The values of cells under their names."""
    if len(row) != len(header):
        raise ValueError(f"{len(row)} cells under {len(header)} columns")
    return parse_record({name: cell.strip() or None for name, cell in zip(header, row, strict=True)})


def check_header(line: int, names: list[str]) -> list[str]:
    """Columns' names as they are; Fault for one that is no field, and where none is the prompt."""
    try:
        found = map_keys_to_fields(names)
    except ValueError as error:
        raise ParseError(line, str(error)) from None
    if "prompt" not in found:
        raise ParseError(line, f"no column 'prompt' among {', '.join(map(repr, names))}")
    return names


def read_parquet_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """Parquet, some rows at a time; a row's number stands for its line."""
    pa = import_pyarrow(Path(file.name))
    from pyarrow import parquet

    row = 0
    try:
        table = parquet.ParquetFile(file)
        check_header(0, table.schema_arrow.names)
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
            for record in batch.to_pylist():
                row += 1
                yield PromptRow(row, partial(parse_record, record))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ParseError(row + 1 if row else 0, f"not parquet: {str(error).splitlines()[0]}") from None


def read_yaml_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """YAML: every combination of the fields' values, each a value or a list of them, a scalar being read as in text.

    The fields are combined in the order of the file, the last varying fastest, but for seeds, which vary faster still.
    A combination has its prompt's line.
    """
    axes: dict[str, list[tuple[int, Any]]] = {}
    faults: list[ParseError] = []
    for name, key, node in iter_yaml_fields(compose_yaml_mapping(file)):
        axes[name] = []
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            line = item.start_mark.line + 1
            try:
                value = read_yaml_value(item)
                unsaid = value is None and name != "prompt"
                axes[name].append((line, None if unsaid else parse_field(name, key, value)))
            except ValueError as error:
                faults.append(ParseError(line, str(error)))
    if faults:
        yield from map(make_error_row, faults)
        return
    if "seed" in axes:
        axes["seed"] = [(0, tuple(run for _, runs in axes["seed"] for run in runs or ()) or None)]
    if (n := math.prod(map(len, axes.values()))) > MAX_IMAGES_PER_RECORD:
        raise ParseError(0, f"{n} combinations, at most {MAX_IMAGES_PER_RECORD} are drawn")
    for chosen in product(*axes.values()):
        found = dict(zip(axes, chosen, strict=True))
        settings = {name: value for name, (_, value) in found.items() if value is not None}
        yield PromptRow(found["prompt"][0], partial(resolve_a1111_sampler, settings))


def make_error_row(error: ParseError) -> PromptRow:
    """A row that cannot be read."""

    def read() -> FieldValues:
        raise error

    return PromptRow(error.line, read)


def compose_yaml_mapping(file: BinaryIO) -> yaml.MappingNode:
    """The mapping that a YAML file is."""
    try:
        node = yaml.compose("".join(decode_bounded_lines(read_lines(file))), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ParseError(mark.line + 1 if mark else 0, f"not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ParseError(0, f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ParseError(1, "not YAML of fields and their values")
    return node


def decode_bounded_lines(file: Iterable[RawLine]) -> Iterator[str]:
    size = 0
    for line in file:
        size += len(line.data)
        if size > MAX_YAML_BYTES:
            raise ParseError(line.number, f"more than {MAX_YAML_BYTES} bytes; longer lists belong into .txt or .jsonl")
        yield line.decode()


def iter_yaml_fields(node: yaml.MappingNode) -> Iterator[tuple[str, str, yaml.Node]]:
    """(field, key, value) of a mapping; Fault for an unknown key, for two of one field, and for no prompt."""
    keys: list[str] = []
    for key, value in node.value:
        keys.append(key.value if isinstance(key, yaml.ScalarNode) else "...")
        try:
            name = list(map_keys_to_fields(keys))[-1]
        except ValueError as error:
            raise ParseError(key.start_mark.line + 1, str(error)) from None
        yield name, keys[-1], value
    if "prompt" not in map_keys_to_fields(keys):
        raise ParseError(0, "no prompts in it")


def read_yaml_value(node: yaml.Node) -> str | list[Any] | None:
    """A scalar as text, None where it is null; a list as one of these."""
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [read_yaml_value(item) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("nested too deeply: a value or a list of values is needed")
    return None if node.tag == YAML_NULL_TAG else node.value


PROMPT_READERS: dict[str, PromptReader] = {
    ".txt": read_text_rows,
    ".jsonl": read_jsonl_rows,
    ".ndjson": read_jsonl_rows,
    ".csv": read_csv_rows,
    ".parquet": read_parquet_rows,
    ".yaml": read_yaml_rows,
    ".yml": read_yaml_rows,
}
