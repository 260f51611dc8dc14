"""Engines: where a job's workers run. What they do is the same under all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from ldm.jobs.worker import Job, reason, work

RESTARTS = 3  # of each worker, where its process died without a word


class Engine(Protocol):
    """Runs workers. `reasons` are why some ended too early, beyond help; one that died is begun again."""

    reasons: list[str]

    def poll(self) -> int:
        """How many workers are at work; looks after them."""

    def stop(self) -> None:
        """Ask all to finish what they are drawing."""

    def kill(self) -> None:
        """End all at once; where that cannot be, nothing happens, and the caller's own end will do it."""


class Inline:
    """One worker, in a thread of this process."""

    def __init__(self, job: Job, devices: Sequence[str | None]) -> None:
        self.reasons: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(job, devices[0]), daemon=True, name="worker")
        self._thread.start()

    def poll(self) -> int:
        return int(self._thread.is_alive())

    def stop(self) -> None:
        self._stop.set()

    def kill(self) -> None:
        pass

    def _run(self, job: Job, device: str | None) -> None:
        try:
            work(job, self._stop, device)
        except Exception as error:
            self.reasons.append(reason(error))


class Local:
    """A process for each device, on this machine; they end with the one that began them."""

    def __init__(self, job: Job, devices: Sequence[str | None]) -> None:
        self.reasons: list[str] = []
        self._job, self._restarts = job, RESTARTS * len(devices)
        self._threads = max(1, torch.get_num_threads() // len(devices))
        self._stopping = False
        self._workers = [self._start(device) for device in devices]

    def poll(self) -> int:
        self._workers = [worker for old in self._workers if (worker := self._looked_after(*old)) is not None]
        return len(self._workers)

    def stop(self) -> None:
        self._stopping = True
        for process, *_ in self._workers:
            process.terminate()

    def kill(self) -> None:
        self._stopping = True
        for process, *_ in self._workers:
            process.kill()
        for process, *_ in self._workers:
            process.join()

    def _start(self, device: str | None) -> tuple[Any, Connection, str | None]:
        context = multiprocessing.get_context("spawn")  # a forked CUDA does not work
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=in_process, args=(self._job, device, self._threads, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours, device

    def _looked_after(self, process: Any, words: Connection, device: str | None) -> tuple | None:
        """The worker if it is at work, another in its place if it died, None where it has ended."""
        if process.is_alive():
            return process, words, device
        with contextlib.suppress(EOFError, OSError):
            if (last := words.recv()) is not None:
                self.reasons.append(last)
            return None
        if self._stopping:
            return None
        if self._restarts == 0:
            self.reasons.append(f"workers died {RESTARTS} times each, the last by {ending(process.exitcode)}")
            return None
        self._restarts -= 1
        return self._start(device)


def in_process(job: Job, device: str | None, threads: int, words: Connection) -> None:
    """The life of a worker's process: its last word is None, or why it ended too early."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=orphaned, args=(stop,), daemon=True).start()
    torch.set_num_threads(threads)
    last = None
    try:
        work(job, stop, device)
    except Exception as error:
        last = reason(error)
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        words.send(last)


def orphaned(stop: threading.Event) -> None:
    """Ask the worker to stop once the process that began it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        stop.set()


def ending(code: int | None) -> str:
    """How a process ended."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


class Ray:
    """A Ray Core actor for each device, wherever the cluster has room: Ray places them and begins the dead again.

    It joins the cluster that RAY_ADDRESS names, or that runs here, or begins one. A task is tried as long as its actor
    lives, which is begun again `RESTARTS` times. The job's folder, its source and its model must have the same paths on
    all machines.
    """

    def __init__(self, job: Job, devices: Sequence[str | None]) -> None:
        ray = self._ray = imported()
        self.reasons: list[str] = []
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        place = {"num_gpus": 1} if any(d is not None for d in devices) else {"num_cpus": 1}
        actor = ray.remote(Actor).options(
            **place, max_concurrency=2, max_restarts=RESTARTS, max_task_retries=-1, scheduling_strategy="SPREAD"
        )
        self._actors = [actor.remote() for _ in devices]
        self._tasks = [a.run.remote(job, d and "cuda") for a, d in zip(self._actors, devices, strict=True)]

    def poll(self) -> int:
        if self._tasks:
            ended, self._tasks = self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)
            for task in ended:
                try:
                    said = self._ray.get(task)
                except self._ray.exceptions.RayError as error:
                    said = f"ray: {reason(error)}"
                self.reasons += [said] if said is not None else []
        return len(self._tasks)

    def stop(self) -> None:
        for actor in self._actors:
            actor.stop.remote()

    def kill(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)


class Actor:
    """A worker in a process of Ray's."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def run(self, job: Job, device: str | None) -> str | None:
        """None, or why it ended too early."""
        try:
            work(job, self._stop, device)
        except Exception as error:
            return reason(error)
        return None

    def stop(self) -> None:
        self._stop.set()


def imported() -> Any:
    """ray; ValueError with the cure where it is not installed."""
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray: needs ray: pip install 'ldm[ray]'") from None
    return ray


ENGINES: dict[str, Callable[[Job, Sequence[str | None]], Engine]] = {"inline": Inline, "local": Local, "ray": Ray}


def places(engine: str, workers: int | None, device: str) -> list[str | None]:
    """A device for each worker: all of CUDA's where the model may be on any, and else the model's own, None.

    ValueError where the engine has no such number of workers.
    """
    found = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if engine == "inline":
        if workers not in (None, 1):
            raise ValueError(f"--workers {workers}: the engine inline has one; choose local or ray")
        return [None]
    count = workers or found or 1
    return [f"cuda:{k % found}" if found else None for k in range(count)]
