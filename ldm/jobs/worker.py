"""A worker of a job: it leases items ahead, generates them with one scheduler, and writes each image meanwhile."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.errors import describe_error
from ldm.files import file_sha256
from ldm.image_io import image_digest
from ldm.jobs.leases import LEASE_TIMEOUT, Leases
from ldm.jobs.manifest import Manifest, append_manifest_record
from ldm.jobs.source import PromptEntry
from ldm.metadata import IMAGE_FORMATS, save_image
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request
from ldm.pipeline.scheduler import BatchScheduler

ITEM_ID_DIGITS = 24  # hex: two of 10^9 items share an id with a probability of 10^-11
FLOAT_FIELDS = {f.name for f in fields(Request) if str(f.type).startswith("float")}
CPU_BATCH_SIZE = 8  # images, where free memory cannot be measured
MAX_BATCH_SIZE = 64  # images: beyond it a device gains nothing
MEMORY_FRACTION = 0.8  # of the free memory
LATER_FIELDS = "s_churn", "s_tmin", "s_tmax", "s_noise"  # of a request, after version 0 of the ids
INVARIANT_ROWS = 16  # of each network evaluation of a batch-invariant job: CPU_BATCH_SIZE images with guidance
MAX_CONSECUTIVE_FAILURES = 10  # of items, before the worker itself is taken to be at fault
QUEUE_POLL_INTERVAL = 0.1  # seconds
MAX_DEFERRED_ITEMS = 1024  # leased by other workers, after which the manifest is read again


@dataclass(frozen=True)
class JobItem:
    """A resolved request, its id, and the first line of the source that asks for it."""

    id: str
    request: Request
    line: int
    extra: dict[str, Any] = field(default_factory=dict)  # the columns of the source that are no fields

    def image_path(self, suffix: str) -> str:
        """The image's path in the job's folder."""
        return f"images/{self.id[:2]}/{self.id}.{suffix}"


@dataclass(frozen=True)
class Job:
    """What every worker of a job has to know; it can be pickled, for other processes and machines.

    `load_pipeline` loads the model on a device, None for its own choice; `model_name` goes into the images' metadata.
    `batch_size` None is by free memory. `shard` (i, n) selects the items whose id is i modulo n. A worker of another
    machine is taken for dead `lease_timeout` seconds after its last heartbeat.
    """

    folder: Path
    entries: Iterable[PromptEntry]
    load_pipeline: Callable[[str | None], Pipeline]
    model_name: str = "picto"
    image_format: str = "png"
    batch_size: int | None = None
    batch_invariant: bool = False  # network evaluations of one size give the same bits in any batch
    shard: tuple[int, int] = (0, 1)
    lease_timeout: float = LEASE_TIMEOUT

    def iter_items(self, pipe: Pipeline) -> Iterator[JobItem]:
        """The items of this shard, one for each entry: equal requests give the same item again."""
        model = fingerprint_model(pipe)
        i, n = self.shard
        for entry in self.entries:
            request = pipe.resolve(entry.request)
            item_id = compute_item_id(request, model)
            if int(item_id, 16) % n == i:
                yield JobItem(item_id, request, entry.line, entry.extra)

    def open_leases(self) -> Leases:
        """The leases of a new worker."""
        return Leases(self.folder / "leases", self.lease_timeout)


def fingerprint_model(pipe: Pipeline) -> dict[str, Any]:
    """The hashes of a model's components, of its adapters with their weights, and of its embeddings by token."""
    adapters = [[adapter.sha256, weight] for adapter, weight in pipe.adapters.loaded.values() if weight]
    return {
        "weights": dict(pipe.model.weight_hashes),
        "adapters": sorted(adapters, key=canonical_json),
        "embeddings": dict(pipe.embedding_hashes),
    }


