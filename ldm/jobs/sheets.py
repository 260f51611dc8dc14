"""Contact sheets over two axes, each labelled."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 256  # pixels: the longest side of a picture
GAP, MARGIN = 8, 16
LETTER, LINE, TYPE = 7, 18, 14  # pixels: a letter's usual width, a line's height, the size of the type
LABEL = 200  # pixels: the width of the rows' labels
GROUND, INK, MISSING = "white", "#1b1b1f", "#d4d4d4"

Cells = Mapping[tuple[str, str], Path]


def draw(cells: Cells, prefixes: Sequence[str], title: str) -> Image.Image:
    """Pictures by the texts of their row and column, each shrunk to fit its cell; what is missing is grey.

    The texts stand at the axes behind their prefix: rows, columns. Numbers stand in their order, other texts as they
    come.
    """
    rows, columns = (ordered(key[axis] for key in cells) for axis in (0, 1))
    width, height = cell_size(cells)
    left = MARGIN + min(LABEL, max(len(prefixes[0] + text) * LETTER for text in rows)) + GAP
    across, down = width + GAP, max(height, LINE) + GAP
    right = left + len(columns) * across + MARGIN
    head = lines(title, right - 2 * MARGIN)
    labels = LINE * max(len(lines(prefixes[1] + text, width)) for text in columns)
    top = MARGIN + (LINE * len(head) + GAP if head else 0) + labels + GAP
    canvas = Image.new("RGB", (right, top + len(rows) * down + MARGIN), GROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=TYPE)
    pen.multiline_text((MARGIN, MARGIN), "\n".join(head), INK, font, spacing=LINE - TYPE)
    for j, text in enumerate(columns):
        words = "\n".join(lines(prefixes[1] + text, width))
        at = left + j * across + width / 2, top - GAP
        pen.multiline_text(at, words, INK, font, anchor="md", align="center", spacing=LINE - TYPE)
    for i, text in enumerate(rows):
        words = "\n".join(lines(prefixes[0] + text, LABEL, height // LINE))
        middle = left - GAP, top + i * down + height / 2
        pen.multiline_text(middle, words, INK, font, anchor="rm", align="right", spacing=LINE - TYPE)
        for j, column in enumerate(columns):
            place(canvas, cells.get((text, column)), (left + j * across, top + i * down, width, height))
    return canvas


def place(canvas: Image.Image, file: Path | None, box: tuple[int, int, int, int]) -> None:
    """A picture in the middle of its cell (x, y, width, height), or grey."""
    x, y, width, height = box
    picture = None if file is None else shrunk(file, max(width, height))
    if picture is None:
        picture = Image.new("RGB", (width, height), MISSING)
    canvas.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))


def cell_size(cells: Cells) -> tuple[int, int]:
    """The width and height that hold every picture, shrunk to at most `SIDE`."""
    sizes = [(SIDE // 4, SIDE // 4)]
    for file in cells.values():
        try:
            with Image.open(file) as picture:  # reads the header alone
                share = min(1, SIDE / max(picture.size))
                sizes.append((round(picture.width * share), round(picture.height * share)))
        except (OSError, SyntaxError, Image.DecompressionBombError):
            continue
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def shrunk(file: Path, side: int) -> Image.Image | None:
    """A picture as RGB, no side longer than that; None where it cannot be read."""
    try:
        with Image.open(file) as picture:
            picture.thumbnail((side, side), reducing_gap=2)
            return picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None


def ordered(texts: Iterable[str]) -> list[str]:
    """Each text once: numbers in their order, anything else as it comes."""
    once = list(dict.fromkeys(texts))
    try:
        return sorted(once, key=float)
    except ValueError:
        return once


def lines(text: str, width: int, most: int = 4) -> list[str]:
    """A label in lines of so many pixels, cut behind `most` of them."""
    return textwrap.wrap(text, max(1, width // LETTER), max_lines=max(1, most), placeholder=" …")
