"""Contact sheets over two axes, each labelled."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

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
