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

from ldm.jobs.lines import ParseError, read_lines
from ldm.jobs.schema import short_repr
from ldm.rng import derive_uniform

WILDCARD_PATTERN = re.compile(
    r"""
    \\\\ | \\[{}|] | \\__
    | [{}|]
    | (?<!\w)__(?P<name>[^\s_{}|](?:[^\s{}|]*?[^\s_{}|])?)__(?!\w)
    | [^\\{}|_]+
    | [\\_]
    """,
    re.VERBOSE,
)
VARIANT_WEIGHT_PATTERN = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)::")
VARIANT_BOUNDS_PATTERN = re.compile(r"\s*[0-9-]+\$\$")
WILDCARD_NAME_PATTERN = re.compile(r"(?=.{1,200}$)\w[\w.-]*(/\w[\w.-]*)*")
MAX_WILDCARD_NESTING = 32
MAX_PROMPT_LENGTH = 2**16  # characters of a prompt
MAX_WILDCARD_FILE_BYTES = 2**24  # bytes


@dataclass(frozen=True)
class Variant:
    """A place in a template where one of some templates goes; `start_trackers` is the character at which it stands."""

    start: int
    options: VariantOptions


TemplateParts = tuple[str | Variant, ...]


@dataclass(frozen=True)
class VariantOptions:
    """Templates to choose from: their weights and numbers of texts, summed up, and the longest text's length."""

    templates: Sequence[TemplateParts]
    cumulative_weights: Sequence[float]
    cumulative_counts: Sequence[int]
    max_length: int
    nesting_depth: int

    def select(self, u: float) -> TemplateParts:
        """The template that a number in [0, 1) falls on."""
        k = bisect_right(self.cumulative_weights, u * self.cumulative_weights[-1])
        return self.templates[min(k, len(self.templates) - 1)]

    def expand_nth(self, k: int) -> str:
        """The k-th text, of all that the templates give."""
        n = bisect_right(self.cumulative_counts, k)
        return expand_nth_parts(self.templates[n], k - (self.cumulative_counts[n - 1] if n else 0))


def build_variant_options(weighted_templates: Iterable[tuple[float, TemplateParts]]) -> VariantOptions:
    """Options of (weight, template); ValueError where all weights are 0, and for what would grow beyond reason."""
    weights, templates = zip(*weighted_templates, strict=True)
    if not 0 < sum(weights) < math.inf:
        raise ValueError("wildcards: the weights of a choice must not all be 0")
    longest, depth = max(map(check_expanded_length, templates)), 1 + max(map(max_nesting_depth, templates))
    if depth > MAX_WILDCARD_NESTING:
        raise ValueError(f"wildcards: nested more than {MAX_WILDCARD_NESTING} deep")
    totals = tuple(accumulate(map(count_expansions, templates)))
    return VariantOptions(templates, tuple(accumulate(weights)), totals, longest, depth)


def iter_variant_options(parts: TemplateParts) -> Iterator[VariantOptions]:
    return (part.options for part in parts if isinstance(part, Variant))


def count_expansions(parts: TemplateParts) -> int:
    """The number of texts that a template gives."""
    return math.prod(among.cumulative_counts[-1] for among in iter_variant_options(parts))


def max_nesting_depth(parts: TemplateParts) -> int:
    return max((among.nesting_depth for among in iter_variant_options(parts)), default=0)


def check_expanded_length(parts: TemplateParts) -> int:
    """Of a template's longest text; ValueError beyond `MAX_PROMPT_LENGTH`."""
    n = sum(len(part) if isinstance(part, str) else part.options.max_length for part in parts)
    if n > MAX_PROMPT_LENGTH and any(iter_variant_options(parts)):
        raise ValueError(f"wildcards: up to {n} characters, at most {MAX_PROMPT_LENGTH} are drawn")
    return n


def sample_expansion(parts: TemplateParts, seed: int, *key: int | str) -> str:
    """One text of a template, a function of (seed, key) alone; each choice is keyed by the places above it."""

    def chosen(part: str | Variant) -> str:
        if isinstance(part, str):
            return part
        return sample_expansion(part.options.select(derive_uniform(seed, *key, part.start)), seed, *key, part.start)

    return "".join(map(chosen, parts))


def expand_nth_parts(parts: TemplateParts, k: int) -> str:
    """The k-th text of a template; the last choice varies fastest."""
    texts = []
    for part in reversed(parts):
        if isinstance(part, Variant):
            k, rest = divmod(k, part.options.cumulative_counts[-1])
            texts.append(part.options.expand_nth(rest))
        else:
            texts.append(part)
    return "".join(reversed(texts))


