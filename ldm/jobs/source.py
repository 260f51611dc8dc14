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

from ldm.images import read_mask, read_picture
from ldm.jobs.fields import Values, one, shown
from ldm.jobs.kinds import MAX_PICTURES, READERS, Reader, Row, failing
from ldm.jobs.lines import MAX_LINE, Fault
from ldm.jobs.wildcards import Template, Wildcards
from ldm.request import Request

EXPANSIONS = ("one", "all", "none")  # of wildcards: one text for each seed, every text, or left alone
TOLD = 5  # faults in one error
PARQUET = b"PAR1"
JSON = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"')


class Entry(NamedTuple):
    """One picture to draw, and the line that asks for it."""

    line: int
    request: Request


@dataclass(frozen=True)
class Record:
    """The pictures of one record: every text of its prompts with every seed, which varies fastest."""

    request: Request
    prompt: Template
    negative: Template | None
    seeds: range

    @property
    def size(self) -> int:
        return self.prompt.total * (self.negative.total if self.negative else 1) * len(self.seeds)

    @property
    def fixed(self) -> bool:
        """Do its pictures differ in their seeds alone?"""
        return all(template.fixed for template in (self.prompt, self.negative) if template)

    def __getitem__(self, k: int) -> Request:
        k, j = divmod(k, len(self.seeds))
        a, b = divmod(k, self.negative.total if self.negative else 1)
        seed = self.seeds[j]
        negative = self.negative(b, seed) if self.negative else None
        return replace(self.request, prompt=self.prompt(a, seed), negative_prompt=negative, seed=seed)


@dataclass(frozen=True)
class Source:
    """A file of prompts; iterating gives its entries, in its order, as often as one likes.

    The same file, defaults and wildcards give the same requests. ValueError where a line cannot be read, with its name
    and number: `check` has told before, unless the file has changed.
    """

    path: Path
    name: str  # for messages
    read: Reader
    defaults: Request
    count: int
    wildcards: Wildcards
    expand: str
    folder: Path  # of its pictures
    kept: Any = field(default=None, repr=False)  # what holds standard input's copy in place

    def __iter__(self) -> Iterator[Entry]:
        for row in self._rows():
            try:
                for record in self._records(row.read()):
                    yield from (Entry(row.line, record[k]) for k in range(record.size))
            except ValueError as error:
                raise ValueError(self._said(row.line, error)) from None

    def check(
        self,
        resolve: Callable[[Request], object],
        heard: Callable[[Request, str], object] = lambda request, where: None,
    ) -> int:
        """Read the whole file, ask `resolve` (as `Pipeline.resolve`) about its requests, and count them.

        Of pictures that differ in their seeds alone the first and the last are asked about; `heard` is told what was
        asked, and its file and line. ValueError tells the first five faults, each with its line, and the number of the
        rest.
        """
        told: list[str] = []
        faults = total = 0
        for row in self._rows():
            try:
                for record in self._records(row.read()):
                    for k in {0, record.size - 1} if record.fixed else range(record.size):
                        resolve(request := record[k])
                        heard(request, self._place(row.line))
                    total += record.size
            except ValueError as error:
                faults += 1
                if faults <= TOLD:
                    told.append(self._said(row.line, error))
        if faults > TOLD:
            told.append(f"and {faults - TOLD} more")
        if faults:
            raise ValueError("; ".join(told))
        if not total:
            raise ValueError(f"{self.name}: no prompts in it")
        return total

    def _rows(self) -> Iterator[Row]:
        """The file's rows; a fault that ends its reading is the last."""
        try:
            with self.path.open("rb") as file:
                yield from self.read(file)
        except Fault as fault:
            yield failing(fault)
        except OSError as error:
            raise ValueError(f"{self.name}: {error.strerror}") from None

    def _records(self, values: Values) -> Iterator[Record]:
        """A row's records, one for each run of seeds; ValueError for values that no request can have."""
        values = dict(values)
        prompt = self._template(values["prompt"])
        negative = values.get("negative_prompt", self.defaults.negative_prompt)
        runs = counted(values.pop("seed", one(self.defaults.seed)), values.pop("count", None), self.count)
        for name in {"image", "mask"} & values.keys():
            values[name] = self._picture(name, values[name])
        request = replace(self.defaults, **values)
        for run in runs:
            record = Record(request, prompt, None if negative is None else self._template(negative), run)
            if record.size > MAX_PICTURES:
                raise ValueError(f"{record.size} pictures of one record, at most {MAX_PICTURES} are drawn")
            yield record

    def _template(self, text: str) -> Template:
        parts = (text,) if self.expand == "none" else self.wildcards(text)
        return Template(text, parts, self.expand == "all")

    def _picture(self, field: str, name: str) -> Image.Image:
        path = PureWindowsPath(name)  # knows both kinds of slash
        if path.anchor or ".." in path.parts:
            raise ValueError(f"{field} {shown(name)}: must lie in the file's folder or below it")
        return PICTURES[field](regular(self.folder / name, f"{field} {shown(name)}"))

    def _said(self, line: int, error: ValueError) -> str:
        """A fault as it is told."""
        return f"{self._place(error.line if isinstance(error, Fault) else line)}: {error}"

    def _place(self, line: int) -> str:
        return f"{self.name}:{line}" if line else self.name


