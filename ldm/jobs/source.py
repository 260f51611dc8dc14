"""Prompt files as requests, in constant memory, and all errors of a file before any image is generated."""

from __future__ import annotations

import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path, PureWindowsPath
from tempfile import NamedTemporaryFile
from typing import IO, Any, NamedTuple

from PIL import Image

from ldm.errors import InputWarning
from ldm.image_io import read_image, read_mask
from ldm.jobs.readers import (
    MAX_IMAGES_PER_RECORD,
    MAX_LINE_BYTES,
    PROMPT_READERS,
    ParseError,
    PromptReader,
    PromptRow,
    read_text_rows,
)
from ldm.jobs.schema import EXTRA, NOTICES, short_repr
from ldm.jobs.wildcard_files import WildcardManager
from ldm.jobs.wildcards import PromptTemplate
from ldm.pipeline.request import RANDOM_SEED, Request
from ldm.rng import derive_seed

WILDCARD_EXPANSIONS = ("one", "all", "none")  # one text per seed, every text, or wildcards left as they are
MAX_REPORTED_ERRORS = 5
PARQUET_MAGIC = b"PAR1"
JSON_OBJECT_PATTERN = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"')
JSON_LIST_PATTERN = re.compile(rb'(\xef\xbb\xbf)?\s*\[\s*(\{\s*)?"')


class PromptEntry(NamedTuple):
    """The request of one image, and the line of the file that it comes from."""

    line: int
    request: Request
    extra: dict[str, Any] = {}  # noqa: RUF012  # the columns that are no fields


@dataclass(frozen=True)
class PromptRecord:
    """The requests of one record: every text of its prompts with every seed, the seed varying fastest."""

    request: Request
    prompt: PromptTemplate
    negative: PromptTemplate | None
    seeds: range

    @property
    def num_images(self) -> int:
        negatives = self.negative.num_expansions if self.negative else 1
        return self.prompt.num_expansions * negatives * len(self.seeds)

    @property
    def prompts_are_constant(self) -> bool:
        """Whether the requests differ in their seeds alone."""
        return self.prompt.is_constant and (self.negative is None or self.negative.is_constant)

    def __getitem__(self, k: int) -> Request:
        k, j = divmod(k, len(self.seeds))
        a, b = divmod(k, self.negative.num_expansions if self.negative else 1)
        seed = self.seeds[j]
        negative = self.negative(b, seed) if self.negative else None
        return replace(self.request, prompt=self.prompt(a, seed), negative_prompt=negative, seed=seed)


