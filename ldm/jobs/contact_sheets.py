"""Contact sheets over two axes, each labelled.

Contact sheets of a job over one or two fields of its requests: a sheet for each combination of all others."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageDraw, ImageFont

from ldm.errors import choose
from ldm.files import atomic_write
from ldm.jobs.gallery import FIELD_LABELS, list_gallery_fields, read_finished_records
from ldm.jobs.manifest import MANIFEST_FILE
from ldm.metadata import save_png

MAX_CELL_SIDE = 256  # pixels: the longest side of a picture
CELL_GAP, SHEET_MARGIN = 8, 16
CHAR_WIDTH, LINE_HEIGHT, FONT_SIZE = 7, 18, 14  # pixels: a letter's usual width, a line's height, the size of the type
ROW_LABEL_WIDTH = 200  # pixels: the width of the rows' labels
BACKGROUND_COLOR, TEXT_COLOR, MISSING_COLOR = "white", "#1b1b1f", "#d4d4d4"

CellPaths = Mapping[tuple[str, str], Path]


def render_contact_sheet(cells: CellPaths, prefixes: Sequence[str], title: str) -> Image.Image:
    """Pictures by the texts of their row and column, each shrunk to fit its cell; what is missing is grey.

    The texts stand at the axes behind their prefix: rows, columns. Numbers stand in their order, other texts as they
    come.
    """
    rows, columns = (sort_unique(key[axis] for key in cells) for axis in (0, 1))
    width, height = cell_size(cells)
    left = SHEET_MARGIN + min(ROW_LABEL_WIDTH, max(len(prefixes[0] + text) * CHAR_WIDTH for text in rows)) + CELL_GAP
    across, down = width + CELL_GAP, max(height, LINE_HEIGHT) + CELL_GAP
    right = left + len(columns) * across + SHEET_MARGIN
    head = wrap_label(title, right - 2 * SHEET_MARGIN)
    labels = LINE_HEIGHT * max(len(wrap_label(prefixes[1] + text, width)) for text in columns)
    top = SHEET_MARGIN + (LINE_HEIGHT * len(head) + CELL_GAP if head else 0) + labels + CELL_GAP
    canvas = Image.new("RGB", (right, top + len(rows) * down + SHEET_MARGIN), BACKGROUND_COLOR)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=FONT_SIZE)
    pen.multiline_text((SHEET_MARGIN, SHEET_MARGIN), "\n".join(head), TEXT_COLOR, font, spacing=LINE_HEIGHT - FONT_SIZE)
    for j, text in enumerate(columns):
        words = "\n".join(wrap_label(prefixes[1] + text, width))
        at = left + j * across + width / 2, top - CELL_GAP
        pen.multiline_text(at, words, TEXT_COLOR, font, anchor="md", align="center", spacing=LINE_HEIGHT - FONT_SIZE)
    for i, text in enumerate(rows):
        words = "\n".join(wrap_label(prefixes[0] + text, ROW_LABEL_WIDTH, height // LINE_HEIGHT))
        middle = left - CELL_GAP, top + i * down + height / 2
        pen.multiline_text(middle, words, TEXT_COLOR, font, anchor="rm", align="right", spacing=LINE_HEIGHT - FONT_SIZE)
        for j, column in enumerate(columns):
            paste_cell(canvas, cells.get((text, column)), (left + j * across, top + i * down, width, height))
    return canvas


def paste_cell(canvas: Image.Image, file: Path | None, box: tuple[int, int, int, int]) -> None:
    """A picture in the middle of its cell (x, y, width, height), or grey."""
    x, y, width, height = box
    picture = None if file is None else load_thumbnail(file, max(width, height))
    if picture is None:
        picture = Image.new("RGB", (width, height), MISSING_COLOR)
    canvas.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))


def cell_size(cells: CellPaths) -> tuple[int, int]:
    """The width and height that hold every picture, shrunk to at most `MAX_CELL_SIDE`."""
    sizes = [(MAX_CELL_SIDE // 4, MAX_CELL_SIDE // 4)]
    for file in cells.values():
        try:
            with Image.open(file) as picture:  # reads the header alone
                share = min(1, MAX_CELL_SIDE / max(picture.size))
                sizes.append((round(picture.width * share), round(picture.height * share)))
        except (OSError, SyntaxError, Image.DecompressionBombError):
            continue
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def load_thumbnail(file: Path, max_side: int) -> Image.Image | None:
    """A picture as RGB, no side longer than that; None where it cannot be read."""
    try:
        with Image.open(file) as picture:
            picture.thumbnail((max_side, max_side), reducing_gap=2)
            return picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None


def sort_unique(texts: Iterable[str]) -> list[str]:
    """Each text once: numbers in their order, anything else as it comes."""
    once = list(dict.fromkeys(texts))
    try:
        return sorted(once, key=float)
    except ValueError:
        return once


def wrap_label(text: str, width: int, max_lines: int = 4) -> list[str]:
    """A label in lines of so many pixels, cut behind `most` of them."""
    return textwrap.wrap(text, max(1, width // CHAR_WIDTH), max_lines=max(1, max_lines), placeholder=" …")


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
            save_png(render_contact_sheet(cells, prefixes, title), draft / names[-1], {"Title": title})
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
