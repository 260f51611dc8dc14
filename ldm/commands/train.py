"""`ldm train`, `ldm average` and `ldm check`: trainings of a recipe, and the audit of its data set before."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.commands.options import JsonOption, StrictOption, apply_strictness
from ldm.commands.progress import show_progress
from ldm.errors import print_message, printable, warn_of_input

if TYPE_CHECKING:
    from ldm.audit.audit import AuditReport
    from ldm.config import Recipe
    from ldm.train.task import TrainingTask

MAX_EXAMPLES = 3  # of each kind of issue, in the table
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", show_default=False)]
OverridesOption = Annotated[list[str] | None, typer.Option("--set", help="key.path=value, as in the recipe.")]


def train(recipe: RecipeArgument, overrides: OverridesOption = None, strict: StrictOption = None) -> None:
    """Train from a recipe; the same command again resumes. Prints the folder of the trained weights."""
    loaded = load_checked_recipe(recipe, overrides, strict)
    from ldm.train.state import check_run_folder
    from ldm.train.trainer import train_model

    check_run_folder(loaded.output_dir)
    preflight(loaded)
    print(train_model(loaded, create_task(loaded)))


def load_checked_recipe(path: Path, overrides: list[str] | None, strict: bool | None = None) -> Recipe:
    """A recipe whose names are known, with its steps; ValueError before anything is written.

    `strict` sets an image dataset's `strict`; False its `skip_broken`, too.
    """
    apply_strictness(strict)
    from ldm.config import ImageDataConfig, load_recipe
    from ldm.data.image_dataset import resolve_num_train_epochs
    from ldm.train.optimizers import check_recipe

    loaded = load_recipe(path, overrides or [])
    check_recipe(loaded)
    if loaded.num_train_epochs is not None and loaded.max_train_steps:
        warn_of_input("max_train_steps overrides num_train_epochs")
    if strict is not None and isinstance(loaded.data, ImageDataConfig):
        choices = {"strict": strict, "skip_broken": not strict}
        loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update=choices)})
    return resolve_num_train_epochs(loaded)


def create_task(recipe: Recipe) -> TrainingTask:
    """The task of a recipe's objective.

    Latents that are not cached yet are encoded here, by the first process of a machine before the others look.
    """
    from ldm.config import AutoencoderObjective, ClipObjective, DiffusionObjective, FinetuneObjective
    from ldm.picto.autoencoder import AutoencoderTask
    from ldm.picto.clip import ClipTask
    from ldm.picto.diffusion import SceneDiffusionTask
    from ldm.train.finetune import FinetuneTask
    from ldm.train.trainer import get_partial_state

    process = get_partial_state()
    with process.local_main_process_first(), show_progress() as update:
        on_progress = partial(update, "encoding")
        match recipe.objective:
            case AutoencoderObjective() as objective:
                return AutoencoderTask(recipe, objective)
            case ClipObjective() as objective:
                return ClipTask(recipe, objective)
            case DiffusionObjective() as objective:
                return SceneDiffusionTask(recipe, objective, process.device, on_progress)
            case FinetuneObjective() as objective:
                return FinetuneTask(recipe, objective, process.device, on_progress)


def preflight(recipe: Recipe) -> None:
    """The quick audit of an image dataset: a line on stderr for each warning; ValueError for an error."""
    from ldm.audit.audit import quick_audit
    from ldm.config import ImageDataConfig
    from ldm.data.sources import COUNTED_KINDS
    from ldm.errors import list_some

    if not isinstance(recipe.data, ImageDataConfig):
        return
    report = quick_audit(recipe)
    for issue in report.with_severity("warning"):
        print_message("warning", f"{issue.key}: {issue.what}")
    report.raise_for_errors()
    notices = [issue for issue in report.with_severity("notice") if issue.kind in COUNTED_KINDS]
    if notices:
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(issue.kind for issue in notices).items())
        names = list_some([issue.key for issue in notices])
        print_message("warning", f"{counts} ({names}): --strict refuses them")


def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a training.", show_default=False)],
    sigma_rel: Annotated[float, typer.Option(help="Relative length of the EMA: 0.05, 0.1, ...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the weights.", show_default=False)],
    step: Annotated[int | None, typer.Option(help="Last step of the average; default: the training's.")] = None,
) -> None:
    """Export a post-hoc EMA of any length after the training (posthoc_steps in its recipe). Prints its folder."""
    from pydantic import ValidationError

    from ldm.config import Recipe
    from ldm.train.ema import export_posthoc_ema
    from ldm.train.state import check_run_folder

    if out.exists():
        raise ValueError(f"{out}: exists already")
    check_run_folder(run)
    try:
        recipe = Recipe.model_validate_json((run / "recipe.json").read_bytes())
    except (OSError, ValidationError):
        raise ValueError(f"{run}: not a training's folder (no recipe.json of this version)") from None
    export_posthoc_ema(create_task(recipe), run, sigma_rel, out, step)
    print(out)


def check(
    recipe: RecipeArgument,
    overrides: OverridesOption = None,
    latents: Annotated[bool, typer.Option("--latents", help="Encode all images, not 64 of them.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML report.", show_default="check.html beside output_dir"),
    ] = None,
    strict: StrictOption = None,
    as_json: JsonOption = False,
) -> None:
    """Audit a data set: decode every image, read every caption, and estimate the training's resources and schedule.

    Prints a table and writes an HTML report of the issues. Exit status 2 if a training would fail.
    """
    from ldm.audit.audit import audit_dataset
    from ldm.audit.report import render_html_report
    from ldm.files import atomic_write

    loaded = load_checked_recipe(recipe, overrides, strict)
    with show_progress() as update:
        report = audit_dataset(loaded, latents, update)
    target = out or loaded.output_dir.parent / "check.html"
    try:
        with atomic_write(target) as draft:
            page = render_html_report(report, loaded.image_data, f"ldm check {recipe.name}")
            draft.write_text(page, "utf-8", "backslashreplace")  # names of files need not be UTF-8
    except OSError as error:
        raise ValueError(f"--out {target}: {error.strerror}") from None
    if as_json:
        findings = [{"severity": issue.severity, **issue._asdict()} for issue in report.issues]
        print(json.dumps({"findings": findings, "forecast": dict(report.estimates), "page": str(target)}))
    else:
        print_report(report)
        print(f"page: {target}")
    report.raise_for_errors()


def print_report(report: AuditReport) -> None:
    """Print a row for each kind of issue with its first few, and the estimates."""
    from rich.console import Console
    from rich.table import Table

    from ldm.audit.audit import count_issues
    from ldm.audit.report import format_estimates

    issues, estimates = (Table(box=None, show_header=False, padding=(0, 2, 0, 0)) for _ in range(2))
    for (severity, kind), count in count_issues(report).items():
        examples = [printable(f"{issue.key}: {issue.what}") for issue in report.issues if issue.kind == kind][
            :MAX_EXAMPLES
        ]
        more = [f"and {count - MAX_EXAMPLES} more"] if count > MAX_EXAMPLES else []
        issues.add_row(severity, kind, str(count), "\n".join([*examples, *more]))
    if not report.issues:
        issues.add_row("No issues found.")
    for name, value in format_estimates(report.estimates):
        estimates.add_row(name, value)
    Console(highlight=False, markup=False).print(issues, estimates, sep="\n")
