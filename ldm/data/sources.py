"""A source: captioned pictures and what is wrong with them, whatever they are kept in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

BytesReader = Callable[[], bytes]  # reads a file's bytes; it can be pickled, for worker processes
MaskMode = Literal["none", "file", "alpha"]

READABLE_IMAGE_SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".ppm",
    ".pgm",
}
UNSUPPORTED_IMAGE_SUFFIXES = {
    ".heic",
    ".heif",
    ".svg",
    ".psd",
    ".xcf",
    ".jxl",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".dng",
    ".raw",
    ".exr",
}
CAPTION_SUFFIXES = (".txt", ".caption")
MASK_SUFFIX = ".mask.png"
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
HELD_OUT_PREFIX = "held out: "  # before the keys of pictures that are not learnt from
NOTICE_KINDS = {"skipped", "animated", "colour profile"}  # kinds of fault that no training needs to refuse


class DatasetIssue(NamedTuple):
    """Something wrong with a source: its kind, where it is (a key, or a file and line), and what, in words."""

    kind: str
    key: str
    what: str

    @property
    def is_fatal(self) -> bool:
        """Does a training refuse it?"""
        return self.kind not in NOTICE_KINDS


@dataclass(frozen=True, slots=True)
class ImageSample:
    """One picture with its caption. `key` names it for good: it depends neither on the order nor on the place."""

    key: str
    caption: str
    read_image: BytesReader
    read_mask: BytesReader | None = None
    repeats: int = 1

    def read_bytes(self) -> bytes:
        """The picture file's bytes; OSError where they cannot be read."""
        return self.read_image()


class ImageSource(NamedTuple):
    """What was found, in the order of its keys."""

    samples: Sequence[ImageSample]
    issues: Sequence[DatasetIssue]


class ColumnNames(NamedTuple):
    """Names of columns; `image` None is `detect_file_name` in a metadata file and `image` in a saved data set."""

    image: str | None = None
    caption: str = "text"
    mask: str = "mask"


class SourceOptions(NamedTuple):
    """How a source is read: its columns, where masks come from, and the caption of pictures that have none."""

    columns: ColumnNames = ColumnNames()
    masks: MaskMode = "none"
    default_caption: str | None = None


@dataclass(frozen=True, slots=True)
class FileSlice:
    """The bytes of a file, or of `size` bytes in it from `start_trackers`, as of a member of a tar."""

    path: Path
    offset: int = 0
    size: int = -1

    def __call__(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path}: ends {self.size - len(data)} bytes early")
        return data


def is_ignored(name: str) -> bool:
    """Is it a file or folder that no person put there: hidden, thumbnails, a Mac's leavings?"""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def skipped_file_issue(key: str) -> DatasetIssue:
    """Why a file that is no picture, caption or mask is left out."""
    suffix = Path(key).suffix.lower()
    if suffix in UNSUPPORTED_IMAGE_SUFFIXES:
        return DatasetIssue("unsupported", key, f"{suffix} pictures cannot be read: convert them to PNG or JPEG")
    return DatasetIssue("skipped", key, "neither a picture nor a caption")


def validate_caption(key: str, text: Any, fallback: str | None, issues: list[DatasetIssue]) -> str | None:
    """A caption as it is used, None with a fault where there is none; `text` is what was found for it."""
    if text is None and fallback is not None:
        return fallback
    if text is None:
        issues.append(DatasetIssue("no caption", key, "no caption"))
    elif not isinstance(text, str):
        issues.append(DatasetIssue("not text", key, f"the caption is {type(text).__name__}, not text"))
    elif not text.strip():
        issues.append(DatasetIssue("empty caption", key, "the caption is empty"))
    else:
        return text.strip()
    return None


def decode_utf8(data: bytes, key: str, issues: list[DatasetIssue]) -> str | None:
    """Text in UTF-8, without its byte-order mark; None with a fault that names the line elsewhere."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        issues.append(DatasetIssue("not UTF-8", key, f"line {line} is not UTF-8"))
        return None


def missing_column(column: str, present: Iterable[str], key: str) -> DatasetIssue:
    """The fault of a column that is not there, with the nearest that is."""
    names = [name for name in present if isinstance(name, str)]
    close = get_close_matches(column, names, 1) or get_close_matches(column.lower(), [n.lower() for n in names], 1, 0.3)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return DatasetIssue(
        "wrong column", key, f"no column {column!r} among {', '.join(map(repr, names)) or 'none'}{hint}"
    )


def deduplicate(samples: Iterable[ImageSample], issues: list[DatasetIssue]) -> list[ImageSample]:
    """The samples by key, in order; one fault for each key that comes again."""
    found: dict[str, ImageSample] = {}
    for sample in samples:
        if sample.key in found:
            issues.append(DatasetIssue("duplicate", sample.key, "is there twice"))
        found.setdefault(sample.key, sample)
    return [found[key] for key in sorted(found)]