@dataclass(frozen=True)
class PromptSource:
    """A file of prompts; iterating it, as often as one likes, yields its entries in their order.

    The same file, defaults and wildcards give the same requests. `validate` comes first: where `lenient`, it finds the
    rows to leave out. Iterating raises ValueError with the name and line of
    a row that cannot be read, which `validate` has reported before unless the file has changed since.
    """

    path: Path
    name: str  # in messages
    reader: PromptReader
    defaults: Request
    images_per_prompt: int
    wildcards: WildcardManager
    expand: str
    folder: Path  # of its images
    convert_clip_skip: Callable[[int], int]
    spool_file: Any = field(default=None, repr=False)  # the temporary copy of standard input, kept open
    notices: dict[str, list[str]] = field(default_factory=dict, repr=False)  # what was not read: its places
    lenient: bool = False  # rows that no request can have are left out
    random_key: tuple[int, ...] = ()  # of seeds that are drawn, beside the row
    left_out: set[int] = field(default_factory=set, repr=False)  # their lines

    def __iter__(self) -> Iterator[PromptEntry]:
        for row in self._read_rows():
            if row.line in self.left_out:
                continue
            try:
                for record in self._expand_row(row):
                    extra = row.values.get(EXTRA, {}) if isinstance(row.values, dict) else {}
                    yield from (PromptEntry(row.line, record[k], extra) for k in range(record.num_images))
            except ValueError as error:
                raise ValueError(self._format_error(row.line, error)) from None

    def validate(
        self,
        resolve: Callable[[Request], object],
        on_request: Callable[[Request, str], object] = lambda request, location: None,
    ) -> int:
        """Read the whole file, call `resolve` (as `Pipeline.resolve`) on its requests, and return their number.

        Of requests that differ in their seeds alone it resolves the first and the last. `on_request` receives each
        request that was resolved, and its file and line. ValueError reports the first `MAX_REPORTED_ERRORS` errors,
        each with its line, and the number of the others.
        """
        messages: list[str] = []
        errors = total = 0
        self.notices.clear()
        for row in self._read_rows():
            for notice in row.values.get(NOTICES, ()) if isinstance(row.values, dict) else ():
                self.notices.setdefault(notice, []).append(self._location(row.line))
            try:
                for record in self._expand_row(row):
                    for k in {0, record.num_images - 1} if record.prompts_are_constant else range(record.num_images):
                        resolve(request := record[k])
                        on_request(request, self._location(row.line))
                    total += record.num_images
            except (ValueError, InputWarning) as error:
                if self.lenient and not getattr(error, "ends_reading", False):
                    self.left_out.add(row.line)
                    self.notices.setdefault(f"left out: {error}", []).append(self._location(row.line))
                    continue
                errors += 1
                if errors <= MAX_REPORTED_ERRORS:
                    messages.append(self._format_error(row.line, error))
        if errors > MAX_REPORTED_ERRORS:
            messages.append(f"and {errors - MAX_REPORTED_ERRORS} more")
        if errors:
            raise ValueError("; ".join(messages))
        for notice in self.wildcards.notices:
            self.notices[notice] = []
        if not total:
            reason = "; ".join(f"{places[0]}: {text}" for text, places in [*self.notices.items()][:1] if places)
            raise ValueError(f"{self.name}: no prompts in it{reason and f' ({reason})'}")
        return total

    def _read_rows(self) -> Iterator[PromptRow]:
        """The rows of the file; an error that ends the reading is the last row."""
        try:
            with self.path.open("rb") as file:
                yield from self.reader(file)
        except ParseError as error:
            error.ends_reading = True
            yield PromptRow(error.line, error)
        except OSError as error:
            raise ValueError(f"{self.name}: {error.strerror}") from None

    def _expand_row(self, row: PromptRow) -> Iterator[PromptRecord]:
        """A record for each range of seeds in a row; ValueError for values that no request can have."""
        if isinstance(row.values, ValueError):
            raise row.values
        values = {name: value for name, value in row.values.items() if name not in (EXTRA, NOTICES)}
        if not values:
            return  # a comment
        prompt = self._parse_template(values["prompt"])
        negative = values.get("negative_prompt", self.defaults.negative_prompt)
        seeds = values.pop("seed", (range(self.defaults.seed, self.defaults.seed + 1),))
        seeds = self._draw_seeds(seeds, row)
        seed_ranges = apply_count(seeds, values.pop("count", None), self.images_per_prompt)
        if "a1111_clip_skip" in values:
            values["clip_skip"] = self.convert_clip_skip(values.pop("a1111_clip_skip"))
        for name in {"image", "mask"} & values.keys():
            values[name] = self._load_image(name, values[name])
        request = replace(self.defaults, **values)
        for seed_range in seed_ranges:
            negative_template = None if negative is None else self._parse_template(negative)
            record = PromptRecord(request, prompt, negative_template, seed_range)
            if record.num_images > MAX_IMAGES_PER_RECORD:
                raise ValueError(f"{record.num_images} images of one record: must be at most {MAX_IMAGES_PER_RECORD}")
            yield record

    def _draw_seeds(self, seed_ranges: Sequence[range], row: PromptRow) -> Sequence[range]:
        """The seeds of a row, one for each that is -1: a function of the row and key, so that a job can be resumed."""
        if not any(seeds.start == RANDOM_SEED for seeds in seed_ranges) or isinstance(row.values, ValueError):
            return seed_ranges
        key: tuple[int | str, ...] = (*self.random_key, row.line, str(row.values["prompt"]))
        drawn = [derive_seed("random seed", *key, k) % 2**32 for k in range(len(seed_ranges))]
        return [range(n, n + 1) if r.start == RANDOM_SEED else r for n, r in zip(drawn, seed_ranges, strict=True)]

    def _parse_template(self, text: str) -> PromptTemplate:
        parts = (text,) if self.expand == "none" else self.wildcards(text)
        return PromptTemplate(text, parts, self.expand == "all")

    def _load_image(self, field: str, name: str) -> Image.Image:
        path = PureWindowsPath(name)  # splits at either kind of slash
        if path.anchor or ".." in path.parts:
            raise ValueError(f"{field} {short_repr(name)}: must lie in the file's folder or below it")
        return CACHED_IMAGE_READERS[field](require_regular_file(self.folder / name, f"{field} {short_repr(name)}"))

    def _format_error(self, line: int, error: Exception) -> str:
        place = self._location(error.line if isinstance(error, ParseError) else line)
        return f"{place}: {error}{' (--strict)' if isinstance(error, InputWarning) else ''}"

    def _location(self, line: int) -> str:
        return f"{self.name}:{line}" if line else self.name


