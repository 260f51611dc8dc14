"""A stranger's output folder: what leads out of it, and records that no training wrote, end in one line."""

import json
import os
import re

import pytest
from trainings import go

from ldm.train.progress import read_log
from ldm.train.state import CHECKSUMS_FILE, check_run_folder

LINKED = "a symbolic link, not a"
ENTRIES = {  # the place of an entry in a run's folder, how it is made, and the words about it
    "averages": (os.symlink, f"{LINKED} folder"),
    "events": (os.symlink, f"{LINKED} folder"),
    "checkpoint-9": (os.symlink, f"{LINKED} folder"),
    "class-images-0a": (os.symlink, f"{LINKED} folder"),
    "log.jsonl": (os.symlink, f"{LINKED} file"),
    "started.txt": (os.symlink, f"{LINKED} file"),
    "recipe.json": (lambda _, path: os.mkfifo(path), "a pipe, socket or device, not a file"),
    "samples.png": (lambda _, path: os.mkdir(path), "a folder, not a file"),
    "checkpoint-9/state.json": (lambda _, path: os.mkfifo(path), "a pipe, socket or device, not a file"),
    "averages/00000001-0.050.safetensors": (os.symlink, f"{LINKED} file"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_leads_elsewhere_is_named_and_nothing_is_written(refused, recipe_file, tmp_path, name):
    make, said = ENTRIES[name]
    outside, entry = tmp_path / "outside", tmp_path / "run" / name
    outside.mkdir()
    (outside / ".x.safetensors.1-2.part").write_text("kept")
    entry.parent.mkdir(parents=True)
    make(outside, entry)
    before = sorted(tmp_path.rglob("*"))
    refused("train", recipe_file("diffusion"), said=f"{entry}: {said}")
    refused("average", tmp_path / "run", "--sigma-rel", 0.1, "--out", tmp_path / "mean", said=f"{entry}: {said}")
    assert sorted(path for path in tmp_path.rglob("*") if path.suffix != ".yaml") == before


def test_what_people_have_in_an_output_folder_is_left_alone(tmp_path):
    (tmp_path / "run" / "checkpoint-9").mkdir(parents=True)
    for name in (".DS_Store", "checkpoint-9/.DS_Store", "notes.txt"):
        (tmp_path / "run" / name).write_text("")
    (tmp_path / "run" / "checkpoint-latest").symlink_to("checkpoint-9")
    (tmp_path / "link").symlink_to("run")
    check_run_folder(tmp_path / "link")
    check_run_folder(tmp_path / "not there")


@pytest.mark.parametrize("line", ["[1]", "5", '{"loss": 1}', '{"step": "x"}', '{"step": 1, "loss": "x"}', "[" * 10**5])
def test_a_log_that_no_training_wrote_is_refused_by_its_line(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step": 1, "loss": NaN}}\n{line}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}: line 2: not a line of a training's log")):
        read_log(path)


def test_a_resumed_log_leaves_the_copy_that_shares_its_bytes_as_it_is(recipe_file, tmp_path):
    path = recipe_file("diffusion")
    go(path, "max_train_steps=1")
    os.link(tmp_path / "run" / "log.jsonl", tmp_path / "copy.jsonl")  # as of `cp -al`
    before = (tmp_path / "copy.jsonl").read_bytes()
    go(path, "max_train_steps=2")
    assert (tmp_path / "copy.jsonl").read_bytes() == before
    assert (tmp_path / "run" / "log.jsonl").read_bytes().startswith(before)


FORGED = {  # a checkpoint's file, its content, and the words about it
    "a hash of a file outside": (CHECKSUMS_FILE, {"../../outside": "0"}, "../../outside is missing"),
    "a hash of a device": (CHECKSUMS_FILE, {"/dev/zero": "0"}, "/dev/zero is missing"),
    "hashes in a list": (CHECKSUMS_FILE, [1], "not a JSON object"),
    "a state that is a list": ("state.json", [1], "not a JSON object"),
    "options that are no table": ("state.json", {"recipe": [1]}, "no attribute"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_checkpoint_is_refused(ldm_, recipe_file, tmp_path, case):
    name, content, said = FORGED[case]
    checkpoint = tmp_path / "run" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / CHECKSUMS_FILE).write_text("{}")
    (checkpoint / name).write_text(json.dumps(content))
    status, _, err = ldm_("train", recipe_file("diffusion"))
    *_, last = err.splitlines()
    assert status == 2 and last.startswith(f"error: {checkpoint}: not a checkpoint") and said in last
