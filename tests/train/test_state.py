"""Resuming: a run that was killed ends as one that was not, and no checkpoint is trusted that should not be."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from trainings import (
    FULL,
    LORA,
    assert_equal,
    assert_goes_on,
    fork,
    go,
    launch,
    log_of,
    needs,
    recipe_of,
    status,
    tensors_of,
)

from ldm.config import load_recipe
from ldm.train import state
from ldm.train.ema import EMAModel, exponential_ema_rate
from ldm.train.optimizers import create_optimizer

KILLS = int(os.environ.get("LDM_STRESS_KILLS", "2"))  # scripts/stress_train.py asks for more
FAULTY = {  # of a tuning, an epoch ends after steps 2, 5, 7 and 10
    "max_train_steps": 10,
    "checkpointing_steps": 4,
    "logging_steps": 3,
    "posthoc_steps": 5,
}


def mortal(path, fatal):
    """`ldm train` in a fork that dies before its event number `fatal` under the run's folder; its exit status.

    Events are openings, renames and removals: each line of the log, each file of a checkpoint, each draft. A life
    without end writes their number to `<folder>.events`.
    """
    folder, seen = str(load_recipe(path).output_dir), 0

    def watch(event, words):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod") and folder in str(words[0]):
            seen += 1
            if seen == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def live():
        sys.addaudithook(watch)
        go(path)
        Path(f"{folder}.events").write_text(str(seen))

    return status(fork(live))


@pytest.mark.parametrize(
    "kind, optimizer",
    [
        ("autoencoder", "adamw"),
        ("clip", "adamw"),
        ("diffusion", "muon"),
        ("diffusion", "adamw8bit"),
        ("diffusion", "prodigy"),
    ],
)
def test_a_run_that_was_interrupted_ends_with_the_bits_of_one_that_was_not(kind, optimizer, recipe_file, tmp_path):
    needs(optimizer)
    changes = {"optimizer": optimizer, "logging_steps": 4, "posthoc_steps": 2}
    assert_goes_on(lambda folder: recipe_file(kind, folder, **changes), tmp_path)
    assert [line["step"] for line in log_of(tmp_path / "whole")] == [4, 6]


@pytest.mark.parametrize("kind", ["diffusion", "lora", "full"])
def test_a_run_killed_anywhere_even_while_it_writes_ends_as_if_it_had_not_been(kind, recipe_file, tuning, tmp_path):
    def write(folder):
        if kind == "diffusion":
            return recipe_file(kind, folder, **FAULTY)
        return tuning(folder, changes=FAULTY, **{"lora": LORA, "full": FULL}[kind])

    assert mortal(write("whole"), 0) == 0
    events = int((tmp_path / "whole.events").read_text())
    for kill in range(KILLS):
        path = write(f"kill{kill}")
        assert mortal(path, random.Random(kill).randrange(1, events + 1)) == -signal.SIGKILL
        go(path)
        assert_equal(tmp_path / "whole", tmp_path / f"kill{kill}")
        assert not [*(tmp_path / f"kill{kill}").glob("**/.*")]  # no drafts are left


ENDLESS = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "validation_steps": 100_000}


def test_sigterm_saves_a_checkpoint_and_the_same_command_goes_on(recipe_file, tmp_path):
    path = recipe_file("autoencoder", **ENDLESS)
    child = fork(lambda: go(path))
    wait_for_steps(tmp_path)
    os.kill(child, signal.SIGTERM)
    assert status(child) == 130
    goes_on(path, tmp_path)


def test_sigterm_to_a_launcher_makes_all_processes_leave_after_the_same_step(recipe_file, tmp_path):
    path = recipe_file("autoencoder", **ENDLESS)
    process = launch(path, 2)
    wait_for_steps(tmp_path)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode != 0, err  # the launcher's own
    goes_on(path, tmp_path)


def wait_for_steps(tmp_path):
    log, end = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and '"step": 3' in log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)


def goes_on(path, tmp_path):
    """One checkpoint is there, with the whole log, and the training does one step more."""
    (saved,) = state.list_checkpoints(tmp_path / "run")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert step >= 3
    go(path, f"max_train_steps={step + 1}")
    assert [line["step"] for line in log_of(tmp_path / "run") if "loss" in line] == [*range(1, step + 2)]


@pytest.fixture
def small(tmp_path):
    """A recipe, and a state with two checkpoints of it, at steps 1 and 2, the weights of each filled with its step."""
    recipe = recipe_of(output_dir=str(tmp_path))
    now = fresh(recipe)
    for step in (1, 2):
        now.model.weight.data.fill_(step)
        now.model.weight.grad = torch.ones_like(now.model.weight)
        now.optimizer.step()
        now.model.weight.data.fill_(step)
        now.step = step
        state.save_checkpoint(now, recipe)
    return recipe


def fresh(recipe):
    model = nn.Linear(3, 2, bias=False)
    return state.TrainState(model, {"ema": EMAModel(model, exponential_ema_rate(0.5))}, create_optimizer(model, recipe))


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("size", [None, 0, 7, -1])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(small, tmp_path, file, size):
    torn = tmp_path / "checkpoint-2" / file
    torn.write_bytes(torn.read_bytes()[:size]) if size is not None else torn.unlink()
    if file == "state.json" and size == -1:  # the newline
        torn.write_bytes(torn.read_bytes()[:-1])
    now = fresh(small)
    with pytest.warns(UserWarning, match="checkpoint-2: not a checkpoint of this recipe") as said:
        state.resume_from_checkpoint(now, small)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert now.step == 1 and (now.model.weight == 1).all()
    assert now.optimizer.state_dict()["state"][0]["step"] == 1
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="checkpoint-2: not a checkpoint of this recipe"):
        state.resume_from_checkpoint(fresh(small), small)


@pytest.mark.parametrize("at", [0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize(
    "file, said",
    [
        *((f"{name}.safetensors", rf"\({name}.safetensors is damaged") for name in ("model", "ema", "optimizer")),
        ("state.json", r"\(state.json is damaged"),
        ("sha256.json", ""),
    ],
)
def test_one_flipped_bit_is_told_by_the_file_and_the_checkpoint_before_it_used(small, tmp_path, file, said, at):
    path = tmp_path / "checkpoint-2" / file
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)
    now = fresh(small)
    with pytest.warns(UserWarning, match=f"checkpoint-2: not a checkpoint of this recipe.*{said}"):
        state.resume_from_checkpoint(now, small)
    assert now.step == 1 and (now.model.weight == 1).all()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"seed": 1}, "its seed is 0, the recipe's 1"),
        ({"optimizer": "prodigy"}, "its optimizer is 'adamw', the recipe's 'prodigy'"),
        ({"data": {"sprites": "others"}}, "its data.sprites is 'none', the recipe's 'others'"),
        ({"objective": {"kind": "autoencoder", "model": {}, "crop": 8}}, "its objective.crop is None, the recipe's 8"),
    ],
)
def test_another_training_s_checkpoint_is_refused_by_the_key_that_differs(small, tmp_path, changes, said):
    other = recipe_of(output_dir=str(tmp_path), **changes)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=said):
        state.resume_from_checkpoint(fresh(other), other)


def test_what_does_not_shape_a_run_may_change(small, tmp_path):
    other = recipe_of(
        output_dir=str(tmp_path), max_train_steps=99, logging_steps=7, learning_rate=1e-4, gradient_accumulation_steps=2
    )
    now = fresh(other)
    state.resume_from_checkpoint(now, other)
    assert now.step == 2


def test_only_the_newest_checkpoints_are_kept(small, tmp_path):
    now = fresh(small)
    for now.step in (3, 10):
        state.save_checkpoint(now, small)
    assert [path.name for path in state.list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-10"]


def test_a_scaler_s_state_and_waiting_figures_come_back(small, tmp_path):
    now = fresh(small)
    now.scaler, now.step, now.pending_metrics = torch.amp.GradScaler("cpu", init_scale=8.0), 4, [{"loss": 0.1 + 0.2}]
    state.save_checkpoint(now, small)
    other = fresh(small)
    other.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    state.resume_from_checkpoint(other, small)
    assert other.scaler.state_dict() == now.scaler.state_dict() and other.pending_metrics == [{"loss": 0.1 + 0.2}]


def test_a_nest_of_tensors_comes_back_from_json(tmp_path):
    tree = {"state": {0: {"a": torch.arange(3), "b": 1.5}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "x": None}]}
    tensors: dict = {}
    back = state.tree_from_json(json.loads(json.dumps(state.tree_to_json(tree, tensors))), tensors)
    assert torch.equal(back["state"][0].pop("a"), tree["state"][0].pop("a"))
    tree["groups"][0]["betas"] = [0.9, 0.99]
    assert back == tree and len(tensors) == 1


def test_moments_keep_the_layout_of_their_parameter(tmp_path):
    recipe = recipe_of(output_dir=str(tmp_path), optimizer="muon")
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)

    def made():
        return state.TrainState(model, {}, create_optimizer(model, recipe), step=1)

    now = made()
    model(torch.randn(1, 4, 5, 5)).sum().backward()
    now.optimizer.step()
    state.save_checkpoint(now, recipe)
    other = made()
    state.resume_from_checkpoint(other, recipe)
    assert other.optimizer.state[model.weight]["momentum"].stride() == model.weight.stride()
    assert tensors_of(tmp_path).keys() >= {"model.safetensors weight"}


@pytest.mark.parametrize("sizes, batches", [((4, 2), 4), ((4, 3), 2), ((4, 8), 1), ((4, 3, 4), 1)])
def test_another_batch_size_keeps_the_position_in_samples(small, tmp_path, sizes, batches):
    """Two steps of four samples are four of two; the rest of a batch that is cut comes again."""
    for size in sizes[1:]:
        recipe = recipe_of(output_dir=str(tmp_path), train_batch_size=size)
        now = fresh(recipe)
        state.resume_from_checkpoint(now, recipe)
        state.save_checkpoint(now, recipe)
    assert now.step == 2 and now.step + now.batch_offset == batches


def added(folder):
    Image.new("RGB", (32, 32)).save(folder / "new.png")
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write('{"file_name": "new.png", "text": "a new zorb"}')


def removed(folder):
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[1:]))
    (folder / "red.png").unlink()


def recaptioned(folder):
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace("a red zorb", "a pink zorb"))


def painted_over(folder):
    Image.new("RGB", (32, 32)).save(folder / "red.png")


@pytest.mark.parametrize(
    "change, said",
    [
        (added, "1 added (new.png)"),
        (removed, "1 removed (red.png)"),
        (recaptioned, "1 changed (red.png)"),
        (painted_over, "1 changed (red.png)"),
    ],
)
def test_other_images_or_captions_are_named_and_need_a_word(change, said, tuning, tmp_path):
    go(tuning(**LORA, changes={"max_train_steps": 3}))
    change(tmp_path / "pictures")
    with pytest.raises(ValueError, match=re.escape(f"the data changed: {said}; --set resume_changed_data=true")):
        go(tuning(**LORA))
    with pytest.warns(UserWarning, match=re.escape(said)):
        go(tuning(**LORA), "resume_changed_data=true")
    go(tuning(**LORA), "max_train_steps=7")  # whose checkpoint holds the data that it went on with
    assert log_of(tmp_path / "run")[-1]["step"] == 7


def test_another_folder_with_the_same_content_and_a_validation_set_are_no_change(tuning, tmp_path):
    go(tuning(**LORA, changes={"max_train_steps": 3}))
    shutil.copytree(tmp_path / "pictures", tmp_path / "held-out")
    moved = (tmp_path / "pictures").rename(tmp_path / "renamed")
    path = tuning(**LORA, validation_data_dir=str(tmp_path / "held-out"), data={"train_data_dir": str(moved)})
    go(path)
    assert log_of(tmp_path / "run")[-1]["step"] == 6
