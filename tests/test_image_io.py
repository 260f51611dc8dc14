"""Images survive the way to tensors and back; files and masks of any mode are decoded, or refused in one line."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from image_files import encoded, noise
from PIL import Image, ImageCms, ImageFilter

from ldm.image_io import (
    contact_sheet,
    decode_image,
    decode_mask,
    from_uint8,
    read_image,
    read_image_size,
    read_mask,
    to_pil,
)
from ldm.metadata import read_image_and_metadata
from ldm.pipeline.request import Request


def test_every_level_survives_the_way_to_a_tensor_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    images = from_uint8(pixels)
    assert images.min() == -1 and images.max() == 1 and images.shape == (1, 3, 16, 16)
    assert np.array_equal(np.asarray(to_pil(images)[0]), pixels[0])


def test_rounding_is_to_nearest_and_what_lies_outside_is_clipped():
    levels = torch.tensor([-3.0, 3.0, 0.0, 1 / 127.5 * 0.6]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert np.asarray(to_pil(levels)[0])[:, :, 0].tolist() == [[0, 255], [128, 128]]


def test_what_is_no_image_is_refused_by_name(tmp_path):
    (tmp_path / "x.png").write_text("no")
    for name in ("x.png", "absent.png"):
        for read in (read_image_and_metadata, read_image, read_mask):
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


def stray(alpha):
    """Opaque but for one corner."""
    levels = np.full_like(HALF, 255)
    levels[-1, -1] = alpha
    return levels


def turned(photo):
    """A 64 x 64 image with a white square in it, turned by 30 degrees on a transparent canvas."""
    image = Image.fromarray(photo).convert("RGBA")
    return image.rotate(30, Image.Resampling.BICUBIC, expand=True)


SQUARE = np.zeros((64, 64), np.uint8)
SQUARE[20:40, 10:30] = 255
FEATHERED = np.asarray(Image.fromarray(SQUARE).filter(ImageFilter.GaussianBlur(3)))
INSIDE_SQUARE = np.asarray(Image.fromarray(SQUARE).rotate(30, Image.Resampling.BICUBIC, expand=True)) >= 128
DIM_HALF = np.where(HALF > 0, 40, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "mask, wanted",
    [
        (cut(HALF[..., None], stray(254)), HALF > 0),
        (cut(HALF[..., None], stray(130)), HALF > 0),
        (cut(HALF[..., None], stray(0)), HALF > 0),
        (cut(HALF[..., None], np.where(HALF > 0, 200, 255).astype(np.uint8)), HALF > 0),
        (cut(HALF[..., None], np.where(HALF > 0, 255, 200).astype(np.uint8)), HALF > 0),
        (cut(HALF[..., None], np.full_like(HALF, 150)), HALF > 0),
        (cut(HALF[..., None], np.full_like(HALF, 60)), HALF > 0),
        (cut(np.full(3, 255), np.where(HALF > 0, 90, 0).astype(np.uint8)), HALF > 0),
        (cut(np.zeros(3), HALF), HALF == 0),
        (cut(COLOURS, DIM_HALF), HALF > 0),
        (cut(COLOURS, np.zeros_like(HALF)), np.full(HALF.shape, True)),
        (turned(SQUARE), INSIDE_SQUARE),
        (turned(FEATHERED), INSIDE_SQUARE),
    ],
    ids=[
        *("stray 254", "stray 130", "stray hole", "white at 200", "black at 200", "a layer at 150", "a layer at 60"),
        *("faint strokes", "black strokes", "dim holes", "nothing visible", "turned", "turned, feathered"),
    ],
)
def test_alpha_decides_only_where_a_mask_has_real_holes(mask, wanted):
    regenerated = np.asarray(Request("", mask=mask).mask) >= 128
    assert (regenerated != wanted).mean() < 0.01


def test_a_soft_mask_keeps_its_levels(tmp_path):
    levels = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    cut(COLOURS, levels).save(tmp_path / "holes.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "holes.png")), 255 - levels)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "grey.png")), levels)


def test_an_image_s_transparency_is_white_and_its_sixteen_bits_are_scaled(tmp_path):
    cut(COLOURS, HALF).save(tmp_path / "a.png")
    Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257).save(tmp_path / "b.png")
    white = np.where(HALF[..., None] > 0, COLOURS, 255)
    for name, wanted in (("a.png", white), ("b.png", np.repeat(COLOURS[..., :1], 3, 2))):
        with Image.open(tmp_path / name) as opened:
            pictures = read_image(tmp_path / name), Request("", image=opened).image
        assert all(p.mode == "RGB" and np.array_equal(np.asarray(p), wanted) for p in pictures)


def file_of(form):
    """A small image in that format."""
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
        for read in (read_image, read_mask, read_image_and_metadata):
            try:
                read(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
                refused += 1
    assert refused > 50


def test_a_contact_sheet_shows_every_image_over_its_caption():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    tiles = [Image.new("RGB", (40, 30), colour) for colour in colours]
    sheet = np.asarray(contact_sheet(tiles, ["a", "", "b"], columns=2)).astype(int)
    cells = [sheet[: len(sheet) // 2, :48], sheet[: len(sheet) // 2, 48:], sheet[len(sheet) // 2 :, :48]]
    for cell, colour, written in zip(cells, colours, (True, False, True), strict=True):
        assert (np.abs(cell - colour).sum(-1) == 0).sum() == 40 * 30
        assert (cell[36:].max(-1) < 100).any() == written


SHEETS = [(1, (40, 40), 1), (9, (128, 128), 3), (8, (512, 64), 1), (8, (64, 512), 8), (40, (64, 64), 6)]


@pytest.mark.parametrize("count, size, columns", SHEETS)
def test_a_contact_sheet_is_nearly_square(count, size, columns):
    sheet = contact_sheet([Image.new("RGB", size)] * count, [""] * count)
    assert sheet.width == columns * (size[0] + 8)


PIXELS = noise(9, 6)
LEVELS = np.linspace(0, 65535, 9 * 6).astype(np.uint16).reshape(6, 9)


def pixels(data):
    return np.asarray(decode_image(data).rgb)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_what_keeps_pixels_keeps_them(form):
    assert np.array_equal(pixels(encoded(PIXELS, form)), PIXELS)


TIFF_COMPRESSIONS = [None, "packbits", "tiff_lzw", "tiff_adobe_deflate"]


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_image_is_shown_upright(turn):
    """Undone by numpy, from the table of EXIF 2.3, section 4.6.4: which edges of the file are top and left."""
    file = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1),
        6: np.rot90(PIXELS),
        7: PIXELS[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(PIXELS, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    for form, options in [("PNG", {})] + [("TIFF", {"compression": name}) for name in TIFF_COMPRESSIONS]:
        data = encoded(np.ascontiguousarray(file), form, exif=exif, **options)
        assert np.array_equal(pixels(data), PIXELS) and read_image_size(data) == (9, 6), (form, options)
    jpeg = encoded(np.ascontiguousarray(file), "TIFF", exif=exif, compression="jpeg")
    assert decode_image(jpeg).rgb.size == read_image_size(jpeg) == (9, 6)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(form):
    wanted = np.rint(LEVELS / 257).astype(np.uint8)
    assert np.array_equal(pixels(encoded(LEVELS, form)), wanted[..., None].repeat(3, 2))
    assert np.array_equal(np.asarray(decode_mask(encoded(LEVELS, form))), wanted)


def png16(samples):
    """A PNG of 16-bit RGB, uint16 [H, W, 3], which Pillow cannot write."""
    import struct

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, 2, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_sixteen_bits_of_rgb_are_scaled_within_a_level():
    samples = np.random.default_rng(0).integers(0, 65536, (6, 9, 3)).astype(np.uint16)
    assert np.abs(pixels(png16(samples)) - samples / 257).max() <= 1


def test_transparency_shows_white_and_is_kept_as_alpha():
    rgba = noise(9, 6, 1, 4)
    share = rgba[..., 3:] / 255
    found = decode_image(encoded(rgba))
    assert np.abs(np.asarray(found.rgb) - (rgba[..., :3] * share + 255 * (1 - share))).max() <= 1
    assert np.array_equal(np.asarray(found.alpha), rgba[..., 3])
    la = np.stack([rgba[..., 0], rgba[..., 3]], -1)
    assert np.abs(pixels(encoded(la))[..., 0] - (la[..., :1] * share + 255 * (1 - share))[..., 0]).max() <= 1
    assert decode_image(encoded(PIXELS)).alpha is None


def test_a_palette_and_its_transparent_colour():
    palette = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8)).convert("P")
    palette.putpalette([250, 10, 20, 0, 255, 0, 9, 9, 9])
    colours = np.array([[250, 10, 20], [0, 255, 0], [9, 9, 9]])
    assert np.array_equal(pixels(encoded(palette)), colours[[[0, 1], [2, 0]]])
    shown = decode_image(encoded(palette, transparency=1))
    assert np.array_equal(np.asarray(shown.rgb), np.array([*colours, [255] * 3])[[[0, 3], [2, 0]]])
    assert np.asarray(shown.alpha).tolist() == [[255, 0], [255, 255]]


def test_the_colour_that_stands_for_transparent_in_rgb():
    data = encoded(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), transparency=(4, 5, 6))
    assert pixels(data).tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize(
    "ink, seen", [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), 0)]
)
@pytest.mark.parametrize("form", ["JPEG", "TIFF"])  # of which a JPEG, as Adobe's do, stores CMYK inverted
def test_inks_are_seen_as_colours(ink, seen, form):
    data = encoded(Image.new("CMYK", (16, 16), ink), form)
    assert np.abs(pixels(data).astype(int) - np.array(seen)).max() <= 3


def test_a_colour_profile_is_followed():
    """Linear light in a profile with sRGB's primaries: sRGB's transfer function is what converts it."""
    linear = encoded(np.full((4, 4, 3), 55, np.uint8), icc_profile=linear_profile())
    light = 55 / 255
    wanted = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(pixels(linear) - wanted).max() <= 1.5
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(encoded(PIXELS, icc_profile=srgb)), PIXELS)
    broken = decode_image(encoded(PIXELS, icc_profile=b"not a profile"))
    assert np.array_equal(np.asarray(broken.rgb), PIXELS) and broken.notices[0][0] == "color profile"


def linear_profile():
    """sRGB's profile with its curves replaced by the identity, under another name."""
    import struct

    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for entry in range(struct.unpack(">I", data[128:132])[0]):
        at = 132 + 12 * entry
        start, size = struct.unpack(">II", data[at + 4 : at + 12])
        if data[at : at + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            data[start : start + 12] = b"curv" + bytes(8)  # no entries: the identity
            data[at + 8 : at + 12] = struct.pack(">I", 12)
        elif data[at : at + 4] == b"desc":
            data[start : start + size] = data[start : start + size].replace(
                "sRGB".encode("utf-16-be"), "line".encode("utf-16-be")
            )
    return bytes(data)


def test_the_first_frame_is_used_and_told():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for form in ("GIF", "PNG", "WEBP"):
        lossless = {"lossless": True} if form == "WEBP" else {}
        found = decode_image(encoded(frames[0], form, save_all=True, append_images=frames[1:], **lossless))
        assert found.rgb.getpixel((1, 1)) == (255, 0, 0) and found.notices == (
            ("animated", "2 frames: the first is used"),
        )


def test_a_profile_of_over_a_megabyte_is_followed():
    """Random bytes after the profile's tables: it is the same to LittleCMS."""
    profile = bytearray(linear_profile() + bytes(3_000_000))
    profile[:4] = struct.pack(">I", len(profile))
    levels = np.full((4, 4, 3), 55, np.uint8)
    long, short = (encoded(levels, icc_profile=bytes(p)) for p in (profile, linear_profile()))
    assert np.array_equal(pixels(long), pixels(short)) and not decode_image(long).notices


@pytest.mark.parametrize(
    "levels, white",
    [
        (np.linspace(0, 1, 54), 1),
        (np.linspace(0, 200, 54), 255),
        (np.linspace(-5, 60000, 54), 65535),
        (np.linspace(0, 2e9, 54), 2**31 - 1),
        (np.array([np.nan, np.inf, -np.inf, *np.linspace(0, 1, 51)]), 1),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_grey_levels_of_32_bits_are_scaled(levels, white, dtype):
    if dtype is np.int32:
        levels, white = np.nan_to_num(levels, posinf=0, neginf=0).astype(np.int64), max(white, 255)
    wanted = np.nan_to_num(np.clip(levels / (white / 255), 0, 255), posinf=255, neginf=0)
    decoded = decode_image(encoded(levels.astype(dtype).reshape(6, 9), "TIFF"))
    assert np.abs(np.asarray(decoded.rgb)[..., 0] - wanted.reshape(6, 9)).max() <= 0.51
    assert [kind for kind, _ in decoded.notices] == ["gray levels"]


def test_lab_is_seen_as_colours():
    """CIE 1976: L* = 53.2, a* = 80.1, b* = 67.2 is sRGB's red, under D50 nearly so."""
    lab = Image.merge("LAB", [Image.new("L", (4, 4), level) for level in (136, 208, 195)])
    red, green, blue = np.asarray(decode_image(encoded(lab, "TIFF")).rgb)[0, 0].tolist()
    assert red > 240 and green < 30 and blue < 40


@pytest.mark.parametrize("form, mode", [("PNG", "1"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("JPEG", "RGB")])
def test_a_large_image_is_shrunk_and_told(monkeypatch, form, mode):
    monkeypatch.setattr("ldm.image_io.MAX_DECODED_PIXELS", 40 * 30)
    image = Image.new(mode, (100, 61), 65535 if mode == "I;16" else "white")
    data = encoded(image, form)
    decoded = decode_image(data)
    assert read_image_size(data) == (100, 61) and decoded.rgb.width * decoded.rgb.height <= 1200
    assert abs(decoded.rgb.width / decoded.rgb.height - 100 / 61) < 0.1 and np.asarray(decoded.rgb).min() == 255
    assert decoded.notices == (("large image", f"100x61 is shrunk to {decoded.rgb.width}x{decoded.rgb.height}"),)
    if mode == "RGBA":
        assert decoded.alpha.size == decoded.rgb.size


def test_a_file_s_notices_are_warnings_with_its_name(tmp_path):
    data = encoded(noise(64, 64), "JPEG")
    (tmp_path / "x.jpg").write_bytes(data[:-9])
    with pytest.warns(UserWarning, match="x.jpg: truncated: the end of the file is missing"):
        read_image(tmp_path / "x.jpg")


def test_bits_and_grey():
    bits = np.array([[True, False], [False, True]])
    assert np.array_equal(pixels(encoded(Image.fromarray(bits)))[..., 0], bits * 255)
    assert np.array_equal(pixels(encoded(PIXELS[..., 0])), PIXELS[..., :1].repeat(3, 2))
