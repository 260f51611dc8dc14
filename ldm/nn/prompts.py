"""Prompts: weights in the syntax of AUTOMATIC1111's web UI, and texts of any length, cut into chunks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
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
UNREAD = re.compile(  # of the web UI's syntax: networks, prompts that change on the way, and several at once
    r"<(?:lora|lyco|hypernet):[^<>]*>|\[[^\[\]]*:\s*(?:\d+(?:\.\d*)?|\.\d+)\s*\]|\[[^\[\]|]*\|[^\[\]]*\]|\bAND\b"
)
BREAK = re.compile(r"\bBREAK\b")
EDGE = r"(?:(?<!\w)|(?!\w))"  # not between two letters of a word
FACTORS = {"(": 1.1, "[": 1 / 1.1}
OPENING = {")": "(", "]": "["}
MAX_NESTING = 32
MAX_WEIGHT = 100.0
REACH = 20  # tokens: a shorter phrase after a comma is not torn

Words = Mapping[str, Sequence[int]]  # what is added to a vocabulary, and the ids that each word stands for


class Part(NamedTuple):
    """A stretch of text and its weight."""

    text: str
    weight: float


class Token(NamedTuple):
    """A token's id and its weight; `inner` where it belongs to the same added word as the one before it."""

    id: int
    weight: float
    inner: bool = False


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


def unread(prompt: str) -> list[str]:
    """What in a prompt is the web UI's syntax and mere text to `parse`: <lora:...>, [a:b:0.5], [a|b], AND."""
    return UNREAD.findall(prompt)


def _merged(texts: Sequence[str], weights: Sequence[float]) -> Iterator[Part]:
    """Neighbours of one weight as one part, so that words are tokenised whole; empty parts are dropped."""
    for weight, run in groupby(zip(texts, weights, strict=True), lambda item: item[1]):
        if text := "".join(text for text, _ in run):
            yield Part(text, weight)


def divided(text: str, words: Words) -> Iterator[str | Sequence[int]]:
    """A text in stretches without added words, and between them the ids of each word, in their order.

    Case does not matter, as to the tokenizer; a word within a longer one is none.
    """
    start, ordered = 0, tuple(sorted(words, key=len, reverse=True))
    for match in _finder(ordered).finditer(text) if words else ():
        yield text[start : match.start()]
        yield words[ordered[(match.lastindex or 0) - 1]]
        start = match.end()
    yield text[start:]


@lru_cache(maxsize=8)
def _finder(words: Sequence[str]) -> re.Pattern[str]:
    """Finds any of the words, the first that fits; the number of the group is its place, from 1 on."""
    return re.compile("|".join(f"({EDGE}{re.escape(word)}{EDGE})" for word in words), re.IGNORECASE)


def cut(tokens: Sequence[Token], size: int, comma: int) -> list[Sequence[Token]]:
    """Pieces of at most `size` tokens, at least one, possibly empty.

    Where a cut would tear the phrase behind a comma among the piece's last 20 tokens, it is made behind that comma, as
    the web UI does; where it would tear an added word, before that word.
    """
    pieces, start = [], 0
    while len(tokens) - start > size:
        end = start + size
        if tokens[end].id != comma:
            commas = (k + 1 for k in range(end - 1, max(start, end - REACH - 1), -1) if tokens[k].id == comma)
            end = next(commas, end)
        end = next((k for k in range(end, start, -1) if not tokens[k].inner), end)
        pieces.append(tokens[start:end])
        start = end
    return [*pieces, tokens[start:]]
