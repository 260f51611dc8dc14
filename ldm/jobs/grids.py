"""Contact sheets of a job over one or two fields of its requests: a sheet for each combination of all others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from ldm.diffusion.spacing import choose
from ldm.files import atomic_write
from ldm.images import save_png
from ldm.jobs import sheets
from ldm.jobs.gallery import FIELD_LABELS, list_gallery_fields, read_finished_records
from ldm.jobs.manifest import MANIFEST_FILE

GRID_FOLDER = "grids"
MAX_SHEETS, MAX_CELLS = 100, 1000  # of a grid; of a sheet: about 70 million pixels

T = TypeVar("T")
GridCells = dict[tuple[str, str], T]  # by the texts of row and column


def parse_grid_axes(option: str) -> list[str]:
    """The fields of `--grid COLUMNS[,ROWS]`, by their own names or those that the page shows."""
    labels = {FIELD_LABELS.get(own, own): own for own in list_gallery_fields()}
    given = [word.strip().replace("-", "_") for word in option.split(",")]
    found = [name if name in list_gallery_fields() else choose(labels, name, "--grid") for name in given]
    if len(found) > 2 or len(set(found)) < len(found):
        raise ValueError(f"--grid {option}: must be one field, for columns, or two, for columns and rows")
    return found


def layout_sheets(
    entries: Iterable[tuple[Mapping[str, Any], T]], axes: Sequence[str]
) -> list[tuple[str, GridCells[T]]]:
    """The title of each sheet and its cells, of (request's record, what stands in its cell).

    A title is the prompt and what differs between sheets. ValueError for more than `MAX_SHEETS`, or than `MAX_CELLS` in one.
    """
    others = [name for name in list_gallery_fields() if name not in axes]
    found: dict[tuple[str, ...], GridCells[T]] = {}
    for record, item in entries:
        told = {**record, "size": f"{record['width']} × {record['height']}"}
        column, row = [format_field_value(told[name]) for name in axes] + [""] * (2 - len(axes))
        cells = found.setdefault(tuple(format_field_value(told[name]) for name in others), {})
        cells.setdefault((row, column), item)
        if len(found) > MAX_SHEETS or len(cells) > MAX_CELLS:
            break
    differ = [others[k] for k in differing_positions(found)]
    if len(found) > MAX_SHEETS:
        told_apart = ", ".join(FIELD_LABELS.get(name, name) for name in differ)
        raise ValueError(f"--grid {','.join(axes)}: more than {MAX_SHEETS} sheets, one for each {told_apart}")
    if any(count_cells(cells) > MAX_CELLS for cells in found.values()):
        raise ValueError(f"--grid {','.join(axes)}: more than {MAX_CELLS} cells in a sheet")
    titled = [name for name in others if name == "prompt" or name in differ]

    def title(key: tuple[str, ...]) -> str:
        told = ((name, text) for name, text in zip(others, key, strict=True) if name in titled and text)
        return " · ".join(format_label_prefix(name) + text for name, text in told)

    return [(title(key), cells) for key, cells in found.items()]


def check_grid_size(folder: Path, records: Iterable[Mapping[str, Any]], axes: Sequence[str]) -> None:
    """ValueError where requests, with those that a job's folder has already, make too large a grid."""
    held = (line["request"] for line in read_finished_records(folder)[0]) if (folder / MANIFEST_FILE).is_file() else ()
    layout_sheets(((record, None) for record in chain(records, held)), axes)


def count_cells(cells: GridCells) -> int:
    """The rows of a sheet times its columns."""
    rows, columns = (len({key[axis] for key in cells}) for axis in (0, 1))
    return rows * columns


def differing_positions(keys: Iterable[tuple[str, ...]]) -> list[int]:
    """At which places some tuples differ."""
    return [k for k, texts in enumerate(zip(*keys, strict=True)) if len(set(texts)) > 1]


def write_contact_sheets(folder: Path, axes: Sequence[str]) -> list[Path]:
    """Write the sheets of a job's finished pictures as `grids/COLUMNS-ROWS/000.png` and on; their paths, of none none.

    Both axes are labelled; a cell whose picture is missing is grey.
    """
    entries = [(line["request"], folder / line["file"]) for line in read_finished_records(folder)[0]]
    if not entries:
        return []
    target = folder / GRID_FOLDER / "-".join(axes)
    names = []
    with atomic_write(target) as draft:
        draft.mkdir()
        for k, (title, cells) in enumerate(layout_sheets(entries, axes)):
            names.append(f"{k:03d}.png")
            prefixes = ["", *map(format_label_prefix, reversed(axes))][-2:]
            save_png(sheets.render_contact_sheet(cells, prefixes, title), draft / names[-1], {"Title": title})
    return [target / name for name in names]


def format_label_prefix(name: str) -> str:
    """What stands before a field's value; a prompt needs no word."""
    return "" if name == "prompt" else f"{FIELD_LABELS.get(name, name.replace('_', ' '))} "


def format_field_value(value: Any) -> str:
    """A value as text; lists and nothing as the page writes them."""
    if isinstance(value, list | tuple):
        return ", ".join(map(format_field_value, value))
    if isinstance(value, Mapping):  # a picture's pixels
        return str(value["sha256"])[:8]
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
