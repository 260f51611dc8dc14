"""`ldm batch`: files of prompts to a job's folder, again and again."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ldm.images import read_texts

PROMPTS = "a cat --d 7\ntwo stars\n# no prompt\na cat --d 7\na dog --w 48\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture
def batch(ldm_, tiny, file, tmp_path):
    """(status, stdout, stderr) of `ldm batch FILE WORDS...`, into out/."""
    return lambda *words: ldm_("batch", file, "--model", tiny, "--steps", 2, "--out", tmp_path / "out", *words)


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_a_file_is_drawn_once_and_the_same_command_again_does_what_is_missing(batch, pipe, tmp_path):
    status, out, err = batch("--seed", 3)
    lines = manifest(tmp_path / "out")
    assert (status, out, err) == (0, "done 3, failed 0, left 0\n", "")
    assert [(line["line"], line["request"]["seed"], line["request"]["width"]) for line in lines] == [
        (1, 7, 32),
        (2, 3, 32),
        (5, 3, 48),
    ]
    files = [tmp_path / "out" / line["file"] for line in lines]
    before = [path.stat().st_mtime_ns for path in files]
    files[1].unlink()
    status, out, err = batch("--seed", 3)
    assert status == 0 and out == "done 3, failed 0, left 0\n" and err.startswith("1 finished pictures are missing")
    assert [path.stat().st_mtime_ns == when for path, when in zip(files, before, strict=True)] == [True, False, True]
    drawn = pipe("two stars", seed=3, num_inference_steps=2).images[0]
    with Image.open(files[1]) as picture:
        assert np.abs(np.asarray(picture, int) - np.asarray(drawn, int)).max() <= 1
    assert json.loads(read_texts(files[1])["ldm"])["request"] == lines[1]["request"]


def test_options_are_every_record_s_defaults_and_count_gives_seeds(batch, tmp_path):
    words = ["--negative", "a bird", "--sampler", "ddim", "--count", 2, "--seed", 5, "--guidance-interval", 0, "inf"]
    status, out, _ = batch(*words, "--json")
    found = [line["request"] for line in manifest(tmp_path / "out")]
    assert (
        status == 0
        and {r["sampler"] for r in found} == {"ddim"}
        and {r["negative_prompt"] for r in found} == {"a bird"}
    )
    assert [r["seed"] for r in found] == [7, 8, 5, 6, 5, 6] and found[0]["guidance_interval"] == [0.0, None]
    last = json.loads(out.splitlines()[-1])
    assert (last["done"], last["failed"], last["left"]) == (6, 0, 0)


def test_shards_formats_and_strictness(batch, tmp_path):
    for k in range(2):
        assert batch("--shard", f"{k}/2", "--format", "webp", "--strict")[0] == 0
    assert [line["file"].rsplit(".", 1)[1] for line in manifest(tmp_path / "out")] == ["webp"] * 3
    settings = json.loads((tmp_path / "out" / "job.json").read_text())["settings"]
    assert settings == {"dtype": "torch.float32", "output": "webp", "strict": True}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--engine", "slurm"], "--engine 'slurm': choose from inline, local, ray"),
        (["--workers", "2"], "--workers 2: the engine inline has one"),
        (["--workers", "0"], "--workers 0"),
        (["--shard", "2/2"], "--shard 2/2: must be I/N"),
        (["--shard", "-1/2"], "--shard -1/2"),
        (["--shard", "1"], "--shard 1"),
        (["--format", "gif"], "--format 'gif': choose from png"),
        (["--strict", "--batch-size", "9"], "--batch-size 9: must be from 1 to 8"),
        (["--timeout", "0"], "--timeout 0"),
        (["--expiry", "nan"], "--expiry nan"),
        (["--count", "0"], "count 0"),
        (["--sampler", "dpm"], "sampler 'dpm'"),
        (["--guidance", "nan"], "guidance nan"),
        (["--expand", "some"], "'some': choose from one"),
        (["--lora", "no.safetensors"], "no.safetensors"),
        (["--image", "no.png"], "no.png"),
    ],
)
def test_wrong_words_are_one_line_and_nothing_is_written(refused, tiny, file, tmp_path, words, said):
    refused("batch", file, "--model", tiny, "--out", tmp_path / "out", *words, said=said)
    assert not (tmp_path / "out").exists()


def test_another_job_s_folder_is_refused(batch, refused, tiny, file, tmp_path):
    assert batch()[0] == 0
    words = ["batch", file, "--model", tiny, "--out", tmp_path / "out", "--dtype", "bfloat16"]
    refused(*words, said="job.json: another job: its dtype is not this")


def test_a_signal_finishes_what_is_being_drawn_and_the_job_goes_on(ldm_, tiny, tmp_path):
    file, out = tmp_path / "many.txt", tmp_path / "out"
    file.write_text("".join(f"a cat --d {k}\n" for k in range(400)))
    words = ["batch", str(file), "--model", str(tiny), "--out", str(out), "--steps", "9", "--batch-size", "2"]
    process = subprocess.Popen([sys.executable, "-m", "ldm.cli", *words], stderr=subprocess.PIPE, text=True)
    while not list(out.glob("images/*/*.png")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    drawn = manifest(out)
    assert process.returncode == 130 and err == "" and 0 < len(drawn) < 400
    assert len(drawn) == len(list(out.glob("images/*/*"))) and not os.listdir(out / "leases")
    file.write_text("".join(f"a cat --d {k}\n" for k in range(len(drawn) + 5)))
    assert ldm_(*words)[0] == 0
    assert len(manifest(out)) == len(drawn) + 5
