"""Folders of pictures: captions in a metadata file, beside the pictures, in kohya's folder names, or one for all."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.data.samples import (
    CAPTIONS,
    MASK,
    PICTURES,
    Fault,
    File,
    Options,
    Sample,
    Source,
    captioned,
    lacking,
    litter,
    skipped,
    told_once,
    utf8,
)
from ldm.data.tables import METADATA, WRONG_METADATA, Row, columns_of, open_parquets, open_saved, read_rows, saved
from ldm.data.tars import open_tar

KOHYA = re.compile(r"(\d+)_(.+)")  # <repeats>_<class tokens>
TARS = (".tar", ".tar.gz", ".tgz")
MOST_REPEATS = 1000  # beyond which the number in a folder's name is likely a year or a count
Files = Mapping[str, Path]  # by path below the source, with slashes, in Unicode's NFC


def open_source(paths: Sequence[Path], options: Options | None = None) -> Source:
    """All pictures in some places, each told by its content, with their captions and with all that is wrong.

    A place is a folder with metadata.jsonl, .csv or .parquet; a folder of pictures with captions beside them
    (.txt, .caption), in folders named <repeats>_<class tokens> (kohya), or without any; a folder of webdataset tars, or
    one tar; a folder of parquet files that hold the pictures; or a data set that `datasets` saved. Keys from the second
    place on begin with its number.
    """
    samples: list[Sample] = []
    faults: list[Fault] = []
    for number, path in enumerate(paths, 1):
        prefix = f"{number}:" if number > 1 else ""
        found = _open(Path(path), options or Options())
        if not found.samples and not any(fault.fatal for fault in found.faults):
            faults.append(Fault("no pictures", prefix + path.name, "no pictures in it"))
        samples += [replace(sample, key=prefix + sample.key) for sample in found.samples]
        faults += [fault._replace(key=prefix + fault.key) for fault in found.faults]
    return Source(samples, faults)


def _open(path: Path, options: Options) -> Source:
    if path.is_file() and path.name.lower().endswith(TARS):
        return open_tars([path], options)
    if not path.is_dir():
        return Source((), (Fault("missing folder", path.name, f"{path} is neither a folder nor a tar"),))
    if saved(path):
        return open_saved(path, options)
    faults: list[Fault] = []
    files = walk(path, faults)
    tars = [file for name, file in files.items() if name.lower().endswith(TARS)]
    tables = [name for name in METADATA if name in files]
    parquets = {name: file for name, file in files.items() if name.lower().endswith(".parquet")}
    if tars:
        found = open_tars(tars, options)
        faults += [Fault("skipped", name, "lies beside tars") for name, file in files.items() if file not in tars]
    elif len(tables) > 1:
        found = Source((), (Fault("two metadata files", tables[1], f"there is {tables[0]} too"),))
    elif tables:
        found = listed(files, tables[0], options)
    elif parquets and not any(map(picture, files)):
        found = open_parquets(parquets, options)
        faults += [Fault("skipped", name, "lies beside parquet files") for name in files if name not in parquets]
    elif WRONG_METADATA in files:
        what = "not read: the file must be metadata.jsonl, one object a line"
        found = Source((), (Fault("metadata.json", WRONG_METADATA, what),))
    else:
        found = beside(files, options)
    return Source(found.samples, [*faults, *found.faults])


def open_tars(paths: Sequence[Path], options: Options) -> Source:
    """The samples of some tars together, by their keys."""
    faults: list[Fault] = []
    samples = [sample for path in sorted(paths) for sample in open_tar(path, options, faults)]
    return Source(told_once(samples, faults), faults)


def walk(root: Path, faults: list[Fault]) -> Files:
    """The files below a folder, by name; links are followed, those that lead back to where they are are faults."""
    return dict(sorted(_walk(root, "", (os.path.realpath(root),), faults)))


def _walk(folder: Path, prefix: str, above: tuple[str, ...], faults: list[Fault]) -> Iterator[tuple[str, Path]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        faults.append(Fault("unreadable", prefix.rstrip("/"), error.strerror or "cannot be read"))
        return
    for entry in entries:
        key = prefix + unicodedata.normalize("NFC", entry.name)
        if litter(entry.name):
            faults.append(Fault("skipped", key, "hidden, or made by a machine"))
        elif entry.is_dir():
            real = os.path.realpath(entry.path)
            if real in above:
                faults.append(Fault("symlink loop", key, f"leads back to {real}"))
            else:
                yield from _walk(Path(entry.path), f"{key}/", (*above, real), faults)
        elif entry.is_file():
            yield key, Path(entry.path)
        else:
            faults.append(Fault("missing file", key, "a link to nothing" if entry.is_symlink() else "not a file"))


def picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in PICTURES and not name.lower().endswith(MASK)


def stem(name: str) -> str:
    """A name without its ending, or without all of a mask's."""
    return name[: -len(MASK)] if name.lower().endswith(MASK) else str(PurePosixPath(name).with_suffix(""))


