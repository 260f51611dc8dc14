"""`ldm export`: a job's images and prompts come back unchanged from the data set, by whichever reader."""

import hashlib
import json
import os
import resource
import shutil
import sys
import tarfile
from dataclasses import replace

import pytest
import yaml
from job_folders import SETTLED, go, job_in, write_job

from ldm.config import ImageDataConfig
from ldm.data.folders import open_image_sources
from ldm.jobs import exports
from ldm.pipeline.request import REQUEST_FIELDS, Request

PROMPTS = ["  a cat, with spaces\t", "🎈 雪 é \u2028 lines\nand tabs\t.", '</script> "quoted" \\ & -- \r\n x', "a.b/c"]
SIZE = 2  # images in a shard


@pytest.fixture(scope="module")
def job(pipe, tmp_path_factory):
    """The folder of a job of five images, two of them of one line."""
    folder = tmp_path_factory.mktemp("exported") / "job"
    requests = [Request(text, seed=k, num_inference_steps=1, height=32 + 8 * k) for k, text in enumerate(PROMPTS)]
    requests.insert(2, Request(PROMPTS[1], "a dog", seed=2**62, num_inference_steps=2, guidance_interval=(0.5, None)))
    assert go(job_in(folder, pipe, requests=requests), pipe) == 0
    return folder


