"""`ldm batch`: a file of prompts to pictures, exactly once each, resumable."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.commands.generate import finite, generate
from ldm.commands.options import (
    MODEL,
    Embedding,
    Lora,
    Loras,
    Model,
    Words,
    named,
    opens_model,
    weighted,
    within,
    writable,
)
from ldm.commands.teller import teller
from ldm.commands.unread import Unread

if TYPE_CHECKING:
    from ldm.jobs.engines import Engine
    from ldm.jobs.worker import Job
    from ldm.pipeline import Pipeline
    from ldm.request import Request

FIELDS = {"negative": "negative_prompt", "steps": "num_inference_steps", "guidance": "guidance_scale"}
OWN = {"prompts", "count", "lora", "embedding", "batch_size", "out", "as_json", *MODEL}  # not of every picture
SETTINGS = [
    parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in inspect.signature(generate).parameters.items()
    if name not in OWN
]


@dataclass(frozen=True)
class Opener:
    """Loads the model of a job, with its adapters and embeddings, in any process."""

    model: Model
    adapters: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    @property
    def words(self) -> list[str]:
        """What `ldm generate` opens the same by."""
        adapters = [word for adapter in self.adapters for word in ("--lora", adapter.word())]
        return self.model.words() + adapters + [w for word in self.embeddings for w in ("--embedding", word.word())]

    def __call__(self, device: str | None = None) -> Pipeline:
        pipe = replace(self.model, device=device or self.model.device).open()
        for adapter in self.adapters:
            pipe.load_lora_weights(*adapter)
        for word in self.embeddings:
            pipe.load_textual_inversion(*word)
        return pipe


def has_settings(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `settings` is filled from `generate`'s options of how a picture is drawn."""
    own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "settings"]

    @wraps(command)
    def run(**values: Any) -> None:
        settings = {parameter.name: values.pop(parameter.name) for parameter in SETTINGS}
        command(**values, settings=settings)

    run.__signature__ = inspect.Signature([*own, *SETTINGS])  # type: ignore[attr-defined]
    return run


@opens_model()
@has_settings
def batch(
    model: Model,
    settings: dict[str, Any],
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="txt, jsonl, csv, parquet, yaml or -.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the job.")] = Path("out"),
    count: Annotated[int, typer.Option(help="Pictures for each record that does not say it.")] = 1,
    engine: Annotated[str, typer.Option(help="inline, local (processes) or ray.")] = "inline",
    workers: Annotated[int | None, typer.Option(help="Of the engine; the default is one for each GPU.")] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Draw the I-th of N parts alone; I from 0.")] = "0/1",
    batch_size: Annotated[int | None, typer.Option(help="Pictures drawn at a time; the default is by memory.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Bit for bit the same in any batch; slower.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Hash finished files; draw again those that changed.")] = False,
    format: Annotated[str, typer.Option(help="png, webp (lossless) or jpeg.")] = "png",
    wildcards: Annotated[Path | None, typer.Option(help="Folder of wildcard files; default: beside FILE.")] = None,
    expand: Annotated[str, typer.Option(help="Wildcards: one (for each seed), all or none.")] = "one",
    timeout: Annotated[float, typer.Option(help="End a job in which no step is finished for so long, s.")] = 600.0,
    expiry: Annotated[float, typer.Option(help="Take silent workers of other machines for dead after, s.")] = 60.0,
    grid: Annotated[
        str | None, typer.Option(metavar="COLUMNS[,ROWS]", help="Contact sheets over seed, guidance, prompt, ...")
    ] = None,
    lora: Loras = None,
    embedding: Words = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print progress as lines of JSON, for programs.")] = False,
) -> None:
    """Draw a file of prompts; the same command again does what is missing. Status 1: some items failed.

    The folder holds images/, index.html (a wall of them), manifest.jsonl (a line for each item), items.jsonl (the item
    of each line of FILE) and, with --grid, grids/. An item that is asked for twice is drawn once. Several such commands
    may work in one folder.
    """
    within("--batch-size", batch_size, 1, 8 if strict else 100_000)
    within("--workers", workers, 1, 1024)
    within("--timeout", timeout, 1, 1e9)
    within("--expiry", expiry, 1, 1e9)
    part = parted(shard)
    from ldm.diffusion.spacing import choose
    from ldm.jobs import gallery, grids
    from ldm.jobs.engines import ENGINES, places
    from ldm.jobs.manifest import FOLDER
    from ldm.jobs.outputs import OUTPUTS
    from ldm.jobs.source import open_source
    from ldm.jobs.worker import Job

    start = choose(ENGINES, engine, "--engine")
    choose(OUTPUTS, format, "--format")
    devices = places(engine, workers, model.device)
    axes = None if grid is None else grids.axes(grid)
    vae = model.vae and absolute(model.vae)
    model = replace(model, model=absolute(model.model), vae=vae, dtype=precision(model))
    adapters, embeddings = map(weighted, lora or []), map(named, embedding or [])
    opener = Opener(
        model,
        tuple(adapter._replace(source=absolute(adapter.source)) for adapter in adapters),
        tuple(word._replace(source=absolute(word.source)) for word in embeddings),
    )
    pipe = opener(None if engine == "inline" else "cpu")
    source = open_source(file, requested(settings, pipe), count=count, wildcards=wildcards, expand=expand)
    unread = Unread()
    source.check(pipe.resolve, unread.hear)
    if axes is not None:
        grids.check(out, (pipe.resolve(entry.request).record() for entry in source), axes)
    writable(out)
    entries = source if engine == "inline" else replace(source, kept=None)
    job = Job(
        out.absolute(),
        entries,
        opener if engine != "inline" else lambda device: pipe,
        model.name,
        format,
        batch_size,
        strict,
        part,
        expiry,
    )
    unread.say()
    with faults():
        status = run(job, pipe, source.name, lambda job: start(job, devices), check, timeout, as_json, opener.words)
        gallery.write(job.folder)
        if axes is not None:
            with job.leases() as leases, leases.alone(FOLDER):  # two commands that end together come one at a time
                grids.write(job.folder, axes)
    raise typer.Exit(status)


