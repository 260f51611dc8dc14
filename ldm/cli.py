"""The `ldm` command. Heavy imports happen inside commands, so that `ldm --help` answers at once."""

from __future__ import annotations

import signal
import sys
import warnings

import typer

from ldm.commands import batch, generate, measure, models, train, verify
from ldm.commands.options import normalize_option

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Latent diffusion, text to image.",
    context_settings={"token_normalize_func": normalize_option},
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
    app.command()(command)


def main() -> None:
    """Run a command line; exit status 0, 1, 2 (one `error:` line) or 130 (interrupted)."""
    warnings.formatwarning = format_warning
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except ValueError as error:
        status = print_error(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        status = print_error(error.format_message())  # typer's: an unknown command or option, a wrong type
    sys.exit(status or 0)


def format_warning(message: Warning | str, *context: object, **options: object) -> str:
    """A warning in one line, without the place in the code that Python names."""
    return f"warning: {' '.join(str(message).split())}\n"


def print_error(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
