"""Prompts: weights in the syntax of AUTOMATIC1111's web UI, and texts of any length, cut into chunks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

SYNTAX = re.compile(
    r"""
    \\[()\[\]\\]                                                    # an escaped bracket or backslash
    | [()\[\]]
    | :\s*+([+-]?+(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))\s*+\)        # possessive: linear in the prompt's length
    | [^\\()\[\]:]+
    | [\\:]
    """,
    re.VERBOSE,
)
BREAK = re.compile(r"\bBREAK\b")
FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENING = {")": "(", "]": "["}
MAX_NESTING = 32
MAX_WEIGHT = 100.0
REACH = 20  # tokens: a shorter phrase after a comma is not torn


class Part(NamedTuple):
    """A stretch of text and its weight."""

    text: str
    weight: float


class Token(NamedTuple):
    """A token's id and its weight."""

    id: int
    weight: float


def parse(prompt: str) -> tuple[tuple[Part, ...], ...]:
    r"""The sections of a prompt, which BREAK (a word of its own) divides, each in stretches of one weight.

    (word) is 1.1, [word] 1/1.1, (word:1.3) 1.3; nested weights multiply; \( \) \[ \] \\ are text, as are a bracket that
    closes nothing and a backslash before any other character. A bracket never closed reaches to the prompt's end. This
    is the web UI's grammar, but for two slips of its own: BREAK within brackets divides too, and a number that is none,
    as in (word:1.2.3), is text. ValueError for brackets nested deeper than 32 or weights beyond 100.
    """
    texts: list[str] = []
    weights: list[float] = []
    breaks: list[int] = []
    opened: dict[str, list[int]] = {bracket: [] for bracket in FACTORS}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in SYNTAX.finditer(prompt):
        word, number = match[0], match[1]
        if word in opened:
            if len(opened[word]) == MAX_NESTING:
                raise ValueError(rf"prompt: {word} nested more than {MAX_NESTING} deep; \{word} is a bracket as text")
            opened[word].append(len(texts))
        elif number and opened["("]:
            close("(", float(number))
        elif word in OPENING and opened[OPENING[word]]:
            close(OPENING[word], FACTORS[OPENING[word]])
        else:
            for k, text in enumerate(BREAK.split(word)):
                breaks += [len(texts)] if k else []
                texts.append(text[1:] if len(text) == 2 and text[0] == "\\" else text)
                weights.append(1.0)
    for bracket, starts in opened.items():
        while starts:
            close(bracket, FACTORS[bracket])
    for weight in weights:
        if not abs(weight) <= MAX_WEIGHT:
            raise ValueError(f"prompt weight {weight:g}: must be from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    bounds = [0, *breaks, len(texts)]
    return tuple(tuple(_merged(texts[a:b], weights[a:b])) for a, b in pairwise(bounds))


def _merged(texts: Sequence[str], weights: Sequence[float]) -> Iterator[Part]:
    """Neighbours of one weight as one part, so that words are tokenised whole; empty parts are dropped."""
    for weight, run in groupby(zip(texts, weights, strict=True), lambda item: item[1]):
        if text := "".join(text for text, _ in run):
            yield Part(text, weight)


def cut(tokens: Sequence[Token], size: int, comma: int) -> list[Sequence[Token]]:
    """Pieces of at most `size` tokens, at least one, possibly empty.

    Where a cut would tear the phrase behind a comma among the piece's last 20 tokens, it is made behind that comma, as
    the web UI does.
    """
    pieces, start = [], 0
    while len(tokens) - start > size:
        end = start + size
        if tokens[end].id != comma:
            commas = (k + 1 for k in range(end - 1, max(start, end - REACH - 1), -1) if tokens[k].id == comma)
            end = next(commas, end)
        pieces.append(tokens[start:end])
        start = end
    return [*pieces, tokens[start:]]
