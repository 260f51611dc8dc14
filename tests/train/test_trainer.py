"""Splits: one batch, however it is shared among processes and accumulated parts, whatever activations are kept."""

import json

import pytest
import torch
from safetensors.torch import load_file
from trainings import FULL, LORA, forks, go, log_of, recipe_of, status, tensors_of

from ldm.checkpoints.hub import LORA_WEIGHT_NAME_SAFE
from ldm.commands.train import create_task
from ldm.config import load_recipe
from ldm.diffusion.objective import TIME_SAMPLERS
from ldm.nn.blocks import ResnetBlock
from ldm.train import state
from ldm.train.trainer import split_rows

EXACT = {
    "train_batch_size": 8,
    "max_train_steps": 4,
    "mixed_precision": "no",
    "optimizer_options": {"eps": 1e-4},  # else rounding decides where a parameter whose gradient is zero goes
}


def figures(folder):
    """The figures of every step in full precision."""
    return json.loads((state.list_checkpoints(folder)[-1] / "state.json").read_text())["figures"]


def assert_close(one, other):
    assert len(figures(one)) == len(figures(other)) == 4
    for a, b in zip(figures(one), figures(other), strict=True):
        assert a == pytest.approx(b, rel=2e-6)
    a, b = tensors_of(one), tensors_of(other)
    weights = [name for name in a if name.startswith(("model", "ema"))]
    assert a.keys() == b.keys() and weights
    for name in weights:
        torch.testing.assert_close(a[name], b[name], rtol=2e-5, atol=2e-6, msg=name)


def test_one_two_and_four_parts_and_two_processes_learn_the_same(recipe_file, tmp_path, capfd):
    changes = {**EXACT, "logging_steps": 100}
    go(recipe_file("diffusion", "whole", **changes))
    for parts in (3, 4):
        go(recipe_file("diffusion", f"parts{parts}", **changes), f"gradient_accumulation_steps={parts}")
        assert_close(tmp_path / "whole", tmp_path / f"parts{parts}")
    path = recipe_file("diffusion", "processes", **changes)
    assert [status(child) for child in forks(lambda: go(path, "gradient_accumulation_steps=2"), 2)] == [0, 0]
    assert (
        capfd.readouterr().err.count("step 4 val_loss") == 4
    )  # the two are one training: its main process alone says it
    assert_close(tmp_path / "whole", tmp_path / "processes")
    assert log_of(tmp_path / "processes")[-1]["val_loss"] == pytest.approx(
        log_of(tmp_path / "whole")[-1]["val_loss"], rel=1e-3
    )  # bfloat16


def test_two_processes_tune_as_one_does(tuning, tmp_path):
    changes = {**EXACT, "logging_steps": 100}
    single = {**LORA, "frozen_dtype": "float32"}
    go(tuning("whole", changes=changes, **single))
    path = tuning("processes", changes=changes, **single)
    assert [status(child) for child in forks(lambda: go(path, "gradient_accumulation_steps=2"), 2)] == [0, 0]
    assert_close(tmp_path / "whole", tmp_path / "processes")
    exports = [load_file(tmp_path / run / "export" / LORA_WEIGHT_NAME_SAFE) for run in ("whole", "processes")]
    assert exports[0].keys() == exports[1].keys()
    for name, a in exports[0].items():
        torch.testing.assert_close(a, exports[1][name], rtol=2e-5, atol=2e-6, msg=name)


def test_an_autoencoder_learns_the_same_in_parts(recipe_file, tmp_path):
    changes = {**EXACT, "logging_steps": 100}
    go(recipe_file("autoencoder", "whole", **changes))
    go(recipe_file("autoencoder", "parts", **changes), "gradient_accumulation_steps=4")
    assert_close(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("kind, times", [("autoencoder", None), *(("diffusion", times) for times in TIME_SAMPLERS)])
def test_rows_of_a_batch_are_those_of_the_whole_batch(kind, times, recipe_file):
    more = {"times": times, "noise_offset": 0.1, "input_perturbation": 0.1} if times else {}
    recipe = load_recipe(
        recipe_file(kind, train_batch_size=8), [f"objective.{name}={value}" for name, value in more.items()]
    )
    task = create_task(recipe)
    whole, part = task.make_batch(9, range(8)), task.make_batch(9, range(3, 5))
    assert whole.keys() == part.keys() and whole["sample_keys"][3:5] == part["sample_keys"]
    whole, part, other = (values_of(batch) for batch in (whole, part, task.make_batch(10, range(3, 5))))
    for name in whole:
        assert torch.equal(whole[name][3:5], part[name]), name
    for name in whole.keys() - {"importance", "nonempty"}:
        assert not torch.equal(other[name], part[name]), name


def values_of(batch):
    """What a batch holds but its keys, as tensors."""
    values = {name: value for name, value in batch.items() if name not in ("sample_keys", "captions")}
    if "captions" in batch:
        values |= {"ids": batch["captions"].token_ids[0], "nonempty": batch["captions"].nonempty}
    return {name: torch.as_tensor(value) for name, value in values.items()}


def test_shares_cover_a_batch_once_in_order():
    for size, processes, parts in ((8, 1, 1), (8, 2, 2), (7, 2, 2), (64, 3, 5)):
        recipe = recipe_of(train_batch_size=size, gradient_accumulation_steps=parts)
        rows = [r for rank in range(processes) for r in split_rows(recipe, _Task(True), rank, processes)]
        assert [i for r in rows for i in r] == list(range(size)) and all(rows)
        assert len(rows) == processes * parts


class _Task:
    def __init__(self, supports_accumulation):
        self.supports_accumulation = supports_accumulation


@pytest.mark.parametrize(
    "size, parts, divisible, said",
    [(3, 2, True, "train_batch_size 3: fewer than 2 processes times 2"), (8, 1, False, "one process")],
)
def test_a_batch_that_cannot_be_shared_is_refused(size, parts, divisible, said):
    with pytest.raises(ValueError, match=said):
        split_rows(recipe_of(train_batch_size=size, gradient_accumulation_steps=parts), _Task(divisible), 0, 2)


def test_a_contrastive_batch_is_not_accumulated(recipe_file):
    with pytest.raises(ValueError, match="needs the whole batch"):
        go(recipe_file("clip"), "gradient_accumulation_steps=2")


@pytest.mark.parametrize("method", [None, LORA, FULL], ids=["from scratch", "lora", "full"])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(method, recipe_file, tuning, tmp_path, monkeypatch):
    def write(folder):
        return tuning(folder, **method) if method else recipe_file("diffusion", folder)

    calls = []
    forward = ResnetBlock.forward
    monkeypatch.setattr(ResnetBlock, "forward", lambda *words: calls.append(torch.is_grad_enabled()) or forward(*words))
    go(write("kept"))
    kept = sum(calls)
    calls.clear()
    go(write("again"), "gradient_checkpointing=true")
    assert kept and sum(calls) == 2 * kept
    a, b = tensors_of(tmp_path / "kept"), tensors_of(tmp_path / "again")
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert log_of(tmp_path / "kept") == log_of(tmp_path / "again")


def test_gradient_checkpointing_is_the_unet_s_alone(recipe_file):
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        go(recipe_file("autoencoder"), "gradient_checkpointing=true")
