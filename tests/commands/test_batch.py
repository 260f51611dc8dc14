"""`ldm batch`: files of prompts to a job's folder, again and again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.adapters.factors import LoRA
from ldm.adapters.lora import Adapter, ModuleDelta
from ldm.adapters.lora_saving import save_adapter
from ldm.checkpoints.formats import load_checkpoint
from ldm.commands.options import ModelOptions, parse_embedding, parse_lora
from ldm.jobs import contact_sheets, gallery
from ldm.metadata import read_image_and_metadata

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
    assert status == 0 and out == "done 3, failed 0, left 0\n" and err.startswith("note: 1 finished images are missing")
    assert [path.stat().st_mtime_ns == when for path, when in zip(files, before, strict=True)] == [True, False, True]
    drawn = pipe("two stars", seed=3, num_inference_steps=2).images[0]
    with Image.open(files[1]) as picture:
        assert np.abs(np.asarray(picture, int) - np.asarray(drawn, int)).max() <= 1
    assert json.loads(read_image_and_metadata(files[1])[1]["ldm"])["request"] == lines[1]["request"]


def test_syntax_that_is_drawn_as_text_is_told_once_with_its_first_line(batch, file):
    file.write_text(
        "a cat\n\n<lora:x:0.8> a cat\n" + "".join(f"a [cat:dog:0.{k}] --n <lora:x:0.8>\n" for k in range(9))
    )
    status, out, err = batch("--steps", 1)
    assert (status, out) == (0, "done 11, failed 0, left 0\n")
    parts = ["<lora:x:0.8>", *(f"[cat:dog:0.{k}]" for k in range(4))]
    said = f"{file}:3: read as text, not as syntax of the web UI: {', '.join(parts)}, ..."
    assert err == f"warning: {said}; LoRAs are given by --lora FILE:WEIGHT\n"


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
        assert batch("--shard", f"{k}/2", "--format", "webp", "--batch-invariant")[0] == 0
    assert [line["file"].rsplit(".", 1)[1] for line in manifest(tmp_path / "out")] == ["webp"] * 3
    settings = json.loads((tmp_path / "out" / "job.json").read_text())["settings"]
    assert settings == {"dtype": "torch.float32", "output": "webp", "batch_invariant": True}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--engine", "slurm"], "--engine 'slurm': choose from inline, local, ray"),
        (["--workers", "2"], "--workers 2: engine inline has one worker"),
        (["--workers", "0"], "--workers 0"),
        (["--shard", "2/2"], "--shard 2/2: must be I/N"),
        (["--shard", "-1/2"], "--shard -1/2"),
        (["--shard", "1"], "--shard 1"),
        (["--format", "gif"], "--format 'gif': choose from png"),
        (["--batch-invariant", "--batch-size", "9"], "--batch-size 9: must be from 1 to 8"),
        (["--timeout", "0"], "--timeout 0"),
        (["--expiry", "nan"], "--expiry nan"),
        (["--count", "0"], "count 0"),
        (["--sampler", "dpm"], "sampler 'dpm'"),
        (["--guidance", "nan"], "guidance nan"),
        (["--expand", "some"], "'some': choose from one"),
        (["--lora", "no.safetensors"], "no.safetensors"),
        (["--image", "no.png"], "no.png"),
        (["--grid", "colour"], "--grid 'colour': choose from prompt"),
        (["--grid", "prompt", "--count", "101"], "--grid prompt: more than 100 sheets, one for each seed"),
    ],
)
def test_wrong_words_are_one_line_and_nothing_is_written(refused, tiny, file, tmp_path, words, said):
    refused("batch", file, "--model", tiny, "--out", tmp_path / "out", *words, said=said)
    assert not (tmp_path / "out").exists()


def test_another_job_s_folder_is_refused(batch, refused, tiny, file, tmp_path):
    assert batch()[0] == 0
    words = ["batch", file, "--model", tiny, "--out", tmp_path / "out", "--dtype", "bfloat16"]
    refused(*words, said="job.json: belongs to another job: dtype differs")


@pytest.fixture
def dressed(tiny, tmp_path):
    """A folder with an adapter, twice, and an embedding, for the tiny model."""
    g = torch.Generator().manual_seed(0)
    factors = LoRA(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g))
    networks = load_checkpoint(tiny, torch.device("cpu"), torch.float32).networks
    target = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    for name in ("style", "a:2"):
        adapter = Adapter(name, {target: ModuleDelta(factors, 2.0)})
        save_adapter(adapter, tmp_path / f"{name}.safetensors", "kohya", networks)
    os.rename(tmp_path / "a:2.safetensors", tmp_path / "a:2")
    save_file({"emb_params": torch.randn(2, 32, generator=g)}, tmp_path / "toy.safetensors")
    return tmp_path


def test_the_gallery_s_command_opens_the_job_s_model_adapters_and_words_and_generates_the_same(
    ldm_, tiny, dressed, file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    os.symlink(tiny, "model")
    file.write_text("a cat and a toy --d 7\n")
    opened = ["--model", "model", "--vae", "model/vae", "--prediction", "eps", "--no-zero-snr"]
    opened += [
        "--lora",
        "style.safetensors:0.7",
        "--lora",
        "other=style.safetensors:-0.5:0",
        "--embedding",
        "toy=toy.safetensors",
    ]
    status, _, err = ldm_("batch", file, *opened, "--steps", 3, "--guidance", 2.5, "--batch-size", 1, "--out", "job")
    assert status == 0, err
    page = (tmp_path / "job" / "index.html").read_text()
    header = json.loads(page.split('id="header">')[1].split("</script>")[0])
    record = {name: value for name, value in manifest(tmp_path / "job")[0]["request"].items() if value is not None}
    told = [
        word for name, option in gallery.GENERATE_OPTIONS.items() if name in record for word in (option, record[name])
    ]
    assert str(tmp_path) not in " ".join(header["words"])  # what was typed
    status, out, err = ldm_("generate", *header["words"], *told, record["prompt"])
    assert status == 0, err
    again, drawn = Image.open(out.strip()), Image.open(tmp_path / "job" / manifest(tmp_path / "job")[0]["file"])
    assert again.tobytes() == drawn.tobytes()
    texts = [json.loads(picture.text["ldm"]) for picture in (again, drawn)]
    assert texts[0] == texts[1] and [a["weight"] for a in texts[0]["adapters"]] == [0.7, [-0.5, 0.0]]


@pytest.mark.parametrize(
    "word", ["a:2:1", "a:2:1:1", "a:2", "a:5e-05", "x=a:2:0.5:0.25", "a=b.safetensors:2", "hub/id:0.5", "x=y"]
)
def test_an_adapter_s_word_reads_back_as_it_was(dressed, monkeypatch, word):
    monkeypatch.chdir(dressed)
    given = parse_lora(word)
    again = parse_lora(given.to_option())
    assert (again.source, again.name) == (given.source, given.name)
    assert np.array_equal(np.broadcast_to(again.weight, 2), np.broadcast_to(given.weight, 2))
    assert parse_embedding(parse_embedding(word).to_option()) == parse_embedding(word)


def test_a_model_s_words_are_its_options_but_for_the_device(ldm_):
    assert ModelOptions().cli_args() == ModelOptions(device="cpu").cli_args() == []
    said = ModelOptions(model="m", revision="main", zero_snr=False, ema=True, dtype="float32").cli_args()
    assert said == ["--model", "m", "--revision", "main", "--no-zero-snr", "--ema", "--dtype", "float32"]
    assert ModelOptions(zero_snr=True).cli_args() == ["--zero-snr"]


def test_grids_and_exports_lie_in_the_job_s_folder_and_verify_passes_them_by(ldm_, batch, tiny, tmp_path):
    assert batch("--count", 2, "--grid", "seed,prompt")[:2] == (0, "done 6, failed 0, left 0\n")
    out = tmp_path / "out"
    sheets = [Image.open(path) for path in sorted((out / "grids" / "seed-prompt").iterdir())]
    assert [sheet.text["Title"] for sheet in sheets] == ["size 32 × 32", "size 48 × 32"]
    for kind in ("webdataset", "parquet"):
        status, said, _ = ldm_("export", out, "--to", kind, "--out", out / kind)
        assert (status, said) == (0, f"6 images in 1 files in {out / kind}\n")
    status, said, err = ldm_("verify", out, "--model", tiny)
    assert (status, err) == (0, "") and len(said.splitlines()) == 6
    assert batch("--count", 2, "--check")[:2] == (0, "done 6, failed 0, left 0\n")
    assert (out / "parquet" / "000000.parquet").is_file()
    lone = shutil.copytree(out / "images", tmp_path / "grids")  # of that name, and no job's
    assert len(ldm_("verify", tmp_path / "grids", "--model", tiny)[1].splitlines()) == len([*lone.rglob("*.png")]) == 6


def test_a_grid_is_drawn_in_a_folder_that_was_there_already(batch, tmp_path):
    (tmp_path / "out").mkdir()
    assert batch("--grid", "seed")[0] == 0
    assert len([*(tmp_path / "out" / "grids" / "seed").iterdir()]) == 3


def test_a_grid_counts_what_the_folder_has_already_before_anything_is_drawn(batch, tmp_path, monkeypatch):
    assert batch()[0] == 0
    drawn = manifest(tmp_path / "out")
    monkeypatch.setattr(contact_sheets, "MAX_SHEETS", 3)
    status, _, err = batch("--negative", "rain", "--grid", "seed")
    assert status == 2 and "--grid seed: more than 3 sheets" in err and manifest(tmp_path / "out") == drawn


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


def test_processes_that_are_spawned_draw_what_one_process_does(batch, ldm_, file, tiny, tmp_path):
    words = ["batch", file, "--model", tiny, "--steps", 2, "--batch-size", 1, "--out", tmp_path / "two"]
    assert batch("--batch-size", 1)[0] == 0
    assert ldm_(*words, "--engine", "local", "--workers", 2) == (0, "done 3, failed 0, left 0\n", "")
    one, two = ([line["pixels"] for line in manifest(tmp_path / name)] for name in ("out", "two"))
    assert one == two and not os.listdir(tmp_path / "two" / "leases")
