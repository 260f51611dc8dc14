"""Files on disk: atomic publishing (a reader sees the whole old file or the whole new one), JSON, hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar, NamedTuple

from ldm.errors import error_text, parse_json

MAX_DRAFT_STEM = 48  # characters of a file's name in its draft's; a name has at most 255 bytes
HASHED_BLOCK_BYTES = 2**20
MAX_FILE_BYTES = 2**31  # of a file that is read as a whole
UMASK = os.umask(0o077)  # it can only be read by setting it, which is safe before there are threads
os.umask(UMASK)


@contextmanager
def atomic_write(path: Path, rename: Callable[[Path, Path], object] = os.replace) -> Iterator[Path]:
    """A path beside `path` to write to (a file, or a folder made by the caller); renamed to `path` on success.

    Write aside, fsync, rename, fsync the folder. On an exception the draft is removed, `path` stays; an OSError names
    `path`. The draft's name is no other's, in whatever container. The mode is what the umask allows.
    `rename` is `rename_noreplace` where an existing file must not be replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.name[:MAX_DRAFT_STEM]}.{os.getpid()}-{secrets.token_hex(4)}"
    draft, old = path.parent / f"{name}.part", path.parent / f"{name}.old"
    try:
        yield draft
        for file in [draft, *draft.rglob("*")] if draft.is_dir() else [draft]:
            file.chmod((0o777 if file.is_dir() else 0o666) & ~UMASK)
            fsync_path(file)
        if (
            draft.is_dir() and path.exists() and rename is not rename_noreplace
        ):  # a folder cannot be renamed over a full one
            path.rename(old)
            draft.rename(path)
            remove_path(old)
        else:
            rename(draft, path)
        fsync_path(path.parent)
    except Exception as error:
        raise name_file(error, draft, path) from None
    finally:
        remove_path(draft)


def name_file(error: Exception, draft: Path, path: Path) -> Exception:
    """The error of a writer, as an OSError that names `path` where it is one of the system's without a name."""
    if not isinstance(error, OSError):  # safetensors' own error has the number in its message
        match = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        return OSError(int(match[1]), os.strerror(int(match[1])), str(path)) if match else error
    if error.errno is not None and (not error.filename or str(error.filename).startswith(str(draft))):
        error.filename = str(path)
    return error


def rename_noreplace(draft: Path, path: Path) -> None:
    """Name a file or a folder; FileExistsError, and nothing done, where something has the name, even since just now."""
    if draft.is_dir():
        path.mkdir()
        draft.rename(path)
        return
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # FAT and others know no links; an empty file is seen there for a moment
        path.touch(exist_ok=False)
        draft.replace(path)


def ensure_writable_dir(folder: Path) -> None:
    """Make the folder; ValueError where it cannot be made, or nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None


def check_creatable_dir(folder: Path) -> None:
    """ValueError where the folder is not there and could not be made; nothing is made."""
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror}") from None
    if not nearest.is_dir():
        raise ValueError(f"{folder}: Not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: not writable")


def check_own_entries(root: Path, folders: re.Pattern[str], files: re.Pattern[str], below: str = "") -> None:
    """ValueError where something below `root` has the name of a folder or a file that we write, but is none.

    A symbolic link would be followed out of `root`, and a pipe never ends. The patterns match paths below `root`; what
    neither matches is left alone.
    """
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / below) as entries:
        for entry in entries:
            name = below + entry.name
            if folders.fullmatch(name) and not entry.is_dir(follow_symlinks=False):
                raise ValueError(f"{entry.path}: {describe_entry(entry)}, not a folder")
            if files.fullmatch(name) and not entry.is_file(follow_symlinks=False) and os.path.lexists(entry):
                raise ValueError(f"{entry.path}: {describe_entry(entry)}, not a file")
            if folders.fullmatch(name):
                check_own_entries(root, folders, files, f"{name}/")


def describe_entry(entry: os.DirEntry[str]) -> str:
    """What an entry of a folder is, without following it."""
    if entry.is_symlink():
        return "a symbolic link"
    if entry.is_dir(follow_symlinks=False):
        return "a folder"
    return "a file" if entry.is_file(follow_symlinks=False) else "a pipe, socket or device"


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_path(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_regular_file(path: str | Path) -> bytes:
    """The bytes of a file; ValueError for a pipe or a device, which may have no end, a folder, or too large a file."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    if path.exists() and path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES >> 30} GB")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file; ValueError names the file where there is none."""
    try:
        values = parse_json(read_regular_file(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error_text(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write an indented JSON object."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class FileVersion(NamedTuple):
    """A file as it is now: another content has another size, time of change or inode."""

    path: Path
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileVersion:
        """The version that a path has now."""
        stat = path.stat()
        return cls(path.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


class FileHashes(Mapping[str, str]):
    """The SHA-256 of some files' content, one after another, by name; computed when first asked for, once a process.

    ValueError from a look-up where a file has changed since its version was taken.
    """

    _known: ClassVar[dict[tuple[FileVersion, ...], str]] = {}

    def __init__(self, files: Mapping[str, tuple[FileVersion, ...]]) -> None:
        self._files = files
        self._thread: threading.Thread | None = None

    def __getitem__(self, name: str) -> str:
        if self._thread and threading.current_thread() is not self._thread:
            self._thread.join()
        files = self._files[name]
        if files not in self._known:
            self._known[files] = _hash_files(files)
        return self._known[files]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def prefetch(self) -> None:
        """Compute all in a thread; an error is for whoever asks."""

        def run() -> None:
            with suppress(OSError, ValueError):
                dict(self)

        self._thread = threading.Thread(target=run, name="hash", daemon=True)
        self._thread.start()


def _hash_files(files: Sequence[FileVersion]) -> str:
    hasher = hashlib.sha256()
    for version in files:
        with version.path.open("rb") as file:
            while block := file.read(HASHED_BLOCK_BYTES):
                hasher.update(block)
        if FileVersion.of(version.path) != version:
            raise ValueError(f"{version.path}: has changed since it was loaded")
    return hasher.hexdigest()


def file_sha256(path: Path, offset: int = 0) -> str:
    """The SHA-256 of a file from byte `offset` on, in hex."""
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.file_digest(file, "sha256").hexdigest()
