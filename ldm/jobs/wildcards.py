r"""Wildcards in prompts: {red|blue}, lines of files and variables, in the syntax of dynamicprompts.

{red|blue}          one of these variants; they nest, and may be empty
{2::red|blue}       red twice as often
{2$$a|b|c}          two of them in any order, joined by a comma; {1-2$$ and $$a|b} one or two, joined by " and "
{~a|b} {@a|b} {!a|b}  at random, in turn with the seed, and every one
__name__            a line of name.txt, which may hold all this again, `2::` included; __~name__ and so on as above
__name(c=red)__     the same, with the variable c set in those lines
${c={red|blue}}     sets a variable, evaluated at each use; ${c=!...} is evaluated once; ${c?=...} keeps an older value
${c} ${c:red}       its value, and red where it is not set
\{ \} \| \__        the characters themselves; before any other a backslash is left to the prompt's own grammar
"""

from __future__ import annotations

import heapq
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby, permutations

from ldm.rng import derive_uniform

TOKEN_PATTERN = re.compile(
    r"""
    \\\\ | \\[{}|] | \\__
    | \$\{\s*(?P<variable>[A-Za-z_][\w-]*)\s*(?P<operator>\??=!?|:|(?=\}))\s*
    | [{}|] | \$\{ | \$\$
    | __(?P<method>[~@!])?(?P<name>[^\s_{}|$\#()](?:(?!__)[^{}|$\#()\n])*(?<!\s)(?<!\\))
        (?:\((?P<values>[^()\n]*)\))?__
    | [^\\{}|_$]+
    | [\\_$]
    """,
    re.VERBOSE,
)
VARIANT_HEADER_PATTERN = re.compile(
    r"(?:\s*(?P<method>[~@!]))?(?:\s*(?P<bounds>[0-9]+-[0-9]+|[0-9]+-|-[0-9]+|[0-9]+)\$\$"
    r"(?:(?P<separator>[^${}]+)\$\$)?)?"
)
VARIANT_WEIGHT_PATTERN = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)::")
STRAY_WILDCARD_PATTERN = re.compile(r"(?<!_)__(?=[^\W_])|(?<=[^\s_,.;:])__(?!_)")
MAX_WILDCARD_NESTING = 32
MAX_PROMPT_LENGTH = 2**16  # characters
MAX_SELECTIONS = 100_000  # of a choice of several, where all are enumerated
RANDOM, CYCLIC, COMBINATORIAL = "~", "@", "!"  # how a variant is chosen


@dataclass(frozen=True)
class Variant:
    """The part of a template that one of some templates replaces; `start` is its position in the text.

    `method` "" is that of the whole template. The text of a `variable` is kept for its references, and not shown.
    """

    start: int
    options: VariantOptions
    method: str = ""
    is_wildcard: bool = False
    variable: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reference:
    """The part of a template that the text of an earlier variant replaces."""

    variable: tuple[int, int]
    max_length: int


TemplateParts = tuple[str | Variant | Reference, ...]
Variables = Mapping[str, TemplateParts]
LoadWildcard = Callable[[str, Variables], "VariantOptions"]


