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

from ldm.files import file_sha256
from ldm.jobs.items import JobItem, compute_item_id, fingerprint_model
from ldm.jobs.leases import LEASE_TIMEOUT, Leases
from ldm.jobs.manifest import Manifest, append_manifest_record
from ldm.jobs.outputs import IMAGE_FORMATS
from ldm.jobs.source import PromptEntry
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request
from ldm.pipeline.scheduler import BatchScheduler

CPU_BATCH_SIZE = 8  # pictures drawn at a time where no memory can be measured
MAX_BATCH_SIZE = 64  # pictures drawn at a time: beyond it a device gains nothing
MEMORY_FRACTION = 0.8  # of the free memory
STRICT_ROWS = 16  # of each call of the network in strict mode: CPU_BATCH guided pictures
MAX_CONSECUTIVE_FAILURES = 10  # items that may fail one after another before it is the worker that is at fault
QUEUE_POLL_INTERVAL = 0.1  # seconds between two looks at what other workers hold
MAX_DEFERRED_ITEMS = 1024  # items of others that are remembered before one looks which are done


@dataclass(frozen=True)
class Job:
    """What every worker of a job has to know; it can be pickled, for other processes and machines.

    `open` loads the model on a device, None its own choice; `model` is what pictures call it. `batch_size` None is by
    free memory. `shard` (i, n) are the items whose id is i modulo n. `expiry` seconds after its last sign of life a
    worker of another machine is taken for dead.
    """

    folder: Path
    entries: Iterable[PromptEntry]
    load_pipeline: Callable[[str | None], Pipeline]
    model_name: str = "picto"
    image_format: str = "png"
    batch_size: int | None = None
    strict: bool = False
    shard: tuple[int, int] = (0, 1)
    lease_timeout: float = LEASE_TIMEOUT

    def iter_items(self, pipe: Pipeline) -> Iterator[JobItem]:
        """The items of this shard, one for each entry: an item that is asked for twice comes twice."""
        model = fingerprint_model(pipe)
        for entry in self.entries:
            request = pipe.resolve(entry.request)
            item = JobItem(compute_item_id(request, model), request, entry.line)
            if self.in_shard(item.id):
                yield item

    def in_shard(self, item_id: str) -> bool:
        """Is an item of this shard?"""
        i, n = self.shard
        return int(item_id, 16) % n == i

    def open_leases(self) -> Leases:
        """A new worker's."""
        return Leases(self.folder / "leases", self.lease_timeout)


def run_worker(job: Job, stop: threading.Event, device: str | None = None) -> None:
    """Draw what is left of a job until nothing is, or until `stop`: then what is being drawn is finished.

    Raises what no other item could avoid: OSError where a picture cannot be written, and what `MAX_CONSECUTIVE_FAILURES` items in a
    row failed by. All else is the item's own failure, and is recorded.
    """
    with job.open_leases() as leases:
        pipe = job.load_pipeline(device)
        leases.status = {"steps": 0, "batch_size": 0}
        scheduler = build_worker_scheduler(job, pipe)
        with (
            Prefetcher(job, pipe, leases, stop, max_ready=scheduler.batch_size) as feed,
            ImageWriter(job, pipe, leases) as writer,
        ):
            Worker(scheduler, leases, feed, writer, stop).run()


