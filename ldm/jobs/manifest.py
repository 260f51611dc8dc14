"""The manifest: one line for each item that was finished or failed, and a job's folder brought in line with it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm.checkpoints.files import sha256
from ldm.files import publish, remove
from ldm.jobs.leases import Leases

WHOLE = "manifest.jsonl"
FOLDER = "folder"  # the lease of whoever publishes files in a job's folder itself
DRAFT = ".part"  # at the end of the names that `publish` gives


class Manifest:
    """What became of a job's items, as all workers' files say: `done` wins over `failed`, and later lines over earlier.

    Every worker appends to a file of its own, `manifest-WORKER.jsonl`, for a network's file system appends for two
    writers in no safe order; `settle` joins the files of those who are gone. A line counts once its newline is there;
    what is no line of a manifest says nothing, and its item is drawn again. It keeps about 100 bytes for each item.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # with the reason
        self._read: dict[str, tuple[int, int]] = {}  # of each file its inode, and how far it was read

    def refresh(self) -> set[str]:
        """Read what came since it was last asked: the items of which something was said."""
        news: set[str] = set()
        for path in files(self.folder):
            inode, start = self._read.get(path.name, (0, 0))
            try:
                with path.open("rb") as file:
                    if os.fstat(file.fileno()).st_ino != inode:
                        inode, start = os.fstat(file.fileno()).st_ino, 0
                    for row in rows(file, start):
                        self._add(row.record)
                        news.add(row.record["id"])
                        start = row.end
            except FileNotFoundError:
                continue  # joined with the rest meanwhile
            self._read[path.name] = inode, start
        return news

    def settled(self, name: str) -> bool:
        """Is there nothing left to do for an item in this run?"""
        return name in self.done or name in self.failed

    def _add(self, record: dict[str, Any]) -> None:
        if record["status"] == "done":
            self.done.add(record["id"])
            self.failed.pop(record["id"], None)
        elif record["id"] not in self.done:
            self.failed[record["id"]] = str(record.get("reason"))


class Row(NamedTuple):
    """A line of a manifest and where it lies in its file."""

    record: dict[str, Any]
    start: int
    end: int


class Place(NamedTuple):
    """Where the line of an item is that counts, and what orders the lines."""

    line: int
    path: Path
    start: int
    end: int


def files(folder: Path) -> list[Path]:
    """The files of a manifest: the joined one first."""
    names = [n for n in os.listdir(folder) if n.startswith("manifest-") and n.endswith(".jsonl")]
    return [folder / name for name in [WHOLE, *sorted(names)]]


def rows(file: Any, start: int = 0) -> Iterator[Row]:
    """The lines of an open manifest from `start`; what is torn, or none of its lines, is left out."""
    file.seek(start)
    for line in file:
        end = start + len(line)
        if line.endswith(b"\n") and (record := record_of(line)) is not None:
            yield Row(record, start, end)
        start = end


def record_of(line: bytes) -> dict[str, Any] | None:
    """A line's record, None where it is none of a manifest."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("id"), str) or type(record.get("line")) is not int:
        return None
    whole = record.get("status") == "done" and all(isinstance(record.get(key), str) for key in ("file", "sha256"))
    return record if whole or record.get("status") == "failed" else None


def append(folder: Path, worker: str, record: dict[str, Any]) -> None:
    """Add a line to a worker's file, whole and on the disk, or not at all: OSError."""
    data = json.dumps(record).encode() + b"\n"
    path = folder / f"manifest-{worker}.jsonl"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        try:
            if os.write(handle, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)


def settle(folder: Path, leases: Leases, check: bool = False, again: Callable[[str], bool] = lambda item: False) -> int:
    """Join the files of workers that are gone into `manifest.jsonl`, ordered by line; how many lines no longer hold.

    Those are lines whose picture is not there or, with `check`, not the one whose hash they say. Failed items for which
    `again` are forgotten, for they are to be drawn. What dead workers left behind is removed.
    """
    with leases.alone(FOLDER):
        for path in folder.glob(f".*{DRAFT}"):
            remove(path)
        gone = [p for p in files(folder) if p.name != WHOLE and not leases.live(p.stem.removeprefix("manifest-"))]
        present = pictures(folder, leases)
        kept, failed = dict[str, Place](), dict[str, Place]()
        lost = set[str]()
        for path in [folder / WHOLE, *gone]:
            if not path.exists():
                continue
            with path.open("rb") as file:
                for record, start, end in rows(file):
                    name, place = record["id"], Place(record["line"], path, start, end)
                    if record["status"] == "failed":
                        if not again(name):
                            failed[name] = place
                    elif holds(folder, record, present, check):
                        kept[name] = place
                    else:
                        lost.add(name)
        wanted = list((failed | kept).values())
        if gone or size(folder / WHOLE) != sum(place.end - place.start for place in wanted):
            write(folder, wanted)
        for path in gone:
            remove(path)
        leases.sweep(kept)
        return len(lost - kept.keys())


def holds(folder: Path, record: dict[str, Any], present: set[str], check: bool) -> bool:
    """Is the picture of a finished item there, and, with `check`, the one that was written?"""
    path = folder / record["file"]
    return path.name in present and (not check or sha256(path) == record["sha256"])


def size(path: Path) -> int:
    """Of a file, in bytes; -1 where there is none."""
    return path.stat().st_size if path.exists() else -1


def write(folder: Path, places: list[Place]) -> None:
    """Publish the joined manifest from lines of the files that there are."""
    sources: dict[Path, Any] = {}
    try:
        with publish(folder / WHOLE) as draft, draft.open("wb") as out:
            for _, path, start, end in sorted(places, key=lambda place: (place.line, place.path.name, place.start)):
                if path not in sources:
                    sources[path] = path.open("rb")
                sources[path].seek(start)
                out.write(sources[path].read(end - start))
    finally:
        for source in sources.values():
            source.close()


def pictures(folder: Path, leases: Leases) -> set[str]:
    """The names of the files among a job's pictures; drafts of items that no living worker holds are removed."""
    found: set[str] = set()
    root = folder / "images"
    for part in sorted(root.iterdir()) if root.exists() else ():
        for entry in list(os.scandir(part)):
            if entry.name.endswith(DRAFT) and leases.free(entry.name[1:].partition(".")[0]):
                remove(Path(entry))
            elif entry.is_file():
                found.add(entry.name)
    return found
