"""SIGKILLs over a job's life, under any engine: at any moment from without, and inside a write from within."""

from __future__ import annotations

import multiprocessing
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from cluster import Nodes
from job_folders import Opens, go, job_in, outcome

from ldm.jobs import driver, engines
from ldm.jobs.engines import Engine, InlineEngine, LocalEngine, RayEngine, run_worker_process
from ldm.jobs.worker import Job
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.write")  # of sys.audit, but for the last
CUT = ("os.chmod",)  # the ends of drafts
PATIENT = 120.0  # seconds that one run may take, or anything that is waited for
LIVES = 8  # of a job, before it is let live to its end
EXCUSES = ("workers died", "ray: ")  # of a run that ends by its workers' deaths
ALIKE = {"batch_size": 1, "batch_invariant": False}  # calls of one size are bit for bit the same anyway
WARM: dict[Path, Pipeline] = {}  # models that forks of this process need not open


def until(true: Callable[[], Any]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + PATIENT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Does a process live? One that nobody has buried does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def session(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


def doom(folder: Path, fatal: int, said: Callable[[], None] = lambda: None, events: tuple[str, ...] = EVENTS) -> None:
    """Let this process die by SIGKILL at its event number `fatal` under a folder.

    Of a write by `os.write` half is written then; of a draft, at its end, half is left.
    """
    seen, write = 0, os.write

    def counts() -> bool:
        nonlocal seen
        seen += 1
        return seen == fatal

    def die() -> None:
        said()
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, words: tuple) -> None:
        if event in events and str(folder) in str(words[0]) and counts():
            if event == "os.chmod":
                os.truncate(words[0], os.path.getsize(words[0]) // 2)
            die()

    def half(handle: int, data: bytes) -> int:
        if "os.write" in events and counts():
            write(handle, data[: len(data) // 2])
            die()
        return write(handle, data)

    os.write = half
    sys.addaudithook(watch)


def doom_within(folder: Path, number: int, said: Callable[[], None]) -> None:
    """Let this process die at some event by a number: where it is odd, at the end of a draft."""
    doom(folder, *((1 + number // 4, said, CUT) if number % 2 else (number, said, EVENTS)))


class Orders(NamedTuple):
    """A folder with files NUMBER-K, each of which dooms the worker that takes it, and a tally of the kills."""

    folder: Path

    def add(self, kind: str) -> None:
        with (self.folder / "tally").open("a") as file:
            file.write(f"{kind}\n")

    def counts(self) -> Counter[str]:
        with suppress(FileNotFoundError):
            return Counter((self.folder / "tally").read_text().splitlines())
        return Counter()

    def place(self, fatal: list[int]) -> None:
        """In place of those that nobody took."""
        for order in self.folder.glob("*-*"):
            order.unlink(missing_ok=True)
        for k, number in enumerate(fatal):
            (self.folder / f"{number}-{k}").touch()

    def taken(self) -> int | None:
        """A number that nobody else took."""
        for order in self.folder.glob("*-*"):
            with suppress(FileNotFoundError):
                order.unlink()
                return int(order.name.partition("-")[0])
        return None


class Doomed(NamedTuple):
    """Opens the model in a worker's process, which takes an order if there is one."""

    model: Path
    orders: Orders
    job: Path

    def __call__(self, device: str | None) -> Pipeline:
        if (fatal := self.orders.taken()) is not None:
            doom_within(self.job, fatal, lambda: self.orders.add("worker, in a write"))
        return WARM.get(self.model) or Opens(self.model)(device)


@dataclass(frozen=True)
class Bench:
    """An engine under which jobs live and die: how it starts in a driver's process, and who is killed from without.

    `pause` is the longest between two kills in seconds, `size` the items of a job; only processes of `sessions` are
    killed.
    """

    start: Callable[[Job], Engine]
    kinds: tuple[str, ...]  # of kills, each as often as it is here
    pause: float = 0.5
    size: int = 24
    node: Callable[[], None] = lambda: None
    sessions: set[int] = field(default_factory=set)

    def workers(self, folder: Path) -> list[int]:
        """The processes of a job's workers, with those of drivers that are gone."""
        pids = {int(path.stem.split("-")[-2]) for path in folder.glob("leases/*.beat")}
        return sorted(pid for pid in pids if session(pid) in self.sessions - {pid} and alive(pid))


def inline() -> Bench:
    return Bench(lambda job: InlineEngine(job, [None]), ("driver",))


def local(count: int = 2) -> Bench:
    """Processes, forked from a driver that has loaded all they need, and not spawned: which takes seconds."""

    def start(job: Job) -> Engine:
        multiprocessing.get_context = lambda kind, begin=multiprocessing.get_context: begin("fork")
        engines.run_worker_process = as_spawned
        return LocalEngine(job, [None] * count)

    return Bench(start, ("driver", "worker", "worker", "worker"))


def as_spawned(job: Job, device: str | None, threads: int, words: Any) -> None:
    """A worker's life in a fork, which as one that is spawned has no file open but its own."""
    kept = {0, 1, 2, words.fileno(), multiprocessing.parent_process().sentinel}
    for handle in {int(name) for name in os.listdir("/proc/self/fd")} - kept:
        with suppress(OSError):
            os.close(handle)
    run_worker_process(job, device, threads, words)


def ray(nodes: Nodes, count: int = 2, size: int = 24) -> Bench:
    """Actors on a cluster of two nodes."""

    import ray  # noqa: F401  # here, after the fork of what the workers are forks of: ray would begin in them as it is here

    def start(job: Job) -> Engine:
        os.environ["RAY_ADDRESS"] = nodes.address
        driver.SHUTDOWN_GRACE = 1.0
        return RayEngine(job, [None] * count)

    return Bench(start, ("driver",) * 2 + ("worker",) * 20 + ("node",), 1.0, size, nodes.kill, {nodes.warm})


@dataclass(frozen=True)
class Story:
    """A job in a folder of its own, which is killed and run again."""

    bench: Bench
    pipe: Pipeline
    model: Path
    folder: Path
    orders: Orders
    chance: random.Random
    kills: int = 0  # after which no more is killed from without

    def life(self, fatal: int | None = None, disturbed: bool = False) -> int:
        """The exit status of a run, negative where it was killed, be it in its own event number `fatal`."""
        child = os.fork()
        if not child:
            self._live(fatal)
        self.bench.sessions.add(child)
        handle, end = os.pidfd_open(child), time.monotonic() + PATIENT
        try:
            while not select.select([handle], [], [], self.chance.uniform(0, self.bench.pause) if disturbed else 1)[0]:
                if disturbed and self._more():
                    began = time.monotonic()
                    self._strike(child)
                    end += time.monotonic() - began  # a new node may take long
                assert time.monotonic() < end, "a run hangs"
        finally:
            os.close(handle)
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status

    def _live(self, fatal: int | None) -> None:
        status = 3
        try:
            os.setsid()
            for stream, name in enumerate((os.devnull, os.devnull, self.orders.folder / "log")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            if fatal is not None:
                doom_within(self.folder, fatal, lambda: self.orders.add("driver, in a write"))
            opens = Doomed(self.model, self.orders, self.folder)
            requests = [Request("a cat", seed=k, num_inference_steps=2 + k % 3) for k in range(self.bench.size)]
            job = job_in(self.folder, self.pipe, requests=requests, **ALIKE)
            status = go(job, self.pipe, start=lambda job: self.bench.start(replace(job, load_pipeline=opens)))
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _more(self) -> bool:
        return self.orders.counts().total() < self.kills

    def _node_first(self) -> bool:
        """Is a node the first to be killed, so that few kills are enough to see one die?"""
        return "node" in self.bench.kinds and not self.orders.counts()["node"]

    def _strike(self, child: int) -> None:
        kind = "node" if self._node_first() else self.chance.choice(self.bench.kinds)
        workers = self.bench.workers(self.folder)
        if "worker" in self.bench.kinds and not workers and (self._node_first() or self.chance.random() < 0.9):
            return  # what is killed before it begins to work tells little
        if kind == "node":
            self.bench.node()
            return self.orders.add(kind)
        pids = [child] if kind == "driver" else workers
        if pids and alive(pid := self.chance.choice(pids)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                until(lambda: not alive(pid))
                self.orders.add(kind)

    def live(self) -> int:
        """All the lives, the last of which is left alone; their number. AssertionError where one ends by no kill."""
        lives, status = 0, -1
        while status != 0 and lives < LIVES and self._more():
            lives += 1
            orders = [self.chance.randrange(1, 40) for _ in range(self.chance.randrange(5))]
            fatal = self.chance.choice((None,) * 3 + (self.chance.randrange(1, 60),))
            if self._node_first():
                orders, fatal = [], None
            self.orders.place(orders)
            status = self.life(fatal, disturbed=True)
            log = (self.orders.folder / "log").read_text()
            assert status in (0, -signal.SIGKILL) or (status == 1 and any(word in log for word in EXCUSES)), log
        self.orders.place([])
        until(lambda: not self.bench.workers(self.folder))
        assert self.life() == 0, (self.orders.folder / "log").read_text()
        return lives + 1


def kill(bench: Bench, pipe: Pipeline, model: Path, folder: Path, kills: int, name: str) -> str:
    """Jobs until so many kills are done; what was done, in words. AssertionError where a job ends otherwise."""
    begun, job, lives, orders = time.monotonic(), 0, 0, Orders(folder / "orders")
    orders.folder.mkdir()
    quiet = Story(replace(inline(), size=bench.size), pipe, model, folder / "undisturbed", orders, random.Random(0))
    assert quiet.life() == 0
    undisturbed = outcome(quiet.folder)
    while orders.counts().total() < kills:
        job += 1
        story = Story(bench, pipe, model, folder / str(job), orders, random.Random(f"{name} {job}"), kills)
        lives += story.live()
        assert outcome(story.folder) == undisturbed, f"job {job}"
    told = ", ".join(f"{kind} {count}" for kind, count in sorted(orders.counts().items()))
    total, seconds = orders.counts().total(), time.monotonic() - begun
    return f"{name}: {total} kills ({told}) in {job} jobs, {lives} runs, {seconds:.0f} s: all ended right"
