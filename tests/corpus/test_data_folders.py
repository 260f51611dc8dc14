"""Data folders as people have them: which captions they give, what is left out with a notice, and what is refused."""

import json
import os
import time

import pytest
from image_files import encoded, jsonl, noise, tar, write
from PIL import Image

from ldm.config import ImageDataConfig
from ldm.data.folders import open_image_sources
from ldm.data.sources import PLUGIN_SUFFIXES, list_image_suffixes
from ldm.image_io import decode_image, read_image
from ldm.image_repair import load_image_plugin

GOOD = {"ok.png": 0, "ok.txt": "fine"}
ROW = {"file_name": "ok.png", "text": "fine"}


def open_images(*paths, **options):
    return open_image_sources(ImageDataConfig(train_data_dir=paths, **options))


def listing(*lines, name="metadata.jsonl", **files):
    """An image, and a metadata file of these lines."""
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return {"ok.png": 0, name: content, **files}


def caption_of(*values, column="text"):
    return listing(*({"file_name": name, column: text} for name, text in values))


TAKEN = {  # what people have: captions by key, and the kinds of notices
    "a readme": (
        {**GOOD, "README.txt": "x", "requirements.txt": "y"},
        {"ok.png": "fine"},
        2 * ["caption without image"],
    ),
    "other formats": (
        {**GOOD, "a.psd": "x", "b.svg": "x", "c.DNG": "x"},
        {"ok.png": "fine"},
        3 * ["unsupported"],
    ),
    "two captions": ({**GOOD, "ok.caption": "other"}, {"ok.png": "fine"}, ["two captions"]),
    "two images of a caption": ({**GOOD, "ok.jpg": 1}, {"ok.jpg": "fine", "ok.png": "fine"}, ["shared caption"]),
    "a.png.txt": ({"a.png": 0, "a.png.txt": "x"}, {"a.png": "x"}, ["other spelling"]),
    "another case": ({"b.PNG": 0, "B.txt": "x"}, {"b.PNG": "x"}, ["other spelling"]),
    "empty caption": ({**GOOD, "a.png": 1, "a.txt": b""}, {"a.png": "", "ok.png": "fine"}, ["empty caption"]),
    "empty caption in a class": ({"3_cat/a.png": 1, "3_cat/a.txt": b""}, {"3_cat/a.png": "cat"}, ["empty caption"]),
    "empty cell": (listing("file_name,text", "ok.png,", name="metadata.csv"), {"ok.png": ""}, ["empty caption"]),
    "below the root": (
        {f"{folder}/{name}": value for folder in ("train", "more") for name, value in listing(ROW).items()},
        {"more/ok.png": "fine", "train/ok.png": "fine"},
        [],
    ),
    "backslashes": (
        {"images/5.png": 0, "metadata.jsonl": jsonl([{"file_name": "images\\5.png", "text": "x"}])},
        {"images/5.png": "x"},
        [],
    ),
    "dot and backslash": (caption_of((".\\ok.png", "x")), {"ok.png": "x"}, []),
    "case of the suffix": (caption_of(("ok.PNG", "x")), {"ok.png": "x"}, ["other spelling"]),
    "no suffix": (caption_of(("ok", "x")), {"ok.png": "x"}, []),
    "semicolons": (listing("file_name;text", "ok.png;a, b", name="metadata.csv"), {"ok.png": "a, b"}, []),
    "tabs": (listing("file_name\ttext", "ok.png\ta; b, c", name="metadata.csv"), {"ok.png": "a; b, c"}, []),
    "UTF-16 csv": (
        {"ok.png": 0, "metadata.csv": "file_name,text\nok.png,caf\u00e9".encode("utf-16")},
        {"ok.png": "caf\u00e9"},
        [],
    ),
    "UTF-16 jsonl": ({"ok.png": 0, "metadata.jsonl": json.dumps(ROW).encode("utf-16")}, {"ok.png": "fine"}, []),
    "UTF-16 text": ({"ok.png": 0, "ok.txt": "caf\u00e9".encode("utf-16")}, {"ok.png": "caf\u00e9"}, []),
    "a list in json": ({"ok.png": 0, "metadata.json": json.dumps([ROW])}, {"ok.png": "fine"}, []),
    "an image not listed": (listing(ROW, **{"b.png": 1}), {"ok.png": "fine"}, ["not listed"]),
    "one of several captions": (caption_of(("ok.png", ["only"])), {"ok.png": "only"}, []),
    "kohya's, with tags": (
        {"ok.png": 0, "meta_cap.json": json.dumps({"ok": {"caption": "x", "tags": "y"}})},
        {"ok.png": "x, y"},
        [],
    ),
    "kohya's tags": ({"ok.png": 0, "meta_lat.json": json.dumps({"ok": {"tags": "y"}})}, {"ok.png": "y"}, []),
    "captions by name": ({"ok.png": 0, "metadata.json": json.dumps({"ok.png": "x"})}, {"ok.png": "x"}, []),
    "lines in json": (
        listing(ROW, {**ROW, "file_name": "b.png"}, name="metadata.json", **{"b.png": 1}),
        {"b.png": "fine", "ok.png": "fine"},
        [],
    ),
    "one line in json": ({"ok.png": 0, "metadata.json": json.dumps(ROW)}, {"ok.png": "fine"}, []),
    "tsv": (listing("file_name\ttext", "ok.png\tx", name="metadata.tsv"), {"ok.png": "x"}, []),
    "ndjson": (listing(ROW, name="metadata.ndjson"), {"ok.png": "fine"}, []),
    "the table's name in capitals": (listing(ROW, name="METADATA.JSONL"), {"ok.png": "fine"}, []),
    "columns in capitals": (listing("File_Name, Text", 'ok.png, "a, b"', name="metadata.csv"), {"ok.png": "a, b"}, []),
    "bars": (listing("file_name|text", "ok.png|a, b", name="metadata.csv"), {"ok.png": "a, b"}, []),
    "pandas's index and a blank row": (
        listing(",file_name,text", "0,ok.png,x", ",,", "", name="metadata.csv"),
        {"ok.png": "x"},
        [],
    ),
    "a number for a name": ({"5.png": 0, "metadata.jsonl": jsonl([{"file_name": 5, "text": "x"}])}, {"5.png": "x"}, []),
    "from another machine": (
        {"images/5.png": 0, "metadata.jsonl": jsonl([{"file_name": "C:\\data\\images\\5.png", "text": "x"}])},
        {"images/5.png": "x"},
        ["other spelling"],
    ),
    "another suffix": (
        {"ok.jpeg": 0, "metadata.jsonl": jsonl([{"file_name": "ok.jpg", "text": "x"}])},
        {"ok.jpeg": "x"},
        ["other spelling"],
    ),
    "a row without an image": (
        listing(ROW, {"file_name": "gone.png", "text": "x"}),
        {"ok.png": "fine"},
        ["missing file"],
    ),
    "a broken line": (listing(ROW, '{"file_name": '), {"ok.png": "fine"}, ["malformed line"]),
    "an image twice": (listing(ROW, {**ROW, "text": "x"}), {"ok.png": "fine"}, ["duplicate"]),
    "an image without a caption": ({**GOOD, "a.png": 1}, {"a.png": "", "ok.png": "fine"}, ["no caption"]),
    "null for a caption": (
        listing(
            ROW,
            '{"file_name": "a.png", "text": null}',
            '{"file_name": "b.png", "text": NaN}',
            **{"a.png": 1, "b.png": 2},
        ),
        {"a.png": "", "b.png": "", "ok.png": "fine"},
        2 * ["no caption"],
    ),
    "a character that is none": (
        listing('{"file_name": "ok.png", "text": "\\ud800 cat"}'),
        {"ok.png": "\ufffd cat"},
        [],
    ),
    "an empty list of captions": (caption_of(("ok.png", [])), {"ok.png": ""}, ["empty caption"]),
    "a tar with another caption": (
        {"a.tar": tar({"a.png": 0, "a.txt": "x", "a.caption": "y", "b.png": 1, "b.json": '{"Text": "z"}'})},
        {"a.png": "x", "b.png": "z"},
        ["two captions"],
    ),
    "suffixes of the same formats": (
        {"a.jpe": encoded(noise(8, 8), "JPEG"), "a.txt": "x", "b.tga": encoded(noise(8, 8), "TGA"), "b.txt": "y"},
        {"a.jpe": "x", "b.tga": "y"},
        [],
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_people_have_is_taken_with_a_notice_and_refused_where_strict(tmp_path, case):
    files, captions, notices = TAKEN[case]
    source = open_images(write(tmp_path, files))
    assert {s.key: s.caption for s in source.samples} == captions
    assert [issue.kind for issue in source.issues] == notices
    assert {issue.severity for issue in source.issues} <= {"notice"}
    assert all(issue.severity == "error" for issue in open_images(tmp_path, strict=True).issues)


OPTIONS = {  # files, options, captions
    "another suffix first": ({**GOOD, "ok.caption": "other"}, {"caption_extension": "caption"}, {"ok.png": "other"}),
    "another suffix first, in a tar": (
        {"a.tar": tar({"a.png": 0, "a.txt": "x", "a.caption": "y"})},
        {"caption_extension": ".caption"},
        {"a.png": "y"},
    ),
    "a suffix of one's own": ({"a.png": 0, "a.wd14": "tags"}, {"caption_extension": ".WD14"}, {"a.png": "tags"}),
    "an empty caption with a prompt": ({"a.png": 0, "a.txt": ""}, {"instance_prompt": "sks dog"}, {"a.png": "sks dog"}),
    "null with a prompt": (caption_of(("ok.png", None)), {"instance_prompt": "sks dog"}, {"ok.png": "sks dog"}),
    "columns": (
        listing({"image": "ok.png", "prompt": "x"}),
        {"image_column": "image", "caption_column": "prompt"},
        {"ok.png": "x"},
    ),
    "a torn tar": (
        {"a.tar": tar({"a.txt": "x", "a.png": 1, "b.txt": "x", "b.png": 0})[:3700]},
        {"skip_broken": True},
        {"a.png": "x"},
    ),
    "Latin-1": ({**GOOD, "a.png": 1, "a.txt": b"caf\xe9"}, {"skip_broken": True}, {"ok.png": "fine"}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_says_what_is_meant(tmp_path, case):
    files, options, captions = OPTIONS[case]
    source = open_images(write(tmp_path, files), **options)
    assert {s.key: s.caption for s in source.samples} == captions
    assert "error" not in {issue.severity for issue in source.issues}


def test_absolute_paths_into_the_folder_are_taken_also_through_a_link(tmp_path):
    os.symlink(tmp_path / "data", tmp_path / "link")
    files = listing({"file_name": str(tmp_path / "data" / "ok"), "text": "x"}, **{"b.png": 1})
    files["metadata.jsonl"] += "\n" + json.dumps({"file_name": str(tmp_path / "link" / "b.png"), "text": "y"})
    source = open_images(write(tmp_path / "data", files))
    assert {s.key: s.caption for s in source.samples} == {"b.png": "y", "ok.png": "x"}


def test_what_is_too_large_is_not_read(tmp_path):
    write(tmp_path / "texts", {**GOOD, "a.png": 1, "a.txt": "x"})
    os.truncate(tmp_path / "texts" / "a.txt", 2**33)
    source = open_images(tmp_path / "texts")
    assert [s.key for s in source.samples] == ["ok.png"]
    assert source.issues[0].what == "more than 1048576 bytes: not a caption"
    write(tmp_path / "table", listing(ROW))
    os.truncate(tmp_path / "table" / "metadata.jsonl", 2**33)
    assert open_images(tmp_path / "table").issues[0].what == "more than 2 GB"
    os.truncate(tmp_path / "texts" / "ok.png", 2**33)
    with pytest.raises(OSError, match="more than 2 GB"):
        source.samples[0].read_image()
    with pytest.raises(ValueError, match=r"ok\.png: more than 2 GB"):
        read_image(tmp_path / "texts" / "ok.png")


def test_names_need_not_be_utf8_and_devices_are_no_files(tmp_path):
    write(tmp_path, GOOD)
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(encoded(noise(8, 8)))
    os.symlink("/dev/zero", tmp_path / "a.png")
    source = open_images(tmp_path)
    assert [s.key for s in source.samples] == ["ok.png", "\udcff.png"]
    assert source.issues[0][1:3] == ("a.png", "not a file")


def test_folders_are_walked_in_linear_time(tmp_path):
    """A thousand levels took half a minute when each path was resolved anew."""
    write(tmp_path, GOOD)
    os.makedirs(tmp_path / "/".join(500 * "a"))
    start = time.process_time()
    assert len(open_images(tmp_path).samples) == 1 and time.process_time() - start < 2


REFUSED = {  # files, and the only error without options
    "captions that cannot be found": ({"a.png": 0, "b.png": 1}, "no image has a caption: give data.instance_prompt"),
    "a table of another name": (
        {"a.png": 0, "labels.csv": "file_name,text\na.png,x"},
        "no image has a caption: give data.instance_prompt, or call labels.csv metadata.csv",
    ),
    "rows of another folder": (
        listing({"file_name": "b.png", "text": "x"}),
        "no images in it that can be used (metadata.jsonl:1: no file b.png)",
    ),
    "two images of one name": (
        listing({"file_name": "Ok", "text": "x"}, **{"ok.jpg": 1}),
        "no images in it that can be used (metadata.jsonl:1: no file Ok, but ok.jpg, ok.png)",
    ),
    "no header": (listing("ok.png,x", name="metadata.csv"), "no rows in it, or no header above them"),
    "a column of another name": (
        caption_of(("ok.png", "x"), column="caption"),
        "no column 'text' among 'caption', 'file_name': give data.caption_column: caption",
    ),
    "Latin-1": ({**GOOD, "a.png": 1, "a.txt": b"caf\xe9"}, "line 1 is not UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_one_error_with_its_cure(tmp_path, case):
    files, what = REFUSED[case]
    source = open_images(write(tmp_path, files))
    assert [issue.what for issue in source.issues if issue.severity == "error"] == [what]


PLANTED = {
    "no caption": {**GOOD, "a.png": 1},
    "empty caption": {**GOOD, "a.png": 1, "a.txt": " \n"},
    "caption without image": {**GOOD, "a.txt": "x"},
    "two captions": {**GOOD, "ok.caption": "fine"},
    "shared caption": {**GOOD, "ok.jpg": 1},
    "not UTF-8": {**GOOD, "a.png": 1, "a.txt": b"caf\xe9"},
    "unsupported": {**GOOD, "a.psd": "x"},
    "mask without image": {**GOOD, "a.mask.png": 1},
    "repeats": {"2023_summer/a.png": 1},
    "no images": {"readme.md": "x"},
    "malformed line in a list": {"ok.png": 0, "metadata.json": json.dumps([1, ROW])},
    "malformed file: deep": {"ok.png": 0, "metadata.json": 100_000 * "["},
    "malformed line: deep in a tar": {"a.tar": tar({"b.png": 0, "b.txt": "x", "a.png": 0, "a.json": 100_000 * "["})},
    "two metadata files": listing(ROW, **{"metadata.csv": "file_name,text\nok.png,fine"}),
    "missing file": listing(ROW, {"file_name": "gone.png", "text": "x"}),
    "missing file in a row": listing(ROW, {"text": "x"}),
    "no caption in a row": listing(ROW, {"file_name": "a.png"}, **{"a.png": 1}),
    "not listed": listing(ROW, **{"a.png": 1}),
    "empty caption in a row": listing(ROW, {"file_name": "a.png", "text": ""}, **{"a.png": 1}),
    "not text": listing(ROW, {"file_name": "a.png", "text": 3}, **{"a.png": 1}),
    "duplicate": listing(ROW, {"file_name": "./ok.png", "text": "x"}),
    "outside": listing(ROW, {"file_name": "../ok.png", "text": "x"}),
    "outside, from the root": listing(ROW, {"file_name": "/etc/hosts", "text": "x"}),
    "malformed line": listing(ROW, '{"file_name": '),
    "malformed line, a list": listing(ROW, "[1]"),
    "wrong column": listing({"file_name": "ok.png", "txt": "fine"}),
    "wrong column: pictures": listing({"filename": "ok.png", "text": "fine"}),
    "unequal line": listing("file_name,text", "ok.png,fine", "a,b,c", name="metadata.csv"),
    "malformed file: csv": listing("file_name,text", "ok.png,fine", 'a,"b"c', name="metadata.csv"),
    "not UTF-8 in csv": {"ok.png": 0, "metadata.csv": b"file_name,text\nok.png,caf\xe9"},
    "malformed file: parquet": {"ok.png": 0, "metadata.parquet": "PAR1"},
    "malformed line, not UTF-8": {"ok.png": 0, "metadata.jsonl": json.dumps(ROW).encode() + b'\n{"text": "caf\xe9"}'},
    "truncated tar": {"a.tar": tar({"a.txt": "x", "a.png": 1, "b.txt": "x", "b.png": 0})[:3700]},
    "truncated tar: no end": {"a.tar": tar({"a.txt": "x", "a.png": 1})[:2048]},
    "compressed tar": {"a.tar.gz": b"\x1f\x8b\x08\x00"},
    "duplicate in tars": {f"{k}.tar": tar({"a.png": 0, "a.txt": "x"}) for k in (0, 1)},
    "no caption in a tar": {"a.tar": tar({"a.png": 0, "a.txt": "x", "b.png": 1})},
    "two captions in a tar": {"a.tar": tar({"a.png": 0, "a.txt": "x", "a.caption": "y"})},
    "duplicate: two pictures of a key": {"a.tar": tar({"a.png": 0, "a.jpg": 0, "a.txt": "x"})},
    "caption without image in a tar": {"a.tar": tar({"a.png": 0, "a.txt": "x", "b.txt": "y"})},
    "wrong column in a tar": {"a.tar": tar({"a.png": 0, "a.json": '{"txt": "x"}'})},
    "malformed line in a tar": {"a.tar": tar({"b.png": 0, "b.txt": "x", "a.png": 0, "a.json": "{"})},
    "corrupt dataset": {"state.json": "{}"},
}


@pytest.mark.parametrize("planted", PLANTED)
def test_where_strict_a_planted_fault_is_told_and_nothing_else(tmp_path, planted):
    found = open_images(write(tmp_path, PLANTED[planted]), strict=True)
    fatal = [fault for fault in found.issues if fault.severity == "error"]
    assert len(fatal) == 1 and planted.startswith(fatal[0].kind), fatal
    assert "\n" not in fatal[0].what and fatal[0].key and str(tmp_path) not in fatal[0].key


HEIC_AND_JXL = {"a.heic": ("HEIF", "pillow_heif"), "b.JXL": ("JXL", "pillow_jxl")}


@pytest.mark.parametrize("name", HEIC_AND_JXL)
def test_formats_of_plug_ins_are_read_where_these_are_installed(tmp_path, name):
    form, module = HEIC_AND_JXL[name]
    pytest.importorskip(module)
    assert load_image_plugin(PLUGIN_SUFFIXES[name[1:].lower()])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    write(tmp_path, {name: encoded(noise(64, 48), form, exif=exif.tobytes())})
    (sample,) = open_images(tmp_path, instance_prompt="x").samples
    assert decode_image(sample.read_image()).rgb.size == (48, 64) == read_image(tmp_path / name).size
    with pytest.raises(ValueError, match="a damaged"):
        decode_image(sample.read_image()[:-200])


@pytest.mark.parametrize("name", HEIC_AND_JXL)
def test_without_a_plug_in_its_package_is_named(tmp_path, name, monkeypatch):
    monkeypatch.setattr("ldm.image_repair.find_spec", lambda module: None)
    list_image_suffixes.cache_clear()
    load_image_plugin.cache_clear()
    start = b"\0\0\0\x18ftypheic" if name.endswith("heic") else b"\xff\x0a"
    source = open_images(write(tmp_path, {**GOOD, name: start}))
    list_image_suffixes.cache_clear()
    assert [(issue.kind, issue.key) for issue in source.issues] == [("unsupported", name)]
    package = "pillow-heif" if name.endswith("heic") else "pillow-jxl-plugin"
    assert f"pip install {package}" in source.issues[0].what
    with pytest.raises(ValueError, match=f"pip install {package}"):
        read_image(tmp_path / name)
    load_image_plugin.cache_clear()