def canonical_json(values: Any) -> str:
    """JSON that is one text for equal values: keys sorted, no spaces, ASCII, floats by repr; ValueError for NaN."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def compute_item_id(request: Request, model: Mapping[str, Any]) -> str:
    """The first 24 hex digits of SHA-256 over the canonical JSON of a resolved request and its `fingerprint_model`.

    Fields that are real numbers count as floats, so that 3 and 3.0 are one. `LATER_FIELDS` count where they are given,
    so that the ids of jobs begun before are the same: an `eta` that is not given was 0.0 then.
    """

    def to_float(value: float | None) -> float | None:
        return None if value is None else float(value)

    record = {name: to_float(v) if name in FLOAT_FIELDS else v for name, v in request.to_record().items()}
    record = {name: value for name, value in record.items() if value is not None or name not in LATER_FIELDS}
    record["eta"] = 0.0 if request.eta is None else 0 if request.eta == 0 else record["eta"]
    record["guidance_interval"] = [to_float(v) for v in request.guidance_interval or ()]
    return hashlib.sha256(canonical_json({"request": record, "model": model}).encode()).hexdigest()[:ITEM_ID_DIGITS]


def run_worker(job: Job, stop: threading.Event, device: str | None = None) -> None:
    """Generate (or resume) a job until it is done, or until `stop` is set: then finish the images that were begun.

    Raises errors that would hit every item: OSError where an image cannot be written, and the last error of
    `MAX_CONSECUTIVE_FAILURES` items that failed in a row. Any other error is recorded as the item's own failure.
    """
    with job.open_leases() as leases:
        pipe = job.load_pipeline(device)
        leases.status = {"steps": 0, "batch_size": 0}
        scheduler = build_worker_scheduler(job, pipe)
        with (
            Prefetcher(job, pipe, leases, stop, max_ready=scheduler.batch_size) as prefetcher,
            ImageWriter(job, pipe, leases) as writer,
        ):
            Worker(scheduler, leases, prefetcher, writer, stop).run()


def try_run_worker(job: Job, stop: threading.Event, device: str | None = None) -> str | None:
    """`run_worker`; returns the error that ended it early, in one line, or None."""
    try:
        run_worker(job, stop, device)
    except Exception as error:
        return describe_error(error)
    return None


@dataclass
class Worker:
    """Passes leased items to the scheduler and its images to the writer."""

    scheduler: BatchScheduler
    leases: Leases
    prefetcher: Prefetcher
    writer: ImageWriter
    stop: threading.Event

    def __post_init__(self) -> None:
        self.running: dict[int, tuple[JobItem, float]] = {}  # the scheduler's index: item and start on the clock
        self.clock = SharedClock()
        self.consecutive_failures = 0

    def run(self) -> None:
        """Generate all items. After an error those that were running are generated again, each alone."""
        while True:
            try:
                return self._generate(self._iter_requests())
            except Exception:
                interrupted_items = [item for item, _ in self.running.values()]
                if not interrupted_items:
                    raise
            for item in interrupted_items:
                if not self._should_stop():
                    self._generate_alone(item)

    def _generate(self, requests: Iterator[Request | None]) -> None:
        for index, image in self.scheduler.run(requests, self._on_progress):
            seconds = self.clock.advance(len(self.running)) - self.running[index][1]
            item, _ = self.running.pop(index)
            self.consecutive_failures = 0
            self.writer.put(item, image, seconds)

    def _iter_requests(self) -> Iterator[Request | None]:
        """Requests as there is room for them; None while nothing is leased and others are running."""
        self.running.clear()
        index = 0
        while not self._should_stop():
            item = self.prefetcher.get(block=not self.running)
            if item is not None:
                self.running[index] = item, self.clock.advance(len(self.running))
                index += 1
                yield item.request
            elif self.prefetcher.exhausted:
                return
            elif self.running:
                yield None

    def _generate_alone(self, item: JobItem) -> None:
        self.running = {0: (item, self.clock.advance(len(self.running)))}
        try:
            self._generate(iter([item.request]))
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


class SharedClock:
    """Time that all who run at once share: between two readings it goes on by seconds / number of runners."""

    def __init__(self) -> None:
        self.shared, self.last = 0.0, time.monotonic()

    def advance(self, num_running: int) -> float:
        """The clock's time now, where so many have run since the last reading."""
        now = time.monotonic()
        self.shared += (now - self.last) / max(1, num_running)
        self.last = now
        return self.shared


