"""Engines run the same worker in a thread, in local processes, or as Ray actors."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from ldm.errors import describe_error
from ldm.installation import install_command
from ldm.jobs.worker import Job, try_run_worker

MAX_RESTARTS = 3  # of each worker whose process died without an error message


class Engine(Protocol):
    """Runs workers. `errors` are those of workers that ended early; a worker whose process died is restarted."""

    errors: list[str]

    def poll(self) -> int:
        """The number of running workers, after restarting those that died."""

    def stop(self) -> None:
        """Ask all workers to finish the images that they have begun."""

    def kill(self) -> None:
        """End all workers at once; where that is impossible it does nothing, and they end with this process."""


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
        if (error := try_run_worker(job, self._stop, device)) is not None:
            self.errors.append(error)


class LocalEngine:
    """A process for each device, on this machine; they end with the one that started them."""

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
        context = multiprocessing.get_context("spawn")  # CUDA does not work in a forked process
        receiver, sender = context.Pipe(duplex=False)
        args = self._job, device, self._threads, sender
        process = context.Process(target=run_worker_process, args=args, daemon=True)
        process.start()
        sender.close()
        return process, receiver, device

    def _restart_if_dead(self, process: Any, connection: Connection, device: str | None) -> tuple | None:
        """The worker if it runs, a new one if it died, None if it has ended."""
        if process.is_alive():
            return process, connection, device
        with contextlib.suppress(EOFError, OSError):
            if (error := connection.recv()) is not None:
                self.errors.append(error)
            return None
        if self._stopping:
            return None
        if self._restarts_left == 0:
            code = process.exitcode
            cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            self.errors.append(f"workers died {MAX_RESTARTS} times each, the last by {cause}")
            return None
        self._restarts_left -= 1
        return self._start(device)


def run_worker_process(job: Job, device: str | None, threads: int, connection: Connection) -> None:
    """Run a worker in this process; at the end it sends None, or the error that ended it early."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=stop_when_orphaned, args=(stop,), daemon=True).start()
    torch.set_num_threads(threads)
    error = try_run_worker(job, stop, device)
    with contextlib.suppress(OSError):  # the receiver may have ended
        connection.send(error)


def stop_when_orphaned(stop: threading.Event) -> None:
    """Set `stop` once the parent process has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        stop.set()


class RayEngine:
    """A Ray Core actor for each device, wherever the cluster has room; Ray restarts those that die.

    It joins the cluster of RAY_ADDRESS, or one that runs on this machine, or starts one. A task is retried while its
    actor lives, which is restarted up to `MAX_RESTARTS` times. The job's folder, its source and its model must have the
    same paths on all machines.
    """

    def __init__(self, job: Job, devices: Sequence[str | None]) -> None:
        ray = self._ray = import_ray()
        self.errors: list[str] = []
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        resources = {"num_gpus": 1} if any(d is not None for d in devices) else {"num_cpus": 1}
        retries: dict[str, Any] = {"max_restarts": MAX_RESTARTS, "max_task_retries": -1}
        actor = ray.remote(RayWorker).options(**resources, **retries, max_concurrency=2, scheduling_strategy="SPREAD")
        self._actors = [actor.remote() for _ in devices]
        self._tasks = [a.run.remote(job, d and d.partition(":")[0]) for a, d in zip(self._actors, devices, strict=True)]

    def poll(self) -> int:
        if self._tasks:
            ended, self._tasks = self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)
            for task in ended:
                try:
                    error = self._ray.get(task)
                except self._ray.exceptions.RayError as ray_error:
                    error = f"ray: {describe_error(ray_error)}"
                self.errors += [error] if error is not None else []
        return len(self._tasks)

    def stop(self) -> None:
        for actor in self._actors:
            actor.stop.remote()

    def kill(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)


class RayWorker:
    """The actor of a worker; `run` returns None, or the error that ended it early."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def run(self, job: Job, device: str | None) -> str | None:
        return try_run_worker(job, self._stop, device)

    def stop(self) -> None:
        self._stop.set()


def import_ray() -> Any:
    """The module ray; ValueError with the command that installs it where it is missing."""
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
    """A device for each worker: the CUDA or XPU devices in turn, if `device` allows any, else None, the model's own.

    ValueError where the engine cannot have that number of workers.
    """
    counts = {kind: getattr(torch, kind).device_count() for kind in ("cuda", "xpu") if device in ("auto", kind)}
    kind, gpus = next(((kind, count) for kind, count in counts.items() if count), ("", 0))
    if engine == "inline":
        if workers not in (None, 1):
            raise ValueError(f"--workers {workers}: engine inline has one worker; choose local or ray")
        return [None]
    return [f"{kind}:{k % gpus}" if gpus else None for k in range(workers or gpus or 1)]
