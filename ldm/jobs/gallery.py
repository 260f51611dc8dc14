"""A job's pictures on one page that opens from disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ldm.files import atomic_write
from ldm.jobs import contact_sheets
from ldm.jobs.manifest import iter_manifest_rows as rows_of
from ldm.jobs.manifest import list_manifest_files
from ldm.jobs.outputs import read_image_and_metadata
from ldm.metadata import parse_generation_parameters
from ldm.pipeline.request import REQUEST_FIELDS, Request

GALLERY_TEMPLATE = Path(__file__).with_name("gallery.html")
GALLERY_PAGE, GALLERY_DATA, THUMBNAIL_FOLDER = "index.html", "index.data", "thumbs"
ROWS_PER_CHUNK = 5000  # rows in a file of the page's data: parsed in less than a frame
THUMBNAIL_SIZE = 256  # pixels: the longest side of a thumbnail
JS_INTEGER_LIMIT = 2**53  # integers beyond it are not JavaScript's numbers

RECORD_FIELDS = tuple(Request("").to_record())
FIELD_LABELS = {name: spec.option for name, spec in REQUEST_FIELDS.items() if spec.option != name}
GENERATE_OPTIONS = {  # of `ldm generate`; images are named beside the command, and clip_skip is counted otherwise there
    name: f"--{spec.option.replace('_', '-')}"
    for name, spec in REQUEST_FIELDS.items()
    if spec.help and name not in ("image", "mask", "clip_skip")
}


class GalleryTable(NamedTuple):
    """Pictures as columns: what all share is told once, what differs a row each."""

    common: dict[str, Any]
    columns: list[str]
    rows: list[list[Any]]


def write_gallery(folder: Path) -> Path:
    """Write the page of a job's finished pictures, `index.html`; returns its path.

    Beside it are `thumbs/` and `index.data/`; these and `images/` are all that it needs: no server and no network.
    Written again, it makes only the thumbnails that are missing. ValueError where the folder holds no manifest.
    """
    folder = Path(folder)
    done, failed = read_finished_records(folder)
    make_thumbnails(folder, done)
    table = build_gallery_table([build_gallery_entry(folder, line) for line in done])
    chunks = write_row_chunks(folder / GALLERY_DATA, table.rows)
    title, model, words = read_job_info(folder)
    header = {
        "title": title,
        "words": words,
        "summary": " · ".join([model, *summarize_settings(table.common)]),
        "count": len(done),
        "failed": failed,
        "common": {**table.common, "model": model},
        "columns": table.columns,
        "fields": list_gallery_fields(),
        "record": RECORD_FIELDS,
        "defaults": Request("").to_record(),
        "labels": FIELD_LABELS,
        "options": GENERATE_OPTIONS,
        "chunks": [f"{GALLERY_DATA}/{name}" for name in chunks],
    }
    data = json.dumps(header).replace("<", "\\u003c")  # no text of a prompt ends the script
    with atomic_write(folder / GALLERY_PAGE) as draft:
        draft.write_text(GALLERY_TEMPLATE.read_text("utf-8").replace("HEADER", data), "utf-8")
    for old in set((folder / GALLERY_DATA).glob("*.js")) - {folder / GALLERY_DATA / name for name in chunks}:
        old.unlink()
    return folder / GALLERY_PAGE


def read_finished_records(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a job's finished pictures, in the order of its source, and how many items failed.

    A finished picture outlives a failure; of two the later line counts. ValueError where there is no manifest.
    """
    paths = [path for path in list_manifest_files(folder) if path.exists()] if folder.is_dir() else []
    if not paths:
        raise ValueError(f"{folder}: no manifest.jsonl, so not a job's folder")
    done, failed = dict[str, dict[str, Any]](), set[str]()
    for path in paths:
        with path.open("rb") as file:
            for record, *_ in rows_of(file):
                if record["status"] == "done":
                    done[record["id"]] = record
                else:
                    failed.add(record["id"])
    lines = sorted(done.values(), key=lambda line: (line["line"], line["request"]["seed"], line["id"]))
    return lines, len(failed - done.keys())


