"""`ldm batch` and `ldm export`: a file of prompts to a folder of images, each exactly once, and a data set of these."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.commands.options import (
    JsonOption,
    ModelOptions,
    RequestOptions,
    StrictOption,
    apply_strictness,
    check_out_folder,
    check_range,
    expand_options,
    load_pipeline_and_request,
)
from ldm.commands.progress import UnsupportedSyntaxReport, print_notices, report_job_progress, show_progress
from ldm.errors import describe_error, print_message

if TYPE_CHECKING:
    from ldm.jobs.driver import Monitor
    from ldm.jobs.engines import Engine
    from ldm.jobs.worker import Job
    from ldm.pipeline.pipeline import Pipeline


@expand_options
def batch(
    *,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="txt, jsonl, json, csv, tsv, parquet, yaml or -.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the job.")] = Path("out"),
    options: RequestOptions,
    count: Annotated[int, typer.Option(help="Images for each record that does not set it.")] = 1,
    engine: Annotated[str, typer.Option(help="inline, local (processes) or ray.")] = "inline",
    workers: Annotated[int | None, typer.Option(help="Number of workers; default: one for each GPU.")] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only the I-th of N parts; I from 0.")] = "0/1",
    batch_size: Annotated[int | None, typer.Option(help="Images at a time; default: by free memory.")] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same bits in any batch; slower.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Hash finished files; regenerate changed ones.")] = False,
    format: Annotated[str, typer.Option(help="png, webp (lossless) or jpeg.")] = "png",
    wildcards: Annotated[Path | None, typer.Option(help="Folder of wildcard files; default: beside FILE.")] = None,
    expand: Annotated[str, typer.Option(help="Wildcards: one (for each seed), all or none.")] = "one",
    strict: StrictOption = None,
    timeout: Annotated[float, typer.Option(help="Stall timeout, seconds.")] = 600.0,
    expiry: Annotated[float, typer.Option(help="Lease timeout, seconds, of workers on other machines.")] = 60.0,
    grid: Annotated[
        str | None, typer.Option(metavar="COLUMNS[,ROWS]", help="Contact sheets over seed, guidance, prompt, ...")
    ] = None,
    model: ModelOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print progress as lines of JSON, for programs.")] = False,
) -> None:
    """Generate images from a file of prompts; the same command again resumes. Status 1: some items failed.

    The folder holds images/, index.html (a gallery), manifest.jsonl (a line for each item), items.jsonl (the item of
    each line of FILE) and, with --grid, grids/. Equal items are generated once. Several such commands may work in one
    folder.
    """
    apply_strictness(strict)
    check_range("--batch-size", batch_size, 1, 8 if batch_invariant else 100_000)
    check_range("--workers", workers, 1, 1024)
    check_range("--timeout", timeout, 1, 1e9)
    check_range("--expiry", expiry, 1, 1e9)
    part = parse_shard(shard)
    from ldm.errors import choose
    from ldm.jobs import contact_sheets, gallery
    from ldm.jobs.engines import ENGINES, assign_devices
    from ldm.jobs.manifest import FOLDER_LEASE, check_job_folder
    from ldm.jobs.source import open_prompt_source
    from ldm.jobs.worker import Job
    from ldm.metadata import IMAGE_FORMATS
    from ldm.pipeline.pipeline import choose_device, choose_dtype

    engine_type = choose(ENGINES, engine, "--engine")
    choose(IMAGE_FORMATS, format, "--format")
    check_job_folder(out)
    devices = assign_devices(engine, workers, model.device)
    axes = None if grid is None else contact_sheets.parse_grid_axes(grid)
    dtype = choose_dtype(model.dtype, choose_device(model.device))  # the workers', wherever they are
    model = replace(model, dtype=str(dtype).removeprefix("torch."))
    cli_args, model = model.cli_args(), model.with_absolute_paths()
    pipe, request = load_pipeline_and_request(model, options, None if engine == "inline" else "cpu")
    convert = pipe.model.text_encoders[0].clip_skip_converter()
    source = open_prompt_source(
        file,
        request,
        count=count,
        wildcards=wildcards,
        expand=expand,
        convert_clip_skip=convert,
        lenient=strict is False,
    )
    unsupported = UnsupportedSyntaxReport()
    source.validate(pipe.resolve, unsupported.collect)
    unsupported.print_warning(strict)
    print_notices(source.notices, strict)
    if axes is not None:
        contact_sheets.check_grid_size(out, (pipe.resolve(entry.request).to_record() for entry in source), axes)
    check_out_folder(out)
    job = Job(
        out.absolute(),
        source if engine == "inline" else replace(source, spool_file=None),
        model.load_pipeline if engine != "inline" else lambda device: pipe,
        model_name=model.display_name,
        image_format=format,
        batch_size=batch_size,
        batch_invariant=batch_invariant,
        shard=part,
        lease_timeout=expiry,
    )
    with exit_on_failure():
        status = run_job(
            job, pipe, source.name, lambda job: engine_type(job, devices), check, timeout, as_json, cli_args
        )
        gallery.write_gallery(job.folder)
        if axes is not None:
            with job.open_leases() as leases, leases.exclusive(FOLDER_LEASE):  # commands that end together take turns
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
    """Run a job from the state of its folder to its end; the exit status."""
    from ldm.jobs import driver
    from ldm.jobs.manifest import FOLDER_LEASE, compact_manifest

    with job.open_leases() as leases, report_job_progress(as_json) as on_progress:
        with leases.exclusive(FOLDER_LEASE):
            driver.write_job_file(job, pipe, source, cli_args)
            item_ids = driver.write_item_list(job, pipe)
        lost = compact_manifest(job.folder, leases, verify_hashes, retry=item_ids)
        monitor = driver.Monitor(job, leases, item_ids, timeout)
        if lost:
            print_message("note", f"{lost} finished images are missing or changed: regenerated")
        engine = start_engine(job)
        try:
            driver.supervise_workers(engine, monitor, on_progress)
            driver.wait_for_workers(monitor, job.lease_timeout + driver.SHUTDOWN_GRACE)
            status = None
        except KeyboardInterrupt:
            status = finish_after_interrupt(engine, monitor, on_progress)
        except driver.StalledError as error:
            print_message("error", str(error))
            sys.stdout.flush()
            os._exit(1)  # a thread that hangs cannot be ended otherwise; finished images are on the disk
        except RuntimeError:
            with suppress(OSError):
                compact_manifest(job.folder, leases)
            raise
        compact_manifest(job.folder, leases)
        state = monitor.progress()
        on_progress(state, last=True)
    return (1 if state.failed or state.remaining else 0) if status is None else status


def finish_after_interrupt(engine: Engine, monitor: Monitor, on_progress: Callable[..., None]) -> int:
    """Wait for the images that are being generated; at the next interrupt end at once."""
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
    """Turn errors that are not the caller's into one line on stderr and status 1."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise  # the caller's name
        print_message("error", describe_error(error))
        raise typer.Exit(1) from None