def parse_wildcards(text: str, load_wildcard: Callable[[str], VariantOptions]) -> TemplateParts:
    """A text's parts, `file` giving the lines that a name stands for. ValueError for braces that do not match."""
    frames: list[list[list[str | Variant]]] = [[[]]]  # for each open brace its options so far
    starts: list[int] = []
    for match in WILDCARD_PATTERN.finditer(text):
        word, part = match[0], frames[-1][-1]
        if word == "{":
            starts.append(match.start())
            frames.append([[]])
        elif word == "}":
            if not starts:
                raise ValueError(rf"wildcards: }} at character {match.start() + 1} closes nothing; \}} is text")
            among = build_variant_options(map(split_variant_weight, map(merge_text_parts, frames.pop())))
            frames[-1][-1].append(Variant(starts.pop(), among))
        elif word == "|" and starts:
            frames[-1].append([])
        elif match["name"]:
            part.append(Variant(match.start(), load_wildcard(match["name"])))
        else:
            escaped = word in (r"\{", r"\}", r"\__") or (word == r"\|" and starts)
            part.append(word[1:] if escaped else word)
    if starts:
        raise ValueError(rf"wildcards: {{ at character {starts[-1] + 1} is not closed; \{{ is text")
    parts = merge_text_parts(frames[0][0])
    check_expanded_length(parts)
    return parts


def merge_text_parts(parts: Iterable[str | Variant]) -> TemplateParts:
    """Neighbouring stretches of text as one."""
    runs = ((kind, list(run)) for kind, run in groupby(parts, type))
    return tuple(part for kind, run in runs for part in (["".join(run)] if kind is str else run))  # type: ignore[arg-type]


def split_variant_weight(parts: TemplateParts) -> tuple[float, TemplateParts]:
    """An option's weight, 1 where it says none, and what follows."""
    head = parts[0] if parts and isinstance(parts[0], str) else ""
    if VARIANT_BOUNDS_PATTERN.match(head):
        raise ValueError("wildcards: $$, for several at once, is not known")
    match = VARIANT_WEIGHT_PATTERN.match(head)
    return (float(match[1]), (head[match.end() :], *parts[1:])) if match else (1.0, parts)


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with wildcards: one text for each seed, or `every` text that there is."""

    source: str
    parts: TemplateParts
    combinatorial: bool = False

    @property
    def is_constant(self) -> bool:
        """Is it the same text whatever the seed?"""
        return all(isinstance(part, str) for part in self.parts)

    @property
    def num_expansions(self) -> int:
        """Of its texts for one seed."""
        return count_expansions(self.parts) if self.combinatorial else 1

    def __call__(self, k: int, seed: int) -> str:
        """The k-th text for a seed."""
        return (
            expand_nth_parts(self.parts, k) if self.combinatorial else sample_expansion(self.parts, seed, self.source)
        )


class WildcardManager:
    """Reads templates, whose files lie in one folder; each file is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cache: dict[str, VariantOptions] = {}
        self._load_stack: list[str] = []

    def __call__(self, text: str) -> TemplateParts:
        """A text's parts; ValueError for what cannot be read, also in the files that it names."""
        return parse_wildcards(text, self.load) if any(sign in text for sign in ("{", "}", "__")) else (text,)

    def load(self, name: str) -> VariantOptions:
        """The lines of a file, as options; blank ones and those that begin with # are none."""
        if name in self._load_stack:
            raise ValueError(f"wildcard __{name}__: is within itself ({' > '.join([*self._load_stack, name])})")
        if name not in self._cache:
            self._load_stack.append(name)
            try:
                self._cache[name] = self._load_file(name)
            finally:
                self._load_stack.pop()
        return self._cache[name]

    def _load_file(self, name: str) -> VariantOptions:
        if not WILDCARD_NAME_PATTERN.fullmatch(name):
            raise ValueError(f"wildcard {short_repr(name)}: not a name of a file below {self.folder}")
        path = self.folder / f"{name}.txt"
        if not os.path.isfile(path):  # also where there can be no such path
            near = get_close_matches(name, [file.stem for file in self.folder.glob("*.txt")], 1)
            hint = f"; did you mean __{near[0]}__?" if near else r"; \__ is text"
            raise ValueError(f"wildcard __{name}__: no file {path}{hint}")
        if path.stat().st_size > MAX_WILDCARD_FILE_BYTES:
            raise ValueError(f"wildcard __{name}__: {path} has more than {MAX_WILDCARD_FILE_BYTES} bytes")
        try:
            with path.open("rb") as file:
                found = [self._parse_line(path, line.number, line.decode().strip()) for line in read_lines(file)]
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except ParseError as fault:
            raise ValueError(f"{path}:{fault.line}: {fault}") from None
        if not any(found):
            raise ValueError(f"wildcard __{name}__: {path} has no lines")
        return build_variant_options(option for option in found if option)

    def _parse_line(self, path: Path, number: int, text: str) -> tuple[float, TemplateParts] | None:
        if not text or text.startswith("#"):
            return None
        try:
            return split_variant_weight(self(text))
        except ValueError as error:
            raise ParseError(number, str(error)) from None
