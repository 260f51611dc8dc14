"""Sources: the same samples whatever they are kept in and wherever it lies; every fault is told, and nothing else."""

import io
import json
import os
import pickle
import shutil
import tarfile

import pytest
from image_files import encoded, jsonl, noise, tar, write

from ldm.config import ImageDataConfig
from ldm.data.folders import open_image_sources

CAPTIONS = {"a.png": "a red fox", "deep/b.JPG": "two stars, é 雪", "c.webp": "a cat"}
PICTURES = {name: seed for seed, name in enumerate(CAPTIONS)}


def open_images(*paths, **options):
    return open_image_sources(ImageDataConfig(train_data_dir=paths, **options))


def rows(key="file_name", text="text"):
    return [{key: name, text: caption, "extra": {"x": [1]}} for name, caption in CAPTIONS.items()]


def in_jsonl(folder):
    write(folder, {**PICTURES, "metadata.jsonl": "\ufeff" + jsonl(rows()) + "\n\n"})


def in_csv(folder):
    lines = [f'{name},"{caption}",7' for name, caption in CAPTIONS.items()]
    write(folder, {**PICTURES, "metadata.csv": "\r\n".join(["file_name,text,extra", *lines])})


def in_parquet(folder):
    import pyarrow as pa
    from pyarrow import parquet

    write(folder, PICTURES)
    parquet.write_table(pa.Table.from_pylist(rows()), folder / "metadata.parquet")


def beside(folder):
    texts = {name.rsplit(".", 1)[0] + ".txt": f" {caption}\n" for name, caption in CAPTIONS.items()}
    write(folder, {**PICTURES, **texts, "Thumbs.db": "", ".DS_Store": "", "__MACOSX/a.png": "x", "notes.md": "mine"})


def in_caption_files(folder):
    texts = {name.rsplit(".", 1)[0] + ".caption": caption for name, caption in CAPTIONS.items()}
    write(folder, {**PICTURES, **texts})


@pytest.mark.parametrize("kind", [in_jsonl, in_csv, in_parquet, beside, in_caption_files])
def test_a_folder_gives_its_captions_however_they_are_kept(tmp_path, kind):
    kind(tmp_path)
    source = open_images(tmp_path)
    assert {s.key: s.caption for s in source.samples} == CAPTIONS
    assert [f for f in source.issues if f.severity == "error"] == []
    assert {f.key for f in source.issues} <= {"Thumbs.db", ".DS_Store", "__MACOSX", "notes.md"}
    for sample in pickle.loads(pickle.dumps(source.samples)):  # as a worker process gets them
        assert sample.read_image() == (tmp_path / sample.key).read_bytes()


def test_keys_depend_neither_on_the_place_nor_on_the_order_of_writing(tmp_path):
    for name, order in (("one", list(CAPTIONS)), ("two/three", list(CAPTIONS)[::-1])):
        write(tmp_path / name, {file: PICTURES[file] for file in order})
    first, second = (open_images(tmp_path / name, instance_prompt="x").samples for name in ("one", "two/three"))
    assert [s.key for s in first] == [s.key for s in second] == sorted(CAPTIONS)


def test_a_name_is_the_same_however_its_accents_are_composed(tmp_path):
    """A Mac stores e and an accent apart; a metadata file written elsewhere does not."""
    row = {"file_name": "caf\u00e9.png", "text": "x"}
    source = open_images(write(tmp_path, {"cafe\u0301.png": 0, "metadata.jsonl": json.dumps(row)}))
    assert [s.key for s in source.samples] == ["caf\u00e9.png"] and not source.issues


def test_another_place_changes_no_key_of_the_first(tmp_path):
    for name in ("one", "two"):
        in_jsonl(tmp_path / name)
    alone, both = (open_images(*(tmp_path / n for n in names)).samples for names in (["one"], ["one", "two"]))
    assert list(both[:3]) == list(alone) and len({s.key for s in both}) == 6


def test_columns_go_by_the_names_given(tmp_path):
    write(tmp_path, {**PICTURES, "metadata.jsonl": jsonl(rows("image", "caption"))})
    source = open_images(tmp_path, image_column="image", caption_column="caption")
    assert {s.key: s.caption for s in source.samples} == CAPTIONS and not source.issues


def test_kohya_folders_say_repeats_and_class_tokens(tmp_path):
    write(tmp_path, {"10_sks dog/a.png": 0, "10_sks dog/b.png": 1, "10_sks dog/b.txt": "my dog", "1_dog/c.png": 2})
    source = open_images(tmp_path)
    found = {s.key: (s.caption, s.repeats) for s in source.samples}
    assert found == {
        "10_sks dog/a.png": ("sks dog", 10),
        "10_sks dog/b.png": ("my dog", 10),
        "1_dog/c.png": ("dog", 1),
    }
    assert not source.issues


def test_one_caption_for_all_that_have_none(tmp_path):
    write(tmp_path, {"a.png": 0, "b.png": 1, "b.txt": "other"})
    found = open_images(tmp_path, instance_prompt="a photo of sks dog")
    assert [s.caption for s in found.samples] == ["a photo of sks dog", "other"] and not found.issues


def test_tars_are_read_as_webdataset_writes_them(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "shard-0.tar")) as sink:
        sink.write({"__key__": "x/000", "png": encoded(noise(4, 4, 0)), "txt": "first"})
        sink.write({"__key__": "x/001", "png": encoded(noise(4, 4, 1)), "json": {"text": "second", "n": 1}})
    with webdataset.TarWriter(str(tmp_path / "shard-1.tar")) as sink:
        sink.write({"__key__": "v1.5/002", "jpg": encoded(noise(4, 4, 2), "JPEG"), "txt": "third"})
    source = open_images(tmp_path)
    oracle = webdataset.WebDataset([str(tmp_path / f"shard-{k}.tar") for k in (0, 1)], shardshuffle=False)
    wanted = {f"{s['__key__']}.{e}": s[e] for s in oracle for e in ("png", "jpg") if e in s}
    assert {s.key: s.read_image() for s in source.samples} == wanted and not source.issues
    assert [s.caption for s in source.samples] == ["third", "first", "second"]
    assert open_images(tmp_path / "shard-1.tar").samples[0].caption == "third"


