"""A worker: leases items ahead, draws them by one scheduler, and writes each picture while the next are drawn."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.checkpoints.files import sha256
from ldm.jobs.items import Item, fingerprint, identify
from ldm.jobs.leases import EXPIRY, Leases
from ldm.jobs.manifest import Manifest, append
from ldm.jobs.outputs import OUTPUTS
from ldm.jobs.source import Entry
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.scheduler import Scheduler

CPU_BATCH = 8  # pictures drawn at a time where no memory can be measured
MOST = 64  # pictures drawn at a time: beyond it a device gains nothing
SHARE = 0.8  # of the free memory
STRICT_ROWS = 16  # of each call of the network in strict mode: CPU_BATCH guided pictures
PATIENCE = 10  # items that may fail one after another before it is the worker that is at fault
POLL = 0.1  # seconds between two looks at what other workers hold
DEFERRED = 1024  # items of others that are remembered before one looks which are done


@dataclass(frozen=True)
class Job:
    """What every worker of a job has to know; it can be pickled, for other processes and machines.

    `open` loads the model on a device, None its own choice; `model` is what pictures call it. `batch_size` None is by
    free memory. `shard` (i, n) are the items whose id is i modulo n. `expiry` seconds after its last sign of life a
    worker of another machine is taken for dead.
    """

    folder: Path
    entries: Iterable[Entry]
    open: Callable[[str | None], Pipeline]
    model: str = "picto"
    output: str = "png"
    batch_size: int | None = None
    strict: bool = False
    shard: tuple[int, int] = (0, 1)
    expiry: float = EXPIRY

    def items(self, pipe: Pipeline) -> Iterator[Item]:
        """The items of this shard, one for each entry: an item that is asked for twice comes twice."""
        model = fingerprint(pipe)
        for entry in self.entries:
            request = pipe.resolve(entry.request)
            item = Item(identify(request, model), request, entry.line)
            if self.owns(item.id):
                yield item

    def owns(self, name: str) -> bool:
        """Is an item of this shard?"""
        i, n = self.shard
        return int(name, 16) % n == i

    def leases(self) -> Leases:
        """A new worker's."""
        return Leases(self.folder / "leases", self.expiry)


def work(job: Job, stop: threading.Event, device: str | None = None) -> None:
    """Draw what is left of a job until nothing is, or until `stop`: then what is being drawn is finished.

    Raises what no other item could avoid: OSError where a picture cannot be written, and what `PATIENCE` items in a
    row failed by. All else is the item's own failure, and is recorded.
    """
    with job.leases() as leases:
        pipe = job.open(device)
        leases.status = {"steps": 0, "batch_size": 0}
        scheduler = scheduled(job, pipe)
        with Feed(job, pipe, leases, stop, ahead=scheduler.batch_size) as feed, Writer(job, pipe, leases) as writer:
            Worker(scheduler, leases, feed, writer, stop).run()


class Worker:
    """The items that are being drawn, by the scheduler's indexes."""

    def __init__(self, scheduler: Scheduler, leases: Leases, feed: Feed, writer: Writer, stop: threading.Event) -> None:
        self.scheduler, self.leases, self.feed, self.writer, self.stop = scheduler, leases, feed, writer, stop
        self.drawn: dict[int, tuple[Item, float]] = {}  # with the time when it began
        self.failures = 0  # one after another

    def run(self) -> None:
        """Draw all that is fed. Where drawing fails, what was being drawn is drawn again, each alone."""
        while True:
            try:
                return self._draw(self._requests())
            except Exception:
                suspects = [item for item, _ in self.drawn.values()]
                if not suspects:
                    raise
            for item in suspects:
                if not self._stopping():
                    self._alone(item)

    def _draw(self, requests: Iterator[Request | None]) -> None:
        for index, picture in self.scheduler.run(requests, self._said):
            item, start = self.drawn.pop(index)
            self.failures = 0
            self.writer.put(item, picture, time.monotonic() - start)

    def _requests(self) -> Iterator[Request | None]:
        """Requests as there is room for them: None where none is leased yet and others are being drawn."""
        self.drawn.clear()
        index = 0
        while not self._stopping():
            item = self.feed.get(wait=not self.drawn)
            if item is not None:
                self.drawn[index] = item, time.monotonic()
                index += 1
                yield item.request
            elif self.feed.ended:
                return
            elif self.drawn:
                yield None

    def _alone(self, item: Item) -> None:
        self.drawn.clear()

        def one() -> Iterator[Request]:
            self.drawn[0] = item, time.monotonic()
            yield item.request

        try:
            self._draw(one())
        except Exception as error:
            self.failures += 1
            self.writer.fail(item, reason(error))
            if self.failures >= PATIENCE:
                raise

    def _said(self, share: float) -> None:
        status = self.leases.status
        self.leases.status = {"steps": status["steps"] + 1, "batch_size": self.scheduler.batch_size}

    def _stopping(self) -> bool:
        return self.stop.is_set() or self.writer.error is not None


