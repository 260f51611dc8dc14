"""A source: a file of prompts as requests, in constant memory, and beforehand all that is wrong with it."""

from __future__ import annotations

import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from tempfile import NamedTemporaryFile
from typing import IO, Any, NamedTuple

from PIL import Image

from ldm.image_io import read_image, read_mask
from ldm.jobs.lines import MAX_LINE_BYTES, ParseError
from ldm.jobs.readers import MAX_IMAGES_PER_RECORD, PROMPT_READERS, PromptReader, PromptRow, make_error_row
from ldm.jobs.schema import FieldValues, short_repr
from ldm.jobs.wildcards import PromptTemplate, WildcardManager
from ldm.pipeline.request import Request

WILDCARD_EXPANSIONS = ("one", "all", "none")  # of wildcards: one text for each seed, every text, or left alone
MAX_REPORTED_ERRORS = 5  # faults in one error
PARQUET_MAGIC = b"PAR1"
JSON_OBJECT_PATTERN = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"')


class PromptEntry(NamedTuple):
    """One picture to draw, and the line that asks for it."""

    line: int
    request: Request


@dataclass(frozen=True)
class PromptRecord:
    """The pictures of one record: every text of its prompts with every seed, which varies fastest."""

    request: Request
    prompt: PromptTemplate
    negative: PromptTemplate | None
    seed_range: range

    @property
    def num_images(self) -> int:
        return (
            self.prompt.num_expansions * (self.negative.num_expansions if self.negative else 1) * len(self.seed_range)
        )

    @property
    def prompts_are_constant(self) -> bool:
        """Do its pictures differ in their seeds alone?"""
        return all(template.is_constant for template in (self.prompt, self.negative) if template)

    def __getitem__(self, k: int) -> Request:
        k, j = divmod(k, len(self.seed_range))
        a, b = divmod(k, self.negative.num_expansions if self.negative else 1)
        seed = self.seed_range[j]
        negative = self.negative(b, seed) if self.negative else None
        return replace(self.request, prompt=self.prompt(a, seed), negative_prompt=negative, seed=seed)


@dataclass(frozen=True)
class PromptSource:
    """A file of prompts; iterating gives its entries, in its order, as often as one likes.

    The same file, defaults and wildcards give the same requests. ValueError where a line cannot be read, with its name
    and number: `check` has told before, unless the file has changed.
    """

    path: Path
    name: str  # for messages
    reader: PromptReader
    defaults: Request
    images_per_prompt: int
    wildcards: WildcardManager
    expand: str
    folder: Path  # of its pictures
    spool_file: Any = field(default=None, repr=False)  # what holds standard input's copy in place

    def __iter__(self) -> Iterator[PromptEntry]:
        for row in self._read_rows():
            try:
                for record in self._expand_row(row.parse()):
                    yield from (PromptEntry(row.line, record[k]) for k in range(record.num_images))
            except ValueError as error:
                raise ValueError(self._format_error(row.line, error)) from None

    def validate(
        self,
        resolve: Callable[[Request], object],
        on_request: Callable[[Request, str], object] = lambda request, where: None,
    ) -> int:
        """Read the whole file, ask `resolve` (as `Pipeline.resolve`) about its requests, and count them.

        Of pictures that differ in their seeds alone the first and the last are asked about; `heard` is told what was
        asked, and its file and line. ValueError tells the first five faults, each with its line, and the number of the
        rest.
        """
        told: list[str] = []
        faults = total = 0
        for row in self._read_rows():
            try:
                for record in self._expand_row(row.parse()):
                    for k in {0, record.num_images - 1} if record.prompts_are_constant else range(record.num_images):
                        resolve(request := record[k])
                        on_request(request, self._location(row.line))
                    total += record.num_images
            except ValueError as error:
                faults += 1
                if faults <= MAX_REPORTED_ERRORS:
                    told.append(self._format_error(row.line, error))
        if faults > MAX_REPORTED_ERRORS:
            told.append(f"and {faults - MAX_REPORTED_ERRORS} more")
        if faults:
            raise ValueError("; ".join(told))
        if not total:
            raise ValueError(f"{self.name}: no prompts in it")
        return total

    def _read_rows(self) -> Iterator[PromptRow]:
        """The file's rows; a fault that ends its reading is the last."""
        try:
            with self.path.open("rb") as file:
                yield from self.reader(file)
        except ParseError as fault:
            yield make_error_row(fault)
        except OSError as error:
            raise ValueError(f"{self.name}: {error.strerror}") from None

    def _expand_row(self, values: FieldValues) -> Iterator[PromptRecord]:
        """A row's records, one for each run of seeds; ValueError for values that no request can have."""
        values = dict(values)
        prompt = self._parse_template(values["prompt"])
        negative = values.get("negative_prompt", self.defaults.negative_prompt)
        seeds = values.pop("seed", (range(self.defaults.seed, self.defaults.seed + 1),))
        runs = apply_count(seeds, values.pop("count", None), self.images_per_prompt)
        for name in {"image", "mask"} & values.keys():
            values[name] = self._load_image(name, values[name])
        request = replace(self.defaults, **values)
        for run in runs:
            record = PromptRecord(request, prompt, None if negative is None else self._parse_template(negative), run)
            if record.num_images > MAX_IMAGES_PER_RECORD:
                raise ValueError(
                    f"{record.num_images} pictures of one record, at most {MAX_IMAGES_PER_RECORD} are drawn"
                )
            yield record

    def _parse_template(self, text: str) -> PromptTemplate:
        parts = (text,) if self.expand == "none" else self.wildcards(text)
        return PromptTemplate(text, parts, self.expand == "all")

    def _load_image(self, field: str, name: str) -> Image.Image:
        path = PureWindowsPath(name)  # knows both kinds of slash
        if path.anchor or ".." in path.parts:
            raise ValueError(f"{field} {short_repr(name)}: must lie in the file's folder or below it")
        return CACHED_IMAGE_READERS[field](require_regular_file(self.folder / name, f"{field} {short_repr(name)}"))

    def _format_error(self, line: int, error: ValueError) -> str:
        """A fault as it is told."""
        return f"{self._location(error.line if isinstance(error, ParseError) else line)}: {error}"

    def _location(self, line: int) -> str:
        return f"{self.name}:{line}" if line else self.name


