"""Contact sheets (A1111's X/Y/Z plot) of a job over one or two fields, a sheet per combination of the other fields."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageDraw, ImageFont

from ldm.errors import choose
from ldm.files import atomic_write
from ldm.jobs.gallery import FIELD_LABELS, list_gallery_fields, load_thumbnail, read_finished_records
from ldm.jobs.manifest import MANIFEST_FILE
from ldm.metadata import save_png

GRID_FOLDER = "grids"
MAX_SHEETS, MAX_CELLS = 100, 1000  # of a grid; of a sheet: about 70 million pixels
MAX_CELL_SIDE, CELL_GAP, SHEET_MARGIN, ROW_LABEL_WIDTH = 256, 8, 16, 200  # pixels
CHAR_WIDTH, LINE_HEIGHT, FONT_SIZE = 7, 18, 14  # pixels; a character's width on average
BACKGROUND_COLOR, TEXT_COLOR, MISSING_COLOR = "white", "#1b1b1f", "#d4d4d4"

Content = TypeVar("Content")  # of a cell
Cells = dict[tuple[str, str], Content]  # by the labels of row and column


def render_contact_sheet(cells: Mapping[tuple[str, str], Path], prefixes: Sequence[str], title: str) -> Image.Image:
    """Images at their labels of row and column, each shrunk to fit its cell; grey where one is missing.

    `prefixes` stand before the labels of rows and of columns. Numbers are sorted, other labels keep their order.
    """
    rows, columns = (sort_unique(key[axis] for key in cells) for axis in (0, 1))
    width, height = cell_size(cells.values())
    left = SHEET_MARGIN + min(ROW_LABEL_WIDTH, max(len(prefixes[0] + text) * CHAR_WIDTH for text in rows)) + CELL_GAP
    across, down = width + CELL_GAP, max(height, LINE_HEIGHT) + CELL_GAP
    right = left + len(columns) * across + SHEET_MARGIN
    head = wrap_label(title, right - 2 * SHEET_MARGIN)
    labels = [wrap_label(prefixes[1] + text, width) for text in columns]
    top = SHEET_MARGIN + (LINE_HEIGHT * len(head) + CELL_GAP if head else 0)
    top += LINE_HEIGHT * max(map(len, labels)) + CELL_GAP
    sheet = Image.new("RGB", (right, top + len(rows) * down + SHEET_MARGIN), BACKGROUND_COLOR)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT_SIZE)

    def write(lines: Sequence[str], x: float, y: float, anchor: str, align: str) -> None:
        spacing = LINE_HEIGHT - FONT_SIZE
        draw.multiline_text((x, y), "\n".join(lines), TEXT_COLOR, font, anchor=anchor, align=align, spacing=spacing)

    write(head, SHEET_MARGIN, SHEET_MARGIN, "la", "left")
    for j, label in enumerate(labels):
        write(label, left + j * across + width / 2, top - CELL_GAP, "md", "center")
    for i, row in enumerate(rows):
        label = wrap_label(prefixes[0] + row, ROW_LABEL_WIDTH, height // LINE_HEIGHT)
        write(label, left - CELL_GAP, top + i * down + height / 2, "rm", "right")
        for j, column in enumerate(columns):
            file = cells.get((row, column))
            image = None if file is None else load_thumbnail(file, max(width, height))
            image = image or Image.new("RGB", (width, height), MISSING_COLOR)
            x, y = left + j * across + (width - image.width) // 2, top + i * down + (height - image.height) // 2
            sheet.paste(image, (x, y))
    return sheet


def cell_size(files: Iterable[Path]) -> tuple[int, int]:
    """The width and height that hold every image, shrunk to at most `MAX_CELL_SIDE`."""
    sizes = [(MAX_CELL_SIDE // 4, MAX_CELL_SIDE // 4)]
    for file in files:
        try:
            with Image.open(file) as image:  # reads the header alone
                scale = min(1, MAX_CELL_SIDE / max(image.size))
                sizes.append((round(image.width * scale), round(image.height * scale)))
        except (OSError, SyntaxError, Image.DecompressionBombError):
            continue
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def sort_unique(texts: Iterable[str]) -> list[str]:
    """Each text once: sorted if all are numbers, else in their order."""
    unique = list(dict.fromkeys(texts))
    try:
        return sorted(unique, key=float)
    except ValueError:
        return unique


def wrap_label(text: str, width: int, max_lines: int = 4) -> list[str]:
    """A label in at most `max_lines` lines of `width` pixels."""
    return textwrap.wrap(text, max(1, width // CHAR_WIDTH), max_lines=max(1, max_lines), placeholder=" …")


def parse_grid_axes(option: str) -> list[str]:
    """The fields of `--grid COLUMNS[,ROWS]`, by their own names or their labels in the gallery."""
    labels = {FIELD_LABELS.get(name, name): name for name in list_gallery_fields()}
    names = [name.strip().replace("-", "_") for name in option.split(",")]
    axes = [name if name in list_gallery_fields() else choose(labels, name, "--grid") for name in names]
    if len(axes) > 2 or len(set(axes)) < len(axes):
        raise ValueError(f"--grid {option}: must be one field, for columns, or two, for columns and rows")
    return axes


def layout_sheets(
    entries: Iterable[tuple[Mapping[str, Any], Content]], axes: Sequence[str]
) -> list[tuple[str, Cells[Content]]]:
    """The title and the cells of each sheet, from (request's record, content of its cell).

    A title is the prompt and what differs between sheets. ValueError beyond `MAX_SHEETS` or `MAX_CELLS`.
    """
    others = [name for name in list_gallery_fields() if name not in axes]
    sheets: dict[tuple[str, ...], Cells[Content]] = {}
    for record, content in entries:
        values = {**record, "size": f"{record['width']} × {record['height']}"}
        column, row = [format_field_value(values[name]) for name in axes] + [""] * (2 - len(axes))
        cells = sheets.setdefault(tuple(format_field_value(values[name]) for name in others), {})
        cells.setdefault((row, column), content)
        if len(sheets) > MAX_SHEETS or len(cells) > MAX_CELLS:
            break
    differing = [name for name, texts in zip(others, zip(*sheets, strict=True), strict=False) if len(set(texts)) > 1]
    if len(sheets) > MAX_SHEETS:
        labels = ", ".join(FIELD_LABELS.get(name, name) for name in differing)
        raise ValueError(f"--grid {','.join(axes)}: more than {MAX_SHEETS} sheets, one for each {labels}")
    for cells in sheets.values():
        rows, columns = (len({key[axis] for key in cells}) for axis in (0, 1))
        if rows * columns > MAX_CELLS:
            raise ValueError(f"--grid {','.join(axes)}: more than {MAX_CELLS} cells in a sheet")

    def format_title(key: tuple[str, ...]) -> str:
        titled = ((n, text) for n, text in zip(others, key, strict=True) if text and (n == "prompt" or n in differing))
        return " · ".join(format_label_prefix(name) + text for name, text in titled)

    return [(format_title(key), cells) for key, cells in sheets.items()]


def check_grid_size(folder: Path, records: Iterable[Mapping[str, Any]], axes: Sequence[str]) -> None:
    """ValueError where requests, with the images that a job's folder already has, make too large a grid."""
    done = (row["request"] for row in read_finished_records(folder)[0]) if (folder / MANIFEST_FILE).is_file() else ()
    layout_sheets(((record, None) for record in chain(records, done)), axes)


def write_contact_sheets(folder: Path, axes: Sequence[str]) -> list[Path]:
    """Write the sheets of a job's finished images as `grids/COLUMNS-ROWS/000.png` and on; returns their paths."""
    entries = [(record["request"], folder / record["file"]) for record in read_finished_records(folder)[0]]
    if not entries:
        return []
    target = folder / GRID_FOLDER / "-".join(axes)
    prefixes = ["", *map(format_label_prefix, reversed(axes))][-2:]
    names = []
    with atomic_write(target) as draft:
        draft.mkdir()
        for k, (title, cells) in enumerate(layout_sheets(entries, axes)):
            names.append(f"{k:03d}.png")
            save_png(render_contact_sheet(cells, prefixes, title), draft / names[-1], {"Title": title})
    return [target / name for name in names]


def format_label_prefix(name: str) -> str:
    """A field's label before its value; none for a prompt."""
    return "" if name == "prompt" else f"{FIELD_LABELS.get(name, name.replace('_', ' '))} "


def format_field_value(value: Any) -> str:
    """A field's value as the gallery shows it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(format_field_value, value))
    if isinstance(value, Mapping):  # the digest of an image
        return str(value["sha256"])[:8]
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
