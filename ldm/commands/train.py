"""`ldm train`, `ldm average` and `ldm check`: trainings of a recipe, and the audit of its data set before."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Context
from typer.core import TyperCommand

from ldm.commands.options import JsonOption, StrictOption, apply_strictness
from ldm.commands.progress import show_progress
from ldm.errors import print_message, printable, warn_of_input

if TYPE_CHECKING:
    from ldm.audit.audit import AuditReport
    from ldm.config import Recipe
    from ldm.train.task import TrainingTask

ForeignCommand = tuple[str, Sequence[str]]  # --like-diffusers or --like-kohya, and the words that follow
FOREIGN_OPTIONS = ("--like-diffusers", "--like-kohya")
OWN_OPTIONS = {  # of `ldm train`, also within another's command line: how many words each takes
    **dict.fromkeys(("--set", "--push", "--write-recipe"), 2),
    **dict.fromkeys(("--strict", "--lenient", "--recipe-only"), 1),
}
MAX_EXAMPLES = 3  # of each kind of issue, in the table
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", show_default=False)]
OverridesOption = Annotated[list[str] | None, typer.Option("--set", help="key.path=value, as in the recipe.")]


class TrainCommand(TyperCommand):
    """`ldm train`: what follows --like-diffusers or --like-kohya is another tool's command line, but for our options.

    It is kept as it is in `context.obj`: (option, words).
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = [arg.replace("_", "-") for arg in args]
        place = next((k for k, name in enumerate(names) if name in FOREIGN_OPTIONS), None)
        if place is not None:
            own, words = split_own_options(args[place + 1 :])
            ctx.obj, args = (names[place], words), [*args[:place], *own]
        return super().parse_args(ctx, args)


def split_own_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our options among the words of another tool's command line, and the others."""
    own: list[str] = []
    others: list[str] = []
    rest = [*words]
    while rest:
        name = rest[0].partition("=")[0]
        count = OWN_OPTIONS.get(name, 0) if "=" not in rest[0] else 1
        (own if name in OWN_OPTIONS else others).extend(rest[: count or 1])
        del rest[: count or 1]
    return own, others


def train(
    context: Context,
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE.yaml", show_default=False)] = None,
    overrides: OverridesOption = None,
    strict: StrictOption = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the trained weights to the hub.")
    ] = None,
    write_recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the recipe to a file, too.", show_default=False)
    ] = None,
    recipe_only: Annotated[bool, typer.Option("--recipe-only", help="Print the recipe, and do not train.")] = False,
    like_diffusers: Annotated[
        str | None, typer.Option(metavar="SCRIPT ...", help="A command line of diffusers' training scripts follows.")
    ] = None,
    like_kohya: Annotated[
        str | None, typer.Option(metavar="SCRIPT ...", help="A command line of kohya's sd-scripts follows.")
    ] = None,
) -> None:
    """Train from a recipe; the same command again resumes. Prints the folder of the trained weights."""
    overrides = [*(overrides or []), *([f"hub_model_id={push}"] if push else [])]
    if context.obj is None and recipe is None:
        raise ValueError("RECIPE.yaml, --like-diffusers or --like-kohya is needed")
    if context.obj is not None and recipe is not None:
        raise ValueError(f"{recipe}: {context.obj[0]} makes a recipe of its own")
    loaded = load_checked_recipe(recipe or context.obj, overrides, strict)
    show_recipe(loaded, context.obj, write_recipe, recipe_only)
    if not recipe_only:
        run_training(loaded)


def run_training(recipe: Recipe) -> None:
    """Train, upload the export if the recipe says so, and print its folder."""
    from ldm.train.state import check_run_folder
    from ldm.train.trainer import get_partial_state, train_model

    check_run_folder(recipe.output_dir)
    preflight(recipe)
    is_pushed = recipe.hub_model_id is not None and get_partial_state().is_main_process
    if is_pushed:
        prepare_push(recipe)
    folder = train_model(recipe, create_task(recipe))
    if is_pushed:
        push_export(recipe, folder)
    print(folder)


def show_recipe(recipe: Recipe, foreign: ForeignCommand | None, file: Path | None, on_stdout: bool) -> None:
    """Write a recipe to a file, and print it: alone on stdout, or on stderr where it was made of another's command."""
    from ldm.files import atomic_write
    from ldm.train.foreign_recipes import recipe_to_yaml

    text = recipe_to_yaml(recipe, [foreign[0], *foreign[1]] if foreign else ())
    if file is not None:
        with atomic_write(file) as draft:
            draft.write_text(text, encoding="utf-8")
    if on_stdout:
        print(text, end="")
    elif foreign is not None and file is None:
        for line in text.splitlines():
            print_message("note", line)


def prepare_push(recipe: Recipe) -> None:
    """Make the hub's repository before hours of training; ValueError where it cannot be made."""
    from ldm.checkpoints.hub import create_repo

    create_repo(recipe.hub_model_id or "", recipe.hub_private_repo)


def push_export(recipe: Recipe, folder: Path) -> None:
    """Upload a training's export; ValueError says where it lies, and how to upload it later."""
    from ldm.checkpoints.hub import upload_folder

    repo = recipe.hub_model_id or ""
    try:
        address = upload_folder(folder, repo, recipe.hub_private_repo, None, "Upload the trained weights")
    except ValueError as error:
        raise ValueError(f"{error}; the weights are in {folder}: upload them by `hf upload {repo} {folder}`") from None
    print_message("note", f"uploaded: {address}")


def load_checked_recipe(
    source: Path | ForeignCommand, overrides: list[str] | None, strict: bool | None = None
) -> Recipe:
    """A recipe, of a file or of another tool's command, whose names are known, with its steps.

    `strict` sets an image dataset's `strict`; False its `skip_broken`, too. ValueError before anything is written.
    """
    apply_strictness(strict)
    from ldm.config import ImageDataConfig, load_recipe
    from ldm.data.image_dataset import resolve_num_train_epochs
    from ldm.train.foreign_recipes import read_foreign_command
    from ldm.train.optimizers import check_recipe

    more = overrides or []
    loaded = read_foreign_command(*source, more) if isinstance(source, tuple) else load_recipe(source, more)
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
