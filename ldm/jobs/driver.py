"""The driver of a job: its folder is made or found again, its source checked, its workers watched to the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoints.files import read_json, write_json
from ldm.files import publish
from ldm.jobs.engines import Engine
from ldm.jobs.items import fingerprint
from ldm.jobs.leases import Leases
from ldm.jobs.manifest import WHOLE, Manifest, files, rows
from ldm.jobs.outputs import OUTPUTS
from ldm.jobs.worker import Job
from ldm.pipeline import Pipeline
from ldm.version import VERSION

WATCH = 0.2  # seconds between two looks at the workers
GRACE = 10.0  # seconds that workers have to end after the last item
RECENT = 30.0  # seconds over which the rate is taken
SAME = ("weights", "settings")  # of job.json: what a job keeps; its source may grow


@dataclass(frozen=True)
class State:
    """How far a job is."""

    done: int
    failed: int
    left: int
    rate: float  # pictures a second
    workers: int
    batch_size: int  # the largest of all workers'

    @property
    def seconds_left(self) -> float | None:
        """None where nobody can tell yet."""
        return self.left / self.rate if self.rate else None

    def record(self) -> dict[str, Any]:
        """For programs."""
        seconds = self.seconds_left
        return {
            "done": self.done,
            "failed": self.failed,
            "left": self.left,
            "images_per_second": round(self.rate, 3),
            "seconds_left": None if seconds is None else round(seconds, 1),
            "workers": self.workers,
            "batch_size": self.batch_size,
        }


def begin(job: Job, pipe: Pipeline, source: str, words: Sequence[str] = ()) -> None:
    """Write `job.json`, once; ValueError where the folder is another job's. `words` open its model for a command."""
    found = fingerprint(pipe)
    record = {
        "source": source,
        "model": job.model,
        "words": list(words),
        "weights": found,
        "settings": {"dtype": str(pipe.model.unet.dtype), "output": job.output, "strict": job.strict},
        "version": VERSION,
    }
    path = job.folder / "job.json"
    if not path.exists():
        with publish(path) as draft:
            write_json(record, draft)
    there = read_json(path)
    for name, values in json.loads(json.dumps({key: record[key] for key in SAME})).items():
        others: Any = there.get(name)
        if not isinstance(others, dict):
            raise ValueError(f"{path}: says no {name}")
        for key, value in values.items():
            if others.get(key) != value:
                raise ValueError(
                    f"{path}: another job: its {key} {'are not these' if key.endswith('s') else 'is not this'}"
                )


def plan(job: Job, pipe: Pipeline) -> set[str]:
    """The ids of a shard's items, distinct; in `items.jsonl` each entry of the source has a line, with its item."""
    names: set[str] = set()
    i, n = job.shard
    path = job.folder / ("items.jsonl" if n == 1 else f"items-{i}-of-{n}.jsonl")
    suffix = OUTPUTS[job.output].suffix
    with publish(path) as draft, draft.open("w", encoding="utf-8") as out:
        for item in job.items(pipe):
            names.add(item.id)
            out.write(json.dumps({"line": item.line, "id": item.id, "file": item.file(suffix)}) + "\n")
    return names


class Watch:
    """Looks at a job's folder while it is worked at, by anybody."""

    def __init__(
        self,
        job: Job,
        leases: Leases,
        names: set[str],
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.names, self.left = names, set(names)
        self.timeout, self.clock = timeout, clock
        self.leases = leases
        self.manifest = Manifest(job.folder)
        self._mark: object = None
        self._moved = clock()  # when a step was last finished
        self._counts: list[tuple[float, int]] = []  # of finished items, lately

    def state(self) -> State:
        """How far the job is."""
        self.left -= self.manifest.refresh() & self.manifest.done
        statuses = [status for status in self.leases.statuses() if "steps" in status]
        done, failed = len(self.names) - len(self.left), sum(name in self.left for name in self.manifest.failed)
        now, mark = self.clock(), (done, failed, [status["steps"] for status in statuses])
        if mark != self._mark:
            self._mark, self._moved = mark, now
        self._counts = [(t, n) for t, n in self._counts if now - t < RECENT] + [(now, done)]
        since, before = self._counts[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        sizes = [status.get("batch_size", 0) for status in statuses]
        return State(done, failed, len(self.left) - failed, rate, len(sizes), max(sizes, default=0))

    def others(self) -> bool:
        """Does a worker live that wrote of these items, as one whose driver was killed does for a while?"""
        paths = [path for path in files(self.manifest.folder) if path.name != WHOLE]
        return any(self.leases.live(path.stem.removeprefix("manifest-")) and self._ours(path) for path in paths)

    def _ours(self, path: Path) -> bool:
        with suppress(FileNotFoundError), path.open("rb") as file:  # joined with the rest meanwhile
            return any(row.record["id"] in self.names for row in rows(file))
        return False

    def idle(self) -> float:
        """For how many seconds nobody has finished a step."""
        return self.clock() - self._moved


class Stuck(RuntimeError):
    """No worker makes progress."""


def outlive(watch: Watch, seconds: float) -> None:
    """Where nothing is left, wait for others that worked at these items: the lines of the living are not joined."""
    end = watch.clock() + seconds
    while watch.state().left == 0 and watch.others() and watch.clock() < end:
        time.sleep(WATCH)


def drive(engine: Engine, watch: Watch, told: Callable[[State], None]) -> None:
    """Watch the workers to their end; RuntimeError with the reason where one ends too early, Stuck where all hang."""
    while engine.poll():
        state = watch.state()
        told(state)
        if engine.reasons:
            engine.stop()
        if state.left == 0 and watch.idle() > GRACE:  # a worker that has not even begun
            engine.kill()
            break
        if watch.idle() > watch.timeout:
            engine.kill()
            raise Stuck(f"no step was finished in {watch.idle():.0f} seconds: the job is stuck")
        time.sleep(WATCH)
    if engine.reasons:
        raise RuntimeError(engine.reasons[0])
