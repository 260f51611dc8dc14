from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def choose(table: Mapping[str, Value], name: str, what: str) -> Value:
    """table[name], or a ValueError that lists the choices."""
    if name not in table:
        raise ValueError(f"{what} {name!r}: choose from {', '.join(table)}")
    return table[name]
