"""Readers of prompt files: each yields the rows of a text, JSON, CSV, parquet or YAML file, one at a time."""

from __future__ import annotations

import codecs
import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, BinaryIO, NamedTuple

import yaml

from ldm.data.shards import import_pyarrow
from ldm.errors import parse_json
from ldm.jobs.image_settings import check_values, read_a1111
from ldm.jobs.schema import (
    NOTICES,
    FieldValues,
    map_keys_to_fields,
    parse_field,
    parse_prompt_line,
    parse_record,
    resolve_names,
    short_repr,
    split_keys,
)

MAX_LINE_BYTES = 2**20
MAX_YAML_BYTES = 2**22  # a YAML file is read as a whole
MAX_IMAGES_PER_RECORD = 10**8  # also the most combinations of a YAML file
DELIMITERS = ",;\t|"  # of CSV, the first that gives a column of prompts
CARRIAGE_RETURN_PATTERN = re.compile(rb"[^\r]*(?:\r+\n|\r|\Z)")  # lines of old Macs, within what ends in a newline
COMMENT_PATTERN = re.compile(rb"\s*#(?![0-9])")  # "#1 best cat" is a prompt
INFOTEXT_END_PATTERN = re.compile(rb"^Steps: \d+, [A-Z][\w ]*: ", re.MULTILINE)  # of the web UI's text
INFOTEXT_HEAD_BYTES = 2**16  # in which the first of them is looked for
UTF16_BOMS = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
YAML_NULL_TAG = "tag:yaml.org,2002:null"
YAML_PYTHON_TAG = "tag:yaml.org,2002:python/"
PARQUET_BATCH_ROWS = 256  # rows of a parquet file in memory


class ParseError(ValueError):
    """What is wrong with a file from `line` on; line 0 is the file as a whole."""

    ends_reading = False  # whether the rows after it cannot be read

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class PromptRow(NamedTuple):
    """The line at which a record begins, and its values or what is wrong with them."""

    line: int
    values: FieldValues | ValueError


PromptReader = Callable[[BinaryIO], Iterator[PromptRow]]


def parse_row(line: int, parse: Callable[..., FieldValues], *args: Any) -> PromptRow:
    """A row of `parse(*args)`, or of the ValueError that it raises."""
    try:
        return PromptRow(line, parse(*args))
    except ValueError as error:
        return PromptRow(line, error)


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line, without the UTF-8 BOM; ParseError for one over `MAX_LINE_BYTES`.

    A line ends in LF, CR LF or CR.
    """
    number = 0
    while True:
        data = file.readline(MAX_LINE_BYTES + 1)
        number += 1
        if number == 1:
            if data.startswith(UTF16_BOMS):
                raise ParseError(1, "is UTF-16: save it as UTF-8")
            data = data.removeprefix(codecs.BOM_UTF8)
        if len(data) > MAX_LINE_BYTES:
            raise ParseError(number, f"longer than {MAX_LINE_BYTES} bytes")
        if not data and number > 1:
            return
        if b"\r" not in data.rstrip(b"\r\n"):
            yield number, data
            continue
        for line in filter(None, CARRIAGE_RETURN_PATTERN.findall(data)):
            yield number, line
            number += 1
        number -= 1


def decode_line(number: int, data: bytes) -> str:
    """The text of a line; ParseError where it is not UTF-8 or holds a NUL."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ParseError(number, f"byte {error.start + 1} is not UTF-8") from None
    if "\0" in text:
        raise ParseError(number, f"character {text.index(chr(0)) + 1} is a NUL")
    return text


def read_text_rows(file: BinaryIO, lenient: bool = False) -> Iterator[PromptRow]:
    """A prompt per line, with options as `parse_prompt_line` reads them; # begins a comment line.

    A file with settings of images, as the web UI saves them, is read by `read_infotext_rows`.
    """
    head = file.read(INFOTEXT_HEAD_BYTES)
    file.seek(0)
    if INFOTEXT_END_PATTERN.search(head):
        yield from read_infotext_rows(file)
        return
    for number, data in read_lines(file):
        if data.strip() and not COMMENT_PATTERN.match(data):
            yield parse_row(number, parse_text_line, number, data, lenient)
        elif data.strip() and data.lstrip()[1:2].isalpha():
            notice = f"taken for a comment: {short_repr(data.decode(errors='replace').strip())}"
            yield PromptRow(number, {NOTICES: [notice]})


def parse_text_line(number: int, data: bytes, lenient: bool = False) -> FieldValues:
    """The values of a line of text, in which `clip_skip` is the web UI's."""
    options = parse_prompt_line(decode_line(number, data), lenient)
    notices = options.pop(NOTICES, [])
    values = parse_record(options)
    if "clip_skip" in values:
        values["a1111_clip_skip"] = values.pop("clip_skip")
    return {**values, NOTICES: notices} if notices else values


