r"""Wildcards in prompts: {red|blue}, and lines of files, in the syntax of dynamicprompts.

{red|blue}          one of these; they nest, and may be empty
{2::red|blue}       red twice as often
__name__            a line of name.txt, which may hold all this again, `2::` included
\{ \} \| \__        the characters themselves; before any other a backslash is left to the prompt's own grammar
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate, groupby
from pathlib import Path

from ldm.jobs.fields import shown
from ldm.jobs.lines import Fault, lines
from ldm.rng import keyed_uniform

SYNTAX = re.compile(
    r"""
    \\\\ | \\[{}|] | \\__
    | [{}|]
    | (?<!\w)__(?P<name>[^\s_{}|](?:[^\s{}|]*?[^\s_{}|])?)__(?!\w)
    | [^\\{}|_]+
    | [\\_]
    """,
    re.VERBOSE,
)
WEIGHT = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)::")
SEVERAL = re.compile(r"\s*[0-9-]+\$\$")
NAME = re.compile(r"(?=.{1,200}$)\w[\w.-]*(/\w[\w.-]*)*")
MAX_NESTING = 32
MAX_LENGTH = 2**16  # characters of a prompt
MAX_FILE = 2**24  # bytes


@dataclass(frozen=True)
class Choice:
    """A place in a template where one of some templates goes; `start` is the character at which it stands."""

    start: int
    among: Options


Parts = tuple[str | Choice, ...]


@dataclass(frozen=True)
class Options:
    """Templates to choose from: their weights and numbers of texts, summed up, and the longest text's length."""

    templates: Sequence[Parts]
    weights: Sequence[float]
    totals: Sequence[int]
    longest: int
    depth: int

    def at(self, share: float) -> Parts:
        """The template that a number in [0, 1) falls on."""
        k = bisect_right(self.weights, share * self.weights[-1])
        return self.templates[min(k, len(self.templates) - 1)]

    def text(self, k: int) -> str:
        """The k-th text, of all that the templates give."""
        n = bisect_right(self.totals, k)
        return nth(self.templates[n], k - (self.totals[n - 1] if n else 0))


def options(weighted: Iterable[tuple[float, Parts]]) -> Options:
    """Options of (weight, template); ValueError where all weights are 0, and for what would grow beyond reason."""
    weights, templates = zip(*weighted, strict=True)
    if not 0 < sum(weights) < math.inf:
        raise ValueError("wildcards: the weights of a choice must not all be 0")
    longest, depth = max(map(length, templates)), 1 + max(map(nesting, templates))
    if depth > MAX_NESTING:
        raise ValueError(f"wildcards: nested more than {MAX_NESTING} deep")
    totals = tuple(accumulate(map(total, templates)))
    return Options(templates, tuple(accumulate(weights)), totals, longest, depth)


def choices(parts: Parts) -> Iterator[Options]:
    return (part.among for part in parts if isinstance(part, Choice))


def total(parts: Parts) -> int:
    """The number of texts that a template gives."""
    return math.prod(among.totals[-1] for among in choices(parts))


def nesting(parts: Parts) -> int:
    return max((among.depth for among in choices(parts)), default=0)


def length(parts: Parts) -> int:
    """Of a template's longest text; ValueError beyond `MAX_LENGTH`."""
    n = sum(len(part) if isinstance(part, str) else part.among.longest for part in parts)
    if n > MAX_LENGTH and any(choices(parts)):
        raise ValueError(f"wildcards: up to {n} characters, at most {MAX_LENGTH} are drawn")
    return n


def pick(parts: Parts, seed: int, *key: int | str) -> str:
    """One text of a template, a function of (seed, key) alone; each choice is keyed by the places above it."""

    def chosen(part: str | Choice) -> str:
        if isinstance(part, str):
            return part
        return pick(part.among.at(keyed_uniform(seed, *key, part.start)), seed, *key, part.start)

    return "".join(map(chosen, parts))


def nth(parts: Parts, k: int) -> str:
    """The k-th text of a template; the last choice varies fastest."""
    texts = []
    for part in reversed(parts):
        if isinstance(part, Choice):
            k, rest = divmod(k, part.among.totals[-1])
            texts.append(part.among.text(rest))
        else:
            texts.append(part)
    return "".join(reversed(texts))


