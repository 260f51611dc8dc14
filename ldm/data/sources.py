"""Captioned images and what is wrong with them, however they are stored."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from ldm.config import ImageDataConfig
from ldm.errors import suggest
from ldm.files import MAX_FILE_BYTES
from ldm.image_repair import IMAGE_PLUGINS, load_image_plugin
from ldm.rng import derive_seed

BytesReader = Callable[[], bytes]  # reads a file's bytes; it can be pickled, for worker processes
MaskMode = Literal["none", "file", "alpha"]
Severity = Literal["error", "warning", "notice"]

# fmt: off
READABLE_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".gif", ".tif", ".tiff",
                           ".avif", ".jp2", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"}
UNSUPPORTED_IMAGE_SUFFIXES = {".svg", ".psd", ".xcf", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raw", ".exr"}
# fmt: on
PLUGIN_SUFFIXES = {suffix: name for name, plugin in IMAGE_PLUGINS.items() for suffix in plugin.suffixes}
CAPTION_SUFFIXES = (".txt", ".caption")
MAX_CAPTION_BYTES = 2**20
MASK_SUFFIX = ".mask.png"
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx"}
USUAL_COLUMNS = {
    "caption_column": ("text", "caption", "prompt", "captions", "tags", "description"),
    "image_column": ("file_name", "image", "image_path", "path", "filename", "file", "img"),
}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # which JSON can express and UTF-8 cannot
UNCONDITIONAL = "learnt without a caption"
HELD_OUT_PREFIX = "held out: "  # before the keys of validation images
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "notice")
DUPLICATE_KINDS = ("same image", "other caption", "held-out leak")  # of identical files
LENIENT_KINDS = (  # a training goes on without, or with another caption
    *("unsupported", "caption without image", "mask without image", "two captions", "shared caption", "not listed"),
    *("empty caption", "no caption", "not text", "other spelling", "missing file", "malformed line", "unequal line"),
    *("duplicate", "symlink loop", "left out"),
)
STRICT_KINDS = {*LENIENT_KINDS, "truncated caption", "truncated"}  # errors where the recipe is strict
COUNTED_KINDS = {*LENIENT_KINDS, "skipped"}  # what a training says in one line
BROKEN_KINDS = ("broken image", "mask size", "too small", "not UTF-8", "truncated tar", "unreadable", "corrupt dataset")
SEVERITY_BY_KIND: Mapping[str, Severity] = {  # all other kinds are errors
    **dict.fromkeys(("file name", "markup", "mojibake", "placeholder caption", "truncated caption"), "warning"),
    **dict.fromkeys((*DUPLICATE_KINDS, "near duplicate", "one caption", "few images", "no masks"), "warning"),
    **dict.fromkeys(("small image", "extreme aspect ratio", "blank image", "extreme latents"), "warning"),
    **dict.fromkeys(("too few steps", "disk space"), "warning"),
    **dict.fromkeys(("metadata", "truncated", "EXIF", "gray levels", "large image"), "notice"),
    **dict.fromkeys(LENIENT_KINDS, "notice"),
    **dict.fromkeys(
        ("skipped", "hidden", "animated", "color profile", "color mode", "multiple lines", "small bucket"), "notice"
    ),
}


class DatasetIssue(NamedTuple):
    """Something wrong with a dataset: its kind, where it is (a sample's key, or a file and line), and what it is."""

    kind: str
    key: str
    what: str
    strict: bool = False

    @property
    def severity(self) -> Severity:
        """With an error, training would fail or is certain to go wrong, and is refused."""
        if self.strict and self.kind in STRICT_KINDS:
            return "error"
        return SEVERITY_BY_KIND.get(self.kind, "error")

    def as_left_out(self) -> DatasetIssue:
        """The issue where its image is left out: `data.skip_broken`."""
        return self._replace(kind="left out", what=f"{self.kind}: {self.what}")


@dataclass(frozen=True, slots=True)
class ImageSample:
    """One image with its caption. `key` identifies it for good: it depends on no order and on no absolute path."""

    key: str
    caption: str
    read_image: BytesReader  # raises OSError
    read_mask: BytesReader | None = None
    repeats: int = 1


class ImageSource(NamedTuple):
    """The samples of a dataset in the order of their keys, and its issues."""

    samples: Sequence[ImageSample]
    issues: Sequence[DatasetIssue]


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Reads the bytes of a file, or `size` bytes of it from `offset`, as of a member of a tar."""

    path: Path
    offset: int = 0
    size: int = -1

    def __call__(self) -> bytes:
        with open(self.path, "rb") as file:
            if self.size < 0 and os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise OSError(f"more than {MAX_FILE_BYTES >> 30} GB")
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path}: ends {self.size - len(data)} bytes early")
        return data


def raise_on_errors(issues: Iterable[DatasetIssue], hint: str = "") -> None:
    """ValueError with the first issue of severity "error", if any, and the number of the others."""
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more{hint})" if len(errors) > 1 else ""
        raise ValueError(f"{errors[0].key}: {errors[0].what}{more}")


def is_ignored(name: str) -> bool:
    """Is a file or folder hidden, or made by an operating system?"""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def is_mask_file(name: str) -> bool:
    """Is a file a mask by its suffix, `.mask.png`?"""
    return name.lower().endswith(MASK_SUFFIX)


def is_image_file(name: str) -> bool:
    """Is a file an image by its suffix, and no mask?"""
    return Path(name).suffix.lower() in list_image_suffixes() and not is_mask_file(name)


@cache
def list_image_suffixes() -> tuple[str, ...]:
    """The suffixes of images that can be read, with those of installed plug-ins, in the order of the alphabet."""
    plugins = (suffix for suffix, name in PLUGIN_SUFFIXES.items() if load_image_plugin(name))
    return tuple(sorted({*READABLE_IMAGE_SUFFIXES, *plugins}))


def strip_extension(name: str) -> str:
    """A path without its suffix, or without `.mask.png`."""
    return name[: -len(MASK_SUFFIX)] if is_mask_file(name) else str(PurePosixPath(name).with_suffix(""))


def list_caption_suffixes(data: ImageDataConfig) -> tuple[str, ...]:
    """The suffixes of captions beside images, the preferred one first."""
    return tuple(dict.fromkeys((data.caption_extension, *CAPTION_SUFFIXES)))


def skipped_file_issue(name: str) -> DatasetIssue:
    """Why a file that is neither an image nor a caption, nor a mask of an image, is left out."""
    suffix = Path(name).suffix.lower()
    if suffix in PLUGIN_SUFFIXES:
        package = IMAGE_PLUGINS[PLUGIN_SUFFIXES[suffix]].package
        return DatasetIssue("unsupported", name, f"not read without a plug-in: pip install {package}, or convert it")
    if suffix in UNSUPPORTED_IMAGE_SUFFIXES:
        return DatasetIssue("unsupported", name, f"{suffix} images are not read: convert it to PNG or JPEG")
    if is_mask_file(name):
        return DatasetIssue("mask without image", name, "no image of that name")
    return DatasetIssue("skipped", name, "neither an image nor a caption")


def validate_caption(key: str, text: Any, fallback: str | None, issues: list[DatasetIssue]) -> str | None:
    """The caption `text`, stripped, or `fallback` if it is None or empty; None with an issue if there is none.

    Of a list one is chosen by the key. Without a caption and a fallback an image is an unconditional sample.
    """
    if isinstance(text, list | tuple):
        text = text[derive_seed("caption", key) % len(text)] if text else ""
    if text is None or text != text:  # NaN, as pandas writes an empty cell
        if fallback is None:
            issues.append(DatasetIssue("no caption", key, f"no caption: {UNCONDITIONAL}"))
        return fallback or ""
    if not isinstance(text, str):
        issues.append(DatasetIssue("not text", key, f"the caption is {type(text).__name__}, not text"))
        return None
    if not text.strip():
        use = UNCONDITIONAL if fallback is None else f"{fallback!r} is used"
        issues.append(DatasetIssue("empty caption", key, f"the caption is empty: {use}"))
        return fallback or ""
    return LONE_SURROGATE.sub("\ufffd", text.strip())


def decode_utf8(data: bytes, key: str, issues: list[DatasetIssue]) -> str | None:
    """UTF-8 text without its byte order mark, or UTF-16 with one; None with an issue that names the wrong line."""
    try:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1  # nearly, in UTF-16
        issues.append(DatasetIssue("not UTF-8", key, f"line {line} is not UTF-8"))
        return None


def read_caption_file(path: Path, key: str, issues: list[DatasetIssue]) -> str | None:
    """`decode_utf8` of a file; None with an issue for one that is too large for a caption."""
    if path.stat().st_size > MAX_CAPTION_BYTES:
        issues.append(DatasetIssue("not text", key, f"more than {MAX_CAPTION_BYTES} bytes: not a caption"))
        return None
    return decode_utf8(path.read_bytes(), key, issues)


def find_missing_columns(
    data: ImageDataConfig, image: str | None, present: Iterable[str], key: str
) -> list[DatasetIssue]:
    """Issues for a missing image column (by default `image`; None if none is needed) or caption column, if needed."""
    names = [name for name in present if isinstance(name, str)]
    known = {name.strip().casefold() for name in names}
    columns = [image and (data.image_column or image), data.caption_column if data.instance_prompt is None else None]
    listed = ", ".join(map(repr, names)) or "none"
    options = {data.caption_column: "caption_column", data.image_column or image: "image_column"}
    missing = [name for name in columns if name and name.casefold() not in known]
    texts = {
        name: f"no column {name!r} among {listed}{_suggest_column(name, options[name], names)}" for name in missing
    }
    return [DatasetIssue("wrong column", key, text) for text in texts.values()]


def match_column(wanted: str, present: Iterable[str]) -> str:
    """The column of a name, or else the one that differs in case and blanks only."""
    names = [name for name in present if isinstance(name, str)]
    near = (name for name in names if name.strip().casefold() == wanted.casefold())
    return wanted if wanted in names else next(near, wanted)


def _suggest_column(wanted: str, option: str, names: Sequence[str]) -> str:
    """The option that names one of the present columns as other tools call it, or else the nearest name."""
    usual = next((name for name in USUAL_COLUMNS[option] if name in names and name != wanted), None)
    nearest = suggest(wanted, names)
    return f": give data.{option}: {usual}" if usual and not nearest else nearest or suggest(wanted, names, 0.3)


def deduplicate(samples: Iterable[ImageSample], issues: list[DatasetIssue]) -> list[ImageSample]:
    """The samples sorted by key; an issue for each key that is repeated."""
    by_key: dict[str, ImageSample] = {}
    for sample in samples:
        if by_key.setdefault(sample.key, sample) is not sample:
            issues.append(DatasetIssue("duplicate", sample.key, "is there twice: the first is used"))
    return [by_key[key] for key in sorted(by_key)]