PICTURES = {  # neighbouring records often share a picture
    "image": lru_cache(maxsize=4)(read_picture),
    "mask": lru_cache(maxsize=4)(read_mask),
}


def regular(path: Path, name: str) -> Path:
    """The path of a file; ValueError where there is none: a pipe or a device would be waited for."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None
    except UnicodeEncodeError:
        pass  # no file has such a name
    raise ValueError(f"{name}: not a file")


def counted(runs: Sequence[range], given: int | None, usual: int) -> Sequence[range]:
    """Runs of seeds with a record's `count`, or the usual one where there is a single seed."""
    if sum(map(len, runs)) > 1:
        if given is not None:
            raise ValueError(f"count {given}: is of one seed, and several are given")
        return runs
    count = usual if given is None else given
    if not 1 <= count <= MAX_PICTURES:
        raise ValueError(f"count {count}: must be from 1 to {MAX_PICTURES}")
    return (range(runs[0].start, runs[0].start + count),)


def open_source(
    path: Path | str, defaults: Request, *, count: int = 1, wildcards: Path | None = None, expand: str = "one"
) -> Source:
    """The file at a path, or standard input ("-"), as requests: `defaults` with what each record says.

    A file is .txt, .jsonl, .csv, .parquet or .yaml; without a suffix, and within .txt, lines of JSON are told by their
    content. `count` pictures are drawn of a record that does not say how many, picture j with its seed + j. Wildcards
    are files in a folder, `wildcards` beside the file where none is given; `expand` is one of `EXPANSIONS`. ValueError
    where there is no such file; its content is looked at by `Source.check`.
    """
    if expand not in EXPANSIONS:
        raise ValueError(f"wildcards {expand!r}: choose from {', '.join(EXPANSIONS)}")
    path, name, kept = Path(path).absolute(), str(path), None
    folder, wildcards = path.parent, (wildcards or path.parent / "wildcards").absolute()
    if name == "-" or path.is_fifo():
        kept = spooled(None if name == "-" else path)
        path, name = Path(kept.name), "standard input" if name == "-" else name
    read = READERS[kind(regular(path, name), name)]
    return Source(path, name, read, defaults, count, Wildcards(wildcards), expand, folder, kept)


def spooled(path: Path | None) -> IO[bytes]:
    """A copy of what can be read only once, a pipe or standard input; the file goes when it is closed."""
    copy = NamedTemporaryFile(prefix="ldm-")  # noqa: SIM115  # it lives as long as the source
    with path.open("rb") if path else sys.stdin.buffer as file:
        shutil.copyfileobj(file, copy)
    copy.flush()
    return copy


def kind(path: Path, name: str) -> str:
    """The suffix that a file should have, by its own or, where that says little, by its first line."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        if file.peek(len(PARQUET)).startswith(PARQUET):
            return ".parquet"
        if suffix in ("", ".txt"):
            return ".jsonl" if JSON.match(file.read(MAX_LINE)) else ".txt"
    if suffix not in READERS:
        raise ValueError(f"{name}: {suffix} is not read; choose from {', '.join(READERS)}")
    return suffix