class Worker:
    """The items that are being drawn, by the scheduler's indexes."""

    def __init__(
        self,
        scheduler: BatchScheduler,
        leases: Leases,
        prefetcher: Prefetcher,
        writer: ImageWriter,
        stop: threading.Event,
    ) -> None:
        self.scheduler, self.leases, self.prefetcher, self.writer, self.stop = (
            scheduler,
            leases,
            prefetcher,
            writer,
            stop,
        )
        self.running: dict[int, tuple[JobItem, float]] = {}  # with the time when it began
        self.consecutive_failures = 0  # one after another

    def run(self) -> None:
        """Draw all that is fed. Where drawing fails, what was being drawn is drawn again, each alone."""
        while True:
            try:
                return self._generate(self._iter_requests())
            except Exception:
                suspects = [item for item, _ in self.running.values()]
                if not suspects:
                    raise
            for item in suspects:
                if not self._should_stop():
                    self._generate_alone(item)

    def _generate(self, requests: Iterator[Request | None]) -> None:
        for index, picture in self.scheduler.run(requests, self._on_progress):
            item, start = self.running.pop(index)
            self.consecutive_failures = 0
            self.writer.put(item, picture, time.monotonic() - start)

    def _iter_requests(self) -> Iterator[Request | None]:
        """Requests as there is room for them: None where none is leased yet and others are being drawn."""
        self.running.clear()
        index = 0
        while not self._should_stop():
            item = self.prefetcher.get(block=not self.running)
            if item is not None:
                self.running[index] = item, time.monotonic()
                index += 1
                yield item.request
            elif self.prefetcher.exhausted:
                return
            elif self.running:
                yield None

    def _generate_alone(self, item: JobItem) -> None:
        self.running.clear()

        def one() -> Iterator[Request]:
            self.running[0] = item, time.monotonic()
            yield item.request

        try:
            self._generate(one())
        except Exception as error:
            self.consecutive_failures += 1
            self.writer.put_failure(item, describe_error(error))
            if self.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
                raise

    def _on_progress(self, progress_delta: float) -> None:
        status = self.leases.status
        self.leases.status = {"steps": status["steps"] + 1, "batch_size": self.scheduler.batch_size}

    def _should_stop(self) -> bool:
        return self.stop.is_set() or self.writer.error is not None


class Prefetcher:
    """Items to draw, leased and with their texts encoded by a thread, ahead of their turn."""

    def __init__(self, job: Job, pipe: Pipeline, leases: Leases, stop: threading.Event, max_ready: int) -> None:
        self.job, self.pipe, self.leases, self.stop = job, pipe, leases, stop
        self.manifest = Manifest(job.folder)
        self.error: BaseException | None = None
        self._queue: queue.Queue[JobItem | None] = queue.Queue(max_ready)
        self._closed = threading.Event()
        self._exhausted = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="feed")

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Raises what the thread failed by."""
        self._closed.set()
        self._thread.join()
        if self.error is not None and error[0] is None:
            raise self.error

    @property
    def exhausted(self) -> bool:
        """Is there nothing left, and nothing to come?"""
        return self._exhausted

    def get(self, block: bool) -> JobItem | None:
        """The next item; None where there is none yet, or no more."""
        try:
            item = self._queue.get(timeout=QUEUE_POLL_INTERVAL) if block else self._queue.get_nowait()
        except queue.Empty:
            return None
        self._exhausted = item is None
        return item

    def _run(self) -> None:
        try:
            for item in self._iter_leased_items():
                self._put(item)
        except BaseException as error:
            self.error = error
        self._put(None)

    def _put(self, item: JobItem | None) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=QUEUE_POLL_INTERVAL)
            except queue.Full:
                continue

    def _iter_leased_items(self) -> Iterator[JobItem]:
        """What nobody has finished and nobody else is at, and then what others leave undone."""
        deferred: dict[str, JobItem] = {}
        self.manifest.refresh()
        for item in self.job.iter_items(self.pipe):
            if self._should_stop():
                return
            if self._try_lease(item):
                yield item
            elif not self.manifest.is_finished(item.id):
                deferred.setdefault(item.id, item)
            if len(deferred) >= MAX_DEFERRED_ITEMS:
                deferred = self._drop_finished(deferred)
        while deferred := self._drop_finished(deferred):
            for item in list(deferred.values()):
                if self._should_stop():
                    return
                if self._try_lease(item):
                    del deferred[item.id]
                    yield item
            time.sleep(QUEUE_POLL_INTERVAL)

    def _try_lease(self, item: JobItem) -> bool:
        """Lease an item that is not settled, and prepare it. What was finished before it was leased shows then."""
        if self.manifest.is_finished(item.id) or not self.leases.acquire(item.id):
            return False
        self.manifest.refresh()
        if self.manifest.is_finished(item.id):
            self.leases.release(item.id)
            return False
        self.pipe.batch_scheduler.prefetch_prompt(item.request)
        return True

    def _drop_finished(self, items: dict[str, JobItem]) -> dict[str, JobItem]:
        """Those of others' items that are not settled by now, and none of this worker's own."""
        self.manifest.refresh()
        return {k: v for k, v in items.items() if not self.manifest.is_finished(k) and not self.leases.holds(k)}

    def _should_stop(self) -> bool:
        return self.stop.is_set() or self._closed.is_set()


class ImageWriter:
    """Writes pictures in a thread: file, then line, then the lease is returned. Few may wait for it."""

    def __init__(self, job: Job, pipe: Pipeline, leases: Leases) -> None:
        self.job, self.pipe, self.leases = job, pipe, leases
        self.error: BaseException | None = None
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(CPU_BATCH_SIZE)
        self._thread = threading.Thread(target=self._run, daemon=True, name="writer")

    def __enter__(self) -> ImageWriter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Returns once all is written; raises what could not be."""
        self._tasks.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error

    def put(self, item: JobItem, image: Image.Image, seconds: float) -> None:
        """Write a picture, which took so long."""
        self._tasks.put(lambda: self._write_image(item, image, seconds))

    def put_failure(self, item: JobItem, message: str) -> None:
        """Record that an item cannot be drawn."""
        self._tasks.put(lambda: self._append_result(item, {"status": "failed", "reason": message}))

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if self.error is None:
                    task()
            except BaseException as error:  # from here on nothing is written, but all that is put is taken
                self.error = error

    def _write_image(self, item: JobItem, image: Image.Image, seconds: float) -> None:
        if not self.leases.holds(item.id):
            return  # this worker slept: another draws it
        output = IMAGE_FORMATS[self.job.image_format]
        file = item.image_path(output.suffix)
        path = self.job.folder / file
        try:
            output.save(image, path, self.pipe.metadata(item.request, self.job.model_name))
        except (ValueError, SyntaxError) as error:
            return self._append_result(item, {"status": "failed", "reason": describe_error(error)})
        pixels = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        record = {"status": "done", "file": file, "sha256": file_sha256(path), "pixels": pixels}
        self._append_result(item, {**record, "seconds": round(seconds, 3)})

    def _append_result(self, item: JobItem, result: dict[str, Any]) -> None:
        about = {"line": item.line, "request": item.request.to_record(), "worker": self.leases.worker}
        append_manifest_record(self.job.folder, self.leases.worker, {"id": item.id, **result, **about})
        self.leases.release(item.id)