@pytest.fixture(scope="module")
def lines(job):
    return [json.loads(line) for line in (job / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture
def export(ldm_, tmp_path):
    """The folder that `ldm export JOB --to KIND` writes."""

    def run(job, kind, out="data", size=SIZE):
        status, _, err = ldm_("export", job, "--to", kind, "--out", tmp_path / out, "--shard-size", size)
        assert (status, err) == (0, ""), err
        return tmp_path / out

    return run


def told(line):
    """The settings that an image is exported with."""
    return {"id": line["id"], "text": line["request"]["prompt"], "model": "tiny", **line["request"]} | {
        "begun_from_image": None,
        "begun_from_mask": None,
    }


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def test_webdataset_reads_each_image_with_its_prompt_and_settings(job, lines, export):
    import webdataset

    out = export(job, "webdataset")
    shards = sorted(map(str, out.iterdir()))
    assert [path[-10:] for path in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [line["id"] for line in lines]
    for sample, line in zip(found, lines, strict=True):
        assert sample["png"] == (job / line["file"]).read_bytes()
        assert sample["txt"].decode() == line["request"]["prompt"]
        assert json.loads(sample["json"]) == without(told(line), "prompt", "image", "mask")
    decoded = next(iter(webdataset.WebDataset(shards, shardshuffle=False).decode("pil")))
    assert decoded["png"].size == (32, 32) and decoded["txt"] == PROMPTS[0] and decoded["json"]["seed"] == 0


def test_datasets_opens_the_folder_with_its_images(job, lines, export, tmp_path):
    import datasets

    found = datasets.load_dataset(str(export(job, "parquet")), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(found.features["image"], datasets.Image)
    for row, line in zip(found, lines, strict=True):
        assert hashlib.sha256(row["image"].convert("RGB").tobytes()).hexdigest() == line["pixels"]
        assert without(row, "image") == without(told(line), "prompt", "image", "mask")


EXTRAS = [  # further columns of a table, and what they are in parquet
    ({"Category": "x", "n": 1, "seed": "s", "mixed": "a", "flag": True}, ["x", 1.0, "s", '"a"', True]),
    ({"Category": "y", "n": 0.5, "mixed": 2}, ["y", 0.5, None, "2", None]),
    ({"mixed": [1, {"a": None}], "n": None}, [None, None, None, '[1, {"a": null}]', None]),
]


def test_further_columns_of_the_table_are_carried_along(tmp_path, export):
    from pyarrow import parquet

    folder = tmp_path / "job"
    lines = write_job(folder, [replace(SETTLED, prompt=name) for name in "abc"])
    for line, (extra, _) in zip(lines, EXTRAS, strict=True):
        line |= {"extra": extra, "sha256": hashlib.sha256((folder / line["file"]).read_bytes()).hexdigest()}
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = parquet.read_table(export(folder, "parquet", "a", 3)).to_pylist()
    names = ["Category", "n", "extra_seed", "mixed", "flag"]
    assert [[row[name] for name in names] for row in rows] == [cells for _, cells in EXTRAS]
    with tarfile.open(export(folder, "webdataset", "b", 3) / "000000.tar") as tar:
        first = json.load(tar.extractfile(f"{lines[0]['id']}.json"))
    assert (first["Category"], first["extra_seed"], first["seed"]) == ("x", "s", 0)


def test_without_pyarrow_the_folder_is_named_and_nothing_written(refused, job, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(
        "export", job, "--to", "parquet", "--out", tmp_path / "data", said=f"error: {tmp_path / 'data'}: needs pyarrow"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", exports.EXPORT_FORMATS)
def test_our_own_trainer_reads_it(job, lines, export, kind):
    source = open_image_sources(ImageDataConfig(train_data_dir=export(job, kind)))
    assert not source.issues
    wanted = {(job / line["file"]).read_bytes(): line["request"]["prompt"].strip() for line in lines}
    assert {sample.read_image(): sample.caption for sample in source.samples} == wanted
    assert len({sample.key for sample in source.samples}) == len(lines)


@pytest.mark.parametrize("kind", exports.EXPORT_FORMATS)
def test_check_audits_it(job, export, ldm_, tiny, tmp_path, kind):
    values = {
        "objective": {"kind": "tune", "pretrained_model_name_or_path": str(tiny), "method": "lora"},
        "data": {"train_data_dir": str(export(job, kind)), "resolution": 32, "bucket_reso_steps": 16},
        "output_dir": str(tmp_path / "runs" / "mine"),
        "train_batch_size": 1,
        "max_train_steps": 9,
        "learning_rate": 1e-3,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    status, out, err = ldm_("check", tmp_path / "recipe.yaml", "--json")
    found = json.loads(out)
    assert status == 0 and [f for f in found["findings"] if f["severity"] == "error"] == [], err
    assert found["forecast"]["images"] == len(PROMPTS) + 1


@pytest.mark.parametrize("kind", exports.EXPORT_FORMATS)
def test_the_same_images_give_the_same_bytes_whoever_drew_them_and_in_whichever_order(job, export, tmp_path, kind):
    other = shutil.copytree(job, tmp_path / "other")
    whole = (other / "manifest.jsonl").read_text().splitlines(keepends=True)
    failed = json.dumps({**json.loads(whole[0]), "status": "failed"}) + "\n"
    stale = json.dumps({**json.loads(whole[3]), "sha256": "0" * 64}) + "\n"
    (other / "manifest.jsonl").write_text("".join([stale, whole[4], whole[2], failed]))
    (other / "manifest-a-worker.jsonl").write_text("".join([stale, whole[3], whole[1]]))
    (other / "manifest-b-worker.jsonl").write_text(whole[0] + whole[1][:40])
    first, again = export(job, kind), export(other, kind, "again")
    files = [{path.name: path.read_bytes() for path in out.iterdir()} for out in (first, again)]
    assert len(files[0]) == 3 and files[0] == files[1]


def test_a_row_group_is_of_modest_size(job, lines, export, monkeypatch):
    from pyarrow import parquet

    sizes = [(job / line["file"]).stat().st_size for line in lines]
    for rows, size, wanted in ((2, 2**30, [2, 2, 1]), (100, sum(sizes[:3]), [3, 2])):
        monkeypatch.setattr(exports, "ROW_GROUP_IMAGES", rows)
        monkeypatch.setattr(exports, "ROW_GROUP_BYTES", size)
        meta = parquet.ParquetFile(export(job, "parquet", f"by-{rows}", 5) / "000000.parquet").metadata
        assert [meta.row_group(k).num_rows for k in range(meta.num_row_groups)] == wanted


def test_every_field_of_a_request_is_a_column():
    import pyarrow as pa

    names = {name for name, _ in exports.build_parquet_columns(pa)}
    request = REQUEST_FIELDS.keys() - {"prompt", "image", "mask"}
    assert names == request | {"image", "id", "text", "model", "begun_from_image", "begun_from_mask"}


DAMAGES = {
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:300]), "not as it was finished"),
    "gone": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("kind", exports.EXPORT_FORMATS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_image_that_is_not_as_it_was_finished_is_named_and_nothing_is_written(
    job, lines, refused, tmp_path, kind, damage
):
    folder = shutil.copytree(job, tmp_path / "torn")
    harm, said = DAMAGES[damage]
    harm(folder / lines[3]["file"])
    words = ["export", folder, "--to", kind, "--out", tmp_path / "data", "--shard-size", SIZE]
    refused(*words, said=f"{folder / lines[3]['file']}: {said}")
    assert os.listdir(tmp_path) == ["torn"]


@pytest.mark.parametrize(
    "change, words, said",
    [
        (lambda f: (f / "manifest.jsonl").unlink(), [], "no manifest.jsonl, so not a job's folder"),
        (lambda f: (f / "manifest.jsonl").write_text(""), [], "no finished images in it"),
        (lambda f: shutil.rmtree(f), [], "no manifest.jsonl"),
        (lambda f: (f / "job.json").unlink(), [], "job.json: No such file"),
        (lambda f: (f / "job.json").write_text("{}"), [], "job.json: names no model"),
        (
            lambda f: (f / "manifest.jsonl").write_text(
                '{"id": "a", "line": 1, "status": "done", "file": "images/0b/0b.png", "sha256": "c"}\n'
            ),
            [],
            "the line of a: no request",
        ),
        (lambda f: None, ["--to", "zip"], "--to 'zip': choose from webdataset, parquet"),
        (lambda f: None, ["--shard-size", 0], "--shard-size 0"),
        (lambda f: None, ["--out", "JOB/images"], "exists already"),
        (lambda f: None, ["--out", "JOB/job.json"], "Not a directory"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(job, refused, tmp_path, change, words, said):
    folder = shutil.copytree(job, tmp_path / "job")
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    words = [str(word).replace("JOB", str(folder)) for word in words]
    refused("export", folder, "--out", tmp_path / "data", *words, said=said)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", exports.EXPORT_FORMATS)
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(job, ldm_, tmp_path, kind):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # bytes of a file
    try:
        status, out, err = ldm_("export", job, "--to", kind, "--out", tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file = tmp_path / "data" / f"000000.{exports.EXPORT_FORMATS[kind][0]}"
    assert (status, out, err) == (1, "", f"error: {file}: File too large\n") and not os.listdir(tmp_path)


def test_memory_does_not_grow_with_the_shards(job, lines, tmp_path):
    """Of 300 images of 300 kB each: 90 MB that are never together in memory."""
    import tracemalloc

    folder, names = shutil.copytree(job, tmp_path / "large"), []
    data = os.urandom(300_000)
    (folder / lines[0]["file"]).write_bytes(data)
    for k in range(300):
        line = {**lines[0], "id": f"{k:024x}", "sha256": hashlib.sha256(data).hexdigest()}
        names.append(json.dumps(line) + "\n")
    (folder / "manifest.jsonl").write_text("".join(names))
    for kind in exports.EXPORT_FORMATS:
        tracemalloc.start()
        exports.export_job(folder, tmp_path / kind, kind, 300, lambda n, of: None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.5 * exports.ROW_GROUP_BYTES, kind
        shutil.rmtree(tmp_path / kind)


def test_a_folder_of_parquet_files_from_elsewhere(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"photo": b"one", "alt": " first ", "mask": b"m"}, {"photo": b"two", "alt": None, "mask": None}]
    rows.append({"photo": None, "alt": "third", "mask": None})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=2)
    columns = {"image_column": "photo", "caption_column": "alt", "masks": "file"}
    config = ImageDataConfig(train_data_dir=tmp_path, **columns)
    first, second, third = (source := open_image_sources(config)).samples
    assert (first.caption, first.read_image(), first.read_mask()) == ("first", b"one", b"m") and third.read_mask is None
    assert [(fault.kind, fault.key) for fault in source.issues] == [("no caption", "train.parquet:0000001")]
    assert (second.caption, second.read_image()) == ("", b"two")
    with pytest.raises(OSError, match=r"train\.parquet: row 0 of 'photo' holds no image"):
        third.read_image()
    misspelled = open_image_sources(config.model_copy(update={"caption_column": "alx"}))
    assert misspelled.issues[0].what.endswith("did you mean 'alt'?")
    (tmp_path / "train.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-9])
    assert [fault.kind for fault in open_image_sources(config).issues] == ["corrupt dataset"]