class Prefetcher:
    """Leases items and encodes their prompts in a thread, ahead of their turn."""

    def __init__(self, job: Job, pipe: Pipeline, leases: Leases, stop: threading.Event, max_ready: int) -> None:
        self.job, self.pipe, self.leases, self.stop = job, pipe, leases, stop
        self.manifest = Manifest(job.folder)
        self.error: BaseException | None = None
        self.exhausted = False  # nothing is left, and nothing to come
        self._queue: queue.Queue[JobItem | None] = queue.Queue(max_ready)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="prefetcher")

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Raises the error that ended the thread."""
        self._closed.set()
        self._thread.join()
        if self.error is not None and error[0] is None:
            raise self.error

    def get(self, block: bool) -> JobItem | None:
        """The next item; None where there is none yet, or no more."""
        try:
            item = self._queue.get(timeout=QUEUE_POLL_INTERVAL) if block else self._queue.get_nowait()
        except queue.Empty:
            return None
        self.exhausted = item is None
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
        """Items that are not finished and not leased by others, then those that others leave unfinished.

        So a job resumes: what its manifest has as finished is skipped.
        """
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
        """Lease an unfinished item and encode its prompt. Another may have finished it just before it was leased."""
        if self.manifest.is_finished(item.id) or not self.leases.acquire(item.id):
            return False
        self.manifest.refresh()
        if self.manifest.is_finished(item.id):
            self.leases.release(item.id)
            return False
        self.pipe.batch_scheduler.prefetch_prompt(item.request)
        return True

    def _drop_finished(self, items: dict[str, JobItem]) -> dict[str, JobItem]:
        """Less those that are finished by now, and those that this worker has leased."""
        self.manifest.refresh()
        return {k: v for k, v in items.items() if not self.manifest.is_finished(k) and not self.leases.holds(k)}

    def _should_stop(self) -> bool:
        return self.stop.is_set() or self._closed.is_set()


class ImageWriter:
    """Writes images in a thread: the file, then its manifest line, then the lease is released. The queue is short."""

    def __init__(self, job: Job, pipe: Pipeline, leases: Leases) -> None:
        self.job, self.pipe, self.leases = job, pipe, leases
        self.error: BaseException | None = None
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(CPU_BATCH_SIZE)
        self._thread = threading.Thread(target=self._run, daemon=True, name="image writer")

    def __enter__(self) -> ImageWriter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Returns once all is written; raises the first error."""
        self._tasks.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error

    def put(self, item: JobItem, image: Image.Image, seconds: float) -> None:
        """Write an image that took `seconds` of the worker's time."""
        self._tasks.put(lambda: self._write_image(item, image, seconds))

    def put_failure(self, item: JobItem, message: str) -> None:
        """Record that an item failed."""
        self._tasks.put(lambda: self._append_result(item, {"status": "failed", "reason": message}))

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if self.error is None:
                    task()
            except BaseException as error:  # keep draining the queue so that put() does not block; run no task
                self.error = error

    def _write_image(self, item: JobItem, image: Image.Image, seconds: float) -> None:
        if not self.leases.holds(item.id):
            return  # this worker slept, and another one has the item
        file = item.image_path(IMAGE_FORMATS[self.job.image_format].suffix)
        path = self.job.folder / file
        try:
            save_image(image, path, self.pipe.metadata(item.request, self.job.model_name), self.job.image_format)
        except (ValueError, SyntaxError) as error:
            return self._append_result(item, {"status": "failed", "reason": describe_error(error)})
        hashes = {"sha256": file_sha256(path), "pixels": image_digest(image)["sha256"]}
        self._append_result(item, {"status": "done", "file": file, **hashes, "seconds": round(seconds, 3)})

    def _append_result(self, item: JobItem, result: dict[str, Any]) -> None:
        context = {"line": item.line, "request": item.request.to_record(), "worker": self.leases.worker}
        if item.extra:
            context["extra"] = item.extra
        append_manifest_record(self.job.folder, self.leases.worker, {"id": item.id, **result, **context})
        self.leases.release(item.id)


def build_worker_scheduler(job: Job, pipe: Pipeline) -> BatchScheduler:
    """A scheduler with the job's batch size, or the one that fits into memory."""
    size = job.batch_size or measure_batch_size(job, pipe)
    return BatchScheduler(pipe.model, pipe.prompt_encoder, size, INVARIANT_ROWS if job.batch_invariant else None)


def measure_batch_size(job: Job, pipe: Pipeline) -> int:
    """How many images like the job's first fit into CUDA memory, by the peaks of batches of one and of two.

    On a CPU, and where the job is batch-invariant, it is `CPU_BATCH_SIZE`.
    """
    first = next(job.iter_items(pipe), None)
    if job.batch_invariant or first is None or pipe.device.type != "cuda":
        return CPU_BATCH_SIZE

    def peak_bytes(count: int) -> int:
        torch.cuda.reset_peak_memory_stats(pipe.device)
        scheduler = BatchScheduler(pipe.model, pipe.prompt_encoder, count)
        list(scheduler.run([first.request] * count, lambda progress_delta: None))
        return torch.cuda.max_memory_allocated(pipe.device)

    one, two = peak_bytes(1), peak_bytes(2)
    torch.cuda.empty_cache()
    return fit_batch_size(torch.cuda.mem_get_info(pipe.device)[0], one, two)


def fit_batch_size(free_bytes: int, peak_one: int, peak_two: int) -> int:
    """The number of images for which `MEMORY_FRACTION` of `free_bytes` suffices; each takes peak_two - peak_one."""
    return max(1, min(MAX_BATCH_SIZE, int(MEMORY_FRACTION * free_bytes / max(1, peak_two - peak_one))))
