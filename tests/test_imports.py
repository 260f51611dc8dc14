"""Who may import whom: the layers of `ldm` run one way, and each third-party name has one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports from the rows above its own and from its own package, never from another name of its row.
LAYERS = (
    {"errors"},
    {"conditioning", "rng", "files", "hardware", "installation", "image_repair", "sampler_names"},
    {"config", "image_io"},
    {"metadata"},
    {"diffusion", "nn"},
    {"checkpoints"},
    {"adapters", "data"},
    {"pipeline"},
    {"train", "jobs", "evaluate", "convert", "analysis", "compat"},
    {"serve", "picto", "audit"},
    {""},  # ldm/__init__.py, which offers the pipeline to users and is nobody's short cut inside
    {"commands"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# A third-party name and where under ldm/ it may be imported: a file, or a folder.
HOMES = {
    "diffusers": ("nn/vae.py",),
    "transformers": ("nn/tokenizer.py", "picto/clip.py", "evaluate"),
    "tokenizers": ("nn/tokenizer.py", "picto/clip.py", "evaluate"),
    "open_clip": ("nn/text_encoders.py", "evaluate"),
    "torchvision": ("nn/__init__.py",),
    "xformers": ("nn/attention.py",),
    "peft": ("adapters/lora_training.py",),
    "huggingface_hub": ("checkpoints/hub.py", "train/card.py"),
    "accelerate": ("train",),
    "bitsandbytes": ("train/optimizers.py",),
    "prodigyopt": ("train/optimizers.py",),
    "ray": ("jobs/engines.py",),
    "pyarrow": ("data/shards.py", "data/tables.py", "jobs/exports.py", "jobs/readers.py"),
    "datasets": (),  # what it saves is read by pyarrow alone
    "webdataset": (),
    "scripts": (),
    "tests": (),
}


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a module of `package` imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module, names, level):
                parents = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(ast.Name(name) | ast.Attribute(_, name), [ast.Constant(str(module)), *_]):
                if name in ("import_module", "__import__"):
                    yield node.lineno, module


def layer(dotted: str) -> str:
    """The row entry that a name below `ldm` belongs to; a name that is no module is the package's own."""
    part = dotted.split(".")[1] if "." in dotted else ""
    return part if part in LEVEL else ""


def violations(source: str, path: str) -> list[str]:
    """What a file at `path` below ldm/ imports against the rules."""
    here = path.split("/")[0].removesuffix(".py").replace("__init__", "")
    if here not in LEVEL:
        return [f"{path}: {here!r} is in no row of LAYERS"]
    package = ".".join(["ldm", *path.split("/")[:-1]])
    wrong = []
    for line, name in imports(source, package):
        top = name.split(".")[0]
        if top == "ldm" and name != "ldm.__version__":
            there = layer(name)
            allowed = there == here or LEVEL[there] < LEVEL[here]
        else:
            allowed = top not in HOMES or any(f"{path}/".startswith(f"{home}/") for home in HOMES[top])
        if not allowed:
            wrong.append(f"{path}:{line} imports {name}")
    return wrong


@pytest.mark.parametrize("path", sorted((ROOT / "ldm").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    assert violations(path.read_text(), path.relative_to(ROOT / "ldm").as_posix()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("diffusion/sde.py", "from ldm.nn import unet"),
        ("nn/unet.py", "import ldm.diffusion.sde as s"),
        ("diffusion/sde.py", "from ..nn.unet import UNet"),
        ("rng.py", "from . import image_io"),
        ("train/trainer.py", "def f():\n    from ldm import jobs"),
        ("jobs/worker.py", "from ldm.evaluate.metrics import fid"),
        ("checkpoints/keys.py", "if TYPE_CHECKING:\n    from ldm.pipeline import Pipeline"),
        ("pipeline/pipeline.py", "from ldm import Pipeline"),
        ("pipeline/pipeline.py", "import diffusers"),
        ("nn/unet.py", "def f():\n    from transformers.models import clip"),
        ("nn/attention.py", "importlib.import_module('ray.util')"),
        ("nn/blocks.py", "import torch, xformers.ops"),
        ("cli.py", "from scripts import run"),
        ("helpers.py", ""),
    ],
)
def test_a_planted_violation_is_caught(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli.py", "from ldm import Pipeline, __version__\nfrom ldm.train import trainer\nimport ldm.jobs"),
        ("picto/clip.py", "import transformers\nimport ldm.nn.blocks"),
        ("evaluate/features.py", "import open_clip\nfrom ldm.image_io import decode\nfrom ..data import folders"),
        ("__init__.py", "def __getattr__(name):\n    from ldm.pipeline import Pipeline"),
        ("diffusion/samplers.py", "from ..conditioning import Conditioning\nfrom .sde import VPSDE"),
    ],
)
def test_what_the_rules_allow_passes(path, source):
    assert violations(source, path) == []


def test_help_answers_without_torch():
    code = (
        "import atexit, sys; from ldm.cli import main; sys.argv = ['ldm', '--help'];"
        "atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "generate" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
