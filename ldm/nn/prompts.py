"""Prompts: weights in the syntax of AUTOMATIC1111's web UI, and texts of any length, cut into chunks."""

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
UNSUPPORTED_PATTERN = (
    re.compile(  # of the web UI's syntax: networks, prompts that change on the way, and several at once
        r"<(?:lora|lyco|hypernet):[^<>]*>|\[[^\[\]]*:\s*(?:\d+(?:\.\d*)?|\.\d+)\s*\]|\[[^\[\]|]*\|[^\[\]]*\]|\bAND\b"
    )
)
BREAK_PATTERN = re.compile(r"\bBREAK\b")
WORD_EDGE = r"(?:(?<!\w)|(?!\w))"  # not between two letters of a word
BRACKET_WEIGHTS = {"(": 1.1, "[": 1 / 1.1}
OPENING_BRACKETS = {")": "(", "]": "["}
MAX_BRACKET_NESTING = 32
MAX_TOKEN_WEIGHT = 100.0
COMMA_PADDING_BACKTRACK = 20  # tokens: a shorter phrase after a comma is not torn

PlaceholderTokens = Mapping[str, Sequence[int]]  # what is added to a vocabulary, and the ids that each word stands for


class PromptSpan(NamedTuple):
    """A stretch of text and its weight."""

    text: str
    weight: float


class WeightedToken(NamedTuple):
    """A token's id and its weight; `p_dot_p` where it belongs to the same added word as the one before it."""

    id: int
    weight: float
    continues_placeholder: bool = False


def parse_prompt_attention(prompt: str) -> tuple[tuple[PromptSpan, ...], ...]:
    r"""The sections of a prompt, which BREAK (a word of its own) divides, each in stretches of one weight.

    (word) is 1.1, [word] 1/1.1, (word:1.3) 1.3; nested weights multiply; \( \) \[ \] \\ are text, as are a bracket that
    closes nothing and a backslash before any other character. A bracket never closed reaches to the prompt's end. This
    is the web UI's grammar, but for two slips of its own: BREAK within brackets divides too, and a number that is none,
    as in (word:1.2.3), is text. ValueError for brackets nested deeper than 32 or weights beyond 100.
    """
    texts: list[str] = []
    weights: list[float] = []
    breaks: list[int] = []
    opened: dict[str, list[int]] = {bracket: [] for bracket in BRACKET_WEIGHTS}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in ATTENTION_PATTERN.finditer(prompt):
        word, number = match[0], match[1]
        if word in opened:
            if len(opened[word]) == MAX_BRACKET_NESTING:
                raise ValueError(
                    rf"prompt: {word} nested more than {MAX_BRACKET_NESTING} deep; \{word} is a bracket as text"
                )
            opened[word].append(len(texts))
        elif number and opened["("]:
            close("(", float(number))
        elif word in OPENING_BRACKETS and opened[OPENING_BRACKETS[word]]:
            close(OPENING_BRACKETS[word], BRACKET_WEIGHTS[OPENING_BRACKETS[word]])
        else:
            for k, text in enumerate(BREAK_PATTERN.split(word)):
                breaks += [len(texts)] if k else []
                texts.append(text[1:] if len(text) == 2 and text[0] == "\\" else text)
                weights.append(1.0)
    for bracket, starts in opened.items():
        while starts:
            close(bracket, BRACKET_WEIGHTS[bracket])
    for weight in weights:
        if not abs(weight) <= MAX_TOKEN_WEIGHT:
            raise ValueError(f"prompt weight {weight:g}: must be from {-MAX_TOKEN_WEIGHT:g} to {MAX_TOKEN_WEIGHT:g}")
    bounds = [0, *breaks, len(texts)]
    return tuple(tuple(_merge_spans(texts[a:b], weights[a:b])) for a, b in pairwise(bounds))


def unsupported_syntax(prompt: str) -> list[str]:
    """What in a prompt is the web UI's syntax and mere text to `parse_prompt_attention`: <lora:...>, [a:b:0.5], [a|b], AND."""
    return UNSUPPORTED_PATTERN.findall(prompt)


def _merge_spans(texts: Sequence[str], weights: Sequence[float]) -> Iterator[PromptSpan]:
    """Neighbours of one weight as one part, so that words are tokenised whole; empty parts are dropped."""
    for weight, run in groupby(zip(texts, weights, strict=True), lambda item: item[1]):
        if text := "".join(text for text, _ in run):
            yield PromptSpan(text, weight)


def split_on_tokens(text: str, placeholder_tokens: PlaceholderTokens) -> Iterator[str | Sequence[int]]:
    """A text in stretches without added words, and between them the ids of each word, in their order.

    Case does not matter, as to the tokenizer; a word within a longer one is none.
    """
    start, ordered = 0, tuple(sorted(placeholder_tokens, key=len, reverse=True))
    for match in _placeholder_pattern(ordered).finditer(text) if placeholder_tokens else ():
        yield text[start : match.start()]
        yield placeholder_tokens[ordered[(match.lastindex or 0) - 1]]
        start = match.end()
    yield text[start:]


@lru_cache(maxsize=8)
def _placeholder_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Finds any of the words, the first that fits; the number of the group is its place, from 1 on."""
    return re.compile("|".join(f"({WORD_EDGE}{re.escape(word)}{WORD_EDGE})" for word in words), re.IGNORECASE)


def split_into_chunks(tokens: Sequence[WeightedToken], chunk_size: int, comma_id: int) -> list[Sequence[WeightedToken]]:
    """Pieces of at most `size` tokens, at least one, possibly empty.

    Where a cut would tear the phrase behind a comma among the piece's last 20 tokens, it is made behind that comma, as
    the web UI does; where it would tear an added word, before that word.
    """
    pieces, start = [], 0
    while len(tokens) - start > chunk_size:
        end = start + chunk_size
        if tokens[end].id != comma_id:
            commas = (
                k + 1
                for k in range(end - 1, max(start, end - COMMA_PADDING_BACKTRACK - 1), -1)
                if tokens[k].id == comma_id
            )
            end = next(commas, end)
        end = next((k for k in range(end, start, -1) if not tokens[k].continues_placeholder), end)
        pieces.append(tokens[start:end])
        start = end
    return [*pieces, tokens[start:]]
