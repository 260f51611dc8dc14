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

from ldm.files import remove

EXPIRY = 60.0  # seconds without a sign of life
BEAT = 1.0  # seconds between two signs of life, at most
STATUS = 256  # bytes of a sign of life, all of which are written at once
BOOT = Path("/proc/sys/kernel/random/boot_id")
OWNER = re.compile(r"[\w.-]+\n")


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
    taken for dead, and `holds` tells it so when it wakes; at worst a picture is drawn twice and the later file stays.
    """

    def __init__(
        self, folder: Path, expiry: float = EXPIRY, clock: Callable[[], float] = time.monotonic, boot: str | None = None
    ) -> None:
        self.folder, self.expiry, self.clock = folder, expiry, clock
        self.boot = boot or (BOOT.read_text().strip() if BOOT.exists() else uuid.uuid4().hex)
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.status: dict[str, Any] = {}  # what others shall know
        self._held: dict[str, Path] = {}
        self._seen: dict[Path, tuple[int, float]] = {}  # a file's time of change, and when it was first seen so
        self._ended = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._beat = self._begin()
        self._thread = threading.Thread(target=self._live, daemon=True, name="beat")
        self._thread.start()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *error: object) -> None:
        """Return all that is held, and leave."""
        self._ended.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)
        remove(self._path(self.worker))
        os.close(self._beat)

    def acquire(self, name: str) -> bool:
        """Try to get a lease: False where a living worker has it, be it this one."""
        while True:
            older = self._all(name)
            if older and self._owned(older[-1]):
                return False
            path = self.folder / f"{name}.{number(older[-1]) + 1 if older else 0}"
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                continue  # another was faster
            try:
                os.write(handle, f"{self.worker}\n".encode())
            except OSError:
                remove(path)
                raise
            finally:
                os.close(handle)
            if self._all(name)[-1] == path:
                break
            remove(path)  # this worker looked before another began, and came after that had tidied up
        self._held[name] = path
        for path in older:
            remove(path)
        return True

    def release(self, name: str) -> None:
        """Return a lease."""
        path = self._held.pop(name, None)
        if path is not None and self._owner(path) == self.worker:
            remove(path)

    def holds(self, name: str) -> bool:
        """Is a lease that was got still this worker's? Not if it slept and was taken for dead."""
        return name in self._held and self._all(name)[-1:] == [self._held[name]]

    def free(self, name: str) -> bool:
        """Does no living worker hold a lease?"""
        return not any(map(self._owned, self._all(name)))

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold a lease for a while, once nobody else does."""
        while not self.acquire(name):
            time.sleep(0.05)
        try:
            yield
        finally:
            self.release(name)

    def live(self, worker: str) -> bool:
        """Does a worker live? The rule is the class's."""
        if worker == self.worker:
            return True
        path = self._path(worker)
        try:
            with path.open("rb") as file:
                if status_of(file.read()).get("boot") != self.boot:
                    return self._changes(path)
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError:
            return self._changes(path)

    def statuses(self) -> list[dict[str, Any]]:
        """What every living worker lets others know."""
        beats = {path.stem: path for path in self.folder.glob("*.beat")}
        return [status_of(content(path)) for worker, path in beats.items() if self.live(worker)]

    def sweep(self, done: Container[str]) -> None:
        """Remove the beats of the dead, and the leases of what is done."""
        for path in list(self.folder.iterdir()):
            if path.stem in done or (path.suffix == ".beat" and not self.live(path.stem)):
                remove(path)

    def _all(self, name: str) -> list[Path]:
        """The files of a lease, the one that counts last."""
        names = [entry for entry in os.listdir(self.folder) if entry.startswith(f"{name}.")]
        return sorted((self.folder / entry for entry in names if entry[len(name) + 1 :].isdecimal()), key=number)

    def _owned(self, path: Path) -> bool:
        """Does the owner of a lease live? Where it names none it is as young as it was first seen."""
        owner = self._owner(path)
        return self._changes(path) if owner is None else self.live(owner)

    def _owner(self, path: Path) -> str | None:
        text = content(path).decode("utf-8", "replace")
        return text[:-1] if OWNER.fullmatch(text) else None

    def _changes(self, path: Path) -> bool:
        """Did a file change within the last `expiry` seconds in which it was looked at?"""
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return False
        now = self.clock()
        if self._seen.get(path, (None, 0.0))[0] != changed:
            self._seen[path] = changed, now
        return now - self._seen[path][1] < self.expiry

    def _path(self, worker: str) -> Path:
        return self.folder / f"{worker}.beat"

    def _begin(self) -> int:
        """Begin to live: the lock comes before the boot id, without which nobody asks for the lock."""
        handle = os.open(self._path(self.worker), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        with contextlib.suppress(OSError):  # a file system without locks: others see it change
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._tell(handle)
        return handle

    def _tell(self, handle: int) -> None:
        text = json.dumps({"boot": self.boot, **self.status}).encode()
        os.pwrite(handle, text.ljust(STATUS - 1) + b"\n", 0)

    def _live(self) -> None:
        while not self._ended.wait(min(BEAT, self.expiry / 4)):
            with contextlib.suppress(OSError):  # nothing is lost: at worst others take this worker for dead
                self._tell(self._beat)


def number(path: Path) -> int:
    """Which of a lease's files it is."""
    return int(path.suffix[1:])


def status_of(data: bytes) -> dict[str, Any]:
    """What a beat says; nothing where it is garbage."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def content(path: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""
