"""The driver of a job: its folder is made or found again, its source checked, its workers watched to the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.files import atomic_write, read_json, write_json
from ldm.jobs.engines import Engine
from ldm.jobs.items import fingerprint_model
from ldm.jobs.leases import Leases
from ldm.jobs.manifest import MANIFEST_FILE, Manifest, iter_manifest_rows, list_manifest_files
from ldm.jobs.outputs import IMAGE_FORMATS
from ldm.jobs.worker import Job
from ldm.pipeline.pipeline import Pipeline

MONITOR_INTERVAL = 0.2  # seconds between two looks at the workers
SHUTDOWN_GRACE = 10.0  # seconds that workers have to end after the last item
RATE_WINDOW = 30.0  # seconds over which the rate is taken
JOB_IDENTITY_KEYS = ("weights", "settings")  # of job.json: what a job keeps; its source may grow


@dataclass(frozen=True)
class JobProgress:
    """How far a job is."""

    done: int
    failed: int
    remaining: int
    images_per_second: float  # pictures a second
    workers: int
    batch_size: int  # the largest of all workers'

    @property
    def seconds_left(self) -> float | None:
        """None where nobody can tell yet."""
        return self.remaining / self.images_per_second if self.images_per_second else None

    def to_dict(self) -> dict[str, Any]:
        """For programs."""
        seconds = self.seconds_left
        return {
            "done": self.done,
            "failed": self.failed,
            "left": self.remaining,
            "images_per_second": round(self.images_per_second, 3),
            "seconds_left": None if seconds is None else round(seconds, 1),
            "workers": self.workers,
            "batch_size": self.batch_size,
        }


def write_job_file(job: Job, pipe: Pipeline, source: str, cli_args: Sequence[str] = ()) -> None:
    """Write `job.json`, once; ValueError where the folder is another job's. `words` open its model for a command."""
    found = fingerprint_model(pipe)
    record = {
        "source": source,
        "model": job.model_name,
        "words": list(cli_args),
        "weights": found,
        "settings": {"dtype": str(pipe.model.unet.dtype), "output": job.image_format, "strict": job.strict},
        "version": __version__,
    }
    path = job.folder / "job.json"
    if not path.exists():
        with atomic_write(path) as draft:
            write_json(record, draft)
    there = read_json(path)
    for name, values in json.loads(json.dumps({key: record[key] for key in JOB_IDENTITY_KEYS})).items():
        others: Any = there.get(name)
        if not isinstance(others, dict):
            raise ValueError(f"{path}: says no {name}")
        for key, value in values.items():
            if others.get(key) != value:
                raise ValueError(
                    f"{path}: another job: its {key} {'are not these' if key.endswith('s') else 'is not this'}"
                )


def write_item_list(job: Job, pipe: Pipeline) -> set[str]:
    """The ids of a shard's items, distinct; in `items.jsonl` each entry of the source has a line, with its item."""
    names: set[str] = set()
    i, n = job.shard
    path = job.folder / ("items.jsonl" if n == 1 else f"items-{i}-of-{n}.jsonl")
    suffix = IMAGE_FORMATS[job.image_format].suffix
    with atomic_write(path) as draft, draft.open("w", encoding="utf-8") as out:
        for item in job.iter_items(pipe):
            names.add(item.id)
            out.write(json.dumps({"line": item.line, "id": item.id, "file": item.image_path(suffix)}) + "\n")
    return names


class Monitor:
    """Looks at a job's folder while it is worked at, by anybody."""

    def __init__(
        self,
        job: Job,
        leases: Leases,
        item_ids: set[str],
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.item_ids, self.remaining_ids = item_ids, set(item_ids)
        self.timeout, self.clock = timeout, clock
        self.leases = leases
        self.manifest = Manifest(job.folder)
        self._last_counts: object = None
        self._last_change = clock()  # when a step was last finished
        self._recent_counts: list[tuple[float, int]] = []  # of finished items, lately

    def progress(self) -> JobProgress:
        """How far the job is."""
        self.remaining_ids -= self.manifest.refresh() & self.manifest.done
        statuses = [status for status in self.leases.worker_statuses() if "steps" in status]
        done, failed = (
            len(self.item_ids) - len(self.remaining_ids),
            sum(name in self.remaining_ids for name in self.manifest.failed),
        )
        now, mark = self.clock(), (done, failed, [status["steps"] for status in statuses])
        if mark != self._last_counts:
            self._last_counts, self._last_change = mark, now
        self._recent_counts = [(t, n) for t, n in self._recent_counts if now - t < RATE_WINDOW] + [(now, done)]
        since, before = self._recent_counts[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        sizes = [status.get("batch_size", 0) for status in statuses]
        return JobProgress(done, failed, len(self.remaining_ids) - failed, rate, len(sizes), max(sizes, default=0))

    def has_other_workers(self) -> bool:
        """Does a worker live that wrote of these items, as one whose driver was killed does for a while?"""
        paths = [path for path in list_manifest_files(self.manifest.folder) if path.name != MANIFEST_FILE]
        return any(
            self.leases.is_alive(path.stem.removeprefix("manifest-")) and self._has_our_items(path) for path in paths
        )

    def _has_our_items(self, path: Path) -> bool:
        with suppress(FileNotFoundError), path.open("rb") as file:  # joined with the rest meanwhile
            return any(row.record["id"] in self.item_ids for row in iter_manifest_rows(file))
        return False

    def seconds_idle(self) -> float:
        """For how many seconds nobody has finished a step."""
        return self.clock() - self._last_change


class StalledError(RuntimeError):
    """No worker makes progress."""


def wait_for_workers(monitor: Monitor, timeout: float) -> None:
    """Where nothing is left, wait for others that worked at these items: the lines of the living are not joined."""
    end = monitor.clock() + timeout
    while monitor.progress().remaining == 0 and monitor.has_other_workers() and monitor.clock() < end:
        time.sleep(MONITOR_INTERVAL)


def supervise_workers(engine: Engine, monitor: Monitor, on_progress: Callable[[JobProgress], None]) -> None:
    """Watch the workers to their end; RuntimeError with the reason where one ends too early, Stuck where all hang."""
    while engine.poll():
        state = monitor.progress()
        on_progress(state)
        if engine.errors:
            engine.stop()
        if state.remaining == 0 and monitor.seconds_idle() > SHUTDOWN_GRACE:  # a worker that has not even begun
            engine.kill()
            break
        if monitor.seconds_idle() > monitor.timeout:
            engine.kill()
            raise StalledError(f"no step was finished in {monitor.seconds_idle():.0f} seconds: the job is stuck")
        time.sleep(MONITOR_INTERVAL)
    if engine.errors:
        raise RuntimeError(engine.errors[0])
