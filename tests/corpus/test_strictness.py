"""What commands leave out or change: one line on stderr, in the record that stays, and an error where --strict."""

import json
import os

import pytest
import torch
import yaml
from image_files import encoded, noise, write
from safetensors.torch import save_file

from ldm.commands.train import load_checked_recipe, preflight

PROMPTS = {  # a file, the notice that is printed
    "an option of the web UI": ("--prompt a --restore_faces\n--prompt b", "warning: FILE:1: --restore_faces"),
    "a comment or a prompt": ("#cat\na", "warning: FILE:1: taken for a comment: '#cat'"),
    "syntax of the web UI": ("a <lora:x:1>", "warning: FILE:1: read as text"),
}
BROKEN_PROMPTS = {  # likewise where --lenient, and the number of images; refused without
    "an unknown option": ("a --w 32 --zz 3\nb", "warning: FILE:1: --zz is unknown: left out", 2),
    "a bad value": ("a --s 0\nb", "warning: FILE:1: left out: steps 0", 1),
    "a bad wildcard": ("a __nothing__\nb", "warning: FILE:1: left out:", 1),
    "no UTF-8": (b"a\ncaf\xe9\nb", "warning: FILE:2: left out: byte 4 is not UTF-8", 2),
}


@pytest.fixture
def batch(ldm_, tiny, tmp_path):
    """(status, stderr, job.json) of `ldm batch` of a file with some content."""

    def run(content, *words):
        (tmp_path / "FILE").write_bytes(content if isinstance(content, bytes) else content.encode())
        options = ("--model", tiny, "--steps", 1, "--width", 32, "--height", 32, "--out", tmp_path / "out")
        status, _, err = ldm_("batch", tmp_path / "FILE", *options, *words)
        job = tmp_path / "out" / "job.json"
        return status, err.replace(str(tmp_path) + "/", ""), json.loads(job.read_text()) if job.exists() else None

    return run


@pytest.mark.parametrize("case", PROMPTS)
def test_a_job_says_what_it_reads_otherwise_and_refuses_it_where_strict(batch, case):
    content, notice = PROMPTS[case]
    status, err, job = batch(content, "--strict")
    assert status == 2 and err.count("\n") == 1 and err.endswith("(--strict)\n") and job is None
    assert notice.partition(": ")[2] in err
    status, err, job = batch(content)
    assert status == 0 and err.startswith(notice) and err.count("\n") == 1
    assert len(job["notices"]) == ("read as text" not in notice) and set(job["notices"].values()) <= {1}


@pytest.mark.parametrize("case", BROKEN_PROMPTS)
def test_a_lenient_job_leaves_broken_rows_out_and_counts_them(batch, tmp_path, case):
    content, notice, count = BROKEN_PROMPTS[case]
    status, err, job = batch(content)
    assert status == 2 and err.startswith("error: FILE:") and job is None
    status, err, job = batch(content, "--lenient")
    assert status == 0 and err.startswith(notice) and err.count("\n") == 1 and len(job["notices"]) == 1
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == count


def test_a_lenient_job_of_nothing_says_why(batch):
    status, err, _ = batch("a --s 0", "--lenient")
    assert (status, err) == (2, "error: FILE: no prompts in it (FILE:1: left out: steps 0: must be from 1 to 10000)\n")


def test_generate_refuses_where_strict(ldm_, tiny, tmp_path):
    for words in (("a <lora:x:1>",), ("a", "--width", 37), ("a", "--image", tmp_path / "cut.jpg", "--strength", 0.5)):
        data = encoded(noise(32, 32), "JPEG")
        (tmp_path / "cut.jpg").write_bytes(data[:-2])
        command = ("generate", *words, "--model", tiny, "--steps", 2, "--height", 32, "--out", tmp_path / "out")
        status, out, err = ldm_(*command, "--strict")
        assert (status, out) == (2, "") and err.count("\n") == 1 and err.endswith("(--strict)\n")
        assert not (tmp_path / "out").exists()