@pytest.mark.parametrize("split", [False, True])
def test_a_data_set_that_was_saved_to_disk(tmp_path, split):
    import datasets

    write(tmp_path, PICTURES)
    columns = {"image": [str(tmp_path / name) for name in CAPTIONS], "text": list(CAPTIONS.values())}
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    (datasets.DatasetDict({"train": made}) if split else made).save_to_disk(str(tmp_path / "saved"))
    wanted = [(tmp_path / name).read_bytes() for name in CAPTIONS]
    moved = shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    source = open_images(moved)
    assert [s.caption for s in source.samples] == list(CAPTIONS.values()) and not source.issues
    assert [s.read_image() for s in pickle.loads(pickle.dumps(source.samples))] == wanted
    assert open_images(moved, caption_column="txt").issues[0].what.endswith("did you mean 'text'?")


def test_masks_lie_beside_or_in_a_column(tmp_path):
    write(tmp_path / "beside", {"a.png": 0, "a.mask.png": 5, "b.png": 1})
    lines = [{"file_name": "a.png", "text": "x", "conditioning": "m/a.png"}, {"file_name": "b.png", "text": "y"}]
    write(tmp_path / "column", {"a.png": 0, "m/a.png": 5, "b.png": 1, "metadata.jsonl": jsonl(lines)})
    (tmp_path / "packed.tar").write_bytes(tar({"a.png": 0, "a.mask.png": 5, "a.txt": "x", "b.png": 1, "b.txt": "y"}))
    for name in ("beside", "column", "packed.tar"):
        for masks in ("file", "none"):
            source = open_images(tmp_path / name, mask_column="conditioning", masks=masks, instance_prompt="all")
            a, b = source.samples
            assert b.read_mask is None and not source.issues
            assert a.read_mask is None if masks == "none" else a.read_mask() == encoded(noise(12, 8, 5))


GOOD = {"ok.png": 0, "ok.txt": "fine"}
ROW = {"file_name": "ok.png", "text": "fine"}


def listing(*lines, name="metadata.jsonl", **files):
    return {
        "ok.png": 0,
        name: "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        **files,
    }


def test_links_that_lead_nowhere_or_back_are_faults(tmp_path):
    write(tmp_path, {**GOOD, "deep/x.png": 1, "deep/x.txt": "y"})
    os.symlink(tmp_path, tmp_path / "deep" / "loop")
    os.symlink(tmp_path / "gone.png", tmp_path / "link.png")
    source = open_images(tmp_path)
    assert {(f.kind, f.key) for f in source.issues} == {("symlink loop", "deep/loop"), ("missing file", "link.png")}
    assert [s.key for s in source.samples] == ["deep/x.png", "ok.png"]
    assert open_images(tmp_path / "gone").issues[0].kind == "missing folder"


def test_a_fault_names_its_line_and_the_cure(tmp_path):
    write(tmp_path, listing(ROW, "", {"filename": "OK.PNG", "text": "x"}, {"file_name": "no.png", "text": "x"}))
    said = {(f.key, f.what) for f in open_images(tmp_path).issues}
    assert said == {
        ("metadata.jsonl:3", "the row has no file_name"),
        ("metadata.jsonl:4", "no file no.png"),
    }


def test_folders_that_link_to_each_other_are_listed_once(tmp_path):
    write(tmp_path, GOOD)
    names = [f"d{k}" for k in range(12)]
    for name in names:
        write(tmp_path / name, {"x.png": 1, "x.txt": "y"})
        for other in names:
            os.symlink(tmp_path / other, tmp_path / name / f"to-{other}")
    source = open_images(tmp_path)
    assert len(source.samples) == 13 and len(source.issues) == 144
    assert {issue.kind for issue in source.issues} == {"skipped", "symlink loop"}


def pax(size):
    """A tar whose second member claims a size, by a pax record."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a.txt", "a.png", "b.png"):
            info = tarfile.TarInfo(name)
            info.pax_headers = {"size": str(size)} if name == "b.png" else {}
            archive.addfile(info, io.BytesIO(b""))
    return out.getvalue()


def long_name(size):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
    return header.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


def test_of_links_in_a_tar_hard_ones_are_files(tmp_path):
    """GNU tar writes the second name of a file as a link to the first."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.png", "a.txt"):
            data = encoded(noise(12, 8)) if name == "a.png" else b"x"
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in (("b.png", tarfile.LNKTYPE), ("b.txt", tarfile.LNKTYPE), ("c.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, f"./a{name[1:]}"
            archive.addfile(info)
    source = open_images(tmp_path)
    assert [(s.key, s.caption, s.read_image()) for s in source.samples] == [
        (key, "x", encoded(noise(12, 8))) for key in ("a.png", "b.png")
    ]
    assert [(issue.kind, issue.key) for issue in source.issues] == [("skipped", "c.png")]


@pytest.mark.parametrize("data", [pax(10**20), pax(10**14), pax(-5), long_name(8 << 30), long_name(1 << 40)])
def test_a_tar_of_absurd_sizes_is_a_truncated_one(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    issues = open_images(tmp_path).issues
    assert "truncated tar" in {issue.kind for issue in issues}
    assert not any("\n" in issue.what for issue in issues)