def build_worker_scheduler(job: Job, pipe: Pipeline) -> BatchScheduler:
    """The scheduler of a worker, as many pictures at a time as fit."""
    size = job.batch_size or measure_batch_size(job, pipe)
    return BatchScheduler(pipe.model, pipe.prompt_encoder, size, STRICT_ROWS if job.strict else None)


def measure_batch_size(job: Job, pipe: Pipeline) -> int:
    """How many pictures like the job's first are drawn at a time: by the memory of one and of two, where it is CUDA's.

    On a CPU, and in strict mode, it is `CPU_BATCH_SIZE`.
    """
    first = next(job.iter_items(pipe), None)
    if job.strict or first is None or pipe.device.type != "cuda":
        return CPU_BATCH_SIZE

    def peak(count: int) -> int:
        torch.cuda.reset_peak_memory_stats(pipe.device)
        scheduler = BatchScheduler(pipe.model, pipe.prompt_encoder, count)
        list(scheduler.run([first.request] * count, lambda share: None))
        return torch.cuda.max_memory_allocated(pipe.device)

    one, two = peak(1), peak(2)
    torch.cuda.empty_cache()
    return fit_batch_size(torch.cuda.mem_get_info(pipe.device)[0], one, two)


def fit_batch_size(free_bytes: int, peak_one: int, peak_two: int) -> int:
    """Pictures for which `MEMORY_FRACTION` of `next_image_number` bytes is enough, by the peaks of one and of two: each adds two - one."""
    return max(1, min(MAX_BATCH_SIZE, int(MEMORY_FRACTION * free_bytes / max(1, peak_two - peak_one))))


def describe_error(error: BaseException) -> str:
    """An error as one line; of a file, its name and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename2 or error.filename}: {error.strerror}"
    return " ".join(str(error).split())[:500] or type(error).__name__
