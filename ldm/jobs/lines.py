"""Lines of a file of any size, one at a time: UTF-8 with or without a byte-order mark, ending in LF or CR LF."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import count
from typing import BinaryIO, NamedTuple

MAX_LINE_BYTES = 2**20  # bytes
UTF16_BOMS = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE


class ParseError(ValueError):
    """What is wrong with a file from `line` on; 0 is the file as a whole."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class RawLine(NamedTuple):
    """The bytes of a line, its end included, and its number, from 1."""

    number: int
    data: bytes

    def decode(self) -> str:
        """The line's text; Fault where it is not UTF-8 or holds a NUL."""
        try:
            text = self.data.decode()
        except UnicodeDecodeError as error:
            raise ParseError(self.number, f"byte {error.start + 1} is not UTF-8") from None
        if "\0" in text:
            raise ParseError(self.number, f"character {text.index(chr(0)) + 1} is a NUL")
        return text


def read_lines(file: BinaryIO) -> Iterator[RawLine]:
    """The lines of a file, without its byte-order mark; Fault at one of more than `MAX_LINE_BYTES` bytes, read no further."""
    for number in count(1):
        data = file.readline(MAX_LINE_BYTES + 1)
        if number == 1:
            if data.startswith(UTF16_BOMS):
                raise ParseError(1, "is UTF-16: save it as UTF-8")
            data = data.removeprefix(codecs.BOM_UTF8)
        if len(data) > MAX_LINE_BYTES:
            raise ParseError(number, f"longer than {MAX_LINE_BYTES} bytes")
        if data:
            yield RawLine(number, data)
        elif number > 1:
            return