def list_gallery_fields() -> list[str]:
    """What pictures are told apart by: a request's fields, its two sides as one."""
    return [*(name for name in RECORD_FIELDS if name not in ("height", "width")), "size"]


def build_gallery_entry(folder: Path, line: Mapping[str, Any]) -> dict[str, Any]:
    """A picture's values by column, as JSON that JavaScript reads exactly."""
    request = line["request"]
    told = {name: line.get(name) for name in ("id", "file", "line", "seconds")}
    size = {"size": f"{request['width']} × {request['height']}"}
    exact = {name: str(v) if isinstance(v, int) and abs(v) >= JS_INTEGER_LIMIT else v for name, v in request.items()}
    return {
        **told,
        **exact,
        **size,
        **({"layer": read_clip_skip(folder / line["file"])} if request.get("clip_skip") else {}),
    }


def read_clip_skip(file: Path) -> str | None:
    """`--clip-skip` of a picture: `Request` counts from a layer of the model's own, the option from the last."""
    try:
        return parse_generation_parameters(read_image_and_metadata(file)[1]["parameters"]).get("Clip skip")
    except (ValueError, KeyError):
        return None


def build_gallery_table(entries: Sequence[Mapping[str, Any]]) -> GalleryTable:
    """Entries as a table; `id` and `file` are always columns."""
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    first = entries[0] if entries else {}
    shared = {n for n in names if n not in ("id", "file") and all(e.get(n) == first.get(n) for e in entries)}
    columns = [name for name in names if name not in shared]
    rows = [[entry.get(name) for name in columns] for entry in entries]
    return GalleryTable({name: first.get(name) for name in names if name in shared}, columns, rows)


def read_job_info(folder: Path) -> tuple[str, str, list[str]]:
    """A job's title, the name of its model, and the words that each of its commands has."""
    try:
        job = json.loads((folder / "job.json").read_bytes())
    except (OSError, ValueError):
        job = {}
    model = job.get("model") or "picto"
    title = Path(job.get("source") or folder.resolve().name).stem
    return title, model, job.get("words", [] if model == "picto" else ["--model", model])


def summarize_settings(common: Mapping[str, Any]) -> list[str]:
    """What pictures have in common, in a few words."""
    told = {name: common.get(name) for name in ("sampler", "spacing", *FIELD_LABELS, "size")}
    return [
        f"{FIELD_LABELS[name]} {value}" if name in FIELD_LABELS else str(value)
        for name, value in told.items()
        if value not in (None, "")
    ]


def write_row_chunks(folder: Path, rows: Sequence[Sequence[Any]]) -> list[str]:
    """Write rows as scripts, which a page may read from disk where it may not read JSON; returns the files' names.

    A file is named by what is in it: one that is there stays, and an old page keeps its own until the new one is there.
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


def thumbnail_path(folder: Path, line: Mapping[str, Any]) -> Path:
    """Where a picture's thumbnail is."""
    return folder / THUMBNAIL_FOLDER / line["id"][:2] / f"{line['id']}.webp"


def make_thumbnails(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Make the thumbnails that are missing; a picture that cannot be read gets none, and the page says so.

    One WebP file a picture: measured against sheets of many by `scripts/bench_gallery.py`.
    """

    def make(line: Mapping[str, Any]) -> None:
        small = contact_sheets.load_thumbnail(folder / line["file"], THUMBNAIL_SIZE)
        if small is not None:
            with atomic_write(thumbnail_path(folder, line)) as draft:
                small.save(draft, "WEBP", quality=82, method=2)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow works outside Python's lock
        for _ in pool.map(make, [line for line in lines if not thumbnail_path(folder, line).is_file()]):
            pass