def read_infotext_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """Settings of images, as the web UI saves them beside these and in params.txt; each ends with its `Steps: ...`."""
    lines: list[str] = []
    start = 0
    for number, data in read_lines(file):
        if lines or data.strip():
            start = start if lines else number
            lines.append(decode_line(number, data))
        if sum(map(len, lines)) > MAX_LINE_BYTES:
            raise ParseError(start, f"settings of an image longer than {MAX_LINE_BYTES} characters")
        if INFOTEXT_END_PATTERN.match(data):
            yield parse_row(start, parse_infotext, "".join(lines))
            lines = []
    if lines:
        yield PromptRow(start, ValueError("settings of an image without their last line, Steps: ..."))


def parse_infotext(text: str) -> FieldValues:
    """The values of an image's settings, and a notice of what is not taken over; the model is the job's."""
    settings = check_values(read_a1111(text))
    values = {name: value for name, value in settings.values.items() if name != "strength"}  # no image is given
    if "seed" in values:
        values["seed"] = parse_field("seed", "Seed", str(values["seed"]))
    notices = {NOTICES: [f"not taken over: {'; '.join(settings.lost)}"]} if settings.lost else {}
    return {"prompt": "", **values, **notices}


def read_jsonl_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """A JSON object per line."""
    for number, data in read_lines(file):
        if data.strip():
            yield parse_row(number, parse_json_line, number, data)


def parse_json_line(number: int, data: bytes) -> FieldValues:
    """The values of a JSON object; ValueError where the line is none."""
    record = parse_json(decode_line(number, data))
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return parse_record(record)


def read_json_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """A JSON list of objects or prompts, or one object, or an object per line; an item's number stands for its line."""
    text = "".join(decode_bounded_lines(file))
    try:
        records = parse_json(text)
    except ValueError as error:
        if text.lstrip().startswith("{") and "Extra data" in str(error):
            file.seek(0)
            yield from read_jsonl_rows(file)
            return
        raise ParseError(0, str(error)) from None
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield parse_row(number, parse_item, record)


def parse_item(item: Any) -> FieldValues:
    """The values of an item of a list: a record, or a prompt alone; ValueError where it is neither."""
    if not isinstance(item, dict | str):
        raise ValueError(f"{short_repr(item)}: must be a prompt, or fields with their values")
    return parse_record({"prompt": item} if isinstance(item, str) else item)


def read_csv_rows(file: BinaryIO, delimiter: str = "") -> Iterator[PromptRow]:
    """CSV below a header of field names, by any of `DELIMITERS`; an empty cell leaves the field at its default."""
    lines = (decode_line(*line) for line in read_lines(file))
    first = next((line for line in lines if line.strip()), "")
    file.seek(0)
    delimiter = delimiter or choose_delimiter(first)
    reader = csv.reader((decode_line(*line) for line in read_lines(file)), strict=True, delimiter=delimiter)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ParseError(line, f"not CSV: {error}") from None
        if header and any(map(str.strip, row)):
            yield parse_row(line, parse_csv_row, header, row)
        elif row and not header:
            header = [cell.strip() for cell in row]
            check_header(line, header)


def read_tsv_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """CSV with tabs, as `read_csv_rows`."""
    return read_csv_rows(file, "\t")


def choose_delimiter(line: str) -> str:
    """The first of `DELIMITERS` that gives a header a column of prompts; a comma where there is none."""
    for delimiter in DELIMITERS:
        try:
            if "prompt" in split_keys(next(csv.reader([line], delimiter=delimiter), []))[0]:
                return delimiter
        except (ValueError, csv.Error):
            continue
    return ","


def parse_csv_row(header: Sequence[str], row: Sequence[str]) -> FieldValues:
    if len(row) != len(header):
        raise ValueError(f"{len(row)} cells under {len(header)} columns")
    return parse_record({name: cell.strip() or None for name, cell in zip(header, row, strict=True)})


def check_header(line: int, names: Sequence[str]) -> None:
    """ParseError where two columns are one field, or none is the prompt."""
    try:
        fields, _ = split_keys(names)
    except ValueError as error:
        raise ParseError(line, str(error)) from None
    if "prompt" not in fields:
        raise ParseError(line, f"no column 'prompt' among {', '.join(map(short_repr, names))}")


