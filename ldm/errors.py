"""Error messages: one line, in the user's words, with the nearest valid name."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
# error: the command ends. warning: input is left out, changed or suspicious. note: what the command does.
MessageKind = Literal["error", "warning", "note"]
MAX_ERROR_LENGTH = 500  # characters
MAX_LINE_LENGTH = 4000  # characters of an `error:` line
# What acts on a terminal or turns the order of characters, and what UTF-8 has no bytes for.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
EXHAUSTED = errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate|failed to allocate", re.IGNORECASE)


class InputWarning(UserWarning):
    """Input that is left out, or used otherwise than it is written: an error where a command is strict."""


def print_message(kind: MessageKind, message: str) -> None:
    """One line on stderr for the user of a command, after what it is."""
    print(f"{kind}: {one_line(message)}", file=sys.stderr, flush=True)


def warn_of_input(message: str) -> None:
    """An `InputWarning`, which commands print as one line."""
    warnings.warn(message, InputWarning, stacklevel=3)


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


def printable(text: object) -> str:
    """A text of others as one line for a terminal: control characters are escaped, as \\x1b."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def one_line(message: str) -> str:
    """A message as a printable line; of a longer one than `MAX_LINE_LENGTH` the middle is left out, with a count."""
    line = printable(" ".join(message.split()))
    if len(line) <= MAX_LINE_LENGTH:
        return line
    half = MAX_LINE_LENGTH // 2
    return f"{line[:half]} ... ({len(line) - 2 * half} characters) ... {line[-half:]}"


def describe_error(error: BaseException) -> str:
    """`error_text`, after the name of the file where the error has one."""
    name = isinstance(error, OSError) and error.strerror and (error.filename2 or error.filename)
    return (
        f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {error_text(error)}" if name else error_text(error)
    )


def describe_system_error(error: BaseException) -> tuple[str, int] | None:
    """An error of the system in words, and the exit status; None for any other, which is a fault of the program.

    1: the machine has no room left (disk, memory, open files), and the same command may succeed later. 2: a file that
    cannot be read or written, and input that is nested too deeply.
    """
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return f"out of memory: {error_text(error)}" if str(error) else "out of memory", 1
    if isinstance(error, RecursionError):
        return "input that is nested too deeply", 2
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's, for ~nosuchuser
        return "~: no such user, or no home directory", 2
    if isinstance(error, OSError):
        is_lost = error.errno == errno.ENOENT and not error.filename and not _has_working_directory()
        message = "the working directory was deleted" if is_lost else describe_error(error)
        return message, 1 if error.errno in EXHAUSTED else 2
    return None


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


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
