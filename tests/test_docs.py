"""The documents: links lead somewhere, commands and snippets run, and what is derived from the code is up to date."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Commands that are parsed only, by a word in them, and why.
NOT_RUN = {
    "run.py": "makes an environment",
    "scripts/": "minutes, or npm",
    "ldm train": "minutes",
    "ldm check": "needs the sample data sets",
    "stable-diffusion-v1-5": "needs the hub",
    '"..."': "needs models that are not here",
    "ldm convert": "needs models that are not here",
    "ldm verify": "needs images of another command",
    "ldm export": "needs a job",
    "weights/picto": "a path of the repository",
}


def code_blocks(kind: str) -> list[tuple[str, str]]:
    """(page, block) of all fenced blocks of a kind."""
    return [
        (path.relative_to(ROOT).as_posix(), block)
        for path in PAGES
        for language, block in FENCE.findall(path.read_text())
        if language == kind
    ]


COMMANDS = sorted({line for _, block in code_blocks("sh") for line in block.strip().splitlines() if line.strip()})


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    """Options and arguments are known to the command; scripts are files."""
    words = shlex.split(command, comments=True)
    if words[:2] == ["python3", "scripts/run.py"]:
        words = ["ldm", *words[2:]] if words[2] not in ("test", "docs", "wheel") else words[:2]
    if words[0] == "ldm":
        group = typer.main.get_command(app)
        parent = typer.Context(group, **group.context_settings)
        name, *rest = words[1:]
        group.get_command(parent, name).make_context(name, rest, parent=parent)
    else:
        assert (ROOT / words[1]).is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(word in c for word in NOT_RUN)])
def test_commands_run(command, tmp_path, monkeypatch, ldm_):
    """In an empty folder, with few steps."""
    image, settings = Image.open(ROOT / "weights/picto/easy.png").crop((0, 0, 128, 128)), PngInfo()
    settings.add_text("parameters", "a cat\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 1, Size: 128x128")
    image.save(tmp_path / "image.png")
    image.save(tmp_path / "photo.png", pnginfo=settings)
    Image.new("L", (128, 128), 255).save(tmp_path / "mask.png")
    (tmp_path / "prompts.txt").write_text("a {red|green} apple\n")
    (tmp_path / "prompts.yaml").write_text("prompt: two stars\n")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)[1:]
    few = {
        "generate": ["--steps", "2"],
        "batch": ["--steps", "2"],
        "likelihood": ["--steps", "2"],
        "invert": ["--steps", "2"],
    }
    status, _, error = ldm_(*words, *few.get(words[0], []))
    assert status == 0, error


@pytest.mark.parametrize("page, block", code_blocks("python"))
def test_snippets_run(page, block, tmp_path):
    """In a process of its own, in an empty folder that has the weights beside it."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    block = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", block)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", block],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def hooks():
    spec = spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_map_is_up_to_date(hooks):
    """`python docs/hooks.py` writes it."""
    text = hooks.ARCHITECTURE.read_text()
    assert hooks.with_file_map(text) == text


def test_the_command_line_s_reference_has_every_option(hooks):
    text = hooks.render_cli()
    assert all(f"`{option}`" in text for option in ("--sampler", "--lora", "--sigma-rel", "--engine", "--set"))


def test_the_architecture_names_what_there_is():
    """Backticked files exist, and backticked names of classes and tables are defined somewhere in ldm."""
    text = (ROOT / "docs/architecture.md").read_text()
    code = "\n".join(path.read_text() for path in (ROOT / "ldm").rglob("*.py"))
    for name in re.findall(r"`(ldm/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`([A-Z]\w+|[a-z]+_\w+)`", text):
        assert re.search(rf"\b{name}\b", code), name
