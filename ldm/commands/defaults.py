"""Defaults of options from a YAML file: `--config FILE`, or else `ldm.yaml` in the user's folder of configurations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def find_user_config() -> Path | None:
    """~/.config/ldm.yaml (or $XDG_CONFIG_HOME/ldm.yaml), None where there is none."""
    try:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        return path if (path := folder / "ldm.yaml").is_file() else None
    except (OSError, RuntimeError):  # no home directory
        return None


def set_defaults(context: typer.Context, config: str | None) -> str | None:
    """Take an option's defaults from a file before the other options are read; ValueError names the file and the key.

    Its keys are options, in any of their spellings, or commands with options of their own. What another command has is
    not for this one.
    """
    path = find_user_config() if config is None else Path(config).expanduser() if config else None
    if path is None or context.resilient_parsing:
        return config
    own, known = options_by_name(context.command), dict[str, Any]()
    commands = getattr(context.find_root().command, "commands", {})
    for command in commands.values():
        known |= options_by_name(command)
    defaults: dict[str, Any] = {}
    for key, value in iter_config(read_config(path), str(context.info_name), commands):
        name = context.token_normalize_func(key.lstrip("-")) if context.token_normalize_func else key
        if name not in known:
            from ldm.errors import suggest

            raise ValueError(f"{path}: {key}: no option has this name{suggest(name, own) or suggest(name, known)}")
        if (option := own.get(name)) is None or option.name == "config":
            continue
        if option.name in defaults:
            raise ValueError(f"{path}: {key}: --{name} is given twice")
        defaults[option.name] = read_default(context, option, value, f"{path}: {key}")
    context.default_map = defaults
    return config


def options_by_name(command: Any) -> dict[str, Any]:
    """A command's options by their names, without dashes."""
    options = (parameter for parameter in command.params if parameter.param_type_name == "option")
    return {name.lstrip("-"): option for option in options for name in option.opts}


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file; ValueError where it cannot be read."""
    from ldm.config import parse_yaml
    from ldm.errors import error_text
    from ldm.files import read_regular_file

    try:
        text = read_regular_file(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path}: {error_text(error)}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict | None):
        raise ValueError(f"{path}: expected options and their values, as in steps: 20")
    return {str(key): value for key, value in (values or {}).items()}


def iter_config(values: Mapping[str, Any], command: str, commands: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, value) of a file's options but those that the command's own section has, then those of this section."""
    sections = {key: value for key, value in values.items() if key in commands and isinstance(value, dict)}
    own = sections.get(command, {})
    yield from ((key, value) for key, value in values.items() if key not in sections and key not in own)
    yield from ((str(key), value) for key, value in own.items())


def read_default(context: typer.Context, option: Any, value: Any, place: str) -> Any:
    """A value of a file as the command line's option has it; ValueError where it is not of the option's type."""
    values = value if isinstance(value, list) else [value]
    values = [os.path.expanduser(v) if isinstance(v, str) and v.startswith("~") else v for v in values]
    value = values if option.multiple or isinstance(value, list) else values[0]
    try:
        option.process_value(context, value)
    except Exception as error:  # the command line's own
        reason = getattr(error, "message", None) or str(error)
        raise ValueError(f"{place}: {reason}") from None
    return value


ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="YAML file of defaults, such as steps: 20; default: ~/.config/ldm.yaml.",
        metavar="FILE",
        is_eager=True,
        callback=set_defaults,
        show_default=False,
    ),
]
