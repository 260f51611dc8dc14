"""Prompt weighting in the syntax of AUTOMATIC1111's web UI, and splitting of long prompts into chunks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

ATTENTION_PATTERN = re.compile(
    r"""
    \\[()\[\]\\]                                                    # an escaped bracket or backslash
    | [()\[\]]
    | :\s*+([+-]?+(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))\s*+\)        # possessive: linear in the prompt's length
    | [^\\()\[\]:]+
    | [\\:]
    """,
    re.VERBOSE,
)
UNSUPPORTED_PATTERN = re.compile(  # syntax of the web UI for extra networks, prompt editing, alternation, composition
    r"<(?:lora|lyco|hypernet):[^<>]*>|\[[^\[\]]*:\s*(?:\d+(?:\.\d*)?|\.\d+)\s*\]|\[[^\[\]|]*\|[^\[\]]*\]|\bAND\b"
)
BREAK_PATTERN = re.compile(r"\bBREAK\b")
WORD_EDGE = r"(?:(?<!\w)|(?!\w))"  # not between two letters of a word
BRACKET_WEIGHTS = {"(": 1.1, "[": 1 / 1.1}
OPENING_BRACKETS = {")": "(", "]": "["}
MAX_BRACKET_NESTING = 32
MAX_TOKEN_WEIGHT = 100.0
COMMA_PADDING_BACKTRACK = 20  # tokens: a shorter phrase after a comma is moved whole to the next chunk

PlaceholderTokens = Mapping[str, Sequence[int]]  # tokens added to a vocabulary, and the ids that each stands for


class PromptSpan(NamedTuple):
    """A part of a prompt and its weight."""

    text: str
    weight: float


class WeightedToken(NamedTuple):
    """A token's id and weight; `continues_placeholder`: it belongs to the same placeholder token as the one before."""

    id: int
    weight: float
    continues_placeholder: bool = False


def parse_prompt_attention(prompt: str) -> tuple[tuple[PromptSpan, ...], ...]:
    r"""The sections of a prompt, separated by the word BREAK, each as spans of one weight.

    (word) is 1.1, [word] 1/1.1, (word:1.3) 1.3; nested weights multiply; \( \) \[ \] \\ are text, as are a bracket that
    closes nothing and a backslash before any other character. A bracket never closed extends to the prompt's end. This
    is the web UI's grammar, except that BREAK within brackets separates too, and that a malformed number, as in
    (word:1.2.3), is text. ValueError for brackets nested deeper than `MAX_BRACKET_NESTING` or weights beyond
    `MAX_TOKEN_WEIGHT`.
    """
    texts: list[str] = []
    weights: list[float] = []
    breaks: list[int] = []
    open_brackets: dict[str, list[int]] = {bracket: [] for bracket in BRACKET_WEIGHTS}

    def close(bracket: str, factor: float) -> None:
        start = open_brackets[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in ATTENTION_PATTERN.finditer(prompt):
        lexeme, number = match[0], match[1]
        if lexeme in open_brackets:
            if len(open_brackets[lexeme]) == MAX_BRACKET_NESTING:
                limit = f"{lexeme} nested more than {MAX_BRACKET_NESTING} deep"
                raise ValueError(rf"prompt: {limit}; \{lexeme} is a bracket as text")
            open_brackets[lexeme].append(len(texts))
        elif number and open_brackets["("]:
            close("(", float(number))
        elif (bracket := OPENING_BRACKETS.get(lexeme, "")) and open_brackets[bracket]:
            close(bracket, BRACKET_WEIGHTS[bracket])
        else:
            for k, text in enumerate(BREAK_PATTERN.split(lexeme)):
                breaks += [len(texts)] if k else []
                texts.append(text[1:] if len(text) == 2 and text[0] == "\\" else text)
                weights.append(1.0)
    for bracket, starts in open_brackets.items():
        while starts:
            close(bracket, BRACKET_WEIGHTS[bracket])
    for weight in weights:
        if not abs(weight) <= MAX_TOKEN_WEIGHT:
            raise ValueError(f"prompt weight {weight:g}: must be from {-MAX_TOKEN_WEIGHT:g} to {MAX_TOKEN_WEIGHT:g}")
    bounds = [0, *breaks, len(texts)]
    return tuple(tuple(_merge_spans(texts[a:b], weights[a:b])) for a, b in pairwise(bounds))


def unsupported_syntax(prompt: str) -> list[str]:
    """The web UI's syntax in a prompt that `parse_prompt_attention` takes as text: <lora:x>, [a:b:0.5], [a|b], AND."""
    return UNSUPPORTED_PATTERN.findall(prompt)


def _merge_spans(texts: Sequence[str], weights: Sequence[float]) -> Iterator[PromptSpan]:
    """Merge neighbours of one weight, so that words are tokenized whole; drop empty spans."""
    for weight, run in groupby(zip(texts, weights, strict=True), lambda item: item[1]):
        if text := "".join(text for text, _ in run):
            yield PromptSpan(text, weight)


def split_on_tokens(text: str, placeholder_tokens: PlaceholderTokens) -> Iterator[str | Sequence[int]]:
    """The parts of a text around placeholder tokens and, in their order, the ids of each placeholder token.

    Case does not matter, as it does not to the tokenizer; a match within a longer word does not count.
    """
    start, tokens = 0, tuple(sorted(placeholder_tokens, key=len, reverse=True))
    for match in _placeholder_pattern(tokens).finditer(text) if placeholder_tokens else ():
        yield text[start : match.start()]
        yield placeholder_tokens[tokens[(match.lastindex or 0) - 1]]
        start = match.end()
    yield text[start:]


@lru_cache(maxsize=8)
def _placeholder_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the first that fits; the group's number is its index, from 1."""
    return re.compile("|".join(f"({WORD_EDGE}{re.escape(token)}{WORD_EDGE})" for token in tokens), re.IGNORECASE)


def split_into_chunks(tokens: Sequence[WeightedToken], chunk_size: int, comma_id: int) -> list[Sequence[WeightedToken]]:
    """Chunks of at most `chunk_size` tokens; at least one, possibly empty.

    A chunk ends after the last comma among its last `COMMA_PADDING_BACKTRACK` tokens, if there is one, as in the web
    UI; it ends before a placeholder token that it cannot hold whole.
    """
    chunks, start = [], 0
    while len(tokens) - start > chunk_size:
        end = start + chunk_size
        if tokens[end].id != comma_id:
            earliest = max(start, end - COMMA_PADDING_BACKTRACK - 1)
            end = next((k + 1 for k in range(end - 1, earliest, -1) if tokens[k].id == comma_id), end)
        end = next((k for k in range(end, start, -1) if not tokens[k].continues_placeholder), end)
        chunks.append(tokens[start:end])
        start = end
    return [*chunks, tokens[start:]]
