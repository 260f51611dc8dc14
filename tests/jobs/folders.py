"""A small job in a folder, and what is compared of how it ended."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import typer

from ldm.commands.batch import exit_on_failure, run_job
from ldm.jobs.engines import InlineEngine
from ldm.jobs.source import PromptEntry
from ldm.jobs.worker import Job
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
    settings = {"model_name": "tiny", "strict": True, "batch_size": 4, "lease_timeout": 0.4, **changes}
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
