"""Training: the laws of the loop, and that each task learns from what its recipe says."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm.config import load_recipe
from ldm.data.sprites import Sprite, write_sprites
from ldm.pipeline import Pipeline
from ldm.train import state
from ldm.train.autoencoder import edges
from ldm.train.clip import positives
from ldm.train.diffusion import visited
from ldm.train.ema import EMA
from ldm.train.loop import rate, train
from ldm.train.setup import task_for

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 2,
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "logging_steps": 1,
    "validation_steps": 6,
    "dataloader_num_workers": 1,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    """Discs in eight colours and four styles: every kind of scene and both splits."""
    folder = tmp_path_factory.mktemp("sprites")
    y, x = np.mgrid[:32, :32] - 15.5
    records, pixels = [], []
    for s, style in enumerate(("noto", "flat", "3d", "blob")):
        for k in range(60):
            rgba = np.zeros((32, 32, 4), np.uint8)
            rgba[x**2 + y**2 < (10 + s) ** 2] = (*np.random.default_rng(k).integers(0, 255, 3), 255)
            records.append(Sprite(f"thing{k}", f"{k}", style, (f"thing{k}",), (), "objects"))
            pixels.append(rgba)
    write_sprites(folder, records, pixels, 32)
    return folder


def objective(kind, tiny):
    unet = json.loads((tiny / "unet" / "config.json").read_text())
    vae = json.loads((tiny / "vae" / "config.json").read_text())
    return {
        "autoencoder": {"model": vae, "crop": 16},
        "clip": {
            "vocab_size": 600,
            "context_length": 16,
            "projection_dim": 16,
            "text": TOWER,
            "vision": {**TOWER, "image_size": 16, "patch_size": 8},
        },
        "diffusion": {"vae": str(tiny / "vae"), "text": str(tiny), "unet": unet},
    }[kind]


@pytest.fixture
def recipe_file(sprites, tiny, tmp_path):
    def write(kind, folder="run", **changes):
        values = {
            **COMMON,
            "output_dir": str(tmp_path / folder),
            "data": {"sprites": str(sprites), "size": 32, "latents": 64 if kind == "diffusion" else 0},
            "objective": {"kind": kind, **objective(kind, tiny)},
            **changes,
        }
        path = tmp_path / f"{kind}-{folder}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def go(path, *overrides):
    recipe = load_recipe(path, overrides)
    return train(recipe, task_for(recipe))


def final(folder):
    """Everything that a run leaves: all tensors of the last checkpoint, and the figures of the log."""
    last = state.checkpoints(folder)[-1]
    tensors = {f"{file.name} {k}": v for file in last.glob("*.safetensors") for k, v in load_file(file).items()}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


@pytest.mark.parametrize(
    "kind, optimizer", [("autoencoder", "adamw"), ("clip", "adamw"), ("diffusion", "adamw"), ("diffusion", "muon")]
)
def test_a_run_that_was_interrupted_ends_with_the_bits_of_one_that_was_not(
    kind, optimizer, recipe_file, tmp_path, monkeypatch
):
    go(recipe_file(kind, "whole", optimizer=optimizer))
    broken = load_recipe(recipe_file(kind, "broken", optimizer=optimizer))
    task = task_for(broken)
    loss, calls = task.loss, []

    def dies(*words):
        calls.append(1)
        if len(calls) == 5:  # two steps past the checkpoint
            raise RuntimeError("killed")
        return loss(*words)

    monkeypatch.setattr(task, "loss", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train(broken, task)
    go(recipe_file(kind, "broken", optimizer=optimizer))
    (a, log_a), (b, log_b) = final(tmp_path / "whole"), final(tmp_path / "broken")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log_a == log_b and log_a[-1]["step"] == 6


def test_sigterm_saves_a_checkpoint_and_the_same_command_goes_on(recipe_file, tmp_path):
    path = recipe_file("autoencoder", max_train_steps=100_000, checkpointing_steps=100_000, validation_steps=100_000)
    process = subprocess.Popen([sys.executable, "-m", "ldm.cli", "train", str(path)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "step 3 " not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err
    (saved,) = state.checkpoints(tmp_path / "run")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert step >= 3
    go(path, f"max_train_steps={step + 1}")
    assert final(tmp_path / "run")[1][-1]["step"] == step + 1


def test_a_torn_checkpoint_is_refused_by_name(recipe_file, tmp_path):
    path = recipe_file("autoencoder")
    go(path)
    torn = tmp_path / "run" / "checkpoint-6" / "ema.safetensors"
    torn.write_bytes(torn.read_bytes()[:-10])
    with pytest.raises(ValueError, match="checkpoint-6: not a checkpoint of this recipe"):
        go(path, "max_train_steps=8")


def test_the_exported_folder_is_a_model(recipe_file):
    folder = go(recipe_file("diffusion"))
    assert Pipeline.from_pretrained(folder, device="cpu")("thing1", num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.parametrize("dropout, dropped", [(0.0, 0), (1.0, 64), (0.25, None)])
def test_captions_are_dropped_as_often_as_the_recipe_says(dropout, dropped, recipe_file, monkeypatch):
    recipe = load_recipe(recipe_file("diffusion"), [f"objective.caption_dropout={dropout}", "train_batch_size=64"])
    task = task_for(recipe)
    seen = []
    text = task._text
    monkeypatch.setattr(task, "_text", lambda ids: seen.append(ids) or text(ids))
    batch = task.batch(0)
    task.loss(task.model, batch, torch.Generator().manual_seed(0))
    empty = (seen[0] == torch.tensor(task.tokenizer("", padding="max_length", max_length=16).input_ids)).all(1)
    assert empty.sum() == dropped if dropped is not None else 8 <= empty.sum() <= 26
    assert torch.equal(seen[0][~empty], batch["ids"][~empty])


def test_every_latent_is_visited_once_an_epoch_in_an_order_of_its_own():
    epochs = [visited(50, 3, 50 * k, 50) for k in range(3)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], visited(50, 4, 0, 50))
    assert np.array_equal(visited(50, 3, 40, 20), np.concatenate([epochs[0][40:], epochs[1][:10]]))


def test_the_average_of_the_weights_follows_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, expected = EMA(model, 0.5), model.weight.item()
    for step in range(1, 20):
        model.weight.data += 1.0
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.item()
    assert ema.model.weight.item() == pytest.approx(expected, rel=1e-6)


def test_the_learning_rate_warms_up_holds_and_falls(recipe_file):
    recipe = load_recipe(recipe_file("clip"), ["max_train_steps=100", "lr_warmup_steps=10", "lr_decay=0.5"])
    assert [rate(k, recipe) for k in (0, 4, 9, 30, 50)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert rate(75, recipe) == pytest.approx(0.5) and rate(99, recipe) < 0.01


def test_equal_captions_are_positives_of_one_another():
    target = positives({"same": np.array([1, 2, 1])})
    assert target.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]


def test_edges_measure_differences_and_nothing_else():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    assert edges(ramp + 5, scales=1) == pytest.approx(1)
    assert edges(ramp, scales=2) == pytest.approx((1 + 2) / 2)
    assert edges(torch.full((1, 1, 8, 8), 3.0)) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    load_recipe(path)


@pytest.mark.parametrize(
    "override, said",
    [
        ("learning_rat=1", "learning_rat: unknown option; did you mean 'learning_rate'"),
        ("objective.kl_wait=1", "objective.kl_wait: unknown option; did you mean 'kl_weight'"),
        ("max_train_steps=0", "max_train_steps: Input should be greater than 0"),
        ("ema_decay=1", "ema_decay"),
        ("objective.kind=gan", "objective"),
        ("seed", "expected key.path=value"),
        ("seed=-1", "seed: Input should be greater"),
        ("seed=[", "--set seed=\\["),
        ("max_train_steps.x=1", "'max_train_steps' is not a group"),
    ],
)
def test_a_wrong_option_is_named(override, said, recipe_file):
    path = recipe_file("autoencoder")
    with pytest.raises(ValueError, match=said.replace("?", r"\?")) as error:
        load_recipe(path, [override])
    assert "\n" not in str(error.value)


def test_yaml_refuses_a_repeated_key_and_reads_1e_4_as_a_number(tmp_path, recipe_file):
    text = recipe_file("autoencoder").read_text()
    path = tmp_path / "x.yaml"
    path.write_text(text.replace("learning_rate: 0.001", "learning_rate: 1e-4"))
    assert math.isclose(load_recipe(path).learning_rate, 1e-4)
    path.write_text(text + "\nlearning_rate: 2\n")
    with pytest.raises(ValueError, match="'learning_rate' is given twice"):
        load_recipe(path)
