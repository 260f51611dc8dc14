"""Leases: which worker generates what, as files in a folder that machines may share."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.files import remove_path

LEASE_TIMEOUT = 60.0  # seconds without a heartbeat
HEARTBEAT_INTERVAL = 1.0  # seconds, at most
HEARTBEAT_BYTES = 256  # written at once
BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")
OWNER_PATTERN = re.compile(r"[\w.-]+\n")


class Leases:
    """The leases that one worker holds, and which other workers are alive.

    1. Acquire: a lease is a file NAME.0 that holds its worker's name, created with O_EXCL, so that one worker gets it.
       Whoever gets a lease must check whether the work was done before.
    2. Take over: the lease of a dead worker is followed by NAME.1, created likewise. One of those who find the owner
       dead gets it, which removing the file or renaming over it could not guarantee; only then is the older one
       removed. The highest number counts.
    3. Liveness: a worker keeps WORKER.beat open under flock and rewrites it every second. On the same machine (boot id)
       the kernel tells whether it is alive: the lock ends with the process. From another machine it is alive until the
       modification time of its file has not changed for `timeout` seconds of the observer's monotonic clock, while the
       observer looked; clocks of two machines are never compared, and may jump.
    4. Limit: a worker of another machine that sleeps for longer is considered dead, and `holds` tells it so when it
       wakes; in the worst case an image is generated twice and the later file stays.
    """

    def __init__(
        self,
        folder: Path,
        timeout: float = LEASE_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
        boot_id: str | None = None,
    ) -> None:
        self.folder, self.timeout, self.clock = folder, timeout, clock
        self.boot_id = boot_id or (BOOT_ID_PATH.read_text().strip() if BOOT_ID_PATH.exists() else uuid.uuid4().hex)
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.status: dict[str, Any] = {}  # published with each heartbeat
        self._lease_paths: dict[str, Path] = {}
        self._observed_mtimes: dict[Path, tuple[int, float]] = {}  # and the time when it was first seen
        self._stop_event = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._heartbeat_fd = self._create_heartbeat()
        self._thread = threading.Thread(target=self._run_heartbeat, daemon=True, name="heartbeat")
        self._thread.start()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *error: object) -> None:
        """Release all leases, and end the heartbeat."""
        self._stop_event.set()
        self._thread.join()
        for name in list(self._lease_paths):
            self.release(name)
        remove_path(self._heartbeat_path(self.worker))
        os.close(self._heartbeat_fd)

    def acquire(self, name: str) -> bool:
        """Try to get a lease; False where a living worker, which may be this one, holds it."""
        while True:
            older = self._lease_files(name)
            if older and self._has_live_owner(older[-1]):
                return False
            path = self.folder / f"{name}.{int(older[-1].suffix[1:]) + 1 if older else 0}"
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                continue  # another worker was faster
            try:
                os.write(fd, f"{self.worker}\n".encode())
            except OSError:
                remove_path(path)
                raise
            finally:
                os.close(fd)
            if self._lease_files(name)[-1] == path:
                break
            remove_path(path)  # since this worker looked, others created a later file and removed the older ones
        self._lease_paths[name] = path
        for path in older:
            remove_path(path)
        return True

    def release(self, name: str) -> None:
        """Give up a lease."""
        path = self._lease_paths.pop(name, None)
        if path is not None and self._read_owner(path) == self.worker:
            remove_path(path)

    def holds(self, name: str) -> bool:
        """Whether a lease is still this worker's: not if it slept and was taken for dead."""
        return name in self._lease_paths and self._lease_files(name)[-1:] == [self._lease_paths[name]]

    def is_free(self, name: str) -> bool:
        """Whether no living worker holds a lease."""
        return not any(map(self._has_live_owner, self._lease_files(name)))

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a lease for a block, after waiting for it."""
        while not self.acquire(name):
            time.sleep(0.05)
        try:
            yield
        finally:
            self.release(name)

    def is_alive(self, worker: str) -> bool:
        """Whether a worker is alive, by the rule in the class's docstring."""
        if worker == self.worker:
            return True
        path = self._heartbeat_path(worker)
        try:
            with path.open("rb") as file:
                if parse_heartbeat(file.read()).get("boot") != self.boot_id:
                    return self._observe_change(path)
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError:
            return self._observe_change(path)

    def worker_statuses(self) -> list[dict[str, Any]]:
        """The published status of every living worker."""
        paths = self.folder.glob("*.beat")
        return [parse_heartbeat(read_file_head(path)) for path in paths if self.is_alive(path.stem)]

    def remove_stale(self, done: Container[str]) -> None:
        """Remove the heartbeats of dead workers, and the leases of what is done."""
        for path in list(self.folder.iterdir()):
            if path.stem in done or (path.suffix == ".beat" and not self.is_alive(path.stem)):
                remove_path(path)

    def _lease_files(self, name: str) -> list[Path]:
        """The files of a lease, the one that counts last."""
        paths = (self.folder / entry for entry in os.listdir(self.folder) if entry.startswith(f"{name}."))
        return sorted((p for p in paths if p.name[len(name) + 1 :].isdecimal()), key=lambda p: int(p.suffix[1:]))

    def _has_live_owner(self, path: Path) -> bool:
        """Whether the owner of a lease is alive; a file without an owner counts while it is younger than `timeout`."""
        owner = self._read_owner(path)
        return self._observe_change(path) if owner is None else self.is_alive(owner)

    def _read_owner(self, path: Path) -> str | None:
        text = read_file_head(path).decode("utf-8", "replace")
        return text[:-1] if OWNER_PATTERN.fullmatch(text) else None

    def _observe_change(self, path: Path) -> bool:
        """Record a file's time; whether it changed within the last `timeout` seconds, as far as it was observed."""
        try:
            mtime = path.stat().st_mtime_ns
        except OSError:
            return False
        now = self.clock()
        if self._observed_mtimes.get(path, (None, 0.0))[0] != mtime:
            self._observed_mtimes[path] = mtime, now
        return now - self._observed_mtimes[path][1] < self.timeout

    def _heartbeat_path(self, worker: str) -> Path:
        return self.folder / f"{worker}.beat"

    def _create_heartbeat(self) -> int:
        """Open and lock the heartbeat file; the boot id comes last, because without it nobody tries the lock."""
        fd = os.open(self._heartbeat_path(self.worker), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks: others see the file change
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._write_heartbeat(fd)
        return fd

    def _write_heartbeat(self, fd: int) -> None:
        text = json.dumps({"boot": self.boot_id, **self.status}).encode()
        os.pwrite(fd, text.ljust(HEARTBEAT_BYTES - 1) + b"\n", 0)

    def _run_heartbeat(self) -> None:
        while not self._stop_event.wait(min(HEARTBEAT_INTERVAL, self.timeout / 4)):
            with contextlib.suppress(OSError):  # at worst others take this worker for dead
                self._write_heartbeat(self._heartbeat_fd)


def parse_heartbeat(data: bytes) -> dict[str, Any]:
    """The JSON object of a heartbeat; empty where it is malformed."""
    try:
        status = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def read_file_head(path: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""
