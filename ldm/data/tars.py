"""Webdataset tars: the members `key.jpg`, `key.txt`, `key.json` are one sample; read where they lie, never unpacked."""

from __future__ import annotations

import json
import posixpath
import tarfile
from pathlib import Path
from typing import Any

from ldm.data.sources import (
    CAPTION_SUFFIXES,
    MASK_SUFFIX,
    READABLE_IMAGE_SUFFIXES,
    DatasetIssue,
    FileSlice,
    ImageSample,
    SourceOptions,
    decode_utf8,
    is_ignored,
    missing_column,
    skipped_file_issue,
    validate_caption,
)

MembersBySuffix = dict[str, tuple[str, FileSlice]]  # the members of one key, by what follows it
GZIP_MAGIC = b"\x1f\x8b"


def open_tar(path: Path, options: SourceOptions, issues: list[DatasetIssue]) -> list[ImageSample]:
    """The samples of a tar: what comes before a tear is used, the tear is a fault."""
    members = _list_members(path, issues)
    groups: dict[str, MembersBySuffix] = {}
    for name, file in members:
        base, suffix = base_plus_ext(name)
        if any(map(is_ignored, name.split("/"))):
            issues.append(DatasetIssue("skipped", name, "hidden, or made by a machine"))
        elif suffix in groups.setdefault(base, {}):
            issues.append(DatasetIssue("duplicate", name, f"is in {path.name} twice"))
        else:
            groups[base][suffix] = name, file
    samples = [_make_sample(base, group, options, issues) for base, group in groups.items()]
    return [sample for sample in samples if sample is not None]


def base_plus_ext(name: str) -> tuple[str, str]:
    """A member's key and the rest, `a.b/0001` and `.mask.png`: a key ends before the first dot of the last name."""
    folder, last = posixpath.split(name)
    stem, dot, suffix = last.partition(".")
    return posixpath.join(folder, stem), (dot + suffix).lower()


def _list_members(path: Path, issues: list[DatasetIssue]) -> list[tuple[str, FileSlice]]:
    """Names of a tar's files and where they lie in it, up to the first tear."""
    found: list[tuple[str, FileSlice]] = []
    with open(path, "rb") as file:
        if file.read(2) == GZIP_MAGIC:
            issues.append(
                DatasetIssue("compressed tar", path.name, "members cannot be read where they lie: unpack the .gz")
            )
            return []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    found.append((posixpath.normpath(member.name), FileSlice(path, member.offset_data, member.size)))
            if tar.offset >= path.stat().st_size:
                issues.append(DatasetIssue("torn tar", path.name, "ends without the mark of its end"))
    except tarfile.TarError as error:  # told after the torn member itself, whose sample is left out
        issues.append(DatasetIssue("torn tar", path.name, str(error)))
        torn = base_plus_ext(found[-1][0])[0] if found else None
        return [member for member in found if base_plus_ext(member[0])[0] != torn]
    return found


def _make_sample(
    base: str, members: MembersBySuffix, options: SourceOptions, issues: list[DatasetIssue]
) -> ImageSample | None:
    """The sample of one key, None with a fault where it has no picture or no caption."""
    pictures, texts = (
        [members[s] for s in order if s in members] for order in (sorted(READABLE_IMAGE_SUFFIXES), CAPTION_SUFFIXES)
    )
    for kind, (first, *more) in (("duplicate", pictures), ("two captions", texts)) if pictures and texts else ():
        issues += [DatasetIssue(kind, name, f"there is {first[0]} too") for name, _ in more]
    if not pictures:
        issues += [_unmatched_member_issue(name) for name, _ in members.values()]
        return None
    name, file = pictures[0]
    told = len(issues)
    found = decode_utf8(texts[0][1](), texts[0][0], issues) if texts else _read_json_caption(members, options, issues)
    if len(issues) > told:
        return None
    text = validate_caption(name, found, options.default_caption, issues)
    mask = members[MASK_SUFFIX][1] if options.masks == "file" and MASK_SUFFIX in members else None
    return None if text is None else ImageSample(name, text, file, mask)


def _unmatched_member_issue(name: str) -> DatasetIssue:
    """Why a member whose key has no picture is left out."""
    if name.lower().endswith(MASK_SUFFIX):
        return DatasetIssue("mask without picture", name, "no picture of that key")
    if base_plus_ext(name)[1] in (*CAPTION_SUFFIXES, ".json"):
        return DatasetIssue("caption without picture", name, "no picture of that key")
    return skipped_file_issue(name)


def _read_json_caption(members: MembersBySuffix, options: SourceOptions, issues: list[DatasetIssue]) -> Any:
    """What a `.json` member says under the caption column."""
    if ".json" not in members:
        return None
    name, file = members[".json"]
    try:
        values = json.loads(file().decode("utf-8-sig"))
    except UnicodeDecodeError:
        issues.append(DatasetIssue("not UTF-8", name, "not UTF-8"))
    except ValueError as error:
        issues.append(DatasetIssue("malformed line", name, f"not JSON ({error})"))
    else:
        if isinstance(values, dict) and options.columns.caption in values:
            return values[options.columns.caption]
        if options.default_caption is None:
            issues.append(missing_column(options.columns.caption, values if isinstance(values, dict) else (), name))
    return None