CACHED_IMAGE_READERS = {  # neighbouring records often share an image
    "image": lru_cache(maxsize=4)(read_image),
    "mask": lru_cache(maxsize=4)(read_mask),
}


def require_regular_file(path: Path, name: str) -> Path:
    """The path of a file; ValueError where there is none, also for a pipe or a device, which would block."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    except UnicodeEncodeError:
        pass  # no file has such a name
    raise ValueError(f"{name}: not a file")


def apply_count(seed_ranges: Sequence[range], record_count: int | None, default_count: int) -> Sequence[range]:
    """Several seeds as they are; a single one as the first of `record_count` or `default_count` consecutive seeds."""
    if sum(map(len, seed_ranges)) > 1:
        if record_count is not None:
            raise ValueError(f"count {record_count}: needs a single seed, and several are given")
        return seed_ranges
    count = default_count if record_count is None else record_count
    if not 1 <= count <= MAX_IMAGES_PER_RECORD:
        raise ValueError(f"count {count}: must be from 1 to {MAX_IMAGES_PER_RECORD}")
    return (range(seed_ranges[0].start, seed_ranges[0].start + count),)


def subtract_one(a1111_clip_skip: int) -> int:
    """`Request.clip_skip` of a model that uses its last layer."""
    return a1111_clip_skip - 1


def open_prompt_source(
    path: Path | str,
    defaults: Request,
    *,
    count: int = 1,
    wildcards: Path | None = None,
    expand: str = "one",
    convert_clip_skip: Callable[[int], int] = subtract_one,
    lenient: bool = False,
    random_key: tuple[int, ...] = (),
) -> PromptSource:
    """The prompts of a file, or of standard input ("-"), as requests: `defaults` updated by each record.

    The suffix tells the format, one of `PROMPT_READERS`; without a suffix, and in .txt, the content tells JSON lines
    from text. `count` is the number of images of a record that does not state it: image j has seed + j. `wildcards` is
    the folder of wildcard files, by default `wildcards` beside the file; `expand` is one of `WILDCARD_EXPANSIONS`.
    `convert_clip_skip`, picklable, converts the clip skip in a line of text to that of a request. If `lenient`, rows
    that cannot be read and unknown options in lines of text are left out, with a notice.
    ValueError where there is no such file; `PromptSource.validate` reads its content.
    """
    if expand not in WILDCARD_EXPANSIONS:
        raise ValueError(f"wildcards {expand!r}: choose from {', '.join(WILDCARD_EXPANSIONS)}")
    path, name, spool = Path(path).absolute(), str(path), None
    folder, wildcards = path.parent, (wildcards or path.parent / "wildcards").absolute()
    if name == "-" or path.is_fifo():
        spool = spool_to_tempfile(None if name == "-" else path)
        path, name = Path(spool.name), "standard input" if name == "-" else name
    reader = PROMPT_READERS[detect_suffix(require_regular_file(path, name), name)]
    if lenient and reader is read_text_rows:
        reader = partial(read_text_rows, lenient=True)
    manager = WildcardManager(wildcards)
    return PromptSource(
        path,
        name,
        reader,
        defaults,
        count,
        manager,
        expand,
        folder,
        convert_clip_skip,
        spool,
        lenient=lenient,
        random_key=random_key,
    )


def spool_to_tempfile(path: Path | None) -> IO[bytes]:
    """A temporary copy of a pipe, or of standard input (None), which can be read only once."""
    copy = NamedTemporaryFile(prefix="ldm-")  # noqa: SIM115  # it lives as long as the source
    if path is None and sys.stdin is None:
        raise ValueError("-: the standard input is closed")
    with path.open("rb") if path else sys.stdin.buffer as file:
        shutil.copyfileobj(file, copy)
    copy.flush()
    return copy


def detect_suffix(path: Path, name: str) -> str:
    """The key of `PROMPT_READERS` for a file, by its suffix or, without one and in .txt, by its first line."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        if file.peek(len(PARQUET_MAGIC)).startswith(PARQUET_MAGIC):
            return ".parquet"
        if suffix in ("", ".txt"):
            start = file.read(MAX_LINE_BYTES)
            file.seek(max(0, path.stat().st_size - MAX_LINE_BYTES))
            if JSON_LIST_PATTERN.match(start) and file.read().rstrip().endswith(b"]"):
                return ".json"
            return ".jsonl" if JSON_OBJECT_PATTERN.match(start) else ".txt"
    if suffix not in PROMPT_READERS:
        raise ValueError(f"{name}: unknown suffix {suffix}: choose from {', '.join(PROMPT_READERS)}")
    return suffix