@dataclass(frozen=True)
class VariantOptions:
    """Templates of which `min_choices` to `max_choices` are chosen, with running sums of their weights."""

    templates: Sequence[TemplateParts]
    cumulative_weights: Sequence[float]
    max_length: int
    nesting_depth: int
    min_choices: int = 1
    max_choices: int = 1
    separator: str = ","

    @cached_property
    def selections(self) -> Sequence[tuple[int, ...]]:
        """Everything that may be chosen: the indices of templates, in their order."""
        numbers = range(self.min_choices, self.max_choices + 1)
        if sum(math.perm(len(self.templates), k) for k in numbers) > MAX_SELECTIONS and self.max_choices > 1:
            raise ValueError(f"wildcards: more than {MAX_SELECTIONS} ways to choose several of a list: not enumerated")
        return [chosen for k in numbers for chosen in permutations(range(len(self.templates)), k)]

    @cached_property
    def cumulative_counts(self) -> Sequence[int]:
        """Running sums of the numbers of texts of each selection."""
        counts = [count_expansions(parts, COMBINATORIAL) for parts in self.templates]
        return tuple(accumulate(math.prod(counts[i] for i in chosen) for chosen in self.selections))

    def count(self, method: str) -> int:
        """The number of texts that are enumerated: one, unless the method is `COMBINATORIAL`."""
        return self.cumulative_counts[-1] if method == COMBINATORIAL else 1

    def sample(self, seed: int, key: Sequence[int | str]) -> tuple[int, ...]:
        """A selection without repetition, by weight: a function of (seed, key)."""
        if self.max_choices == self.min_choices == 1:
            u = derive_uniform(seed, *key) * self.cumulative_weights[-1]
            return (min(bisect_right(self.cumulative_weights, u), len(self.templates) - 1),)
        sizes = self.max_choices - self.min_choices + 1
        number = self.min_choices + int(derive_uniform(seed, *key, "number") * sizes)
        weights = [b - a for a, b in zip([0.0, *self.cumulative_weights], self.cumulative_weights, strict=False)]
        chosen: list[int] = []
        for j in range(number):
            sums = list(accumulate(weights))
            if sums[-1] <= 0:
                break
            chosen.append(min(bisect_right(sums, derive_uniform(seed, *key, "item", j) * sums[-1]), len(weights) - 1))
            weights[chosen[-1]] = 0.0
        return tuple(chosen)

    def expand(self, rank: int, method: str, seed: int, key: Sequence[int | str], texts: Mapping) -> str:
        """The text of rank `rank` of all, or the one of `seed`, by the method."""
        if method == COMBINATORIAL:
            n = bisect_right(self.cumulative_counts, rank)
            chosen, rank = self.selections[n], rank - (self.cumulative_counts[n - 1] if n else 0)
        elif method == CYCLIC:
            chosen, rank, method = self.selections[seed % len(self.selections)], seed, RANDOM
        else:
            chosen, rank = self.sample(seed, key), seed
        items: list[str] = []
        for j, i in reversed(list(enumerate(chosen))):
            item_rank = rank
            if method == COMBINATORIAL:
                rank, item_rank = divmod(rank, count_expansions(self.templates[i], method))
            item_key = key if self.max_choices == 1 else (*key, "item", j)
            items.append(expand_template(self.templates[i], item_rank, method, seed, item_key, texts))
        return self.separator.join(reversed(items))


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
    return VariantOptions(templates, tuple(accumulate(weights)), max_length, depth)


def choose_several(options: VariantOptions, bounds: str, separator: str | None) -> VariantOptions:
    """Options of which a number within `bounds` ("2", "1-3", "1-", "-3") is chosen; ValueError where there is none.

    A wildcard alone stands for its lines: they are not repeated.
    """
    parts = [part for part in options.templates[0] if not isinstance(part, str) or part.strip()]
    if len(options.templates) == 1 and len(parts) == 1 and isinstance(parts[0], Variant) and parts[0].is_wildcard:
        options = parts[0].options
    low, dash, high = bounds.partition("-")
    total = len(options.templates)
    most = min(total, int(high) if high else total if dash else int(low))
    least = min(total, int(low) if low else 1)
    if least > most:
        raise ValueError(f"wildcards: {bounds}$$: must run upwards")
    joiner = "," if separator is None else separator
    longest = sum(heapq.nlargest(most, map(measure_template, options.templates))) + max(0, most - 1) * len(joiner)
    check_length(longest)
    weights = options.cumulative_weights
    return VariantOptions(options.templates, weights, longest, options.nesting_depth, least, most, joiner)


def count_expansions(parts: TemplateParts, method: str) -> int:
    """The number of texts of a template that are enumerated."""
    return math.prod(part.options.count(part.method or method) for part in parts if isinstance(part, Variant))