def run(
    job: Job,
    pipe: Pipeline,
    source: str,
    start: Callable[[Job], Engine],
    check: bool,
    timeout: float,
    as_json: bool,
    words: Sequence[str] = (),
) -> int:
    """The job from its folder's state to its end; the exit status."""
    from ldm.jobs import driver
    from ldm.jobs.manifest import FOLDER, settle

    with job.leases() as leases, teller(as_json) as tell:
        with leases.alone(FOLDER):
            driver.begin(job, pipe, source, words)
            names = driver.plan(job, pipe)
        lost = settle(job.folder, leases, check, names.__contains__)
        watch = driver.Watch(job, leases, names, timeout)
        if lost:
            print(f"{lost} finished pictures are missing or changed: drawn again", file=sys.stderr)
        engine = start(job)
        try:
            driver.drive(engine, watch, tell)
            driver.outlive(watch, job.expiry + driver.GRACE)
            status = None
        except KeyboardInterrupt:
            status = interrupted(engine, watch, tell)
        except driver.Stuck as stuck:
            print(f"error: {stuck}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # a thread that hangs cannot be ended otherwise; what is finished is on the disk
        except RuntimeError:
            with suppress(OSError):
                settle(job.folder, leases)
            raise
        settle(job.folder, leases)
        state = watch.state()
        tell(state, last=True)
    return (1 if state.failed or state.left else 0) if status is None else status


def interrupted(engine: Engine, watch: Any, tell: Callable[..., None]) -> int:
    """Wait for what is being drawn; at the next interrupt end at once."""
    from ldm.jobs import driver

    engine.stop()
    try:
        driver.drive(engine, watch, tell)
    except (KeyboardInterrupt, driver.Stuck):
        engine.kill()
        os._exit(130)
    return 130


@contextmanager
def faults() -> Iterator[None]:
    """What ends a job but is no fault of the caller's words: one line on stderr, status 1."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        from ldm.jobs.worker import reason

        print(f"error: {reason(error)}", file=sys.stderr)
        raise typer.Exit(1) from None


def parted(word: str) -> tuple[int, int]:
    """I/N as two numbers."""
    first, _, second = word.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second) <= 100_000):
        raise ValueError(f"--shard {word}: must be I/N with 0 <= I < N")
    return int(first), int(second)


def absolute(source: str) -> str:
    """A path that means the same in any folder; a hub id, and "" for the model that is shipped, stay."""
    return str(Path(source).absolute()) if source and Path(source).exists() else source


def precision(model: Model) -> str:
    """The dtype that the workers draw in, by name, also where they are elsewhere."""
    from ldm.pipeline import choose_device, choose_dtype

    return str(choose_dtype(model.dtype, choose_device(model.device))).removeprefix("torch.")


def requested(settings: dict[str, Any], pipe: Pipeline) -> Request:
    """The defaults of every record from the options of `generate`."""
    from ldm.images import read_mask, read_picture
    from ldm.request import Request

    values = {FIELDS.get(name, name): value for name, value in settings.items()}
    for name, read in (("image", read_picture), ("mask", read_mask)):
        values[name] = None if values[name] is None else read(values[name])
    if values["guidance_interval"] is not None:
        low, high = values["guidance_interval"]
        values["guidance_interval"] = low, finite(high)
    if values["clip_skip"] is not None:
        values["clip_skip"] = pipe.clip_skip(values["clip_skip"])
    return Request("", **values)