class Feed:
    """Items to draw, leased and with their texts encoded by a thread, ahead of their turn."""

    def __init__(self, job: Job, pipe: Pipeline, leases: Leases, stop: threading.Event, ahead: int) -> None:
        self.job, self.pipe, self.leases, self.stop = job, pipe, leases, stop
        self.manifest = Manifest(job.folder)
        self.error: BaseException | None = None
        self._ready: queue.Queue[Item | None] = queue.Queue(ahead)
        self._left = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="feed")

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Raises what the thread failed by."""
        self._left.set()
        self._thread.join()
        if self.error is not None and error[0] is None:
            raise self.error

    @property
    def ended(self) -> bool:
        """Is there nothing left, and nothing to come?"""
        return self._ended

    def get(self, wait: bool) -> Item | None:
        """The next item; None where there is none yet, or no more."""
        try:
            item = self._ready.get(timeout=POLL) if wait else self._ready.get_nowait()
        except queue.Empty:
            return None
        self._ended = item is None
        return item

    def _run(self) -> None:
        try:
            for item in self._items():
                self._put(item)
        except BaseException as error:
            self.error = error
        self._put(None)

    def _put(self, item: Item | None) -> None:
        while not self._left.is_set():
            try:
                return self._ready.put(item, timeout=POLL)
            except queue.Full:
                continue

    def _items(self) -> Iterator[Item]:
        """What nobody has finished and nobody else is at, and then what others leave undone."""
        deferred: dict[str, Item] = {}
        self.manifest.refresh()
        for item in self.job.items(self.pipe):
            if self._over():
                return
            if self._take(item):
                yield item
            elif not self.manifest.settled(item.id):
                deferred.setdefault(item.id, item)
            if len(deferred) >= DEFERRED:
                deferred = self._open(deferred)
        while deferred := self._open(deferred):
            for item in list(deferred.values()):
                if self._over():
                    return
                if self._take(item):
                    del deferred[item.id]
                    yield item
            time.sleep(POLL)

    def _take(self, item: Item) -> bool:
        """Lease an item that is not settled, and prepare it. What was finished before it was leased shows then."""
        if self.manifest.settled(item.id) or not self.leases.acquire(item.id):
            return False
        self.manifest.refresh()
        if self.manifest.settled(item.id):
            self.leases.release(item.id)
            return False
        self.pipe.scheduler.prepare(item.request)
        return True

    def _open(self, items: dict[str, Item]) -> dict[str, Item]:
        """Those of others' items that are not settled by now, and none of this worker's own."""
        self.manifest.refresh()
        return {k: v for k, v in items.items() if not self.manifest.settled(k) and not self.leases.holds(k)}

    def _over(self) -> bool:
        return self.stop.is_set() or self._left.is_set()


class Writer:
    """Writes pictures in a thread: file, then line, then the lease is returned. Few may wait for it."""

    def __init__(self, job: Job, pipe: Pipeline, leases: Leases) -> None:
        self.job, self.pipe, self.leases = job, pipe, leases
        self.error: BaseException | None = None
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(CPU_BATCH)
        self._thread = threading.Thread(target=self._run, daemon=True, name="writer")

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Returns once all is written; raises what could not be."""
        self._waiting.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error

    def put(self, item: Item, picture: Image.Image, seconds: float) -> None:
        """Write a picture, which took so long."""
        self._waiting.put(lambda: self._write(item, picture, seconds))

    def fail(self, item: Item, why: str) -> None:
        """Record that an item cannot be drawn."""
        self._waiting.put(lambda: self._record(item, {"status": "failed", "reason": why}))

    def _run(self) -> None:
        while (task := self._waiting.get()) is not None:
            try:
                if self.error is None:
                    task()
            except BaseException as error:  # from here on nothing is written, but all that is put is taken
                self.error = error

    def _write(self, item: Item, picture: Image.Image, seconds: float) -> None:
        if not self.leases.holds(item.id):
            return  # this worker slept: another draws it
        output = OUTPUTS[self.job.output]
        file = item.file(output.suffix)
        path = self.job.folder / file
        try:
            output.save(picture, path, self.pipe.texts_of(item.request, self.job.model))
        except (ValueError, SyntaxError) as error:
            return self._record(item, {"status": "failed", "reason": reason(error)})
        pixels = hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()
        record = {"status": "done", "file": file, "sha256": sha256(path), "pixels": pixels}
        self._record(item, {**record, "seconds": round(seconds, 3)})

    def _record(self, item: Item, result: dict[str, Any]) -> None:
        about = {"line": item.line, "request": item.request.record(), "worker": self.leases.worker}
        append(self.job.folder, self.leases.worker, {"id": item.id, **result, **about})
        self.leases.release(item.id)


def scheduled(job: Job, pipe: Pipeline) -> Scheduler:
    """The scheduler of a worker, as many pictures at a time as fit."""
    size = job.batch_size or measured(job, pipe)
    return Scheduler(pipe.model, pipe.texts, size, STRICT_ROWS if job.strict else None)


def measured(job: Job, pipe: Pipeline) -> int:
    """How many pictures like the job's first are drawn at a time: by the memory of one and of two, where it is CUDA's.

    On a CPU, and in strict mode, it is `CPU_BATCH`.
    """
    first = next(job.items(pipe), None)
    if job.strict or first is None or pipe.device.type != "cuda":
        return CPU_BATCH

    def peak(count: int) -> int:
        torch.cuda.reset_peak_memory_stats(pipe.device)
        scheduler = Scheduler(pipe.model, pipe.texts, count)
        list(scheduler.run([first.request] * count, lambda share: None))
        return torch.cuda.max_memory_allocated(pipe.device)

    one, two = peak(1), peak(2)
    torch.cuda.empty_cache()
    return fitting(torch.cuda.mem_get_info(pipe.device)[0], one, two)


def fitting(free: int, one: int, two: int) -> int:
    """Pictures for which `SHARE` of `free` bytes is enough, by the peaks of one and of two: each adds two - one."""
    return max(1, min(MOST, int(SHARE * free / max(1, two - one))))


def reason(error: BaseException) -> str:
    """An error as one line; of a file, its name and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return " ".join(str(error).split())[:500] or type(error).__name__
