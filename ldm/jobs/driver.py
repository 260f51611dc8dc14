"""The driver of a job: it makes or resumes the job's folder, and monitors the workers to the end."""

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
from ldm.jobs.leases import Leases
from ldm.jobs.manifest import Manifest, iter_manifest_rows, list_worker_manifests
from ldm.jobs.worker import Job, fingerprint_model
from ldm.metadata import IMAGE_FORMATS
from ldm.pipeline.pipeline import Pipeline

MONITOR_INTERVAL = 0.2  # seconds
SHUTDOWN_GRACE = 10.0  # seconds that workers have to end after the last item
RATE_WINDOW = 30.0  # seconds
JOB_IDENTITY_KEYS = ("weights", "settings")  # of job.json: these must not change; the source may grow


@dataclass(frozen=True)
class JobProgress:
    """The state of a job; `batch_size` is the largest of all workers."""

    done: int
    failed: int
    remaining: int
    images_per_second: float
    workers: int
    batch_size: int

    @property
    def seconds_left(self) -> float | None:
        """None while the rate is 0."""
        return self.remaining / self.images_per_second if self.images_per_second else None

    def to_dict(self) -> dict[str, Any]:
        """The values of a line of `ldm batch --json`."""
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
    """Write `job.json`, once; ValueError where the folder is another job's. `cli_args` load the model."""
    record = {
        "source": source,
        "model": job.model_name,
        "words": list(cli_args),
        "weights": fingerprint_model(pipe),
        "settings": {
            "dtype": str(pipe.model.unet.dtype),
            "output": job.image_format,
            "batch_invariant": job.batch_invariant,
        },
        "notices": {text: len(places) or 1 for text, places in getattr(job.entries, "notices", {}).items()},
        "version": __version__,
    }
    path = job.folder / "job.json"
    if not path.exists():
        with atomic_write(path) as draft:
            write_json(record, draft)
    existing = read_json(path)
    if existing.get("notices") != record["notices"] and isinstance(existing.get("settings"), dict):
        with atomic_write(path) as draft:
            write_json({**existing, "notices": record["notices"]}, draft)
    for name, values in json.loads(json.dumps({key: record[key] for key in JOB_IDENTITY_KEYS})).items():
        others: Any = existing.get(name)
        if not isinstance(others, dict):
            raise ValueError(f"{path}: has no {name}")
        for key, value in values.items():
            if others.get(key) != value:
                differ = "differ" if key.endswith("s") else "differs"
                raise ValueError(f"{path}: belongs to another job: {key} {differ}; give another --out")


def write_item_list(job: Job, pipe: Pipeline) -> set[str]:
    """Write `items.jsonl`, the item of each entry of the source, a line each; returns the distinct ids."""
    ids: set[str] = set()
    i, n = job.shard
    path = job.folder / ("items.jsonl" if n == 1 else f"items-{i}-of-{n}.jsonl")
    suffix = IMAGE_FORMATS[job.image_format].suffix
    with atomic_write(path) as draft, draft.open("w", encoding="utf-8") as out:
        for item in job.iter_items(pipe):
            ids.add(item.id)
            record = {"line": item.line, "id": item.id, "file": item.image_path(suffix)}
            out.write(json.dumps({**record, "extra": item.extra} if item.extra else record) + "\n")
    return ids


class Monitor:
    """Follows the progress of a job in its folder, whoever works at it."""

    def __init__(
        self, job: Job, leases: Leases, item_ids: set[str], timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.item_ids, self.remaining_ids = item_ids, set(item_ids)
        self.leases, self.timeout, self.clock = leases, timeout, clock
        self.manifest = Manifest(job.folder)
        self._last_counts: object = None
        self._last_change = clock()  # when a step was last finished
        self._recent_counts: list[tuple[float, int]] = []  # (time, finished items)

    def progress(self) -> JobProgress:
        """The state of the job now."""
        self.remaining_ids -= self.manifest.refresh() & self.manifest.done
        statuses = [status for status in self.leases.worker_statuses() if "steps" in status]
        done = len(self.item_ids) - len(self.remaining_ids)
        failed = sum(item_id in self.remaining_ids for item_id in self.manifest.failed)
        now, counts = self.clock(), (done, failed, [status["steps"] for status in statuses])
        if counts != self._last_counts:
            self._last_counts, self._last_change = counts, now
        self._recent_counts = [(t, n) for t, n in self._recent_counts if now - t < RATE_WINDOW] + [(now, done)]
        since, before = self._recent_counts[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        sizes = [status.get("batch_size", 0) for status in statuses]
        return JobProgress(done, failed, len(self.remaining_ids) - failed, rate, len(sizes), max(sizes, default=0))

    def has_other_workers(self) -> bool:
        """Whether a living worker wrote lines of these items, as one of a killed driver does for a while."""
        files = list_worker_manifests(self.manifest.folder).items()
        return any(self.leases.is_alive(worker) and self._has_our_items(path) for worker, path in files)

    def _has_our_items(self, path: Path) -> bool:
        with suppress(FileNotFoundError), path.open("rb") as file:  # compacted meanwhile
            return any(record["id"] in self.item_ids for record, _ in iter_manifest_rows(file))
        return False

    def seconds_idle(self) -> float:
        """Seconds since a step was last finished."""
        return self.clock() - self._last_change


class StalledError(RuntimeError):
    """No worker makes progress."""


def wait_for_workers(monitor: Monitor, timeout: float) -> None:
    """Once nothing remains, wait until other workers at these items end: living workers' files are not compacted."""
    end = monitor.clock() + timeout
    while monitor.progress().remaining == 0 and monitor.has_other_workers() and monitor.clock() < end:
        time.sleep(MONITOR_INTERVAL)


def supervise_workers(engine: Engine, monitor: Monitor, on_progress: Callable[[JobProgress], None]) -> None:
    """Wait for the workers; RuntimeError with the reason where one ends too early, StalledError where all hang."""
    while engine.poll():
        progress = monitor.progress()
        on_progress(progress)
        if engine.errors:
            engine.stop()
        if progress.remaining == 0 and monitor.seconds_idle() > SHUTDOWN_GRACE:  # e.g. a worker that is still starting
            engine.kill()
            break
        if monitor.seconds_idle() > monitor.timeout:
            engine.kill()
            raise StalledError(f"no step was finished in {monitor.seconds_idle():.0f} seconds: the job is stalled")
        time.sleep(MONITOR_INTERVAL)
    if engine.errors:
        raise RuntimeError(engine.errors[0])