def measure_template(parts: TemplateParts) -> int:
    """The length of a template's longest text."""
    lengths = (len(part) if isinstance(part, str) else _max_length(part) for part in parts)
    return sum(lengths)


def _max_length(part: Variant | Reference) -> int:
    if isinstance(part, Reference):
        return part.max_length
    return 0 if part.variable else part.options.max_length


def check_length(n: int) -> int:
    """ValueError for a text of more than `MAX_PROMPT_LENGTH` characters."""
    if n > MAX_PROMPT_LENGTH:
        raise ValueError(f"wildcards: up to {n} characters: must be at most {MAX_PROMPT_LENGTH}")
    return n


def check_expanded_length(parts: TemplateParts) -> int:
    """The length of a template's longest text; ValueError beyond `MAX_PROMPT_LENGTH`, unless it is constant."""
    n = measure_template(parts)
    return n if is_constant(parts) else check_length(n)


def is_constant(parts: TemplateParts) -> bool:
    """Whether a template is one text."""
    return all(isinstance(part, str) for part in parts)


def expand_template(
    parts: TemplateParts, rank: int, method: str, seed: int, key: Sequence[int | str], texts: Mapping
) -> str:
    """One text of a template, a function of its arguments alone; the positions around a choice are its key.

    What is enumerated has the digits of `rank`, the last choice varying fastest; `texts` are those of variables.
    """
    ranks: list[int] = []
    for part in reversed(parts):
        rank, rest = divmod(rank, count_expansions((part,), method))
        ranks.append(rest)
    texts, words = dict(texts), list[str]()
    for part, rest in zip(parts, reversed(ranks), strict=True):
        if isinstance(part, str):
            words.append(part)
        elif isinstance(part, Reference):
            words.append(texts[part.variable])
        else:
            text = part.options.expand(rest, part.method or method, seed, (*key, part.start), texts)
            if part.variable:
                texts[part.variable] = text
            else:
                words.append(text)
    return "".join(words)


@dataclass
class Frame:
    """An open brace of a text: what it opened, and its templates so far."""

    start: int
    match: re.Match[str] | None = None  # of the header of a variant, or the token of a variable
    templates: list[list[str | Variant | Reference]] = field(default_factory=lambda: [[]])

    @property
    def is_variable(self) -> bool:
        return self.match is not None and self.match.re is TOKEN_PATTERN


