"""Webdataset tars: the members `key.jpg`, `key.txt`, `key.json` are one sample; read where they lie, never unpacked."""

from __future__ import annotations

import json
import posixpath
import tarfile
from pathlib import Path
from typing import Any

from ldm.data.samples import (
    CAPTIONS,
    MASK,
    PICTURES,
    Fault,
    File,
    Options,
    Sample,
    captioned,
    lacking,
    litter,
    skipped,
    utf8,
)

Group = dict[str, tuple[str, File]]  # the members of one key, by what follows it
GZIP = b"\x1f\x8b"


def open_tar(path: Path, options: Options, faults: list[Fault]) -> list[Sample]:
    """The samples of a tar: what comes before a tear is used, the tear is a fault."""
    members = _members(path, faults)
    groups: dict[str, Group] = {}
    for name, file in members:
        base, suffix = split(name)
        if any(map(litter, name.split("/"))):
            faults.append(Fault("skipped", name, "hidden, or made by a machine"))
        elif suffix in groups.setdefault(base, {}):
            faults.append(Fault("duplicate", name, f"is in {path.name} twice"))
        else:
            groups[base][suffix] = name, file
    samples = [_sample(base, group, options, faults) for base, group in groups.items()]
    return [sample for sample in samples if sample is not None]


def split(name: str) -> tuple[str, str]:
    """A member's key and the rest, `a.b/0001` and `.mask.png`: a key ends before the first dot of the last name."""
    folder, last = posixpath.split(name)
    stem, dot, suffix = last.partition(".")
    return posixpath.join(folder, stem), (dot + suffix).lower()


def _members(path: Path, faults: list[Fault]) -> list[tuple[str, File]]:
    """Names of a tar's files and where they lie in it, up to the first tear."""
    found: list[tuple[str, File]] = []
    with open(path, "rb") as file:
        if file.read(2) == GZIP:
            faults.append(Fault("compressed tar", path.name, "members cannot be read where they lie: unpack the .gz"))
            return []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    found.append((posixpath.normpath(member.name), File(path, member.offset_data, member.size)))
            if tar.offset >= path.stat().st_size:
                faults.append(Fault("torn tar", path.name, "ends without the mark of its end"))
    except tarfile.TarError as error:  # told after the torn member itself, whose sample is left out
        faults.append(Fault("torn tar", path.name, str(error)))
        torn = split(found[-1][0])[0] if found else None
        return [member for member in found if split(member[0])[0] != torn]
    return found


def _sample(base: str, group: Group, options: Options, faults: list[Fault]) -> Sample | None:
    """The sample of one key, None with a fault where it has no picture or no caption."""
    pictures, texts = ([group[s] for s in order if s in group] for order in (sorted(PICTURES), CAPTIONS))
    for kind, (first, *more) in (("duplicate", pictures), ("two captions", texts)) if pictures and texts else ():
        faults += [Fault(kind, name, f"there is {first[0]} too") for name, _ in more]
    if not pictures:
        faults += [_stray(name) for name, _ in group.values()]
        return None
    name, file = pictures[0]
    told = len(faults)
    found = utf8(texts[0][1](), texts[0][0], faults) if texts else _from_json(group, options, faults)
    if len(faults) > told:
        return None
    text = captioned(name, found, options.caption, faults)
    mask = group[MASK][1] if options.masks == "file" and MASK in group else None
    return None if text is None else Sample(name, text, file, mask)


def _stray(name: str) -> Fault:
    """Why a member whose key has no picture is left out."""
    if name.lower().endswith(MASK):
        return Fault("mask without picture", name, "no picture of that key")
    if split(name)[1] in (*CAPTIONS, ".json"):
        return Fault("caption without picture", name, "no picture of that key")
    return skipped(name)


def _from_json(group: Group, options: Options, faults: list[Fault]) -> Any:
    """What a `.json` member says under the caption column."""
    if ".json" not in group:
        return None
    name, file = group[".json"]
    try:
        values = json.loads(file().decode("utf-8-sig"))
    except UnicodeDecodeError:
        faults.append(Fault("not UTF-8", name, "not UTF-8"))
    except ValueError as error:
        faults.append(Fault("malformed line", name, f"not JSON ({error})"))
    else:
        if isinstance(values, dict) and options.columns.caption in values:
            return values[options.columns.caption]
        if options.caption is None:
            faults.append(lacking(options.columns.caption, values if isinstance(values, dict) else (), name))
    return None
