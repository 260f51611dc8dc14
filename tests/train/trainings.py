"""Recipes small enough to train in a test, and what is compared of a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ldm.commands.train import create_task
from ldm.config import Recipe, load_recipe
from ldm.train import state
from ldm.train.trainer import train_model

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 2,
    "max_train_steps": 6,
    "checkpointing_steps": 3,
    "logging_steps": 1,
    "report_to": [],
    "validation_steps": 6,
    "dataloader_num_workers": 1,
}
FULL = {"method": "full"}
LORA = {"method": "lora", "rank": 2, "targets": ["attention", "convolutions"], "train_text_encoder": True}
WORD = {"method": "textual_inversion", "placeholder_token": "zorb", "initializer_token": "red", "num_vectors": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def objective(kind: str, tiny: Path) -> dict:
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


def needs(optimizer: str) -> None:
    """Skip where a package is not installed: bitsandbytes, on a CPU, says a line whenever it is imported."""
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")


def recipe_of(**changes) -> Recipe:
    """A recipe for what needs no data."""
    objective = {"kind": "autoencoder", "model": {}}
    return Recipe.model_validate(
        {**COMMON, "objective": objective, "data": {"sprites": "none"}, "output_dir": "none", **changes}
    )


def go(path: Path, *overrides: str) -> Path:
    recipe = load_recipe(path, overrides)
    return train_model(recipe, create_task(recipe))


def assert_goes_on(write: Callable[[str], Path], folder: Path) -> None:
    """A run that dies two steps past its checkpoint and is run again ends with the bits of one that does not.

    `write(name)` is the file of a recipe whose output is `folder / name`.
    """
    go(write("whole"))
    recipe = load_recipe(write("broken"))
    task = create_task(recipe)
    loss, calls = task.compute_loss, []

    def dies(*words):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("killed")
        return loss(*words)

    task.compute_loss = dies
    with pytest.raises(RuntimeError, match="killed"):
        train_model(recipe, task)
    go(write("broken"))
    assert_equal(folder / "whole", folder / "broken")


def fork(work: Callable[[], object], **environment: str) -> int:
    """The process id of a fork that does some work, free of the seconds that imports take; 130 is an interrupt."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.environ |= environment
        AcceleratorState._reset_state(True)
        work()
        status = 0
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


def status(child: int) -> int:
    """The exit status of a fork, once it has ended; of a signal, its negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forks(work: Callable[[], object], processes: int) -> list[int]:
    """As many processes of one training, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [fork(work, **common, RANK=str(k), LOCAL_RANK=str(k)) for k in range(processes)]


def launch(path: Path, processes: int) -> subprocess.Popen:
    """`ldm train` by torch's launcher."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "ldm.cli", "train", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def log_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint and of the averages' snapshots."""
    files = [*state.list_checkpoints(folder)[-1].glob("*.safetensors"), *folder.glob("averages/*.safetensors")]
    return {f"{file.name} {k}": v for file in files for k, v in load_file(file).items()}


def assert_equal(one: Path, other: Path) -> None:
    """Bit for bit: tensors, what else the last checkpoint's state says, and the log."""
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []
    states = [json.loads((state.list_checkpoints(folder)[-1] / "state.json").read_text()) for folder in (one, other)]
    assert states[0] == states[1]
    assert log_of(one) == log_of(other)
