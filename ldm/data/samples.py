"""A source: captioned pictures and what is wrong with them, whatever they are kept in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

Blob = Callable[[], bytes]  # reads a file's bytes; it can be pickled, for worker processes
Masks = Literal["none", "file", "alpha"]

PICTURES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm"}
UNREADABLE = {".heic", ".heif", ".svg", ".psd", ".xcf", ".jxl", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raw", ".exr"}
CAPTIONS = (".txt", ".caption")
MASK = ".mask.png"
LITTER = {"thumbs.db", "desktop.ini", "__macosx"}
HELD_OUT = "held out: "  # before the keys of pictures that are not learnt from
NOTICES = {"skipped", "animated", "colour profile"}  # kinds of fault that no training needs to refuse


class Fault(NamedTuple):
    """Something wrong with a source: its kind, where it is (a key, or a file and line), and what, in words."""

    kind: str
    key: str
    what: str

    @property
    def fatal(self) -> bool:
        """Does a training refuse it?"""
        return self.kind not in NOTICES


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with its caption. `key` names it for good: it depends neither on the order nor on the place."""

    key: str
    caption: str
    picture: Blob
    mask: Blob | None = None
    repeats: int = 1

    def open(self) -> bytes:
        """The picture file's bytes; OSError where they cannot be read."""
        return self.picture()


class Source(NamedTuple):
    """What was found, in the order of its keys."""

    samples: Sequence[Sample]
    faults: Sequence[Fault]


class Columns(NamedTuple):
    """Names of columns; `image` None is `file_name` in a metadata file and `image` in a saved data set."""

    image: str | None = None
    caption: str = "text"
    mask: str = "mask"


class Options(NamedTuple):
    """How a source is read: its columns, where masks come from, and the caption of pictures that have none."""

    columns: Columns = Columns()
    masks: Masks = "none"
    caption: str | None = None


@dataclass(frozen=True, slots=True)
class File:
    """The bytes of a file, or of `size` bytes in it from `start`, as of a member of a tar."""

    path: Path
    start: int = 0
    size: int = -1

    def __call__(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path}: ends {self.size - len(data)} bytes early")
        return data


def litter(name: str) -> bool:
    """Is it a file or folder that no person put there: hidden, thumbnails, a Mac's leavings?"""
    return name.startswith(".") or name.lower() in LITTER


def skipped(key: str) -> Fault:
    """Why a file that is no picture, caption or mask is left out."""
    suffix = Path(key).suffix.lower()
    if suffix in UNREADABLE:
        return Fault("unsupported", key, f"{suffix} pictures cannot be read: convert them to PNG or JPEG")
    return Fault("skipped", key, "neither a picture nor a caption")


def captioned(key: str, text: Any, fallback: str | None, faults: list[Fault]) -> str | None:
    """A caption as it is used, None with a fault where there is none; `text` is what was found for it."""
    if text is None and fallback is not None:
        return fallback
    if text is None:
        faults.append(Fault("no caption", key, "no caption"))
    elif not isinstance(text, str):
        faults.append(Fault("not text", key, f"the caption is {type(text).__name__}, not text"))
    elif not text.strip():
        faults.append(Fault("empty caption", key, "the caption is empty"))
    else:
        return text.strip()
    return None


def utf8(data: bytes, key: str, faults: list[Fault]) -> str | None:
    """Text in UTF-8, without its byte-order mark; None with a fault that names the line elsewhere."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        faults.append(Fault("not UTF-8", key, f"line {line} is not UTF-8"))
        return None


def lacking(column: str, present: Iterable[str], key: str) -> Fault:
    """The fault of a column that is not there, with the nearest that is."""
    names = [name for name in present if isinstance(name, str)]
    close = get_close_matches(column, names, 1) or get_close_matches(column.lower(), [n.lower() for n in names], 1, 0.3)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return Fault("wrong column", key, f"no column {column!r} among {', '.join(map(repr, names)) or 'none'}{hint}")


def told_once(samples: Iterable[Sample], faults: list[Fault]) -> list[Sample]:
    """The samples by key, in order; one fault for each key that comes again."""
    found: dict[str, Sample] = {}
    for sample in samples:
        if sample.key in found:
            faults.append(Fault("duplicate", sample.key, "is there twice"))
        found.setdefault(sample.key, sample)
    return [found[key] for key in sorted(found)]