def listed(files: Files, table: str, options: Options) -> Source:
    """Pictures and captions as a metadata file lists them; pictures that it does not list are faults."""
    faults: list[Fault] = []
    rows = read_rows(files[table], faults)
    image, caption, mask = (options.columns.image or "file_name", *options.columns[1:])
    present = sorted(columns_of(rows))
    wrong = [c for c in (image, *([caption] if options.caption is None else [])) if c not in present]
    if wrong or not rows:
        return Source((), faults + [lacking(column, present, table) for column in wrong if rows])
    masks = {stem(name): name for name in files if name.lower().endswith(MASK)}
    samples, used = [], set()
    for row in rows:
        name = _resolved(row, image, files, faults)
        if name is None:
            continue
        text = captioned(name, row.values.get(caption), options.caption, faults)
        shade = _resolved(row, mask, files, faults) if row.values.get(mask) else masks.get(stem(name))
        used |= {name, shade}
        if text is not None:
            told = File(files[shade]) if shade and options.masks == "file" else None
            samples.append(Sample(name, text, File(files[name]), told))
    faults += [unlisted(name, table) for name in files if name not in used and name != table]
    return Source(told_once(samples, faults), faults)


def unlisted(name: str, table: str) -> Fault:
    """Why a file that the metadata file does not name is left out."""
    if name.lower().endswith(MASK):
        return Fault("mask without picture", name, "no picture of that name")
    return Fault("no caption", name, f"not in {table}") if picture(name) else skipped(name)


def _resolved(row: Row, column: str, files: Files, faults: list[Fault]) -> str | None:
    """The file that a cell names, None with a fault where there is none, or none below the folder."""
    value: Any = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        faults.append(Fault("missing file", row.key, f"the row has no {column}"))
        return None
    name = unicodedata.normalize("NFC", os.path.normpath(value.strip()))
    if os.path.isabs(name) or name.split("/")[0] == "..":
        faults.append(Fault("outside", row.key, f"{value} leads out of the folder"))
    elif name in files:
        return name
    else:
        same = next((other for other in files if other.casefold() == name.casefold()), None)
        faults.append(Fault("missing file", row.key, f"no file {value}" + (f"; there is {same}" if same else "")))
    return None


def beside(files: Files, options: Options) -> Source:
    """Pictures with captions beside them; without one, a kohya folder's class tokens, or the caption for all."""
    faults: list[Fault] = []
    texts = _by_stem((name for name in files if PurePosixPath(name).suffix.lower() in CAPTIONS), "two captions", faults)
    masks = _by_stem((name for name in files if name.lower().endswith(MASK)), "two masks", faults)
    owners: dict[str, str] = {}
    samples = []
    for name in filter(picture, files):
        base = stem(name)
        if base in texts and owners.setdefault(base, name) != name:
            faults.append(Fault("shared caption", name, f"{texts[base]} is {owners[base]}'s as well"))
            continue
        owners[base] = name
        repeats, tokens = _kohya(name)
        text = _sidecar(name, texts.get(base), files, tokens or options.caption, faults)
        mask = File(files[masks[base]]) if base in masks and options.masks == "file" else None
        if text is not None:
            samples.append(Sample(name, text, File(files[name]), mask, repeats))
    for kind, strays in (("caption without picture", texts), ("mask without picture", masks)):
        faults += [Fault(kind, strays[base], "no picture of that name") for base in strays.keys() - owners.keys()]
    known = {*texts.values(), *masks.values(), *(fault.key for fault in faults)}
    faults += [skipped(name) for name in files if not picture(name) and name not in known]
    return Source(samples, faults + _many_repeats(samples))


def _sidecar(name: str, beside: str | None, files: Files, fallback: str | None, faults: list[Fault]) -> str | None:
    """A picture's caption from the file beside it, None with a fault where that cannot be used."""
    if beside is None:
        return captioned(name, None, fallback, faults)
    text = utf8(files[beside].read_bytes(), beside, faults)
    return None if text is None else captioned(beside, text, fallback, faults)


def _by_stem(names: Iterator[str], kind: str, faults: list[Fault]) -> dict[str, str]:
    """Files by their stem; a second one of a stem is a fault."""
    found: dict[str, str] = {}
    for name in names:
        if stem(name) in found:
            faults.append(Fault(kind, name, f"there is {found[stem(name)]} too"))
        found.setdefault(stem(name), name)
    return found


def _kohya(name: str) -> tuple[int, str | None]:
    """Repeats and class tokens by the first folder of a path."""
    match = KOHYA.fullmatch(name.split("/")[0]) if "/" in name else None
    return (int(match[1]), match[2].strip()) if match else (1, None)


def _many_repeats(samples: Sequence[Sample]) -> list[Fault]:
    folders = {sample.key.split("/")[0]: sample.repeats for sample in samples}
    what = "would be repeated {} times: rename the folder if that is no number of repeats"
    return [Fault("repeats", n, what.format(r)) for n, r in folders.items() if not 0 < r <= MOST_REPEATS]
