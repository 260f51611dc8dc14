"""A data set with a fault of every kind planted, each by a function that tells what an audit must say of it."""

import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
from image_files import encoded, write
from PIL import Image, ImageCms, ImageColor

PLACES = ("beside", "listed", "cells", "classes", "packed")  # in a recipe's order; a whole place's fault adds its own
FAULTS = {}  # name: function
WORDS = ("red", "green", "blue", "grey", "round", "square", "small", "large")


def plant(function):
    FAULTS[function.__name__] = function
    return function


def smooth(seed, width=64, height=64, least=40, most=215):
    """An image of soft colours: a few random pixels enlarged."""
    few = np.random.default_rng(seed).integers(least, most, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def file(seed, *size, **options):
    return encoded(smooth(seed, *size), **options)


def marked(seed, colour):
    """An image whose first pixel has a pure colour, by which a test's autoencoder knows it."""
    picture = smooth(seed)
    picture.putpixel((0, 0), ImageColor.getrgb(colour))
    return picture


def caption(seed):
    return f"a {WORDS[seed % 8]} {WORDS[seed // 8 % 8]} star"


def tar(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sound(root):
    """A data set in five places that nothing is wrong with: images beside captions, listed, in classes, in a tar."""
    shapes = [(64, 64), (96, 48), (48, 96), (80, 80)]
    for k in range(8):
        write(root / "beside", {f"{k}.png": file(k, *shapes[k % 4]), f"{k}.txt": caption(k)})
    write(root / "beside", {"0.mask.png": encoded(smooth(100).convert("L"))})
    rows = [{"file_name": f"{k}.png", "text": caption(k)} for k in range(10, 14)]
    write(root / "listed", {f"{k}.png": file(k) for k in range(10, 14)})
    write(root / "listed", {"metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    write(root / "cells", {f"{k}.png": file(k) for k in range(20, 24)})
    lines = [f"{k}.png,{caption(k)}\n" for k in range(20, 24)]
    write(root / "cells", {"metadata.csv": "".join(["file_name,text\n", *lines])})
    write(root / "classes", {f"2_sks dog/{k}.png": file(k) for k in range(30, 34)})
    packed = {}
    for k in range(40, 44):
        packed |= {f"{k}.png": file(k), f"{k}.txt": caption(k)}
    write(root / "packed", {"good.tar": tar(packed)})


def beside(root, name, content, text="a green star"):
    """An image with its caption; the key."""
    write(root / "beside", {name: content, name.rsplit(".", 1)[0] + ".txt": text})
    return name


def row(root, **values):
    """One more row of the metadata file; its key."""
    path = root / "listed" / "metadata.jsonl"
    with path.open("a") as lines:
        lines.write((values.get("line") or json.dumps(values)) + "\n")
    return f"2:metadata.jsonl:{len(path.read_text().splitlines())}"


@plant
def picture_without_a_caption(root):
    write(root / "beside", {"alone.png": file(200)})
    return {("no caption", "alone.png")}


@plant
def caption_that_is_empty(root):
    beside(root, "blank.png", file(201), " \n")
    return {("empty caption", "blank.txt")}


@plant
def caption_without_a_picture(root):
    write(root / "beside", {"stray.txt": "a red star"})
    return {("caption without image", "stray.txt")}


@plant
def two_captions_of_a_picture(root):
    write(root / "beside", {"0.caption": caption(0)})
    return {("two captions", "0.caption")}


@plant
def two_pictures_of_a_caption(root):
    write(root / "beside", {"1.webp": file(202, form="WEBP")})
    return {("shared caption", "1.webp")}


@plant
def caption_in_another_encoding(root):
    beside(root, "cafe.png", file(203), "café".encode("latin-1"))
    return {("not UTF-8", "cafe.txt")}


@plant
def ending_of_another_format(root):
    write(root / "beside", {"raw.CR2": b"II*\0"})
    return {("unsupported", "raw.CR2")}


@plant
def mask_without_a_picture(root):
    write(root / "beside", {"gone.mask.png": file(204)})
    return {("mask without image", "gone.mask.png")}


@plant
def text_called_a_picture(root):
    return {("broken image", beside(root, "words.png", "once upon a time"))}


@plant
def empty_file(root):
    return {("broken image", beside(root, "nothing.png", b""))}


@plant
def phone_picture_under_another_name(root):
    return {("broken image", beside(root, "phone.jpg", b"\0\0\0\x18ftypheic" + bytes(100)))}


@plant
def picture_cut_short(root):
    data = file(205, 96, 96)
    return {("broken image", beside(root, "half.png", data[: len(data) // 2]))}


@plant
def jpeg_cut_short(root):
    data = file(206, 96, 96, form="JPEG", quality=95)
    return {("broken image", beside(root, "cut.jpg", data[: len(data) * 2 // 3]))}


@plant
def bits_flipped_in_a_picture(root):
    data = bytearray(file(207, 96, 96))
    at = data.index(b"IDAT") + 60
    data[at] ^= 255
    return {("broken image", beside(root, "flipped.png", bytes(data)))}


@plant
def pixel_flipped_in_a_picture(root):
    """Stored without compression: the checksum of its pixels alone knows."""
    data = bytearray(file(228, 96, 96, compress_level=0))
    data[len(data) // 2] ^= 255
    return {("broken image", beside(root, "pixel.png", bytes(data)))}


@plant
def floating_point_picture(root):
    levels = np.random.default_rng(0).random((64, 64), np.float32)
    key = beside(root, "depth.tiff", encoded(levels, "TIFF"))
    return {("gray levels", key), ("color mode", key)}


@plant
def bomb(root):
    """A file of 50 bytes that says it is 60,000 pixels a side."""
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return {("broken image", beside(root, "bomb.png", head + struct.pack(">I", zlib.crc32(head[12:]))))}


@plant
def mask_of_another_size(root):
    write(root / "beside", {"4.mask.png": encoded(smooth(208, 32, 32).convert("L"))})
    return {("mask size", "4.png")}


@plant
def mask_that_is_black(root):
    key = beside(root, "unmasked.png", file(209))
    write(root / "beside", {"unmasked.mask.png": encoded(Image.new("L", (64, 64)))})
    return {("black mask", key)}


@plant
def mask_cut_short(root):
    key = beside(root, "torn.png", file(210, 96, 96))
    write(root / "beside", {"torn.mask.png": file(211, 96, 96)[:300]})
    return {("broken image", key)}


@plant
def picture_that_is_tiny(root):
    return {("small image", beside(root, "icon.png", file(212, 24, 24)))}


@plant
def panorama(root):
    return {("extreme aspect ratio", beside(root, "panorama.png", file(213, 640, 64))), ("small bucket", "128x32")}


@plant
def picture_of_one_colour(root):
    return {("blank image", beside(root, "wall.png", encoded(Image.new("RGB", (64, 64), "teal"))))}


@plant
def picture_that_is_transparent(root):
    key = beside(root, "ghost.png", encoded(Image.new("RGBA", (64, 64), (9, 9, 9, 0))))
    return {("blank image", key), ("color mode", key)}


@plant
def picture_in_grey(root):
    return {("color mode", beside(root, "grey.png", encoded(smooth(214).convert("L"))))}


@plant
def picture_with_a_palette(root):
    return {("color mode", beside(root, "palette.png", encoded(smooth(215).quantize(32))))}


@plant
def picture_for_printing(root):
    return {("color mode", beside(root, "print.jpg", encoded(smooth(216).convert("CMYK"), "JPEG")))}


@plant
def animation(root):
    frames = [smooth(217 + k).quantize(32) for k in range(2)]
    key = beside(root, "moving.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    return {("animated", key), ("color mode", key)}


@plant
def profile_of_another_colour_space(root):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    return {("color profile", beside(root, "lab.png", file(219, icc_profile=lab)))}


@plant
def file_that_is_there_twice(root):
    write(root / "classes", {"2_sks dog/copy.png": file(30)})
    return {("same image", "4:2_sks dog/copy.png")}


@plant
def file_with_two_captions(root):
    return {("other caption", beside(root, "9-again.png", file(2, 48, 96), "something else"))}


@plant
def picture_saved_again(root):
    again = smooth(3, 80, 80).resize((72, 72), Image.Resampling.LANCZOS)
    return {("near duplicate", beside(root, "saved-again.jpg", encoded(again, "JPEG", quality=80)))}


@plant
def caption_that_is_a_file_name(root):
    return {("file name", beside(root, "IMG_0042.png", file(220), "IMG_0042"))}


@plant
def caption_in_markup(root):
    return {("markup", beside(root, "page.png", file(221), "a red star<br>"))}


@plant
def caption_read_in_another_encoding(root):
    return {("mojibake", beside(root, "garbled.png", file(222), "a cafÃ©"))}


@plant
def caption_that_says_nothing(root):
    return {("placeholder caption", beside(root, "none.png", file(223), "None"))}


@plant
def caption_on_two_lines(root):
    return {("multiple lines", beside(root, "lines.png", file(224), "a red star\na blue star"))}


@plant
def caption_longer_than_is_read(root):
    return {("truncated caption", beside(root, "long.png", file(225), "a red star, " * 12))}


@plant
def picture_whose_latents_are_extreme(root):
    return {("extreme latents", beside(root, "strange.png", encoded(marked(226, "red"))))}


@plant
def picture_whose_latents_are_not_finite(root):
    return {("non-finite latents", beside(root, "impossible.png", encoded(marked(227, "lime"))))}


@plant
def link_to_nothing(root):
    os.symlink(root / "nowhere.png", root / "beside" / "link.png")
    return {("missing file", "link.png")}


@plant
def link_to_where_it_is(root):
    os.symlink(".", root / "beside" / "loop")
    return {("symlink loop", "loop")}


@plant
def what_machines_leave(root):
    write(root / "beside", {".DS_Store": "", "Thumbs.db": ""})
    return {("hidden", ".DS_Store"), ("hidden", "Thumbs.db")}


@plant
def row_without_its_file(root):
    return {("missing file", row(root, file_name="gone.png", text="a star"))}


@plant
def row_without_a_name(root):
    return {("missing file", row(root, text="a star"))}


@plant
def row_that_leaves_the_folder(root):
    return {("outside", row(root, file_name="../beside/0.png", text="a star"))}


@plant
def row_that_comes_twice(root):
    row(root, file_name="10.png", text="a star")
    return {("duplicate", "2:10.png")}


@plant
def row_that_is_not_json(root):
    return {("malformed line", row(root, line="{'file_name'"))}


@plant
def row_with_a_number_for_its_caption(root):
    write(root / "listed", {"number.png": file(230)})
    row(root, file_name="number.png", text=7)
    return {("not text", "2:number.png")}


@plant
def picture_that_is_not_listed(root):
    write(root / "listed", {"unlisted.png": file(231)})
    return {("not listed", "2:unlisted.png")}


@plant
def line_with_a_comma_too_many(root):
    with (root / "cells" / "metadata.csv").open("a") as lines:
        lines.write("20.png,a red, round star\n")
    return {("unequal line", "3:metadata.csv:6")}


@plant
def folder_named_by_its_year(root):
    write(root / "classes", {f"2023_summer/{k}.png": file(240 + k) for k in range(4)})
    return {("repeats", "4:2023_summer")}


@plant
def class_of_two_pictures(root):
    write(root / "classes", {f"5_a cat/{k}.png": file(250 + k) for k in range(2)})
    return {("few images", "5_a cat")}


@plant
def tar_cut_short(root):
    whole = tar({"a.png": file(260), "a.txt": caption(60), "b.png": file(261), "b.txt": caption(61)})
    write(root / "packed", {"torn.tar": whole[:-11000]})
    return {("truncated tar", "5:torn.tar")}


@plant
def tar_that_is_compressed(root):
    write(root / "packed", {"small.tar.gz": b"\x1f\x8b\x08\0"})
    return {("compressed tar", "5:small.tar.gz")}


@plant
def captions_in_json_not_lines(root):
    write(root / "p6", {"a.png": file(270), "metadata.json": "[1]"})
    return {("malformed line", "6:metadata.json:1"), ("no images", "6:p6")}


@plant
def column_of_another_name(root):
    write(root / "p7", {"a.png": file(271), "metadata.jsonl": json.dumps({"file_name": "a.png", "txt": "x"})})
    return {("wrong column", "7:metadata.jsonl")}


@plant
def two_tables(root):
    line = json.dumps({"file_name": "a.png", "text": "x"})
    write(root / "p8", {"a.png": file(272), "metadata.jsonl": line, "metadata.csv": "file_name,text\na.png,x\n"})
    return {("two metadata files", "8:metadata.csv")}


@plant
def place_without_pictures(root):
    (root / "p9").mkdir()
    return {("no images", "9:p9")}
