"""The images of a job as a data set for trainers: webdataset tars or parquet files, the same bytes for the same job."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from ldm.data.shards import import_pyarrow
from ldm.files import atomic_write, read_json, rename_noreplace
from ldm.jobs.manifest import RowSpan, check_job_folder, read_finished_rows
from ldm.pipeline.request import REQUEST_FIELDS, Request, complete_record

ROW_GROUP_IMAGES, ROW_GROUP_BYTES = 100, 2**24  # whichever ends a parquet row group first; one is read as a whole
INPUT_IMAGE_FIELDS = "image", "mask"
RECORD_FIELDS = frozenset(Request("").to_record())


class ExportedImage(NamedTuple):
    """The bytes of an image file, its name (id and suffix), and the settings that it was generated with."""

    name: str
    data: bytes
    settings: dict[str, Any]


def export_job(
    folder: Path, out: Path, export_format: str, shard_size: int, on_progress: Callable[[int, int], None]
) -> tuple[int, int]:
    """Write a job's finished images to `out` in shards of `shard_size`, all or nothing; returns (images, shards).

    `export_format` is a key of `EXPORT_FORMATS`; `on_progress` receives the numbers of images written and in all.
    It keeps about 350 bytes per image. ValueError where `out` exists, the folder is no job's or has no image, or an
    image is not the one that was finished; OSError with a file's name where `out` cannot be written.
    """
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already")
    check_job_folder(folder)
    suffix, write_shard = EXPORT_FORMATS[export_format]
    if suffix == "parquet":
        import_pyarrow(out)
    extra_types: dict[str, set[str]] = {}

    def keep(record: dict[str, Any], span: RowSpan) -> RowSpan:
        for name, value in read_extra(record).items():
            extra_types.setdefault(name, set()).add(classify_extra(value))
        return span

    with ExitStack() as stack:
        spans, _ = read_finished_rows(folder, keep, stack)
        if not spans:
            raise ValueError(f"{folder}: no finished images in it")
        model = read_json(folder / "job.json").get("model")
        if not isinstance(model, str):
            raise ValueError(f"{folder / 'job.json'}: names no model")
        starts = range(0, len(spans), shard_size)

        def load_images(start: int) -> Iterator[ExportedImage]:
            for k in range(start, min(start + shard_size, len(spans))):
                on_progress(k, len(spans))
                yield load_finished_image(folder, spans[k], model)

        with atomic_write(out.absolute(), rename_noreplace) as draft:
            draft.mkdir()
            for k, start in enumerate(starts):
                shard = draft / f"{k:06d}.{suffix}"
                try:
                    write_shard(shard, load_images(start), extra_types)
                except OSError as error:
                    error.filename = error.filename or str(out / shard.name)  # a write that fails names no file
                    raise
    return len(spans), len(starts)


def load_finished_image(folder: Path, span: RowSpan, model: str) -> ExportedImage:
    """The image of a manifest line; ValueError where its file has another hash than the line."""
    record = json.loads(span.read())
    record["request"] = complete_record(record["request"])
    path = folder / record["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: run the job again to generate it") from None
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise ValueError(f"{path}: not as it was finished: run the job with --check to generate it again")
    return ExportedImage(f"{record['id']}{path.suffix}", data, flatten_settings(record, model))


def flatten_settings(record: dict[str, Any], model: str) -> dict[str, Any]:
    """The settings of an image, its prompt as `text`; input images are the hash of their pixels, `begun_from_...`.

    The further columns of the job's table follow under their own names, or as `extra_<name>` where a setting has it.
    """
    values = dict(record["request"]) | read_extra(record)
    inputs = {f"begun_from_{name}": (digest := values.pop(name)) and digest["sha256"] for name in INPUT_IMAGE_FIELDS}
    return {"id": record["id"], "text": values.pop("prompt"), "model": model, **values, **inputs}


def read_extra(record: dict[str, Any]) -> dict[str, Any]:
    """The further columns of the table that an image's prompt is from, by their names in the data set."""
    extra = record.get("extra")
    taken = {"id", "text", "model", "image", *(f"begun_from_{name}" for name in INPUT_IMAGE_FIELDS), *RECORD_FIELDS}
    values = extra.items() if isinstance(extra, dict) else ()
    return {f"extra_{name}" if name in taken else name: value for name, value in values if value is not None}


