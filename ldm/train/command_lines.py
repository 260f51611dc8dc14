"""Command lines of other tools' training scripts: launchers, options by tables, and what has no effect here."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from ldm.errors import suggest
from ldm.pipeline.compat import Automatic, Missing, Ours, Rule

LINE_ENDS = {"\\", "^", "`", "&&", ";"}  # of pasted lines
OFF_VALUES = ("", "none", "no", "false", "0", "0.0")  # with which an option is as if it were not given
PROCESS_OPTIONS = ("num_processes", "nproc_per_node", "nproc-per-node")  # of accelerate's and torch's launchers


class Argument(NamedTuple):
    """An option of another tool: what becomes of it, and how many words follow it (-1: any number).

    `Ours("")` is a value that the script's own translation reads, by the option's name. `neutral` are values of a
    `Missing` one that change nothing, so that it may be given.
    """

    rule: Rule
    nargs: int = 1
    neutral: tuple[str, ...] = ()


Arguments = Mapping[str, Argument]
Given = Mapping[str, Any]  # by the option's name: a text, a list of texts, or True for a flag


class Translation(NamedTuple):
    """Our options by dotted name, values that a script's translation reads, and options without effect."""

    options: dict[str, Any]
    values: dict[str, Any]
    notes: list[str]


class ForeignRecipe(NamedTuple):
    """The options of a recipe by dotted name, notes of what has no effect, and intervals that are given in epochs."""

    options: dict[str, Any]
    notes: list[str]
    epochs: dict[str, int]


class CommandLine(NamedTuple):
    """The name of a script, what is given to it, and how a launcher would start it."""

    script: str
    given: dict[str, Any]
    num_processes: int = 1
    mixed_precision: str | None = None
    notes: tuple[str, ...] = ()


def arguments(names: str, rule: Rule, nargs: int = 1, neutral: tuple[str, ...] = ()) -> dict[str, Argument]:
    """Some options, whose names are separated by blanks, of one rule."""
    return dict.fromkeys(names.split(), Argument(rule, nargs, neutral))


def read(convert: Callable[[str], Any] = str) -> Ours:
    """The rule of a value that the script's translation reads."""
    return Ours("", convert)


def same(group: str, convert: Callable[[Any], Any], *names: str) -> dict[str, Argument]:
    """Options that have our names; `group` is "objective.", "data." or ""."""
    return {name: Argument(Ours(group + name, convert)) for name in names}


def switches(group: str, *names: str) -> dict[str, Argument]:
    """Flags that have our names."""
    return {name: Argument(Ours(group + name, bool), 0) for name in names}


def parse_command_line(words: Sequence[str], scripts: Iterable[str], known: Arguments) -> CommandLine:
    """A pasted command line: a launcher and its options, the script, and the script's options.

    ValueError, in one line, for an unknown script or option, with the nearest names.
    """
    if len(words) == 1 and " " in words[0]:
        words = shlex.split(words[0])
    words = [word for word in words if word.strip() and word not in LINE_ENDS]
    names = {PurePath(name).stem: name for name in scripts}
    place = next((k for k, word in enumerate(words) if word.endswith(".py") or word in names), None)
    if place is None:
        raise ValueError(f"expected a script and its options: {', '.join(names.values())}")
    script = names.get(PurePath(words[place].replace("\\", "/")).stem)
    if script is None:
        name = PurePath(words[place].replace("\\", "/")).name
        raise ValueError(f"{name}: only {', '.join(names.values())} are read{suggest(name, names.values())}")
    launched = _parse_launcher(words[:place])
    return CommandLine(script, parse_words(words[place + 1 :], known), *launched)


def _parse_launcher(words: Sequence[str]) -> tuple[int, str | None, tuple[str, ...]]:
    """The number of processes, the precision, and a note of the other options of a launcher."""
    pairs: dict[str, str] = {}
    for word, after in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            pairs[name.lstrip("-")] = value if equals else after
    count = next((pairs[name] for name in PROCESS_OPTIONS if name in pairs), "1")
    others = [name for name in pairs if name not in (*PROCESS_OPTIONS, "mixed_precision", "m")]
    notes = (f"the launcher's {', '.join(others)} (one process is started)",) if others else ()
    world = int(os.environ.get("WORLD_SIZE", 1))
    return max(world, int(count) if count.isdigit() else 1), pairs.get("mixed_precision"), notes


def parse_words(words: Sequence[str], known: Arguments) -> dict[str, Any]:
    """Options as argparse reads them: `--name value`, `--name=value`, unique beginnings of names; the last counts."""
    given: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r}: an option was expected")
        text, equals, value = word[2:].partition("=")
        name = find_option(text, known)
        nargs = known[name].nargs
        following = next((k for k, other in enumerate(rest) if other.startswith("--")), len(rest))
        if nargs == 0:
            if equals:
                raise ValueError(f"--{name} takes no value")
            given[name] = True
        elif nargs == 1:
            if not equals and not following:
                raise ValueError(f"--{name} needs a value")
            given[name] = value if equals else rest.pop(0)
        else:
            given[name], rest = [*[value] * bool(equals), *rest[:following]], rest[following:]
    return given


def find_option(text: str, known: Arguments) -> str:
    """The option of a name, with dashes for underscores, or of its beginning; ValueError with the nearest name."""
    name = text.replace("-", "_")
    if name in known:
        return name
    longer = [other for other in known if other.startswith(name)]
    if len(longer) == 1:
        return longer[0]
    raise ValueError(f"--{text}: unknown option{suggest(name, known)}")


def from_values(table: Mapping[str, Any], known: Arguments, where: str) -> dict[str, Any]:
    """What a TOML table gives, as `parse_words` does; ValueError names the file."""
    given: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ValueError(f"{where}: {key}: unknown option{suggest(key, known)}")
        if known[key].nargs == 0:
            if not isinstance(value, bool):
                raise ValueError(f"{where}: {key}: true or false is needed")
            given |= {key: True} if value else {}
        elif known[key].nargs == 1:
            given[key] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        else:
            given[key] = list(map(str, value)) if isinstance(value, list) else str(value).split()
    return given


def translate_arguments(given: Given, known: Arguments) -> Translation:
    """What is given, by the rules of a table; ValueError, with what to write instead, for what is missing here."""
    result = Translation({}, {}, [])
    for name, value in given.items():
        rule, nargs, neutral = known[name]
        match rule:
            case Ours(ours, convert):
                target = result.options if ours else result.values
                target[ours or name] = _convert(name, value, convert)
            case Automatic(reason):
                result.notes.append(f"--{name} ({reason})" if reason else f"--{name}")
            case Missing(instead):
                texts = [value] if isinstance(value, str) else value if nargs else ["true"]
                if any(text.lower() not in (*neutral, *OFF_VALUES) for text in texts):
                    raise ValueError(f"--{name} is not supported: {instead}")
    return result


def _convert(name: str, value: Any, convert: Callable[[Any], Any]) -> Any:
    try:
        return convert(value)
    except (ValueError, SyntaxError) as error:
        kind = {int: "not a whole number", float: "not a number"}.get(convert, str(error))  # type: ignore[call-overload]
        raise ValueError(f"--{name} {value}: {kind}") from None


def nest(options: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of dotted options; those of None are left out."""
    recipe: dict[str, Any] = {}
    for name, value in options.items():
        group, _, last = name.rpartition(".")
        if value is not None:
            (recipe.setdefault(group, {}) if group else recipe)[last] = value
    return recipe
