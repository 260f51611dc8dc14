"""How far a job is, as it is told to people and to programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.jobs.driver import JobProgress


JSON_PROGRESS_INTERVAL = 1.0  # seconds between two lines for programs


@contextmanager
def progress_reporter(as_json: bool) -> Iterator[Callable[..., None]]:
    """Says how far a job is: lines of JSON on stdout, or a bar on stderr and a last line on stdout."""
    import time

    from rich.console import Console
    from rich.progress import Progress

    console, told = Console(stderr=True), [0.0]
    with Progress(console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def tell(state: JobProgress, last: bool = False) -> None:
            total = state.done + state.failed + state.remaining
            bar.update(task, total=total, completed=state.done + state.failed, description=format_progress(state))
            if as_json and (last or time.monotonic() - told[0] >= JSON_PROGRESS_INTERVAL):
                told[0] = time.monotonic()
                print(json.dumps(state.to_dict()), flush=True)
            elif last:
                print(f"done {state.done}, failed {state.failed}, left {state.remaining}")

        yield tell


def format_progress(state: JobProgress) -> str:
    """A state in a few words."""
    seconds = state.seconds_left
    left = "" if seconds is None else f", {seconds / 60:.0f} min left"
    return (
        f"done {state.done}, failed {state.failed}, left {state.remaining}; "
        f"{state.images_per_second:.2f} images/s{left}; {state.batch_size} at a time"
    )
