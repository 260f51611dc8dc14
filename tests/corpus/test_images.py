"""Image files as people have them: sound images in damaged files, what is no image, and what is no file."""

import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, noise
from PIL import Image

from ldm.image_io import decode_image, read_image, read_image_size, read_mask
from ldm.metadata import read_image_and_metadata

PIXELS = noise(9, 6)


def png_chunk(kind, body, damage=0):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ damage)


def with_chunk(chunk):
    """A PNG of PIXELS with a further chunk before its pixels."""
    data = encoded(PIXELS)
    return data[:33] + chunk + data[33:]


def turned_by(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(PIXELS, exif=exif)


def tiff(samples, photometric, order="<"):
    """An uncompressed TIFF of 16 bits, uint16 [H, W, C], which Pillow cannot write."""
    height, width, channels = samples.shape
    data = samples.astype(order + "u2").tobytes()
    start = 8 + len(data)
    values = {256: width, 257: height, 259: 1, 262: photometric, 273: 8, 277: channels, 278: height, 279: len(data)}
    tags = [(tag, 4, 1, value) for tag, value in values.items()]
    tags = sorted([*tags, (258, 3, channels, start + 2 + 12 * (len(tags) + 1) + 4)])
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "I", start)
    directory = b"".join(struct.pack(order + "HHII", *tag) for tag in tags)
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    return head + data + struct.pack(order + "H", len(tags)) + directory + bytes(4) + bits


DEEP = PIXELS.astype(np.uint16) * 257
LONG = zlib.compress(bytes(3_000_000))
VERY_LONG = zlib.compress(bytes(20_000_000))
SOUND = {  # the same pixels, and the kinds of notices
    "a long text": (with_chunk(png_chunk(b"zTXt", b"a\0\0" + LONG)), []),
    "a very long text": (with_chunk(png_chunk(b"zTXt", b"a\0\0" + VERY_LONG)), ["metadata"]),
    "a very long profile": (with_chunk(png_chunk(b"iCCP", b"a\0\0" + VERY_LONG)), ["metadata"]),
    "a text's checksum": (with_chunk(png_chunk(b"tEXt", b"a\0b", damage=1)), ["metadata"]),
    "a date's checksum": (with_chunk(png_chunk(b"tIME", bytes(7), damage=1)), ["metadata"]),
    "a damaged text": (with_chunk(png_chunk(b"zTXt", b"a\0\0no")), []),
    "junk in EXIF": (with_chunk(png_chunk(b"eXIf", b"junk of some kind")), ["EXIF"]),
    "junk after EXIF's start": (with_chunk(png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + bytes(5))), []),
    "a damaged profile": (with_chunk(png_chunk(b"iCCP", b"a\0\0no")), ["color profile"]),
    "no end chunk": (encoded(PIXELS)[:-12], []),
    "another file behind": (encoded(PIXELS) + b"PK\3\4" + bytes(99), []),
    "turned by nothing": (turned_by(0), []),
    "turned by more than there is": (turned_by(9), []),
    "16 bits in a TIFF": (tiff(DEEP, 2), []),
    "16 bits in a big-endian TIFF": (tiff(DEEP, 2, ">"), []),
}


@pytest.mark.parametrize("case", SOUND)
def test_damage_outside_of_the_pixels_gives_a_notice_at_most(case, capfd):
    data, notices = SOUND[case]
    decoded = decode_image(data)
    assert np.array_equal(np.asarray(decoded.rgb), PIXELS) and read_image_size(data) == (9, 6)
    assert [kind for kind, _ in decoded.notices] == notices
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}])
def test_a_jpeg_without_its_last_bytes_gives_a_notice(options):
    photo = np.asarray(Image.fromarray(noise(12, 16)).resize((96, 128), Image.Resampling.BICUBIC))
    data = encoded(photo, "JPEG", **options)
    for missing in (2, 3, 10, 40):
        decoded = decode_image(data[:-missing])
        assert np.array_equal(np.asarray(decoded.rgb)[:96], np.asarray(decode_image(data).rgb)[:96])
        assert [kind for kind, _ in decoded.notices] == ["truncated"]


PHOTO = encoded(noise(64, 64), "JPEG")
BOMB = bytearray(encoded(Image.new("1", (8, 8)), "PPM"))
BOMB[3:6] = b"40000 40000"
TURNED_CODE = bytearray(encoded(PIXELS, "TIFF", compression="tiff_lzw"))
TURNED_CODE[12:20] = b"\xff" * 8
REFUSED = {  # a file, and the error
    "empty": (b"", "the file is empty"),
    "text": (b"hello", "not an image"),
    "a web page": (b"\n<!DOCTYPE html><html>404", "a web page"),
    "SVG": (b"<svg xmlns='x'/>", "SVG images are not read"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
    "a bomb": (bytes(BOMB), "million pixels"),
    "too long": (encoded(Image.new("1", (200_000, 1))), "a side of more than"),
    "without its half": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "no size": (b"GIF89a\0\0\0\0\0\0\0;", ""),
    "codes that are none": (bytes(TURNED_CODE), ""),
    "more samples than there are": (tiff(np.zeros((2, 2, 99), np.uint16), 2), ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_image_is_one_line_and_the_libraries_are_silent(case, capfd, tmp_path):
    data, said = REFUSED[case]
    (tmp_path / "x.png").write_bytes(data)
    logging.getLogger().handlers, handlers = [], logging.getLogger().handlers  # pytest's
    try:
        for read in (read_image, read_mask):
            with pytest.raises(ValueError, match=f"x.png: .*{said}") as error:
                read(tmp_path / "x.png")
            assert "\n" not in str(error.value)
    finally:
        logging.getLogger().handlers = handlers
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_an_image_cut_short_is_refused_not_shown_in_part(form):
    data = encoded(noise(64, 64), form)
    for share in (0.3, 0.6) if form == "JPEG" else (0.3, 0.6, 0.9, 0.99):
        with pytest.raises(ValueError) as told:
            decode_image(data[: int(len(data) * share)])
        assert "\n" not in str(told.value)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        for read in (read_image, read_mask, read_image_and_metadata):
            with pytest.raises(ValueError, match=f"{path}: .*not a regular file"):
                read(path)
