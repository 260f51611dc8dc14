"""Decoding: the pixels that a viewer shows, whole or an error."""

import numpy as np
import pytest
from image_files import encoded, noise
from PIL import Image, ImageCms

from ldm.image_io import decode_image, decode_mask, read_image_size

PIXELS = noise(9, 6)
LEVELS = np.linspace(0, 65535, 9 * 6).astype(np.uint16).reshape(6, 9)


def pixels(data):
    return np.asarray(decode_image(data).rgb)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_what_keeps_pixels_keeps_them(form):
    assert np.array_equal(pixels(encoded(PIXELS, form)), PIXELS)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_shown_upright(turn):
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
    data = encoded(np.ascontiguousarray(file), "PNG", exif=exif)
    assert np.array_equal(pixels(data), PIXELS) and read_image_size(data) == (9, 6)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(form):
    wanted = np.rint(LEVELS / 257).astype(np.uint8)
    assert np.array_equal(pixels(encoded(LEVELS, form)), wanted[..., None].repeat(3, 2))
    assert np.array_equal(np.asarray(decode_mask(encoded(LEVELS, form))), wanted)


def png16(samples):
    """A PNG of 16-bit RGB, uint16 [H, W, 3], which Pillow cannot write."""
    import struct
    import zlib

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


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_picture_cut_short_is_refused_not_shown_in_part(form):
    data = encoded(noise(64, 64), form)
    for share in (0.3, 0.6, 0.9, 0.99):
        with pytest.raises(ValueError) as told:
            decode_image(data[: int(len(data) * share)])
        assert "\n" not in str(told.value)


def test_what_cannot_be_read_is_named():
    heic = bytes(4) + b"ftypheic" + bytes(20)
    bomb = bytearray(encoded(Image.new("1", (8, 8)), "PPM"))
    bomb[3:6] = b"40000 40000"
    for data, said in ((heic, "HEIC"), (b"", "empty"), (b"hello", "not an image"), (bytes(bomb), "million pixels")):
        for read in (decode_image, read_image_size):
            with pytest.raises(ValueError, match=said):
                read(data)
    with pytest.raises(ValueError, match="mode F"):
        decode_image(encoded(Image.new("F", (4, 4)), "TIFF"))


def test_bits_and_grey():
    bits = np.array([[True, False], [False, True]])
    assert np.array_equal(pixels(encoded(Image.fromarray(bits)))[..., 0], bits * 255)
    assert np.array_equal(pixels(encoded(PIXELS[..., 0])), PIXELS[..., :1].repeat(3, 2))
