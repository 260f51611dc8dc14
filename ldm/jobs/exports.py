"""A finished job as a data set for trainers: webdataset tars or parquet files, the same bytes for the same job."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, NamedTuple

from ldm.data.tables import import_pyarrow
from ldm.files import atomic_write, read_json, rename_noreplace
from ldm.jobs.manifest import iter_manifest_rows, list_manifest_files
from ldm.pipeline.request import Request

GROUP_ROWS, GROUP_BYTES = 100, 2**24  # of a parquet file's row group, which is read as a whole: what ends it first


class ImageRowSpan(NamedTuple):
    """Where the line of a finished picture is; places sort in the order of the job's source."""

    line: int
    seed: int
    id: str
    file: IO[bytes]
    start: int
    end: int


class ExportedImage(NamedTuple):
    """A picture's file as it lies in the job, and what it was drawn with."""

    name: str  # its id and suffix
    data: bytes
    settings: dict[str, Any]


def export_job(
    folder: Path, out: Path, export_format: str, shard_size: int, on_progress: Callable[[int, int], None]
) -> tuple[int, int]:
    """Write a job's finished pictures to `out` in shards of `size`, all or nothing; the numbers of pictures and shards.

    `detect_suffix` is one of `EXPORT_FORMATS`; `told` hears how many pictures of how many are written. Of each picture about 350 bytes
    are kept in memory. ValueError where `out` is there, the folder is no job's or has no picture, or a picture is not
    the one that was finished; OSError with a file's name where `out` cannot be written.
    """
    if os.path.lexists(out):
        raise ValueError(f"{out}: is there already")
    with ExitStack() as stack:
        places, model, (suffix, write) = (
            index_finished_images(folder, stack),
            read_model_name(folder),
            EXPORT_FORMATS[export_format],
        )
        starts = range(0, len(places), shard_size)

        def picture(at: int) -> ExportedImage:
            on_progress(at, len(places))
            return read_finished_image(folder, places[at], model)

        with atomic_write(out.absolute(), rename_noreplace) as draft:
            draft.mkdir()
            for k, start in enumerate(starts):
                shard = draft / f"{k:06d}.{suffix}"
                try:
                    write(shard, (picture(at) for at in range(start, min(start + shard_size, len(places)))))
                except OSError as error:
                    error.filename = error.filename or str(out / shard.name)  # a write that fails names no file
                    raise
    return len(places), len(starts)


def index_finished_images(folder: Path, stack: ExitStack) -> list[ImageRowSpan]:
    """The places of a job's finished pictures, in the order of its source; of two lines of one the later counts.

    Files stay open until `stack` ends, and so as they were, whatever a running job puts in their place. The joined one
    is opened last: what a worker's file held when it went is in it.
    """
    found: dict[str, ImageRowSpan] = {}
    for path in reversed(list_manifest_files(folder)) if folder.is_dir() else ():
        try:
            file = stack.enter_context(path.open("rb"))
        except FileNotFoundError:
            continue
        own = {
            r["id"]: make_image_row_span(r, file, start, end)
            for r, start, end in iter_manifest_rows(file)
            if r["status"] == "done"
        }
        found = own | found
    if not found:
        raise ValueError(f"{folder}: no finished picture in it, or not a job's folder")
    return sorted(found.values())


def make_image_row_span(record: dict[str, Any], file: IO[bytes], start: int, end: int) -> ImageRowSpan:
    """A line's place; ValueError where it says no request."""
    try:
        return ImageRowSpan(record["line"], record["request"]["seed"], record["id"], file, start, end)
    except (KeyError, TypeError):
        raise ValueError(f"{file.name}: its line of {record['id']} says no request") from None


def read_model_name(folder: Path) -> str:
    """What a job's pictures call their model; ValueError where `job.json` does not say it."""
    model = read_json(folder / "job.json").get("model")
    if not isinstance(model, str):
        raise ValueError(f"{folder / 'job.json'}: says no model")
    return model


def read_finished_image(folder: Path, span: ImageRowSpan, model: str) -> ExportedImage:
    """A finished picture; ValueError where its file is not what its line says."""
    span.file.seek(span.start)
    record = json.loads(span.file.read(span.end - span.start))
    path = folder / record["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: the job's own command draws it again") from None
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise ValueError(f"{path}: not as it was finished: the job's own command with --check draws it again")
    return ExportedImage(f"{span.id}{path.suffix}", data, flatten_settings(record, model))


def flatten_settings(record: dict[str, Any], model: str) -> dict[str, Any]:
    """What a picture was drawn with, flat, its prompt as `text`; of a picture that it began from, the pixels' hash."""
    values = dict(record["request"])
    begun = {f"begun_from_{name}": (found := values.pop(name)) and found["sha256"] for name in INPUT_IMAGE_FIELDS}
    return {"id": record["id"], "text": values.pop("prompt"), "model": model, **values, **begun}


INPUT_IMAGE_FIELDS = "image", "mask"


def write_tar(path: Path, images: Iterable[ExportedImage]) -> None:
    """A webdataset tar: of each picture its file, the prompt as `.txt`, all settings as `.json`."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, values in images:
            told = json.dumps(values, indent=1).encode()
            base = values["id"]
            for member, content in ((name, data), (f"{base}.txt", values["text"].encode()), (f"{base}.json", told)):
                entry = tarfile.TarInfo(member)  # of nobody, and of no time
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            tar.getmembers().clear()  # else it keeps them all


def write_parquet(path: Path, images: Iterable[ExportedImage]) -> None:
    """A parquet file that `datasets` opens with its pictures: a row each, a column for each setting."""
    pa = import_pyarrow(path)
    from pyarrow import parquet

    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    schema = pa.schema(build_parquet_columns(pa), {"huggingface": json.dumps(features)})
    with path.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
        for group in iter_row_groups(images):
            table = [{"image": {"bytes": data, "path": name}, **values} for name, data, values in group]
            writer.write_table(pa.Table.from_pylist(table, schema))


def build_parquet_columns(pa: Any) -> list[tuple[str, Any]]:
    """The columns of a parquet file with their types."""
    real, whole, text = pa.float64(), pa.int64(), pa.string()
    types = {"str": text, "int": whole, "float": real, "tuple[float": pa.list_(real), "tuple[int": pa.list_(whole)}
    request = {
        field.name: next(types[begin] for begin in types if str(field.type).startswith(begin))
        for field in fields(Request)
        if field.name not in ("prompt", "latents", *INPUT_IMAGE_FIELDS)
    }
    begun = {f"begun_from_{name}": text for name in INPUT_IMAGE_FIELDS}
    image = pa.struct({"bytes": pa.binary(), "path": text})
    return list({"image": image, "id": text, "text": text, "model": text, **request, **begun}.items())


def iter_row_groups(images: Iterable[ExportedImage]) -> Iterator[Sequence[ExportedImage]]:
    """Pictures in row groups."""
    group: list[ExportedImage] = []
    for picture in images:
        group.append(picture)
        if len(group) == GROUP_ROWS or sum(len(each.data) for each in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


EXPORT_FORMATS: dict[str, tuple[str, Callable[[Path, Iterable[ExportedImage]], None]]] = {
    "webdataset": ("tar", write_tar),
    "parquet": ("parquet", write_parquet),
}
