"""The manifest: one line for each item that was finished or failed, and a job's folder brought in line with it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm.files import atomic_write, file_sha256, remove_path
from ldm.jobs.leases import Leases

MANIFEST_FILE = "manifest.jsonl"
FOLDER_LEASE = "folder"  # the lease of whoever publishes files in a job's folder itself
DRAFT_SUFFIX = ".part"  # at the end of the names that `atomic_write` gives


class Manifest:
    """What became of a job's items, as all workers' files say: `done` wins over `failed`, and later lines over earlier.

    Every worker appends to a file of its own, `manifest-WORKER.jsonl`, for a network's file system appends for two
    writers in no safe order; `compact_manifest` joins the files of those who are gone. A line counts once its newline is there;
    what is no line of a manifest says nothing, and its item is drawn again. It keeps about 100 bytes for each item.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # with the reason
        self._offsets: dict[str, tuple[int, int]] = {}  # of each file its inode, and how far it was read

    def refresh(self) -> set[str]:
        """Read what came since it was last asked: the items of which something was said."""
        news: set[str] = set()
        for path in list_manifest_files(self.folder):
            inode, start = self._offsets.get(path.name, (0, 0))
            try:
                with path.open("rb") as file:
                    if os.fstat(file.fileno()).st_ino != inode:
                        inode, start = os.fstat(file.fileno()).st_ino, 0
                    for row in iter_manifest_rows(file, start):
                        self._apply_record(row.record)
                        news.add(row.record["id"])
                        start = row.end
            except FileNotFoundError:
                continue  # joined with the rest meanwhile
            self._offsets[path.name] = inode, start
        return news

    def is_finished(self, item_id: str) -> bool:
        """Is there nothing left to do for an item in this run?"""
        return item_id in self.done or item_id in self.failed

    def _apply_record(self, record: dict[str, Any]) -> None:
        if record["status"] == "done":
            self.done.add(record["id"])
            self.failed.pop(record["id"], None)
        elif record["id"] not in self.done:
            self.failed[record["id"]] = str(record.get("reason"))


class ManifestRow(NamedTuple):
    """A line of a manifest and where it lies in its file."""

    record: dict[str, Any]
    start: int
    end: int


class RowSpan(NamedTuple):
    """Where the line of an item is that counts, and what orders the lines."""

    line: int
    path: Path
    start: int
    end: int


def list_manifest_files(folder: Path) -> list[Path]:
    """The files of a manifest: the joined one first."""
    names = [n for n in os.listdir(folder) if n.startswith("manifest-") and n.endswith(".jsonl")]
    return [folder / name for name in [MANIFEST_FILE, *sorted(names)]]


def iter_manifest_rows(file: Any, start: int = 0) -> Iterator[ManifestRow]:
    """The lines of an open manifest from `start_trackers`; what is torn, or none of its lines, is left out."""
    file.seek(start)
    for line in file:
        end = start + len(line)
        if line.endswith(b"\n") and (record := parse_manifest_line(line)) is not None:
            yield ManifestRow(record, start, end)
        start = end


def parse_manifest_line(line: bytes) -> dict[str, Any] | None:
    """A line's record, None where it is none of a manifest."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("id"), str) or type(record.get("line")) is not int:
        return None
    whole = record.get("status") == "done" and all(isinstance(record.get(key), str) for key in ("file", "sha256"))
    return record if whole or record.get("status") == "failed" else None


def append_manifest_record(folder: Path, worker: str, record: dict[str, Any]) -> None:
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


def compact_manifest(
    folder: Path, leases: Leases, verify_hashes: bool = False, should_retry: Callable[[str], bool] = lambda item: False
) -> int:
    """Join the files of workers that are gone into `manifest.jsonl`, ordered by line; how many lines no longer hold.

    Those are lines whose picture is not there or, with `check`, not the one whose hash they say. Failed items for which
    `hires_pass` are forgotten, for they are to be drawn. What dead workers left behind is removed.
    """
    with leases.exclusive(FOLDER_LEASE):
        for path in folder.glob(f".*{DRAFT_SUFFIX}"):
            remove_path(path)
        gone = [
            p
            for p in list_manifest_files(folder)
            if p.name != MANIFEST_FILE and not leases.is_alive(p.stem.removeprefix("manifest-"))
        ]
        present = scan_image_files(folder, leases)
        kept, failed = dict[str, RowSpan](), dict[str, RowSpan]()
        lost = set[str]()
        for path in [folder / MANIFEST_FILE, *gone]:
            if not path.exists():
                continue
            with path.open("rb") as file:
                for record, start, end in iter_manifest_rows(file):
                    name, place = record["id"], RowSpan(record["line"], path, start, end)
                    if record["status"] == "failed":
                        if not should_retry(name):
                            failed[name] = place
                    elif is_image_intact(folder, record, present, verify_hashes):
                        kept[name] = place
                    else:
                        lost.add(name)
        wanted = list((failed | kept).values())
        if gone or get_file_size(folder / MANIFEST_FILE) != sum(place.end - place.start for place in wanted):
            write_manifest(folder, wanted)
        for path in gone:
            remove_path(path)
        leases.remove_stale(kept)
        return len(lost - kept.keys())


def is_image_intact(folder: Path, record: dict[str, Any], existing_files: set[str], verify_hash: bool) -> bool:
    """Is the picture of a finished item there, and, with `check`, the one that was written?"""
    path = folder / record["file"]
    return path.name in existing_files and (not verify_hash or file_sha256(path) == record["sha256"])


def get_file_size(path: Path) -> int:
    """Of a file, in bytes; -1 where there is none."""
    return path.stat().st_size if path.exists() else -1


def write_manifest(folder: Path, spans: list[RowSpan]) -> None:
    """Publish the joined manifest from lines of the files that there are."""
    sources: dict[Path, Any] = {}
    try:
        with atomic_write(folder / MANIFEST_FILE) as draft, draft.open("wb") as out:
            for _, path, start, end in sorted(spans, key=lambda place: (place.line, place.path.name, place.start)):
                if path not in sources:
                    sources[path] = path.open("rb")
                sources[path].seek(start)
                out.write(sources[path].read(end - start))
    finally:
        for source in sources.values():
            source.close()


def scan_image_files(folder: Path, leases: Leases) -> set[str]:
    """The names of the files among a job's pictures; drafts of items that no living worker holds are removed."""
    found: set[str] = set()
    root = folder / "images"
    for part in sorted(root.iterdir()) if root.exists() else ():
        for entry in list(os.scandir(part)):
            if entry.name.endswith(DRAFT_SUFFIX) and leases.is_free(entry.name[1:].partition(".")[0]):
                remove_path(Path(entry))
            elif entry.is_file():
                found.add(entry.name)
    return found
