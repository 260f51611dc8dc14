"""A gallery of a job's images: one HTML page that opens from disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.files import atomic_write
from ldm.jobs.manifest import check_job_folder, read_finished_rows
from ldm.metadata import parse_generation_parameters, read_image_and_metadata
from ldm.pipeline.request import REQUEST_FIELDS, Request

GALLERY_TEMPLATE = Path(__file__).with_name("gallery.html")
GALLERY_PAGE, GALLERY_DATA, THUMBNAIL_FOLDER = "index.html", "index.data", "thumbs"
ROWS_PER_CHUNK = 5000  # of a data file: parsed in less than a frame
THUMBNAIL_SIZE = 256  # pixels, of the longer side
JS_INTEGER_LIMIT = 2**53  # JavaScript's numbers are exact below it

RECORD_FIELDS = tuple(Request("").to_record())
FIELD_LABELS = {name: spec.option for name, spec in REQUEST_FIELDS.items() if spec.option != name}
GENERATE_OPTIONS = {  # of `ldm generate`; images are named beside the command, and clip_skip is counted otherwise there
    name: f"--{spec.option.replace('_', '-')}"
    for name, spec in REQUEST_FIELDS.items()
    if spec.help and name not in ("image", "mask", "clip_skip")
}


def write_gallery(folder: Path) -> Path:
    """Write the page of a job's finished images, `index.html`; returns its path.

    Beside it are `thumbs/` and `index.data/`; with `images/` these are all that it needs: no server and no network.
    Written again, it makes only the thumbnails that are missing. ValueError where the folder holds no manifest.
    """
    folder = Path(folder)
    check_job_folder(folder)
    done, failed = read_finished_records(folder)
    make_thumbnails(folder, done)
    common, columns, rows = build_gallery_table([build_gallery_entry(folder, record) for record in done])
    chunks = write_row_chunks(folder / GALLERY_DATA, rows)
    title, model, cli_args = read_job_info(folder)
    header = {
        "title": title,
        "words": cli_args,
        "summary": " · ".join([model, *summarize_settings(common)]),
        "count": len(done),
        "failed": failed,
        "common": {**common, "model": model},
        "columns": columns,
        "fields": list_gallery_fields(),
        "record": RECORD_FIELDS,
        "defaults": Request("").to_record(),
        "labels": {**FIELD_LABELS, "seconds": "seconds, of its worker's time"},
        "options": GENERATE_OPTIONS,
        "chunks": [f"{GALLERY_DATA}/{name}" for name in chunks],
    }
    data = json.dumps(header).replace("<", "\\u003c")  # else a prompt could end the script
    with atomic_write(folder / GALLERY_PAGE) as draft:
        draft.write_text(GALLERY_TEMPLATE.read_text("utf-8").replace("HEADER", data), "utf-8")
    for old in set((folder / GALLERY_DATA).glob("*.js")) - {folder / GALLERY_DATA / name for name in chunks}:
        old.unlink()
    return folder / GALLERY_PAGE


def read_finished_records(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The manifest records of `read_finished_rows`, and the number of failed items."""
    with ExitStack() as stack:
        return read_finished_rows(folder, lambda record, span: record, stack)


def list_gallery_fields() -> list[str]:
    """The fields that tell images apart: those of a request, with height and width as `size`."""
    return [*(name for name in RECORD_FIELDS if name not in ("height", "width")), "size"]


def build_gallery_entry(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an image by column, as JSON that JavaScript reads exactly."""
    request = record["request"]
    entry = {name: record.get(name) for name in ("id", "file", "line", "seconds")}
    entry |= {k: str(v) if isinstance(v, int) and abs(v) >= JS_INTEGER_LIMIT else v for k, v in request.items()}
    entry["size"] = f"{request['width']} × {request['height']}"
    if request.get("clip_skip"):
        entry["layer"] = read_clip_skip(folder / record["file"])
    return entry


def read_clip_skip(file: Path) -> str | None:
    """The `--clip-skip` of an image: `Request` counts from the layer that the model uses, the option from the last."""
    try:
        return parse_generation_parameters(read_image_and_metadata(file)[1]["parameters"]).get("Clip skip")
    except (ValueError, KeyError):
        return None


def build_gallery_table(entries: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str], list[list[Any]]]:
    """The values that all entries have in common, and columns and rows of the others; `id` and `file` are columns."""
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    first = entries[0] if entries else {}
    shared = {n for n in names if n not in ("id", "file") and all(e.get(n) == first.get(n) for e in entries)}
    columns = [name for name in names if name not in shared]
    rows = [[entry.get(name) for name in columns] for entry in entries]
    return {name: first.get(name) for name in names if name in shared}, columns, rows


def read_job_info(folder: Path) -> tuple[str, str, list[str]]:
    """A job's title, the name of its model, and the arguments with which `ldm generate` loads the same model."""
    try:
        job = json.loads((folder / "job.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        job = {}
    job = job if isinstance(job, dict) else {}
    texts = {name: value for name in ("model", "source") if isinstance(value := job.get(name), str)}
    model = texts.get("model") or "picto"
    title = Path(texts.get("source") or folder.resolve().name).stem
    args = job.get("words")
    if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
        args = [] if model == "picto" else ["--model", model]
    return title, model, args


def summarize_settings(common: Mapping[str, Any]) -> list[str]:
    """The main settings that all images have in common."""
    values = {name: common.get(name) for name in ("sampler", "spacing", *FIELD_LABELS, "size")}
    labelled = ((FIELD_LABELS.get(name), value) for name, value in values.items() if value not in (None, ""))
    return [f"{label} {value}" if label else str(value) for label, value in labelled]


def write_row_chunks(folder: Path, rows: Sequence[Sequence[Any]]) -> list[str]:
    """Write rows as scripts, which a page may load from disk where it may not load JSON; returns the files' names.

    A file is named by its content, so that an existing one is kept, and an old page keeps its own until it is replaced.
    """
    names = []
    for k in range(0, len(rows), ROWS_PER_CHUNK):
        text = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows[k : k + ROWS_PER_CHUNK])
        script = f"take([\n{text}\n]);\n"
        names.append(f"{hashlib.sha256(script.encode()).hexdigest()[:16]}.js")
        if not (folder / names[-1]).is_file():
            with atomic_write(folder / names[-1]) as draft:
                draft.write_text(script, "utf-8")
    return names


def thumbnail_path(folder: Path, record: Mapping[str, Any]) -> Path:
    return folder / THUMBNAIL_FOLDER / record["id"][:2] / f"{record['id']}.webp"


def load_thumbnail(file: Path, max_side: int) -> Image.Image | None:
    """An image as RGB with no side longer than `max_side`; None where it cannot be decoded."""
    try:
        with Image.open(file) as image:
            image.thumbnail((max_side, max_side), reducing_gap=2)
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None


def make_thumbnails(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Make the thumbnails that are missing; an image that cannot be decoded gets none, and the page says so.

    One WebP file per image: `scripts/bench_gallery.py` compares this with sheets of many.
    """

    def make(record: Mapping[str, Any]) -> None:
        thumbnail = load_thumbnail(folder / record["file"], THUMBNAIL_SIZE)
        if thumbnail is not None:
            with atomic_write(thumbnail_path(folder, record)) as draft:
                thumbnail.save(draft, "WEBP", quality=82, method=2)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the interpreter lock
        for _ in pool.map(make, [record for record in records if not thumbnail_path(folder, record).is_file()]):
            pass
