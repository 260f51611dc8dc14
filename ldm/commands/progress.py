"""What commands print beside their results: progress bars, a job's progress, and a warning for unsupported syntax."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ldm.errors import print_message

if TYPE_CHECKING:
    from ldm.jobs.driver import JobProgress
    from ldm.pipeline.request import Request

JSON_PROGRESS_INTERVAL = 1.0  # seconds between two lines for programs
MAX_LISTED_PARTS = 5  # parts of prompts in one warning


@contextmanager
def show_progress(quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Bars on stderr, if it is a terminal: yields update(task, done, total), which adds a bar for a new task."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:

        def update(task: str, done: float, total: float, description: str | None = None) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(task, total=total)
            bar.update(tasks[task], completed=done, total=total, description=description)

        yield update


@contextmanager
def report_job_progress(as_json: bool) -> Iterator[Callable[..., None]]:
    """Reports a job's progress: lines of JSON on stdout, or a bar on stderr and a last line on stdout."""
    last_time = 0.0
    with show_progress(quiet=as_json) as update:

        def report(state: JobProgress, last: bool = False) -> None:
            nonlocal last_time
            finished = state.done + state.failed
            update("job", finished, finished + state.remaining, format_progress(state))
            if as_json and (last or time.monotonic() - last_time >= JSON_PROGRESS_INTERVAL):
                last_time = time.monotonic()
                print(json.dumps(state.to_dict()), flush=True)
            elif last:
                print(f"done {state.done}, failed {state.failed}, left {state.remaining}")

        yield report


def format_progress(state: JobProgress) -> str:
    """The description of a job's bar."""
    seconds = state.seconds_left
    left = "" if seconds is None else f", {seconds / 60:.0f} min left"
    return (
        f"done {state.done}, failed {state.failed}, left {state.remaining}; "
        f"{state.images_per_second:.2f} images/s{left}; batch size {state.batch_size}"
    )


@dataclass
class UnsupportedSyntaxReport:
    """The first parts of prompts that are AUTOMATIC1111's syntax and mere text here, and where the first of them is."""

    parts: dict[str, None] = field(default_factory=dict)
    first_location: str = ""

    def collect(self, request: Request, location: str = "") -> None:
        """Search a request's prompts, until enough is found."""
        from ldm.nn.prompts import unsupported_syntax

        if len(self.parts) <= MAX_LISTED_PARTS and (
            parts := [*unsupported_syntax(request.prompt), *unsupported_syntax(request.negative_prompt or "")]
        ):
            self.first_location = self.first_location if self.parts else location
            self.parts.update(dict.fromkeys(parts))

    def print_warning(self, strict: bool | None = None) -> None:
        """One line on stderr, if anything was found; ValueError where `strict`."""
        if parts := list(self.parts):
            listed = ", ".join(parts[:MAX_LISTED_PARTS]) + (", ..." if len(parts) > MAX_LISTED_PARTS else "")
            hint = "; LoRAs are given by --lora FILE:WEIGHT" if any("<" in part for part in parts) else ""
            where = f"{self.first_location}: " if self.first_location else ""
            message = f"{where}read as text, not as syntax of the web UI: {listed}{hint}"
            if strict:
                raise ValueError(f"{message} (--strict)")
            print_message("warning", message)


def print_notices(notices: Mapping[str, Sequence[str]], strict: bool | None = None) -> None:
    """A line on stderr for each notice, with its first place and the number of others; ValueError where `strict`."""
    for notice, places in notices.items():
        where = f"{places[0]}: " if places else ""
        more = f" (and in {len(places) - 1} more)" if len(places) > 1 else ""
        if strict:
            raise ValueError(f"{where}{notice}{more} (--strict)")
        print_message("warning", f"{where}{notice}{more}")
