"""Leases: which worker draws what, as files in a folder that machines may share."""

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

LEASE_TIMEOUT = 60.0  # seconds without a sign of life
HEARTBEAT_INTERVAL = 1.0  # seconds between two signs of life, at most
HEARTBEAT_BYTES = 256  # bytes of a sign of life, all of which are written at once
BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")
OWNER_PATTERN = re.compile(r"[\w.-]+\n")


class Leases:
    """What one worker holds, and who else lives.

    A lease is a file NAME.0 with its worker's name in it, made by O_EXCL, so that one worker gets it. That of a dead
    worker is followed by NAME.1, made alike: of those who find the owner dead one gets it, which removing it or
    renaming over it could not promise; only then is the older one removed. The highest number counts. What was done
    before a lease was got, whoever has it must look for.

    A worker keeps WORKER.beat open under flock and rewrites it every second. On the same machine (boot id) the kernel
    tells whether it lives: the lock ends with the process. From another machine it lives until its file's time of
    change has stood still for `expiry` seconds of the observer's monotonic clock, while the observer looked; clocks of
    two machines are never compared, and may jump. The limit: a worker of another machine that sleeps for longer is
    taken for dead, and `is_image_intact` tells it so when it wakes; at worst a picture is drawn twice and the later file stays.
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
        self.status: dict[str, Any] = {}  # what others shall know
        self._lease_paths: dict[str, Path] = {}
        self._observed_mtimes: dict[
            Path, tuple[int, float]
        ] = {}  # a file's time of change, and when it was first seen so
        self._stop_event = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._heartbeat_fd = self._create_heartbeat()
        self._thread = threading.Thread(target=self._run_heartbeat, daemon=True, name="beat")
        self._thread.start()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *error: object) -> None:
        """Return all that is held, and leave."""
        self._stop_event.set()
        self._thread.join()
        for name in list(self._lease_paths):
            self.release(name)
        remove_path(self._heartbeat_path(self.worker))
        os.close(self._heartbeat_fd)

    def acquire(self, name: str) -> bool:
        """Try to get a lease: False where a living worker has it, be it this one."""
        while True:
            older = self._lease_files(name)
            if older and self._has_live_owner(older[-1]):
                return False
            path = self.folder / f"{name}.{parse_lease_generation(older[-1]) + 1 if older else 0}"
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                continue  # another was faster
            try:
                os.write(handle, f"{self.worker}\n".encode())
            except OSError:
                remove_path(path)
                raise
            finally:
                os.close(handle)
            if self._lease_files(name)[-1] == path:
                break
            remove_path(path)  # this worker looked before another began, and came after that had tidied up
        self._lease_paths[name] = path
        for path in older:
            remove_path(path)
        return True

    def release(self, name: str) -> None:
        """Return a lease."""
        path = self._lease_paths.pop(name, None)
        if path is not None and self._read_owner(path) == self.worker:
            remove_path(path)

    def holds(self, name: str) -> bool:
        """Is a lease that was got still this worker's? Not if it slept and was taken for dead."""
        return name in self._lease_paths and self._lease_files(name)[-1:] == [self._lease_paths[name]]

    def is_free(self, name: str) -> bool:
        """Does no living worker hold a lease?"""
        return not any(map(self._has_live_owner, self._lease_files(name)))

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a lease for a while, once nobody else does."""
        while not self.acquire(name):
            time.sleep(0.05)
        try:
            yield
        finally:
            self.release(name)

    def is_alive(self, worker: str) -> bool:
        """Does a worker live? The rule is the class's."""
        if worker == self.worker:
            return True
        path = self._heartbeat_path(worker)
        try:
            with path.open("rb") as file:
                if parse_heartbeat(file.read()).get("boot") != self.boot_id:
                    return self._changed_recently(path)
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError:
            return self._changed_recently(path)

    def worker_statuses(self) -> list[dict[str, Any]]:
        """What every living worker lets others know."""
        beats = {path.stem: path for path in self.folder.glob("*.beat")}
        return [parse_heartbeat(read_file_head(path)) for worker, path in beats.items() if self.is_alive(worker)]

    def remove_stale(self, done: Container[str]) -> None:
        """Remove the beats of the dead, and the leases of what is done."""
        for path in list(self.folder.iterdir()):
            if path.stem in done or (path.suffix == ".beat" and not self.is_alive(path.stem)):
                remove_path(path)

    def _lease_files(self, name: str) -> list[Path]:
        """The files of a lease, the one that counts last."""
        names = [entry for entry in os.listdir(self.folder) if entry.startswith(f"{name}.")]
        return sorted(
            (self.folder / entry for entry in names if entry[len(name) + 1 :].isdecimal()), key=parse_lease_generation
        )

    def _has_live_owner(self, path: Path) -> bool:
        """Does the owner of a lease live? Where it names none it is as young as it was first seen."""
        owner = self._read_owner(path)
        return self._changed_recently(path) if owner is None else self.is_alive(owner)

    def _read_owner(self, path: Path) -> str | None:
        text = read_file_head(path).decode("utf-8", "replace")
        return text[:-1] if OWNER_PATTERN.fullmatch(text) else None

    def _changed_recently(self, path: Path) -> bool:
        """Did a file change within the last `expiry` seconds in which it was looked at?"""
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return False
        now = self.clock()
        if self._observed_mtimes.get(path, (None, 0.0))[0] != changed:
            self._observed_mtimes[path] = changed, now
        return now - self._observed_mtimes[path][1] < self.timeout

    def _heartbeat_path(self, worker: str) -> Path:
        return self.folder / f"{worker}.beat"

    def _create_heartbeat(self) -> int:
        """Begin to live: the lock comes before the boot id, without which nobody asks for the lock."""
        handle = os.open(self._heartbeat_path(self.worker), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks: others see it change
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._write_heartbeat(handle)
        return handle

    def _write_heartbeat(self, fd: int) -> None:
        text = json.dumps({"boot": self.boot_id, **self.status}).encode()
        os.pwrite(fd, text.ljust(HEARTBEAT_BYTES - 1) + b"\n", 0)

    def _run_heartbeat(self) -> None:
        while not self._stop_event.wait(min(HEARTBEAT_INTERVAL, self.timeout / 4)):
            with contextlib.suppress(OSError):  # nothing is lost: at worst others take this worker for dead
                self._write_heartbeat(self._heartbeat_fd)


def parse_lease_generation(path: Path) -> int:
    """Which of a lease's files it is."""
    return int(path.suffix[1:])


def parse_heartbeat(data: bytes) -> dict[str, Any]:
    """What a beat says; nothing where it is garbage."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_file_head(path: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""
