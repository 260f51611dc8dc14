"""Folders of jobs: a small job that runs and how it ended, and a finished one whose images have one colour each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import typer
from PIL import Image

from ldm.commands.batch import exit_on_failure, run_job
from ldm.jobs.engines import InlineEngine
from ldm.jobs.source import PromptEntry
from ldm.jobs.worker import Job
from ldm.metadata import save_png
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request

REQUESTS = [
    Request("a cat", seed=1, num_inference_steps=2),
    Request("two stars", "a dog", seed=2, num_inference_steps=3, sampler="ddim"),
    Request("a dog on a blue background", seed=3, num_inference_steps=2, guidance_scale=1.0),
    Request("a cat", seed=1, num_inference_steps=2),  # the first one again
    Request("a red apple", seed=4, num_inference_steps=4, sampler="heun"),
    Request("", seed=5, num_inference_steps=2, height=48),
    Request("two stars", seed=6, num_inference_steps=3, upscale=1.5),
]
ITEMS = len(REQUESTS) - 1


def job_in(folder: Path, pipe: Pipeline, **changes: Any) -> Job:
    """The job of `REQUESTS`, bit for bit the same in any batch."""
    entries = [PromptEntry(k + 1, request) for k, request in enumerate(changes.pop("requests", REQUESTS))]
    settings = {"model_name": "tiny", "batch_invariant": True, "batch_size": 4, "lease_timeout": 0.4, **changes}
    return Job(folder, entries, lambda device: pipe, **settings)


def go(job: Job, pipe: Pipeline, check: bool = False, start: Callable[[Job], Any] | None = None) -> int:
    """The exit status of `ldm batch` on a job whose model and source are at hand."""
    try:
        with exit_on_failure():
            return run_job(job, pipe, "list", start or (lambda job: InlineEngine(job, [None])), check, 120.0, True)
    except typer.Exit as end:
        return end.exit_code


def outcome(folder: Path) -> dict[str, Any]:
    """How a job ended: the manifest's lines, less who drew them and for how long, and all files with their hashes.

    AssertionError where a line is torn or an item has two.
    """
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    told = [{k: v for k, v in line.items() if k not in ("seconds", "worker")} for line in lines]
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        files[name] = "" if name == "manifest.jsonl" else hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(files[line["file"]] == line["sha256"] for line in lines if line["status"] == "done")
    return {"manifest": told, "files": files}


class Opens(NamedTuple):
    """Opens a model in any process."""

    folder: Path

    def __call__(self, device: str | None) -> Pipeline:
        return Pipeline.from_pretrained(self.folder, device="cpu", dtype="float32")


def fork(live: Callable[[], int]) -> int:
    """The wait status of `live` in a fork of this process, which says nothing."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 3
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        status = live()
    finally:
        os._exit(status)


SETTLED = Request("", "", 0, 32, 48, 6, 3.0, "dpmpp_2m", "trailing")
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def line_of(number, request, **changes):
    name = f"{number:024x}"[::-1]
    file = f"images/{name[:2]}/{name}.png"
    line = {
        "id": name,
        "status": "done",
        "file": file,
        "sha256": "0" * 64,
        "line": number + 1,
        "seconds": 0.5,
        "request": request.to_record(),
        **changes,
    }
    return json.loads(json.dumps(line))


def write_job(folder, requests, draw=True, model="tiny"):
    """A finished job's folder: images of one colour each, a manifest, and the lines in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line_of(k, request) for k, request in enumerate(requests)]
    for k, (request, line) in enumerate(zip(requests, lines, strict=True) if draw else ()):
        colour = COLOURS[k % len(COLOURS)]
        save_png(Image.new("RGB", (request.width, request.height), colour), folder / line["file"], {})
    (folder / "job.json").write_text(json.dumps({"source": "prompts.txt", "model": model}))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines
