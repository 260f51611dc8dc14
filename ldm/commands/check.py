"""`ldm check`: a data set and a recipe audited before any training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.commands.options import JsonOption
from ldm.commands.progress import show_progress

if TYPE_CHECKING:
    from ldm.audit.audit import AuditReport
    from ldm.config import Recipe


MAX_EXAMPLES = 3  # of each kind of finding, in the table


def check(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value, as in the recipe.")] = None,
    latents: Annotated[bool, typer.Option("--latents", help="Encode all pictures, not 64 of them.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The HTML page.", show_default="check.html beside output_dir")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Decode every picture, read every caption, and foresee what a training will take.

    Prints a table and writes an HTML page with what it complains about. Exit status 2 where a training would fail.
    """
    from ldm.audit.audit import audit_dataset
    from ldm.audit.report import render_html_report
    from ldm.config import load_recipe
    from ldm.files import atomic_write

    loaded = load_recipe(recipe, overrides or [])
    with show_progress() as update:
        report = audit_dataset(loaded, latents, update)
    target = out or loaded.output_dir.parent / "check.html"
    try:
        with atomic_write(target) as draft:
            draft.write_text(
                render_html_report(report, loaded.image_data, f"ldm check {recipe.name}"), encoding="utf-8"
            )
    except OSError as error:
        raise ValueError(f"--out {target}: {error.strerror}") from None
    if as_json:
        print(json.dumps({**report_to_dict(report), "page": str(target)}))
    else:
        print_report(report)
        print(f"page: {target}")
    report.raise_for_errors()


def preflight(recipe: Recipe) -> None:
    """The quick part, before a training on pictures: a line on stderr for each warning; ValueError for an error."""
    from ldm.audit.audit import quick_audit
    from ldm.config import ImageDataConfig

    if not isinstance(recipe.data, ImageDataConfig):
        return
    report = quick_audit(recipe)
    for fault in report.with_severity("warning"):
        print(f"warning: {fault.key}: {fault.what}", file=sys.stderr)
    report.raise_for_errors()


def report_to_dict(report: AuditReport) -> dict[str, object]:
    """A report as JSON values."""
    findings = [{"severity": fault.severity, **fault._asdict()} for fault in report.issues]
    return {"findings": findings, "forecast": dict(report.estimates)}


def print_report(report: AuditReport) -> None:
    """Print a report: a row for each kind of finding with its first few, and the figures of the forecast."""
    from rich.console import Console
    from rich.table import Table

    from ldm.audit.audit import count_issues
    from ldm.audit.report import format_estimates

    console = Console(highlight=False, markup=False)
    found, foreseen = (Table(box=None, show_header=False, padding=(0, 2, 0, 0)) for _ in range(2))
    for (severity, kind), count in count_issues(report).items():
        first = [f"{fault.key}: {fault.what}" for fault in report.issues if fault.kind == kind][:MAX_EXAMPLES]
        more = [f"and {count - MAX_EXAMPLES} more"] if count > MAX_EXAMPLES else []
        found.add_row(severity, kind, str(count), "\n".join([*first, *more]))
    if not report.issues:
        found.add_row("nothing to complain about")
    for name, value in format_estimates(report.estimates):
        foreseen.add_row(name, value)
    console.print(found, foreseen, sep="\n")