@pytest.fixture
def recipe(tiny, tmp_path):
    write(tmp_path / "data", {f"{k}.png": encoded(noise(64, 64, k)) for k in range(5)})
    write(tmp_path / "data", {f"{k}.txt": f"caption {k}" for k in range(5)})
    values = {
        "objective": {"kind": "tune", "pretrained_model_name_or_path": str(tiny), "method": "lora"},
        "data": {"train_data_dir": str(tmp_path / "data"), "resolution": 64, "bucket_reso_steps": 16},
        "output_dir": str(tmp_path / "run"),
        "train_batch_size": 2,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "report_to": [],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


LONG = " ".join(["word"] * 99)
FOLDERS = {  # files, the line of a training, the error where --strict, and whether it takes --lenient to go on
    "stray files": ({"README.txt": "x", "a.npz": "x"}, "1 caption without image, 1 skipped", "README.txt", False),
    "an image without a caption": ({"a.png": encoded(noise(64, 64, 9))}, "1 no caption", "a.png: no caption", False),
    "a broken image": ({"a.png": b"x", "a.txt": "x"}, "1 left out", "a.png: not an image", True),
    "Latin-1": ({"a.png": encoded(noise(64, 64, 9)), "a.txt": b"caf\xe9"}, "1 left out", "a.txt: line 1", True),
    "a JPEG without its end": (
        {"a.jpg": encoded(noise(64, 64, 9), "JPEG")[:-2], "a.txt": "x"},
        "",
        "a.jpg: the end of the file is missing",
        False,
    ),
    "a long caption": ({"a.png": encoded(noise(64, 64, 9)), "a.txt": LONG}, "", "a.png: 398 tokens", False),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_training_counts_what_it_leaves_out_and_refuses_it_where_strict(refused, recipe, tmp_path, case, capsys):
    files, line, error, is_broken = FOLDERS[case]
    write(tmp_path / "data", files)
    refused("train", recipe, "--strict", said=f"error: {error}")
    assert not (tmp_path / "run").exists()
    if is_broken:
        with pytest.raises(ValueError, match=error):
            preflight(load_checked_recipe(recipe, []))
    preflight(load_checked_recipe(recipe, [], False if is_broken else None))
    assert (line and f"warning: {line} (") in capsys.readouterr().err


def test_check_means_the_same(ldm_, recipe, tmp_path):
    write(tmp_path / "data", {"README.txt": "x", "a.png": b"x", "a.txt": "x"})
    write(tmp_path / "data", {os.fsdecode(b"\xff.png"): 6})
    status, _, err = ldm_("check", recipe, "--strict")
    assert status == 2 and err.startswith("error: a.png: not an image (and ") and err.count("\n") == 1
    assert ldm_("check", recipe, "--lenient")[0] == 0


def test_what_a_training_leaves_out_stands_on_stderr_and_in_its_card(ldm_, recipe, tmp_path):
    write(tmp_path / "data", {"README.txt": "x", "a.png": b"x", "a.txt": "x"})
    status, _, err = ldm_("train", recipe, "--lenient")
    assert status == 0
    assert "warning: 1 caption without image, 1 left out (README.txt, a.png): --strict refuses them\n" in err
    card = next((tmp_path / "run").rglob("*.md")).read_text()
    assert "Left out, or used otherwise than it is: 2" in card and "- `a.png: broken image: not an image" in card


def test_inspect_refuses_an_adapter_with_unknown_tensors_where_strict(ldm_, tmp_path):
    weights = {f"lora_unet_mid_block_resnets_0_conv1.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
    save_file(weights, tmp_path / "a.safetensors")
    assert ldm_("inspect", tmp_path / "a.safetensors", "--strict")[0] == 0
    save_file({**weights, "stray": torch.ones(1)}, tmp_path / "b.safetensors")
    assert ldm_("inspect", tmp_path / "b.safetensors")[0] == 0
    status, out, err = ldm_("inspect", tmp_path / "b.safetensors", "--strict")
    assert status == 2 and "stray" in out and err.endswith("b.safetensors: unknown: stray (--strict)\n")