CACHED_IMAGE_READERS = {  # neighbouring records often share a picture
    "image": lru_cache(maxsize=4)(read_image),
    "mask": lru_cache(maxsize=4)(read_mask),
}


def require_regular_file(path: Path, name: str) -> Path:
    """The path of a file; ValueError where there is none: a pipe or a device would be waited for."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    except UnicodeEncodeError:
        pass  # no file has such a name
    raise ValueError(f"{name}: not a file")


def apply_count(seed_ranges: Sequence[range], record_count: int | None, default_count: int) -> Sequence[range]:
    """Runs of seeds with a record's `compose_count`, or the usual one where there is a single seed."""
    if sum(map(len, seed_ranges)) > 1:
        if record_count is not None:
            raise ValueError(f"count {record_count}: is of one seed, and several are given")
        return seed_ranges
    count = default_count if record_count is None else record_count
    if not 1 <= count <= MAX_IMAGES_PER_RECORD:
        raise ValueError(f"count {count}: must be from 1 to {MAX_IMAGES_PER_RECORD}")
    return (range(seed_ranges[0].start, seed_ranges[0].start + count),)


def open_prompt_source(
    path: Path | str, defaults: Request, *, count: int = 1, wildcards: Path | None = None, expand: str = "one"
) -> PromptSource:
    """The file at a path, or standard input ("-"), as requests: `defaults` with what each record says.

    A file is .txt, .jsonl, .csv, .parquet or .yaml; without a suffix, and within .txt, lines of JSON are told by their
    content. `compose_count` pictures are drawn of a record that does not say how many, picture j with its seed + j. Wildcards
    are files in a folder, `wildcards` beside the file where none is given; `expand` is one of `WILDCARD_EXPANSIONS`. ValueError
    where there is no such file; its content is looked at by `PromptSource.validate`.
    """
    if expand not in WILDCARD_EXPANSIONS:
        raise ValueError(f"wildcards {expand!r}: choose from {', '.join(WILDCARD_EXPANSIONS)}")
    path, name, kept = Path(path).absolute(), str(path), None
    folder, wildcards = path.parent, (wildcards or path.parent / "wildcards").absolute()
    if name == "-" or path.is_fifo():
        kept = spool_to_tempfile(None if name == "-" else path)
        path, name = Path(kept.name), "standard input" if name == "-" else name
    read = PROMPT_READERS[detect_suffix(require_regular_file(path, name), name)]
    return PromptSource(path, name, read, defaults, count, WildcardManager(wildcards), expand, folder, kept)


def spool_to_tempfile(path: Path | None) -> IO[bytes]:
    """A copy of what can be read only once, a pipe or standard input; the file goes when it is closed."""
    copy = NamedTemporaryFile(prefix="ldm-")  # noqa: SIM115  # it lives as long as the source
    with path.open("rb") if path else sys.stdin.buffer as file:
        shutil.copyfileobj(file, copy)
    copy.flush()
    return copy


def detect_suffix(path: Path, name: str) -> str:
    """The suffix that a file should have, by its own or, where that says little, by its first line."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        if file.peek(len(PARQUET_MAGIC)).startswith(PARQUET_MAGIC):
            return ".parquet"
        if suffix in ("", ".txt"):
            return ".jsonl" if JSON_OBJECT_PATTERN.match(file.read(MAX_LINE_BYTES)) else ".txt"
    if suffix not in PROMPT_READERS:
        raise ValueError(f"{name}: {suffix} is not read; choose from {', '.join(PROMPT_READERS)}")
    return suffix
