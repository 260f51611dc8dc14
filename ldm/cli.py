"""The `ldm` command. Heavy imports happen inside commands, so that `ldm --help` answers at once."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from typing import Annotated

import typer

from ldm import __version__
from ldm.commands import batch, generate, measure, models, train, verify
from ldm.commands.foreign_options import translate_words
from ldm.commands.options import normalize_option
from ldm.errors import InputWarning, describe_system_error, print_message

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": normalize_option, "help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    generate.generate,
    batch.batch,
    batch.export,
    train.train,
    train.check,
    train.average,
    measure.likelihood,
    measure.invert,
    verify.verify,
    models.inspect,
    models.convert,
    models.info,
)
for command in COMMANDS:
    app.command(cls=train.TrainCommand if command is train.train else None)(command)
for alias in ("txt2img", "img2img"):  # as other tools call it
    app.command(alias, hidden=True)(generate.generate)


def print_version(is_given: bool) -> None:
    """Print the version and end."""
    if is_given:
        print(f"ldm {__version__}")
        raise typer.Exit


@app.callback()
def set_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Latent diffusion, text to image."""


def main() -> None:
    """Run a command line; exit status 0, 1, 2 (one `error:` line) or 130 (interrupted).

    This is the one handler of the system's errors: a file that cannot be read or written is named, and where the disk
    or the memory is exhausted the status is 1.
    """
    prepare_process()
    try:
        os.getcwd()  # fails where it was deleted, in which libraries end the process
        status = app(args=translate_words(sys.argv[1:]) or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except BrokenPipeError:  # the reader of our output has ended, as `head` does
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        status = report_error(error)
    sys.exit(status or 0)


def show_warning(message: Warning | str, category: type[Warning], *context: object, **options: object) -> None:
    """Print an `InputWarning` as one line; what libraries warn their callers of is not for the user."""
    if issubclass(category, InputWarning):
        print_message("warning", str(message))


def prepare_process() -> None:
    """Let SIGTERM and SIGHUP end a command as an interrupt does, drafts removed; print names in any encoding.

    Warnings are printed by `show_warning`; libraries log errors alone.
    """
    warnings.showwarning = show_warning
    logging.getLogger().addHandler(logging.NullHandler())  # else Python prints what has no handler
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def report_error(error: Exception) -> int:
    """Print an error of the caller or of the system as a line, and return the exit status; raise any other."""
    if hasattr(error, "format_message"):  # typer's: an unknown command or option, a wrong type
        message, status = error.format_message(), 2
    elif isinstance(error, InputWarning):
        message, status = f"{error} (--strict)", 2
    elif isinstance(error, ValueError):
        message, status = str(error), 2
    elif described := describe_system_error(error):
        message, status = described
    else:
        raise error
    print_message("error", message)
    return status


if __name__ == "__main__":
    main()