class TemplateParser:
    """Parses a text; `load_wildcard(name, variables)` gives the options of a __name__, `depth` levels of files down."""

    def __init__(self, text: str, load_wildcard: LoadWildcard, variables: Variables, depth: int = 0) -> None:
        self.text, self.load_wildcard, self.depth = text, load_wildcard, depth
        self.variables = dict(variables)
        self.frames = [Frame(0)]

    def parse(self) -> TemplateParts:
        """The parts of the text; ValueError for unmatched braces, and for what looks like a wildcard and is none."""
        position = 0
        while match := TOKEN_PATTERN.match(self.text, position):
            position = match.end()
            if match[0] == "{":
                header = VARIANT_HEADER_PATTERN.match(self.text, position)
                position = header.end() if header else position
                self.frames.append(Frame(match.start(), header))
            elif match["variable"]:
                self.frames.append(Frame(match.start(), match))
            else:
                self._add_token(match)
        if len(self.frames) > 1:
            where = f"character {self.frames[-1].start + 1}"
            raise ValueError(rf"wildcards: {{ at {where} is not closed; \{{ is text")
        parts = merge_text_parts(self.frames[0].templates[0])
        check_expanded_length(parts)
        return parts

    def _add_token(self, match: re.Match[str]) -> None:
        token, frame = match[0], self.frames[-1]
        in_variant = len(self.frames) > 1 and not frame.is_variable
        if token == "}":
            self._close(match.start())
        elif token == "|" and in_variant:
            frame.templates.append([])
        elif match["name"]:
            frame.templates[-1].append(self._parse_wildcard(match))
        elif token == "${" or (token == "$$" and in_variant):
            raise ValueError(rf"wildcards: {token} at character {match.start() + 1} is not understood; \{{ is text")
        else:
            stray = STRAY_WILDCARD_PATTERN.match(self.text, match.start())
            if stray and STRAY_WILDCARD_PATTERN.search(self.text, match.start() + 2):
                raise ValueError(rf"wildcards: __ at character {match.start() + 1} is not understood; \__ is text")
            is_escaped = token in (r"\{", r"\}", r"\__") or (token == r"\|" and in_variant)
            frame.templates[-1].append(token[1:] if is_escaped else token)

    def _parse_wildcard(self, match: re.Match[str]) -> Variant:
        name, values, variables = match["name"], match["values"], self.variables
        if values is not None and "=" not in values:
            name = f"{name}({values})"  # the name of a file
        else:
            for variable, _, value in (pair.partition("=") for pair in (values or "").split(",") if pair.strip()):
                parser = TemplateParser(value.strip(), self.load_wildcard, self.variables, self.depth)
                variables = {**variables, variable.strip(): parser.parse()}
        return Variant(match.start(), self.load_wildcard(name, variables), match["method"] or "", is_wildcard=True)

    def _close(self, end: int) -> None:
        if len(self.frames) == 1:
            raise ValueError(rf"wildcards: }} at character {end + 1} closes nothing; \}} is text")
        frame = self.frames.pop()
        templates = [merge_text_parts(parts) for parts in frame.templates]
        target = self.frames[-1].templates[-1]
        if frame.is_variable:
            target.extend(self._evaluate_variable(frame, templates[0]))
            return
        options = build_variant_options(map(split_variant_weight, templates))
        header = frame.match
        if header and header["bounds"]:
            options = choose_several(options, header["bounds"], header["separator"])
        target.append(Variant(frame.start, options, (header and header["method"]) or ""))

    def _evaluate_variable(self, frame: Frame, value: TemplateParts) -> TemplateParts:
        """The parts that an access to a variable, or its assignment, leaves in the text."""
        assert frame.match is not None
        name, operator = frame.match["variable"], frame.match["operator"]
        if "=" not in operator:
            if name not in self.variables and operator != ":":
                raise ValueError(rf"wildcards: ${{{name}}}: no such variable is set; $\{{ is text")
            return self._use(frame.start, self.variables.get(name, value))
        if len(self.frames) > 1:
            raise ValueError(f"wildcards: ${{{name}=...}}: a variable cannot be set within braces")
        if "?" in operator and name in self.variables:
            return ()
        if "!" not in operator or is_constant(value):
            self.variables[name] = value
            return ()
        options, variable = build_variant_options([(1.0, value)]), (self.depth, frame.start)
        self.variables[name] = (Reference(variable, options.max_length),)
        return (Variant(frame.start, options, variable=variable),)

    def _use(self, start: int, value: TemplateParts) -> TemplateParts:
        """The value of a variable, with choices of its own."""
        if any(isinstance(part, Variant) for part in value):
            return (Variant(start, build_variant_options([(1.0, value)])),)
        return value


def merge_text_parts(parts: Iterable[str | Variant | Reference]) -> TemplateParts:
    """Parts with neighbouring strings joined."""
    runs = ((kind, list(run)) for kind, run in groupby(parts, type))
    return tuple(part for kind, run in runs for part in (["".join(run)] if kind is str else run))  # type: ignore[arg-type]


def split_variant_weight(parts: TemplateParts) -> tuple[float, TemplateParts]:
    """The weight before `::`, by default 1, and the rest of an option."""
    head = parts[0] if parts and isinstance(parts[0], str) else ""
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
        return is_constant(self.parts)

    @property
    def num_expansions(self) -> int:
        """The number of texts per seed."""
        return count_expansions(self.parts, COMBINATORIAL) if self.combinatorial else 1

    def __call__(self, k: int, seed: int) -> str:
        """The k-th text for a seed."""
        rank, method = (k, COMBINATORIAL) if self.combinatorial else (seed, RANDOM)
        return expand_template(self.parts, rank, method, seed, (self.source,), {})
