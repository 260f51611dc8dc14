"""The manifest of a job: a JSON line for each item that was finished or failed, appended by many workers."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from ldm.errors import list_some, warn_of_input
from ldm.files import atomic_write, check_own_entries, file_sha256, remove_path
from ldm.jobs.leases import Leases
from ldm.pipeline.request import complete_record

MANIFEST_FILE = "manifest.jsonl"
FOLDER_LEASE = "folder"  # held while one publishes files in a job's folder itself
DRAFT_SUFFIX = ".part"  # of the names that `atomic_write` gives
ITEM_ID_PATTERN = re.compile(r"[0-9a-f]{1,64}")
IMAGE_FILE_PATTERN = re.compile(r"images/[0-9a-f]{1,2}/[0-9a-f]{1,64}\.(png|webp|jpg)")
JOB_FOLDERS = re.compile(r"images|leases|thumbs|index\.data|grids|(images|thumbs)/[0-9a-f]{1,2}|grids/[a-z_-]+")
JOB_FILES = re.compile(
    r"job\.json|index\.html|(items|manifest)[^/]*\.jsonl|leases/[^/]+\.(beat|\d+)|index\.data/[^/]+\.js"
    r"|(images|thumbs)/[^/]+/[0-9a-f]+\.(png|webp|jpg)|grids/[^/]+/\d+\.png"
)

Row = TypeVar("Row")


class Manifest:
    """What became of a job's items: `done` wins over `failed`, and later lines win over earlier ones.

    Every worker appends to a file of its own, `manifest-WORKER.jsonl`, because a network file system does not order the
    appends of two writers; `compact_manifest` joins the files of workers that have ended. A line counts once its
    newline is there; a malformed line is ignored, and its item is generated again. An id that is not hexadecimal and an
    image that lies outside `images/` are malformed: what is read from a folder names no file outside it. It keeps about
    100 bytes per item.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # with the reason
        self._offsets: dict[str, tuple[int, int]] = {}  # the inode of each file, and how far it was read

    def refresh(self) -> set[str]:
        """Read the lines that were appended since the last call; returns the ids in them."""
        changed: set[str] = set()
        for path in list_manifest_files(self.folder):
            inode, start = self._offsets.get(path.name, (0, 0))
            try:
                with path.open("rb") as file:
                    if os.fstat(file.fileno()).st_ino != inode:
                        inode, start = os.fstat(file.fileno()).st_ino, 0
                    for record, span in iter_manifest_rows(file, start):
                        self._apply_record(record)
                        changed.add(record["id"])
                        start = span.end
            except FileNotFoundError:
                continue  # compacted meanwhile
            self._offsets[path.name] = inode, start
        return changed

    def is_finished(self, item_id: str) -> bool:
        """Whether an item is done or has failed in this run."""
        return item_id in self.done or item_id in self.failed

    def _apply_record(self, record: dict[str, Any]) -> None:
        if record["status"] == "done":
            self.done.add(record["id"])
            self.failed.pop(record["id"], None)
        elif record["id"] not in self.done:
            self.failed[record["id"]] = str(record.get("reason"))


def check_job_folder(folder: Path) -> None:
    """ValueError where a link, a pipe or the like has the name of a folder or a file of a job: see its message."""
    check_own_entries(folder, JOB_FOLDERS, JOB_FILES)


class RowSpan(NamedTuple):
    """The bytes of a line in an open manifest file."""

    file: BinaryIO
    start: int
    end: int

    def read(self) -> bytes:
        self.file.seek(self.start)
        return self.file.read(self.end - self.start)


def list_worker_manifests(folder: Path) -> dict[str, Path]:
    """The manifest files of single workers, by the workers' names."""
    names = (name for name in sorted(os.listdir(folder)) if name.startswith("manifest-") and name.endswith(".jsonl"))
    return {name.removeprefix("manifest-").removesuffix(".jsonl"): folder / name for name in names}


def list_manifest_files(folder: Path) -> list[Path]:
    """The files of a manifest, the compacted one first."""
    return [folder / MANIFEST_FILE, *list_worker_manifests(folder).values()]


def iter_manifest_rows(
    file: BinaryIO, start: int = 0, strict: bool = False, on_malformed: Callable[[], object] = lambda: None
) -> Iterator[tuple[dict[str, Any], RowSpan]]:
    """The records of an open manifest from the byte `start` on; incomplete and malformed lines are left out.

    `on_malformed` is called for each of the latter. With `strict`, ValueError for a whole line of an image that names a
    file outside `images/`.
    """
    file.seek(start)
    for line in file:
        end = start + len(line)
        record = parse_manifest_line(line) if line.endswith(b"\n") else None
        if record is not None:
            yield record, RowSpan(file, start, end)
        elif strict and line.endswith(b"\n") and has_unsafe_name(line):
            raise ValueError(f"{file.name}: byte {start}: an id that is not hexadecimal, or a file not below images/")
        elif line.endswith(b"\n"):
            on_malformed()
        start = end


