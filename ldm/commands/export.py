"""`ldm export`: a job's pictures as a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ldm.commands.batch import exit_on_failure
from ldm.commands.options import JsonOption, check_out_folder, check_range


def export(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="Folder of `ldm batch`.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of the data set, a new one.", show_default=False)],
    to: Annotated[str, typer.Option(help="webdataset (tars) or parquet.")] = "webdataset",
    shard_size: Annotated[int, typer.Option(help="Pictures in a file.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Write a job's finished pictures as a data set: webdataset tars, or parquet files as `datasets` opens them.

    Each picture is its file, unchanged, with its prompt as the caption `text` and all its settings, in the order of the
    job's source. The same pictures give the same bytes.
    """
    check_range("--shard-size", shard_size, 1, 1_000_000)
    check_out_folder(out, make=False)
    from rich.console import Console
    from rich.progress import Progress

    from ldm.errors import choose
    from ldm.jobs.exports import EXPORT_FORMATS
    from ldm.jobs.exports import export_job as write

    choose(EXPORT_FORMATS, to, "--to")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar, exit_on_failure():
        task = bar.add_task("writing")
        pictures, shards = write(job, out, to, shard_size, lambda n, of: bar.update(task, completed=n, total=of))
    if as_json:
        print(json.dumps({"pictures": pictures, "shards": shards, "out": str(out)}))
    else:
        print(f"{pictures} pictures in {shards} files in {out}")