def parse_shard(option: str) -> tuple[int, int]:
    """I/N as two numbers."""
    first, _, second = option.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second) <= 100_000):
        raise ValueError(f"--shard {option}: must be I/N with 0 <= I < N")
    return int(first), int(second)


def export(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="Folder of `ldm batch`.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the data set, a new one.", show_default=False)],
    to: Annotated[str, typer.Option(help="webdataset (tars) or parquet.")] = "webdataset",
    shard_size: Annotated[int, typer.Option(help="Images in a file.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Write a job's finished images as a data set: webdataset tars, or parquet files as `datasets` opens them.

    Each image is its file, unchanged, with its prompt as the caption `text` and all its settings, in the order of the
    job's source. The same images give the same bytes.
    """
    check_range("--shard-size", shard_size, 1, 1_000_000)
    check_out_folder(out, make=False)
    from ldm.errors import choose
    from ldm.jobs.exports import EXPORT_FORMATS, export_job

    choose(EXPORT_FORMATS, to, "--to")
    with show_progress() as update, exit_on_failure():
        images, shards = export_job(job, out, to, shard_size, lambda done, total: update("writing", done, total))
    if as_json:
        print(json.dumps({"pictures": images, "shards": shards, "out": str(out)}))
    else:
        print(f"{images} images in {shards} files in {out}")
