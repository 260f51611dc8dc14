"""Images survive the way to tensors and back; files and masks of any mode are decoded, or refused in one line."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.image_io import contact_sheet, from_uint8, read_image, read_mask, to_pil
from ldm.metadata import read_png_texts
from ldm.pipeline.request import Request


def test_every_level_survives_the_way_to_a_tensor_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    images = from_uint8(pixels)
    assert images.min() == -1 and images.max() == 1 and images.shape == (1, 3, 16, 16)
    assert np.array_equal(np.asarray(to_pil(images)[0]), pixels[0])


def test_rounding_is_to_nearest_and_what_lies_outside_is_clipped():
    levels = torch.tensor([-3.0, 3.0, 0.0, 1 / 127.5 * 0.6]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert np.asarray(to_pil(levels)[0])[:, :, 0].tolist() == [[0, 255], [128, 128]]


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "x.png").write_text("no")
    for name in ("x.png", "absent.png"):
        for read in (read_png_texts, read_image, read_mask):
            with pytest.raises(ValueError, match=name):
                read(tmp_path / name)


HALF = np.repeat([[255] * 4 + [0] * 4], 6, 0).astype(np.uint8)  # redrawn on the left
COLOURS = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)


def cut(colours, alpha):
    return Image.fromarray(np.dstack([np.broadcast_to(colours, (6, 8, 3)).astype(np.uint8), alpha]))


MASKS = {
    "grey": Image.fromarray(HALF),
    "16 bits": Image.fromarray(np.where(HALF > 0, 65535, 300).astype(np.uint16)),
    "1 bit": Image.fromarray(HALF > 0),
    "palette": Image.fromarray(HALF).convert("RGB").quantize(2),
    "opaque, with an alpha channel": cut(HALF[..., None], np.full_like(HALF, 255)),
    "a picture with holes": cut(COLOURS, 255 - HALF),
    "a picture with holes, white beneath": cut(np.where(HALF[..., None] > 0, 255, COLOURS), 255 - HALF),
    "black with holes": cut(np.zeros(3), 255 - HALF),
    "white strokes on nothing": cut(np.full(3, 255), HALF),
    "white strokes on black nothing": cut(HALF[..., None], HALF),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_read_whatever_its_mode(tmp_path, name):
    """The same from a file, and from one that a person opened."""
    MASKS[name].save(tmp_path / "mask.png")
    wanted = np.where(HALF == 0, MASKS[name].mode == "I;16", HALF)  # 300 of 65535 is 1 of 255
    assert np.array_equal(np.asarray(read_mask(tmp_path / "mask.png")), wanted)
    with Image.open(tmp_path / "mask.png") as opened:
        assert np.array_equal(np.asarray(Request("", mask=opened).mask), wanted)


def test_a_soft_mask_keeps_its_levels(tmp_path):
    levels = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    cut(COLOURS, levels).save(tmp_path / "holes.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "holes.png")), 255 - levels)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "grey.png")), levels)


def test_a_picture_s_transparency_is_white_and_its_sixteen_bits_are_scaled(tmp_path):
    cut(COLOURS, HALF).save(tmp_path / "a.png")
    Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257).save(tmp_path / "b.png")
    white = np.where(HALF[..., None] > 0, COLOURS, 255)
    for name, wanted in (("a.png", white), ("b.png", np.repeat(COLOURS[..., :1], 3, 2))):
        with Image.open(tmp_path / name) as opened:
            pictures = read_image(tmp_path / name), Request("", image=opened).image
        assert all(p.mode == "RGB" and np.array_equal(np.asarray(p), wanted) for p in pictures)


def file_of(form):
    """A small picture in that format."""
    file, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG" if form == "ICNS" else form)
    data = file.getvalue()
    if form == "ICNS":  # Pillow writes sizes of up to 1024
        data = b"icns" + struct.pack(">I", len(data) + 16) + b"icp4" + struct.pack(">I", len(data) + 8) + data
    return data


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["PPM", "DDS", "SGI", "ICNS", "JPEG2000", "GIF", "WEBP", "TIFF", "PNG", "JPEG", "PCX"])
def test_whatever_is_wrong_with_a_file_is_one_line_with_its_name(tmp_path, form):
    """Random bytes in place of some, most of them in the head; every third file is cut short."""
    rng, path, refused = np.random.default_rng(0), tmp_path / "x.png", 0
    whole = np.frombuffer(file_of(form), np.uint8)
    path.write_bytes(whole.tobytes())
    assert read_image(path).size == (16, 16)
    for k in range(150):
        data, reach = whole.copy(), len(whole) if k % 2 else min(len(whole), 120)
        places = rng.integers(0, reach, rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
        path.write_bytes(data[: rng.integers(len(data)) if k % 3 == 0 else None].tobytes())
        for read in (read_image, read_mask, read_png_texts):
            try:
                read(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                refused += 1
    assert refused > 50


def test_a_contact_sheet_shows_every_picture_over_its_caption():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    tiles = [Image.new("RGB", (40, 30), colour) for colour in colours]
    sheet = np.asarray(contact_sheet(tiles, ["a", "", "b"], columns=2)).astype(int)
    cells = [sheet[: len(sheet) // 2, :48], sheet[: len(sheet) // 2, 48:], sheet[len(sheet) // 2 :, :48]]
    for cell, colour, written in zip(cells, colours, (True, False, True), strict=True):
        assert (np.abs(cell - colour).sum(-1) == 0).sum() == 40 * 30
        assert (cell[36:].max(-1) < 100).any() == written
