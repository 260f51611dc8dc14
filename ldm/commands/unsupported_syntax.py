"""A warning for prompts of AUTOMATIC1111's web UI: what of its syntax is drawn as mere text here."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.pipeline.request import Request


MAX_LISTED_PARTS = 5  # parts in one warning


@dataclass
class UnsupportedSyntaxReport:
    """The parts that were heard, in constant memory, and where the first of them is."""

    parts: dict[str, None] = field(default_factory=dict)
    first_location: str = ""

    def collect(self, request: Request, location: str = "") -> None:
        """Look through a request's prompts, until enough is found."""
        from ldm.nn.prompts import unsupported_syntax

        if len(self.parts) <= MAX_LISTED_PARTS and (
            parts := [*unsupported_syntax(request.prompt), *unsupported_syntax(request.negative_prompt or "")]
        ):
            self.first_location = self.first_location if self.parts else location
            self.parts.update(dict.fromkeys(parts))

    def print_warning(self) -> None:
        """One line on stderr, where there is something to say."""
        if parts := list(self.parts):
            shown = ", ".join(parts[:MAX_LISTED_PARTS]) + (", ..." if len(parts) > MAX_LISTED_PARTS else "")
            cure = "; adapters are given by --lora FILE:WEIGHT" if any("<" in part for part in parts) else ""
            where = f"{self.first_location}: " if self.first_location else ""
            print(f"warning: {where}read as text, not as commands of the web UI: {shown}{cure}", file=sys.stderr)
