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

from ldm.commands.generate import generate, none_if_infinite
from ldm.commands.options import (
    MODEL_OPTIONS,
    EmbeddingOption,
    EmbeddingSpec,
    LoraOption,
    LoraSpec,
    ModelOptions,
    check_out_folder,
    check_range,
    parse_embedding,
    parse_lora,
    with_model_options,
)
from ldm.commands.progress import progress_reporter
from ldm.commands.unsupported_syntax import UnsupportedSyntaxReport

if TYPE_CHECKING:
    from ldm.jobs.engines import Engine
    from ldm.jobs.worker import Job
    from ldm.pipeline.pipeline import Pipeline
    from ldm.pipeline.request import Request


OPTION_TO_FIELD = {"negative": "negative_prompt", "steps": "num_inference_steps", "guidance": "guidance_scale"}
EXCLUDED_OPTIONS = {
    "prompts",
    "count",
    "lora",
    "embedding",
    "batch_size",
    "out",
    "as_json",
    *MODEL_OPTIONS,
}  # not of every picture
GENERATE_PARAMETERS = [
    parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in inspect.signature(generate).parameters.items()
    if name not in EXCLUDED_OPTIONS
]


@dataclass(frozen=True)
class PipelineLoader:
    """Loads the model of a job, with its adapters and embeddings, in any process."""

    model: ModelOptions
    adapters: tuple[LoraSpec, ...] = ()
    embeddings: tuple[EmbeddingSpec, ...] = ()

    @property
    def cli_args(self) -> list[str]:
        """What `ldm generate` opens the same by."""
        adapters = [word for adapter in self.adapters for word in ("--lora", adapter.to_option())]
        return (
            self.model.cli_args()
            + adapters
            + [w for word in self.embeddings for w in ("--embedding", word.to_option())]
        )

    def __call__(self, device: str | None = None) -> Pipeline:
        pipe = replace(self.model, device=device or self.model.device).load_pipeline()
        for adapter in self.adapters:
            pipe.load_lora_weights(*adapter)
        for word in self.embeddings:
            pipe.load_textual_inversion(*word)
        return pipe


def with_generate_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `flatten_settings` is filled from `generate`'s options of how a picture is drawn."""
    own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "settings"]

    @wraps(command)
    def run(**values: Any) -> None:
        settings = {parameter.name: values.pop(parameter.name) for parameter in GENERATE_PARAMETERS}
        command(**values, settings=settings)

    run.__signature__ = inspect.Signature([*own, *GENERATE_PARAMETERS])  # type: ignore[attr-defined]
    return run


@with_model_options()
@with_generate_options
def batch(
    model: ModelOptions,
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
    lora: LoraOption = None,
    embedding: EmbeddingOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print progress as lines of JSON, for programs.")] = False,
) -> None:
    """Draw a file of prompts; the same command again does what is missing. Status 1: some items failed.

    The folder holds images/, index.html (a wall of them), manifest.jsonl (a line for each item), items.jsonl (the item
    of each line of FILE) and, with --grid, grids/. An item that is asked for twice is drawn once. Several such commands
    may work in one folder.
    """
    check_range("--batch-size", batch_size, 1, 8 if strict else 100_000)
    check_range("--workers", workers, 1, 1024)
    check_range("--timeout", timeout, 1, 1e9)
    check_range("--expiry", expiry, 1, 1e9)
    part = parse_shard(shard)
    from ldm.errors import choose
    from ldm.jobs import contact_sheets, gallery
    from ldm.jobs.engines import ENGINES, assign_devices
    from ldm.jobs.manifest import FOLDER_LEASE
    from ldm.metadata import IMAGE_FORMATS
    from ldm.jobs.source import open_prompt_source
    from ldm.jobs.worker import Job

    start = choose(ENGINES, engine, "--engine")
    choose(IMAGE_FORMATS, format, "--format")
    devices = assign_devices(engine, workers, model.device)
    axes = None if grid is None else contact_sheets.parse_grid_axes(grid)
    vae = model.vae and make_path_absolute(str(model.vae))
    model = replace(model, model=make_path_absolute(model.model), vae=vae, dtype=resolve_dtype_name(model))
    adapters, embeddings = map(parse_lora, lora or []), map(parse_embedding, embedding or [])
    opener = PipelineLoader(
        model,
        tuple(adapter._replace(source=make_path_absolute(adapter.source)) for adapter in adapters),
        tuple(word._replace(source=make_path_absolute(word.source)) for word in embeddings),
    )
    pipe = opener(None if engine == "inline" else "cpu")
    source = open_prompt_source(
        file, build_default_request(settings, pipe), count=count, wildcards=wildcards, expand=expand
    )
    unread = UnsupportedSyntaxReport()
    source.validate(pipe.resolve, unread.collect)
    if axes is not None:
        contact_sheets.check_grid_size(out, (pipe.resolve(entry.request).to_record() for entry in source), axes)
    check_out_folder(out)
    entries = source if engine == "inline" else replace(source, spool_file=None)
    job = Job(
        out.absolute(),
        entries,
        opener if engine != "inline" else lambda device: pipe,
        model.display_name,
        format,
        batch_size,
        strict,
        part,
        expiry,
    )
    unread.print_warning()
    with exit_on_failure():
        status = run_job(
            job, pipe, source.name, lambda job: start(job, devices), check, timeout, as_json, opener.cli_args
        )
        gallery.write_gallery(job.folder)
        if axes is not None:
            with (
                job.open_leases() as leases,
                leases.exclusive(FOLDER_LEASE),
            ):  # two commands that end together come one at a time
                contact_sheets.write_contact_sheets(job.folder, axes)
    raise typer.Exit(status)


