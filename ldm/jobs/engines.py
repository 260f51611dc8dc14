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

from ldm.installation import install_command
from ldm.jobs.worker import Job, describe_error, run_worker

MAX_RESTARTS = 3  # of each worker, where its process died without a word


class Engine(Protocol):
    """Runs workers. `reasons` are why some ended too early, beyond help; one that died is begun again."""

    errors: list[str]

    def poll(self) -> int:
        """How many workers are at work; looks after them."""

    def stop(self) -> None:
        """Ask all to finish what they are drawing."""

    def kill(self) -> None:
        """End all at once; where that cannot be, nothing happens, and the caller's own end will do it."""


class InlineEngine:
    """One worker, in a thread of this process."""

    def __init__(self, job: Job, devices: Sequence[str | None]) -> None:
        self.errors: list[str] = []
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
            run_worker(job, self._stop, device)
        except Exception as error:
            self.errors.append(describe_error(error))


class LocalEngine:
    """A process for each device, on this machine; they end with the one that began them."""

    def __init__(self, job: Job, devices: Sequence[str | None]) -> None:
        self.errors: list[str] = []
        self._job, self._restarts_left = job, MAX_RESTARTS * len(devices)
        self._threads = max(1, torch.get_num_threads() // len(devices))
        self._stopping = False
        self._workers = [self._start(device) for device in devices]

    def poll(self) -> int:
        self._workers = [worker for old in self._workers if (worker := self._restart_if_dead(*old)) is not None]
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
        process = context.Process(
            target=run_worker_process, args=(self._job, device, self._threads, theirs), daemon=True
        )
        process.start()
        theirs.close()
        return process, ours, device

    def _restart_if_dead(self, process: Any, connection: Connection, device: str | None) -> tuple | None:
        """The worker if it is at work, another in its place if it died, None where it has ended."""
        if process.is_alive():
            return process, connection, device
        with contextlib.suppress(EOFError, OSError):
            if (last := connection.recv()) is not None:
                self.errors.append(last)
            return None
        if self._stopping:
            return None
        if self._restarts_left == 0:
            self.errors.append(
                f"workers died {MAX_RESTARTS} times each, the last by {describe_exit_code(process.exitcode)}"
            )
            return None
        self._restarts_left -= 1
        return self._start(device)


def run_worker_process(job: Job, device: str | None, threads: int, connection: Connection) -> None:
    """The life of a worker's process: its last word is None, or why it ended too early."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=stop_when_orphaned, args=(stop,), daemon=True).start()
    torch.set_num_threads(threads)
    last = None
    try:
        run_worker(job, stop, device)
    except Exception as error:
        last = describe_error(error)
    with contextlib.suppress(OSError):  # nobody may be there to hear it
        connection.send(last)


def stop_when_orphaned(stop: threading.Event) -> None:
    """Ask the worker to stop once the process that began it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        stop.set()


def describe_exit_code(code: int | None) -> str:
    """How a process ended."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


class RayEngine:
    """A Ray Core actor for each device, wherever the cluster has room: Ray places them and begins the dead again.

    It joins the cluster that RAY_ADDRESS names, or that runs here, or begins one. A task is tried as long as its actor
    lives, which is begun again `MAX_RESTARTS` times. The job's folder, its source and its model must have the same paths on
    all machines.
    """

    def __init__(self, job: Job, devices: Sequence[str | None]) -> None:
        ray = self._ray = import_ray()
        self.errors: list[str] = []
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        place = {"num_gpus": 1} if any(d is not None for d in devices) else {"num_cpus": 1}
        actor = ray.remote(RayWorker).options(
            **place, max_concurrency=2, max_restarts=MAX_RESTARTS, max_task_retries=-1, scheduling_strategy="SPREAD"
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
                    said = f"ray: {describe_error(error)}"
                self.errors += [said] if said is not None else []
        return len(self._tasks)

    def stop(self) -> None:
        for actor in self._actors:
            actor.stop.remote()

    def kill(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)


class RayWorker:
    """A worker in a process of Ray's."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def run(self, job: Job, device: str | None) -> str | None:
        """None, or why it ended too early."""
        try:
            run_worker(job, self._stop, device)
        except Exception as error:
            return describe_error(error)
        return None

    def stop(self) -> None:
        self._stop.set()


def import_ray() -> Any:
    """ray; ValueError with the cure where it is not installed."""
    try:
        import ray
    except ImportError:
        raise ValueError(f"--engine ray: needs ray: {install_command('ray')}") from None
    return ray


ENGINES: dict[str, Callable[[Job, Sequence[str | None]], Engine]] = {
    "inline": InlineEngine,
    "local": LocalEngine,
    "ray": RayEngine,
}


def assign_devices(engine: str, workers: int | None, device: str) -> list[str | None]:
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
