r"""Wildcards in prompts: {red|blue}, and lines of files, in the syntax of dynamicprompts.

{red|blue}          one of these variants; they nest, and may be empty
{2::red|blue}       red twice as often
__name__            a line of name.txt, which may hold all this again, `2::` included
\{ \} \| \__        the characters themselves; before any other a backslash is left to the prompt's own grammar
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path

from ldm.errors import error_text, suggest
from ldm.jobs.readers import ParseError, decode_line, read_lines
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
MAX_PROMPT_LENGTH = 2**16  # characters
MAX_WILDCARD_FILE_BYTES = 2**24


@dataclass(frozen=True)
class Variant:
    """The part of a template that one of some templates replaces; `start` is its position in the text."""

    start: int
    options: VariantOptions


TemplateParts = tuple[str | Variant, ...]


@dataclass(frozen=True)
class VariantOptions:
    """Templates to choose from, with running sums of their weights and of their numbers of texts."""

    templates: Sequence[TemplateParts]
    cumulative_weights: Sequence[float]
    cumulative_counts: Sequence[int]
    max_length: int
    nesting_depth: int

    def select(self, u: float) -> TemplateParts:
        """The template at a quantile u in [0, 1) of the weights."""
        k = bisect_right(self.cumulative_weights, u * self.cumulative_weights[-1])
        return self.templates[min(k, len(self.templates) - 1)]

    def expand_nth(self, k: int) -> str:
        """The k-th of all texts of the templates."""
        n = bisect_right(self.cumulative_counts, k)
        return expand_nth_parts(self.templates[n], k - (self.cumulative_counts[n - 1] if n else 0))


def build_variant_options(weighted_templates: Iterable[tuple[float, TemplateParts]]) -> VariantOptions:
    """Options of (weight, template); ValueError where all weights are 0, or a text could grow without bound."""
    weights, templates = zip(*weighted_templates, strict=True)
    if not 0 < sum(weights) < math.inf:
        raise ValueError("wildcards: the weights of a choice must not all be 0")
    max_length = max(map(check_expanded_length, templates))
    inner = [part.options.nesting_depth for parts in templates for part in parts if isinstance(part, Variant)]
    depth = 1 + max(inner, default=0)
    if depth > MAX_WILDCARD_NESTING:
        raise ValueError(f"wildcards: nested more than {MAX_WILDCARD_NESTING} deep")
    counts = tuple(accumulate(map(count_expansions, templates)))
    return VariantOptions(templates, tuple(accumulate(weights)), counts, max_length, depth)


def count_expansions(parts: TemplateParts) -> int:
    """The number of texts of a template."""
    return math.prod(part.options.cumulative_counts[-1] for part in parts if isinstance(part, Variant))


def check_expanded_length(parts: TemplateParts) -> int:
    """The length of a template's longest text; ValueError beyond `MAX_PROMPT_LENGTH`."""
    n = sum(len(part) if isinstance(part, str) else part.options.max_length for part in parts)
    if n > MAX_PROMPT_LENGTH and any(isinstance(part, Variant) for part in parts):
        raise ValueError(f"wildcards: up to {n} characters: must be at most {MAX_PROMPT_LENGTH}")
    return n


def sample_expansion(parts: TemplateParts, seed: int, *key: int | str) -> str:
    """One text of a template, a function of (seed, key) alone; the positions around a choice are its key."""
    texts = []
    for part in parts:
        if isinstance(part, Variant):
            chosen = part.options.select(derive_uniform(seed, *key, part.start))
            texts.append(sample_expansion(chosen, seed, *key, part.start))
        else:
            texts.append(part)
    return "".join(texts)


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
    """The parts of a text; `load_wildcard` gives the options of a __name__. ValueError for unmatched braces."""
    frames: list[list[list[str | Variant]]] = [[[]]]  # the options so far of each open brace
    starts: list[int] = []
    for match in WILDCARD_PATTERN.finditer(text):
        token, parts = match[0], frames[-1][-1]
        if token == "{":
            starts.append(match.start())
            frames.append([[]])
        elif token == "}":
            if not starts:
                raise ValueError(rf"wildcards: }} at character {match.start() + 1} closes nothing; \}} is text")
            options = build_variant_options(map(split_variant_weight, map(merge_text_parts, frames.pop())))
            frames[-1][-1].append(Variant(starts.pop(), options))
        elif token == "|" and starts:
            frames[-1].append([])
        elif match["name"]:
            parts.append(Variant(match.start(), load_wildcard(match["name"])))
        else:
            is_escaped = token in (r"\{", r"\}", r"\__") or (token == r"\|" and starts)
            parts.append(token[1:] if is_escaped else token)
    if starts:
        raise ValueError(rf"wildcards: {{ at character {starts[-1] + 1} is not closed; \{{ is text")
    merged = merge_text_parts(frames[0][0])
    check_expanded_length(merged)
    return merged


