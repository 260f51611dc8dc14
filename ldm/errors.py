"""Error messages: one line, in the user's words, with the nearest valid name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
MAX_ERROR_LENGTH = 500  # characters


def choose(table: Mapping[Key, Value], name: Key, what: str) -> Value:
    """table[name]; ValueError lists the choices where there is no such name."""
    if name not in table:
        raise ValueError(f"{what} {name!r}: choose from {', '.join(map(str, table))}")
    return table[name]


def suggest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; did you mean 'x'?" with the nearest of `names`, ignoring case; "" if none is near (difflib's ratio)."""
    by_lower_case = {known.lower(): known for known in names}
    nearest = get_close_matches(name.strip().lower(), by_lower_case, 1, cutoff)
    return f"; did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""


def error_text(error: BaseException) -> str:
    """An error in one line: the strerror of an OSError, else the message, else the name of its class."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:MAX_ERROR_LENGTH] or type(error).__name__


def list_some(items: Sequence[object], limit: int = 3) -> str:
    """ "a, b, c and 5 more": the first `limit` items and the number of the others."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


def parse_json(text: str | bytes, name: str = "") -> Any:
    """The value of a JSON text; ValueError, after `name`, for bad syntax, a key given twice, or NaN."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_int=_parse_int, parse_constant=_parse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{name}: not JSON: {reason}" if name else f"not JSON: {reason}") from None


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is given twice")
    return values


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 40 else float(digits)  # int() takes quadratic time, and refuses 4,300 digits


def _parse_constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is not a value")
    return float(name)  # diffusers writes -Infinity for "no limit"
