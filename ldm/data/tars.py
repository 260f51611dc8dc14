"""Webdataset tars: the members `key.jpg`, `key.txt`, `key.json` are one sample, read in place, never unpacked."""

from __future__ import annotations

import json
import posixpath
import tarfile
from pathlib import Path
from typing import Any

from ldm.config import ImageDataConfig
from ldm.data.sources import (
    CAPTION_SUFFIXES,
    MASK_SUFFIX,
    READABLE_IMAGE_SUFFIXES,
    DatasetIssue,
    FileSlice,
    ImageSample,
    decode_utf8,
    is_ignored,
    missing_columns,
    skipped_file_issue,
    validate_caption,
)

MembersBySuffix = dict[str, tuple[str, FileSlice]]  # the members of one key: name and content by suffix
GZIP_MAGIC = b"\x1f\x8b"


def open_tar(path: Path, data: ImageDataConfig, issues: list[DatasetIssue]) -> list[ImageSample]:
    """The samples of a tar; of a truncated one those before the cut, and an issue."""
    groups: dict[str, MembersBySuffix] = {}
    for name, file in _list_members(path, issues):
        base, suffix = base_plus_ext(name)
        if any(map(is_ignored, name.split("/"))):
            issues.append(DatasetIssue("skipped", name, "hidden, or a system file"))
        elif suffix in groups.setdefault(base, {}):
            issues.append(DatasetIssue("duplicate", name, f"is in {path.name} twice"))
        else:
            groups[base][suffix] = name, file
    samples = [_make_sample(members, data, issues) for members in groups.values()]
    return [sample for sample in samples if sample is not None]


def base_plus_ext(name: str) -> tuple[str, str]:
    """A member's key and suffix, `a.b/0001` and `.mask.png`: a key ends before the first dot of the last component."""
    folder, last = posixpath.split(name)
    stem, dot, suffix = last.partition(".")
    return posixpath.join(folder, stem), (dot + suffix).lower()


def _list_members(path: Path, issues: list[DatasetIssue]) -> list[tuple[str, FileSlice]]:
    """Names of a tar's files and their slices of it; of a truncated tar those that are complete."""
    found: list[tuple[str, FileSlice]] = []
    with open(path, "rb") as file:
        if file.read(2) == GZIP_MAGIC:
            issues.append(DatasetIssue("compressed tar", path.name, "members cannot be read in place: unpack the .gz"))
            return []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    found.append((posixpath.normpath(member.name), FileSlice(path, member.offset_data, member.size)))
            if tar.offset >= path.stat().st_size:
                issues.append(DatasetIssue("truncated tar", path.name, "has no end-of-archive mark"))
    except tarfile.TarError as error:  # raised after the truncated member itself, whose sample is left out
        issues.append(DatasetIssue("truncated tar", path.name, str(error)))
        torn = base_plus_ext(found[-1][0])[0] if found else None
        return [member for member in found if base_plus_ext(member[0])[0] != torn]
    return found


def _make_sample(members: MembersBySuffix, data: ImageDataConfig, issues: list[DatasetIssue]) -> ImageSample | None:
    """The sample of one key; None with an issue if it has no image or no caption."""
    images, texts = (
        [members[s] for s in order if s in members] for order in (sorted(READABLE_IMAGE_SUFFIXES), CAPTION_SUFFIXES)
    )
    for kind, (first, *more) in (("duplicate", images), ("two captions", texts)) if images and texts else ():
        issues += [DatasetIssue(kind, name, f"there is {first[0]} too") for name, _ in more]
    if not images:
        issues += [_unmatched_member_issue(name) for name, _ in members.values()]
        return None
    name, file = images[0]
    num_issues = len(issues)
    text = decode_utf8(texts[0][1](), texts[0][0], issues) if texts else _read_json_caption(members, data, issues)
    if len(issues) > num_issues:
        return None
    caption = validate_caption(name, text, data.instance_prompt, issues)
    mask = members[MASK_SUFFIX][1] if data.masks == "file" and MASK_SUFFIX in members else None
    return None if caption is None else ImageSample(name, caption, file, mask)


def _unmatched_member_issue(name: str) -> DatasetIssue:
    suffix = base_plus_ext(name)[1]
    if suffix.endswith(MASK_SUFFIX):
        return DatasetIssue("mask without image", name, "no image of that key")
    if suffix in (*CAPTION_SUFFIXES, ".json"):
        return DatasetIssue("caption without image", name, "no image of that key")
    return skipped_file_issue(name)


def _read_json_caption(members: MembersBySuffix, data: ImageDataConfig, issues: list[DatasetIssue]) -> Any:
    """The value of the caption column in a sample's `.json` member, if it has one."""
    if ".json" not in members:
        return None
    name, file = members[".json"]
    try:
        values = json.loads(file().decode("utf-8-sig"))
    except UnicodeDecodeError:
        issues.append(DatasetIssue("not UTF-8", name, "not UTF-8"))
        return None
    except ValueError as error:
        issues.append(DatasetIssue("malformed line", name, f"not JSON ({error})"))
        return None
    values = values if isinstance(values, dict) else {}
    if data.instance_prompt is None:
        issues += missing_columns([data.caption_column], values, name)
    return values.get(data.caption_column)