def read_parquet_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """Parquet, `PARQUET_BATCH_ROWS` at a time; a row's number stands for its line."""
    try:
        pa = import_pyarrow()
    except ValueError as error:
        raise ParseError(0, str(error)) from None
    from pyarrow import parquet

    row = 0
    try:
        table = parquet.ParquetFile(file)
        check_header(0, table.schema_arrow.names)
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, use_threads=False):
            for record in list_records(batch, pa):
                row += 1
                yield parse_row(row, parse_record, record)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ParseError(row + 1 if row else 0, f"not parquet: {str(error).splitlines()[0]}") from None


def list_records(batch: Any, pa: Any) -> list[dict[str, Any]]:
    """The rows of a batch; values that Python has no type for, such as dates after the year 9999, as text."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        columns = [c.cast(pa.string()) if pa.types.is_temporal(c.type) else c for c in batch.columns]
        return pa.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()


def read_yaml_rows(file: BinaryIO) -> Iterator[PromptRow]:
    """YAML: a list of prompts and records, each a row; or fields, of which every combination is one."""
    node = compose_yaml(file)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield parse_row(item.start_mark.line + 1, parse_yaml_item, item)
        return
    if not isinstance(node, yaml.MappingNode):
        raise ParseError(1, "not YAML of fields and their values, nor a list of prompts")
    yield from iter_yaml_combinations(node)


def parse_yaml_item(node: yaml.Node) -> FieldValues:
    """The values of an item of a list."""
    if not isinstance(node, yaml.MappingNode):
        return parse_item(read_yaml_value(node))
    pairs = [(key.value if isinstance(key, yaml.ScalarNode) else "...", value) for key, value in node.value]
    split_keys(key for key, _ in pairs)
    return parse_record({key: read_yaml_value(value) for key, value in pairs})


def iter_yaml_combinations(root: yaml.MappingNode) -> Iterator[PromptRow]:
    """Every combination of the values of fields, each a scalar or a list, where scalars are read as text.

    Fields vary in the order of the file, the last one fastest, except that seeds vary faster still. The line of a
    combination is that of its prompt.
    """
    axes: dict[str, list[tuple[int, Any]]] = {}
    errors: list[ParseError] = []
    for name, key, node in iter_yaml_fields(root):
        axes[name] = []
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            line = item.start_mark.line + 1
            try:
                value = read_yaml_value(item)
                is_default = value is None and name != "prompt"
                axes[name].append((line, None if is_default else parse_field(name, key, value)))
            except ValueError as error:
                errors.append(ParseError(line, str(error)))
    if errors:
        yield from (PromptRow(error.line, error) for error in errors)
        return
    if "seed" in axes:
        axes["seed"] = [(0, tuple(seeds for _, ranges in axes["seed"] for seeds in ranges or ()) or None)]
    if (n := math.prod(map(len, axes.values()))) > MAX_IMAGES_PER_RECORD:
        raise ParseError(0, f"{n} combinations: must be at most {MAX_IMAGES_PER_RECORD}")
    for combination in product(*axes.values()):
        cells = dict(zip(axes, combination, strict=True))
        values = {name: value for name, (_, value) in cells.items() if value is not None}
        yield PromptRow(cells["prompt"][0], resolve_names(values))


def compose_yaml(file: BinaryIO) -> yaml.Node | None:
    """The root node of a YAML file; ParseError where it is none."""
    try:
        return yaml.compose("".join(decode_bounded_lines(file)), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ParseError(mark.line + 1 if mark else 0, f"not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ParseError(0, f"not YAML: {' '.join(str(error).split())}") from None


def decode_bounded_lines(file: BinaryIO) -> Iterator[str]:
    size = 0
    for number, data in read_lines(file):
        size += len(data)
        if size > MAX_YAML_BYTES:
            raise ParseError(number, f"more than {MAX_YAML_BYTES} bytes: use .txt or .jsonl for longer lists")
        yield decode_line(number, data)


def iter_yaml_fields(node: yaml.MappingNode) -> Iterator[tuple[str, str, yaml.Node]]:
    """(field, key, value) of a mapping; ParseError for an unknown key, two keys of one field, or no prompt."""
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
    """A scalar as text, or None for null; a list of scalars as a list of these."""
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [read_yaml_value(item) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("nested too deeply: must be a value or a list of values")
    if node.tag.startswith(("!", YAML_PYTHON_TAG)):
        raise ValueError(f"tag {node.tag!r:.60}: not supported")
    return None if node.tag == YAML_NULL_TAG else node.value


PROMPT_READERS: dict[str, PromptReader] = {
    ".txt": read_text_rows,
    ".jsonl": read_jsonl_rows,
    ".ndjson": read_jsonl_rows,
    ".json": read_json_rows,
    ".csv": read_csv_rows,
    ".tsv": read_tsv_rows,
    ".parquet": read_parquet_rows,
    ".yaml": read_yaml_rows,
    ".yml": read_yaml_rows,
}