def has_unsafe_name(line: bytes) -> bool:
    """Whether a whole line is one of a finished image but for an id or a file that no job of ours writes."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict) or record.get("status") != "done":
        return False
    return not (_matches(ITEM_ID_PATTERN, record.get("id")) and _matches(IMAGE_FILE_PATTERN, record.get("file")))


def parse_manifest_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line, None where it is malformed."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("line")) is not int or abs(record["line"]) >= 2**63:
        return None
    if not _matches(ITEM_ID_PATTERN, record.get("id")):
        return None
    if record.get("status") == "failed":
        return {name: value for name, value in record.items() if name != "file"}
    is_done = record.get("status") == "done" and isinstance(record.get("sha256"), str)
    return record if is_done and _matches(IMAGE_FILE_PATTERN, record.get("file")) else None


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and len(value) < 256 and pattern.fullmatch(value) is not None


def read_finished_rows(
    folder: Path, keep: Callable[[dict[str, Any], RowSpan], Row], stack: ExitStack
) -> tuple[list[Row], int]:
    """`keep(record, span)` of each finished image, in the order of the job's source, and the number of failed items.

    A finished image wins over a failure, and a later line over an earlier one. Files stay open until `stack` closes,
    and so keep their content while a running job replaces them; the compacted one is opened last, because it holds what
    a worker's file held before it was removed. ValueError where there is no manifest, or a line has no valid request.
    """
    files: list[BinaryIO] = []
    for path in reversed(list_manifest_files(folder)) if folder.is_dir() else ():
        try:
            files.append(stack.enter_context(path.open("rb")))
        except FileNotFoundError:
            continue
    if not files:
        raise ValueError(f"{folder}: no {MANIFEST_FILE}, so not a job's folder")
    done, failed = dict[str, tuple[tuple[int, int, str], Row]](), set[str]()
    for file in reversed(files):
        for record, span in iter_manifest_rows(file, strict=True):
            if record["status"] == "failed":
                failed.add(record["id"])
                continue
            try:
                record["request"] = complete_record(record.get("request"))
            except ValueError as error:
                raise ValueError(f"{file.name}: the line of {record['id']}: {error}") from None
            key = record["line"], record["request"]["seed"], record["id"]
            done[record["id"]] = key, keep(record, span)
    return [value for _, value in sorted(done.values(), key=lambda row: row[0])], len(failed - done.keys())


def append_manifest_record(folder: Path, worker: str, record: dict[str, Any]) -> None:
    """Append a line to a worker's file, flushed to the disk, as a whole or not at all: OSError."""
    data = json.dumps(record).encode() + b"\n"
    path = folder / f"manifest-{worker}.jsonl"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(fd).st_size
        try:
            if os.write(fd, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(fd)
        except OSError:
            os.ftruncate(fd, before)
            raise
    finally:
        os.close(fd)


def compact_manifest(folder: Path, leases: Leases, verify_hashes: bool = False, retry: Container[str] = ()) -> int:
    """Join the files of ended workers into `manifest.jsonl`, from which a job resumes; returns how many lines it drops.

    Those are lines whose image is missing, empty or, with `verify_hashes`, has another hash. What is no line of ours is
    dropped with a warning. Failed items in `retry` are
    forgotten, so that they are generated again. Leases and drafts that dead workers left behind are removed.
    """
    with leases.exclusive(FOLDER_LEASE), ExitStack() as stack:
        for draft in folder.glob(f".*{DRAFT_SUFFIX}"):
            remove_path(draft)
        ended = [path for name, path in list_worker_manifests(folder).items() if not leases.is_alive(name)]
        existing = scan_image_files(folder, leases)
        done, failed = dict[str, tuple[int, RowSpan]](), dict[str, tuple[int, RowSpan]]()
        lost = set[str]()
        joined, malformed = folder / MANIFEST_FILE, list[Path]()
        for path in [joined, *ended] if joined.exists() else ended:
            file, on_malformed = stack.enter_context(path.open("rb")), partial(malformed.append, path)
            for record, span in iter_manifest_rows(file, on_malformed=on_malformed):
                name, row, image = record["id"], (record["line"], span), folder / record.get("file", "")
                if record["status"] == "failed":
                    if name not in retry:
                        failed[name] = row
                elif image.name in existing and not (verify_hashes and file_sha256(image) != record["sha256"]):
                    done[name] = row
                else:
                    lost.add(name)
        if malformed:
            warn_of_input(f"{len(malformed)} malformed lines are left out: {list_some(sorted({*map(str, malformed)}))}")
        rows = (failed | done).values()
        size = joined.stat().st_size if joined.exists() else -1
        if ended or size != sum(span.end - span.start for _, span in rows):
            with atomic_write(joined) as draft, draft.open("wb") as out:
                for _, span in sorted(rows, key=lambda row: (row[0], Path(row[1].file.name).name, row[1].start)):
                    out.write(span.read())
        for path in ended:
            remove_path(path)
        leases.remove_stale(done)
        return len(lost - done.keys())


def scan_image_files(folder: Path, leases: Leases) -> set[str]:
    """The names of a job's image files; drafts of items that no living worker has leased are removed."""
    names: set[str] = set()
    root = folder / "images"
    for subfolder in sorted(filter(Path.is_dir, root.iterdir())) if root.exists() else ():  # none is a .DS_Store
        for entry in list(os.scandir(subfolder)):
            if entry.name.endswith(DRAFT_SUFFIX) and leases.is_free(entry.name[1:].partition(".")[0]):
                remove_path(Path(entry))
            elif entry.is_file() and entry.stat().st_size:  # a machine that lost power may leave empty ones
                names.add(entry.name)
    return names
