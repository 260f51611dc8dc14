"""Lines of a file of any size, one at a time: UTF-8 with or without a byte-order mark, ending in LF or CR LF."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import count
from typing import BinaryIO, NamedTuple

MAX_LINE = 2**20  # bytes
UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


class Fault(ValueError):
    """What is wrong with a file from `line` on; 0 is the file as a whole."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


class Line(NamedTuple):
    """The bytes of a line, its end included, and its number, from 1."""

    number: int
    data: bytes

    def text(self) -> str:
        """The line's text; Fault where it is not UTF-8 or holds a NUL."""
        try:
            text = self.data.decode()
        except UnicodeDecodeError as error:
            raise Fault(self.number, f"byte {error.start + 1} is not UTF-8") from None
        if "\0" in text:
            raise Fault(self.number, f"character {text.index(chr(0)) + 1} is a NUL")
        return text


def lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file, without its byte-order mark; Fault at one of more than `MAX_LINE` bytes, read no further."""
    for number in count(1):
        data = file.readline(MAX_LINE + 1)
        if number == 1:
            if data.startswith(UTF16):
                raise Fault(1, "is UTF-16: save it as UTF-8")
            data = data.removeprefix(codecs.BOM_UTF8)
        if len(data) > MAX_LINE:
            raise Fault(number, f"longer than {MAX_LINE} bytes")
        if data:
            yield Line(number, data)
        elif number > 1:
            return
