"""`ldm batch` and `ldm verify`: nothing is lost, nothing is drawn twice, and a picture is what it says it is."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

PROMPTS = "a cat\ntwo stars --s 3\na cat\n# nothing\na dog --d 7 --l 2\n"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return tmp_path / "prompts.txt"


@pytest.fixture
def batch(ldm_, tiny, file, tmp_path):
    """(status, stderr) of `ldm batch` of four records, three of them different, into a folder."""

    def run(*words, out="job"):
        status, _, err = ldm_("batch", file, "--model", tiny, "--steps", 2, "--out", tmp_path / out, *words)
        return status, err

    return run


def lines(folder):
    return [json.loads(line) for file in sorted(folder.glob("manifest*.jsonl")) for line in file.open()]


def pictures(folder):
    return {file.name: file.read_bytes() for file in folder.glob("images/*/*.png")}


def test_an_item_is_drawn_once_and_a_second_run_draws_nothing(batch, tmp_path):
    assert batch()[0] == 0
    drawn = pictures(tmp_path / "job")
    assert len(drawn) == len(lines(tmp_path / "job")) == 2 + 1
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "job").rglob("*.png")}
    assert batch()[0] == 0
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "job").rglob("*.png")}
    assert len(lines(tmp_path / "job")) == 3


def test_what_is_missing_or_spoilt_is_drawn_again_and_a_torn_manifest_is_mended(batch, tmp_path):
    batch()
    job, drawn = tmp_path / "job", pictures(tmp_path / "job")
    first, second, _ = sorted(job.glob("images/*/*.png"))
    first.unlink()
    assert batch()[0] == 0 and pictures(job) == drawn
    second.write_bytes(second.read_bytes()[:100])
    assert batch("--check")[0] == 0 and pictures(job) == drawn
    for manifest in job.glob("manifest*.jsonl"):
        manifest.write_bytes(manifest.read_bytes()[:-20])
    assert batch()[0] == 0 and pictures(job) == drawn
    assert {line["id"] for line in lines(job) if line["status"] == "done"} == {name[:-4] for name in drawn}


@pytest.mark.parametrize("words", [["--batch-size", 1], ["--batch-size", 3], ["--engine", "local", "--workers", 2]])
def test_strict_pictures_are_the_same_bits_in_any_batch_and_engine(batch, tmp_path, words):
    assert batch("--strict", "--batch-size", 2)[0] == batch("--strict", *words, out="other")[0] == 0
    assert {line["id"]: line["pixels"] for line in lines(tmp_path / "job")} == {
        line["id"]: line["pixels"] for line in lines(tmp_path / "other")
    }


def test_shards_draw_every_item_once_between_them(batch, tmp_path):
    assert batch("--shard", "0/2")[0] == batch("--shard", "1/2")[0] == 0
    found = lines(tmp_path / "job")
    assert len(found) == len({line["id"] for line in found}) == 3


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_killed_job_run_again_ends_as_if_it_had_not_been(batch, tiny, tmp_path, seconds):
    (tmp_path / "many.txt").write_text("".join(f"a cat --d {k} --s 2\n" for k in range(40)))
    words = ["batch", tmp_path / "many.txt", "--model", tiny, "--batch-size", 2, "--out", tmp_path / "killed"]
    command = [sys.executable, "-m", "ldm.cli", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("killed/images/*/*.png")):
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {k: v for k, v in pictures(tmp_path / "killed").items() if k[:-4] in {x["id"] for x in whole(tmp_path)}}
    assert subprocess.run(command, capture_output=True).returncode == 0
    after, found = pictures(tmp_path / "killed"), lines(tmp_path / "killed")
    assert len(after) == 40 and {line["id"] for line in found if line["status"] == "done"} == {k[:-4] for k in after}
    assert before.items() <= after.items() and not list((tmp_path / "killed").rglob("*.part"))


def whole(folder):
    """The lines of a killed job's manifest, less a torn last one."""
    texts = [line for file in folder.glob("killed/manifest*.jsonl") for line in file.read_text().splitlines()]
    return [json.loads(text) for text in texts if text.endswith("}")]


def test_the_whole_file_is_checked_before_the_first_picture(refused, tiny, file, tmp_path):
    file.write_text("a cat\na dog --s many\na fish --w 30\n")
    refused("batch", file, "--model", tiny, "--out", tmp_path / "job", said=":2")
    assert not (tmp_path / "job").exists()


def test_verify_tells_a_picture_that_is_what_it_says_from_one_that_is_not(batch, ldm_, tiny, tmp_path):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    batch()
    status, out, err = ldm_("verify", tmp_path / "job", "--model", tiny)
    assert status == 0, out + err
    one = sorted((tmp_path / "job").glob("images/*/*.png"))[0]
    with Image.open(one) as picture:
        picture.load()
        info = PngInfo()
        for key, value in picture.text.items():
            info.add_itxt(key, value)
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(one, pnginfo=info)
    status, out, _ = ldm_("verify", one, "--model", tiny)
    assert status == 1 and "differ" in out
    os.remove(one)