def run_job(
    job: Job,
    pipe: Pipeline,
    source: str,
    start_engine: Callable[[Job], Engine],
    verify_hashes: bool,
    timeout: float,
    as_json: bool,
    cli_args: Sequence[str] = (),
) -> int:
    """The job from its folder's state to its end; the exit status."""
    from ldm.jobs import driver
    from ldm.jobs.manifest import FOLDER_LEASE, compact_manifest

    with job.open_leases() as leases, progress_reporter(as_json) as tell:
        with leases.exclusive(FOLDER_LEASE):
            driver.write_job_file(job, pipe, source, cli_args)
            names = driver.write_item_list(job, pipe)
        lost = compact_manifest(job.folder, leases, verify_hashes, retry=names)
        watch = driver.Monitor(job, leases, names, timeout)
        if lost:
            print(f"{lost} finished pictures are missing or changed: drawn again", file=sys.stderr)
        engine = start_engine(job)
        try:
            driver.supervise_workers(engine, watch, tell)
            driver.wait_for_workers(watch, job.lease_timeout + driver.SHUTDOWN_GRACE)
            status = None
        except KeyboardInterrupt:
            status = finish_after_interrupt(engine, watch, tell)
        except driver.StalledError as stuck:
            print(f"error: {stuck}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # a thread that hangs cannot be ended otherwise; what is finished is on the disk
        except RuntimeError:
            with suppress(OSError):
                compact_manifest(job.folder, leases)
            raise
        compact_manifest(job.folder, leases)
        state = watch.progress()
        tell(state, last=True)
    return (1 if state.failed or state.remaining else 0) if status is None else status


def finish_after_interrupt(engine: Engine, monitor: Any, on_progress: Callable[..., None]) -> int:
    """Wait for what is being drawn; at the next interrupt end at once."""
    from ldm.jobs import driver

    engine.stop()
    try:
        driver.supervise_workers(engine, monitor, on_progress)
    except (KeyboardInterrupt, driver.StalledError):
        engine.kill()
        os._exit(130)
    return 130


@contextmanager
def exit_on_failure() -> Iterator[None]:
    """What ends a job but is no fault of the caller's words: one line on stderr, status 1."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        from ldm.jobs.worker import describe_error

        print(f"error: {describe_error(error)}", file=sys.stderr)
        raise typer.Exit(1) from None


def parse_shard(option: str) -> tuple[int, int]:
    """I/N as two numbers."""
    first, _, second = option.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second) <= 100_000):
        raise ValueError(f"--shard {option}: must be I/N with 0 <= I < N")
    return int(first), int(second)


def make_path_absolute(source: str) -> str:
    """A path that means the same in any folder; a hub id, and "" for the model that is shipped, stay."""
    return str(Path(source).absolute()) if source and Path(source).exists() else source


def resolve_dtype_name(model: ModelOptions) -> str:
    """The dtype that the workers draw in, by name, also where they are elsewhere."""
    from ldm.pipeline.pipeline import choose_device, choose_dtype

    return str(choose_dtype(model.dtype, choose_device(model.device))).removeprefix("torch.")


def build_default_request(settings: dict[str, Any], pipe: Pipeline) -> Request:
    """The defaults of every record from the options of `generate`."""
    from ldm.image_io import read_image, read_mask
    from ldm.pipeline.request import Request

    values = {OPTION_TO_FIELD.get(name, name): value for name, value in settings.items()}
    for name, read in (("image", read_image), ("mask", read_mask)):
        values[name] = None if values[name] is None else read(values[name])
    if values["guidance_interval"] is not None:
        low, high = values["guidance_interval"]
        values["guidance_interval"] = low, none_if_infinite(high)
    if values["clip_skip"] is not None:
        values["clip_skip"] = pipe.convert_clip_skip(values["clip_skip"])
    return Request("", **values)