def classify_extra(value: Any) -> str:
    """The key in `EXTRA_TYPES` of a value of a further column."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) < 2**63 else "other"
    return type(value).__name__ if isinstance(value, float | str) else "other"


def write_tar(path: Path, images: Iterable[ExportedImage], extra_types: Mapping[str, set[str]]) -> None:
    """A webdataset tar: for each image its file, the prompt as `.txt`, all settings as `.json`."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, settings in images:
            record = json.dumps(settings, indent=1).encode()
            base = settings["id"]
            for member, content in ((name, data), (f"{base}.txt", settings["text"].encode()), (f"{base}.json", record)):
                entry = tarfile.TarInfo(member)  # without owner and time
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            tar.getmembers().clear()  # else it keeps them all


def write_parquet(path: Path, images: Iterable[ExportedImage], extra_types: Mapping[str, set[str]]) -> None:
    """A parquet file that `datasets` opens with its images: a row per image, a column per setting.

    A further column of the job's table has the type of its values; of several types they are JSON.
    """
    pa = import_pyarrow(path)
    from pyarrow import parquet

    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    extra = {name: choose_extra_type(types) for name, types in extra_types.items()}
    columns = [*build_parquet_columns(pa), *((name, EXTRA_TYPES[kind](pa)) for name, kind in extra.items())]
    schema = pa.schema(columns, {"huggingface": json.dumps(features)})
    with path.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:
        for group in iter_row_groups(images):
            rows = [{"image": {"bytes": data, "path": name}, **settings} for name, data, settings in group]
            for row in rows:
                as_json = (name for name, kind in extra.items() if kind == "other" and name in row)
                row |= {name: json.dumps(row[name]) for name in as_json}
            writer.write_table(pa.Table.from_pylist(rows, schema))


EXTRA_TYPES: dict[str, Callable[[Any], Any]] = {
    "bool": lambda pa: pa.bool_(),
    "int": lambda pa: pa.int64(),
    "float": lambda pa: pa.float64(),
    "str": lambda pa: pa.string(),
    "other": lambda pa: pa.string(),  # JSON
}


def choose_extra_type(types: set[str]) -> str:
    """The key in `EXTRA_TYPES` of a column with values of these types."""
    return next(iter(types)) if len(types) == 1 else "float" if types == {"int", "float"} else "other"


def build_parquet_columns(pa: Any) -> list[tuple[str, Any]]:
    """The columns of a parquet file with their types."""
    real, whole, text = pa.float64(), pa.int64(), pa.string()
    types = {"str": text, "int": whole, "float": real, "tuple[float": pa.list_(real), "tuple[int": pa.list_(whole)}
    request = {
        field.name: next(types[begin] for begin in types if str(field.type).startswith(begin))
        for field in fields(Request)
        if field.name in REQUEST_FIELDS and field.name not in ("prompt", *INPUT_IMAGE_FIELDS)
    }
    inputs = {f"begun_from_{name}": text for name in INPUT_IMAGE_FIELDS}
    image = pa.struct({"bytes": pa.binary(), "path": text})
    request["seed"] = pa.uint64()
    return list({"image": image, "id": text, "text": text, "model": text, **request, **inputs}.items())


def iter_row_groups(images: Iterable[ExportedImage]) -> Iterator[Sequence[ExportedImage]]:
    group: list[ExportedImage] = []
    for image in images:
        group.append(image)
        if len(group) == ROW_GROUP_IMAGES or sum(len(image.data) for image in group) >= ROW_GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


ShardWriter = Callable[[Path, Iterable[ExportedImage], Mapping[str, set[str]]], None]
EXPORT_FORMATS: dict[str, tuple[str, ShardWriter]] = {
    "webdataset": ("tar", write_tar),
    "parquet": ("parquet", write_parquet),
}