def parse(text: str, file: Callable[[str], Options]) -> Parts:
    """A text's parts, `file` giving the lines that a name stands for. ValueError for braces that do not match."""
    frames: list[list[list[str | Choice]]] = [[[]]]  # for each open brace its options so far
    starts: list[int] = []
    for match in SYNTAX.finditer(text):
        word, part = match[0], frames[-1][-1]
        if word == "{":
            starts.append(match.start())
            frames.append([[]])
        elif word == "}":
            if not starts:
                raise ValueError(rf"wildcards: }} at character {match.start() + 1} closes nothing; \}} is text")
            among = options(map(weighted, map(merged, frames.pop())))
            frames[-1][-1].append(Choice(starts.pop(), among))
        elif word == "|" and starts:
            frames[-1].append([])
        elif match["name"]:
            part.append(Choice(match.start(), file(match["name"])))
        else:
            escaped = word in (r"\{", r"\}", r"\__") or (word == r"\|" and starts)
            part.append(word[1:] if escaped else word)
    if starts:
        raise ValueError(rf"wildcards: {{ at character {starts[-1] + 1} is not closed; \{{ is text")
    parts = merged(frames[0][0])
    length(parts)
    return parts


def merged(parts: Iterable[str | Choice]) -> Parts:
    """Neighbouring stretches of text as one."""
    runs = ((kind, list(run)) for kind, run in groupby(parts, type))
    return tuple(part for kind, run in runs for part in (["".join(run)] if kind is str else run))  # type: ignore[arg-type]


def weighted(parts: Parts) -> tuple[float, Parts]:
    """An option's weight, 1 where it says none, and what follows."""
    head = parts[0] if parts and isinstance(parts[0], str) else ""
    if SEVERAL.match(head):
        raise ValueError("wildcards: $$, for several at once, is not known")
    match = WEIGHT.match(head)
    return (float(match[1]), (head[match.end() :], *parts[1:])) if match else (1.0, parts)


@dataclass(frozen=True)
class Template:
    """A prompt with wildcards: one text for each seed, or `every` text that there is."""

    source: str
    parts: Parts
    every: bool = False

    @property
    def fixed(self) -> bool:
        """Is it the same text whatever the seed?"""
        return all(isinstance(part, str) for part in self.parts)

    @property
    def total(self) -> int:
        """Of its texts for one seed."""
        return total(self.parts) if self.every else 1

    def __call__(self, k: int, seed: int) -> str:
        """The k-th text for a seed."""
        return nth(self.parts, k) if self.every else pick(self.parts, seed, self.source)


class Wildcards:
    """Reads templates, whose files lie in one folder; each file is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, Options] = {}
        self._reading: list[str] = []

    def __call__(self, text: str) -> Parts:
        """A text's parts; ValueError for what cannot be read, also in the files that it names."""
        return parse(text, self.file) if any(sign in text for sign in ("{", "}", "__")) else (text,)

    def file(self, name: str) -> Options:
        """The lines of a file, as options; blank ones and those that begin with # are none."""
        if name in self._reading:
            raise ValueError(f"wildcard __{name}__: is within itself ({' > '.join([*self._reading, name])})")
        if name not in self._read:
            self._reading.append(name)
            try:
                self._read[name] = self._options(name)
            finally:
                self._reading.pop()
        return self._read[name]

    def _options(self, name: str) -> Options:
        if not NAME.fullmatch(name):
            raise ValueError(f"wildcard {shown(name)}: not a name of a file below {self.folder}")
        path = self.folder / f"{name}.txt"
        if not os.path.isfile(path):  # also where there can be no such path
            near = get_close_matches(name, [file.stem for file in self.folder.glob("*.txt")], 1)
            hint = f"; did you mean __{near[0]}__?" if near else r"; \__ is text"
            raise ValueError(f"wildcard __{name}__: no file {path}{hint}")
        if path.stat().st_size > MAX_FILE:
            raise ValueError(f"wildcard __{name}__: {path} has more than {MAX_FILE} bytes")
        try:
            with path.open("rb") as file:
                found = [self._option(path, line.number, line.text().strip()) for line in lines(file)]
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except Fault as fault:
            raise ValueError(f"{path}:{fault.line}: {fault}") from None
        if not any(found):
            raise ValueError(f"wildcard __{name}__: {path} has no lines")
        return options(option for option in found if option)

    def _option(self, path: Path, number: int, text: str) -> tuple[float, Parts] | None:
        if not text or text.startswith("#"):
            return None
        try:
            return weighted(self(text))
        except ValueError as error:
            raise Fault(number, str(error)) from None