def merge_text_parts(parts: Iterable[str | Variant]) -> TemplateParts:
    """Parts with neighbouring strings joined."""
    runs = ((kind, list(run)) for kind, run in groupby(parts, type))
    return tuple(part for kind, run in runs for part in (["".join(run)] if kind is str else run))  # type: ignore[arg-type]


def split_variant_weight(parts: TemplateParts) -> tuple[float, TemplateParts]:
    """The weight before `::`, by default 1, and the rest of an option."""
    head = parts[0] if parts and isinstance(parts[0], str) else ""
    if VARIANT_BOUNDS_PATTERN.match(head):
        raise ValueError("wildcards: $$, for several at once, is not supported")
    match = VARIANT_WEIGHT_PATTERN.match(head)
    return (float(match[1]), (head[match.end() :], *parts[1:])) if match else (1.0, parts)


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with wildcards: one text for each seed, or, if `combinatorial`, every text."""

    source: str
    parts: TemplateParts
    combinatorial: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether the text is the same for every seed."""
        return all(isinstance(part, str) for part in self.parts)

    @property
    def num_expansions(self) -> int:
        """The number of texts per seed."""
        return count_expansions(self.parts) if self.combinatorial else 1

    def __call__(self, k: int, seed: int) -> str:
        """The k-th text for a seed."""
        if self.combinatorial:
            return expand_nth_parts(self.parts, k)
        return sample_expansion(self.parts, seed, self.source)


class WildcardManager:
    """Parses templates whose wildcard files lie in one folder; each file is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cache: dict[str, VariantOptions] = {}
        self._load_stack: list[str] = []

    def __call__(self, text: str) -> TemplateParts:
        """The parts of a text; ValueError for what cannot be parsed, also in the files that it names."""
        return parse_wildcards(text, self.load) if any(sign in text for sign in ("{", "}", "__")) else (text,)

    def load(self, name: str) -> VariantOptions:
        """The lines of a file as options, except blank lines and those that begin with #."""
        if name in self._load_stack:
            raise ValueError(f"wildcard __{name}__: includes itself ({' > '.join([*self._load_stack, name])})")
        if name not in self._cache:
            self._load_stack.append(name)
            try:
                self._cache[name] = self._load_file(name)
            finally:
                self._load_stack.pop()
        return self._cache[name]

    def _load_file(self, name: str) -> VariantOptions:
        if not WILDCARD_NAME_PATTERN.fullmatch(name):
            raise ValueError(f"wildcard {short_repr(name)}: not the name of a file below {self.folder}")
        path = self.folder / f"{name}.txt"
        if not os.path.isfile(path):  # also where there can be no such path
            hint = suggest(name, [file.stem for file in self.folder.glob("*.txt")]) or r"; \__ is text"
            raise ValueError(f"wildcard __{name}__: no file {path}{hint}")
        if path.stat().st_size > MAX_WILDCARD_FILE_BYTES:
            raise ValueError(f"wildcard __{name}__: {path} has more than {MAX_WILDCARD_FILE_BYTES} bytes")
        try:
            with path.open("rb") as file:
                options = [self._parse_line(*line) for line in read_lines(file)]
        except OSError as error:
            raise ValueError(f"{path}: {error_text(error)}") from None
        except ParseError as error:
            raise ValueError(f"{path}:{error.line}: {error}") from None
        if not any(options):
            raise ValueError(f"wildcard __{name}__: {path} has no lines")
        return build_variant_options(option for option in options if option)

    def _parse_line(self, number: int, data: bytes) -> tuple[float, TemplateParts] | None:
        text = decode_line(number, data).strip()
        if not text or text.startswith("#"):
            return None
        try:
            return split_variant_weight(self(text))
        except ValueError as error:
            raise ParseError(number, str(error)) from None
