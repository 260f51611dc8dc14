"""A warning for prompts of AUTOMATIC1111's web UI: what of its syntax is drawn as mere text here."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.request import Request

SHOWN = 5  # parts in one warning


@dataclass
class Unread:
    """The parts that were heard, in constant memory, and where the first of them is."""

    found: dict[str, None] = field(default_factory=dict)
    where: str = ""

    def hear(self, request: Request, where: str = "") -> None:
        """Look through a request's prompts, until enough is found."""
        from ldm.nn.prompts import unread

        if len(self.found) <= SHOWN and (parts := [*unread(request.prompt), *unread(request.negative_prompt or "")]):
            self.where = self.where if self.found else where
            self.found.update(dict.fromkeys(parts))

    def say(self) -> None:
        """One line on stderr, where there is something to say."""
        if parts := list(self.found):
            shown = ", ".join(parts[:SHOWN]) + (", ..." if len(parts) > SHOWN else "")
            cure = "; adapters are given by --lora FILE:WEIGHT" if any("<" in part for part in parts) else ""
            where = f"{self.where}: " if self.where else ""
            print(f"warning: {where}read as text, not as commands of the web UI: {shown}{cure}", file=sys.stderr)
