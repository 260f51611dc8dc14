"""What a record of a prompt file may contain: names and values of fields, and options in a line of text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from ldm.errors import suggest
from ldm.metadata import resolve_a1111_sampler
from ldm.pipeline.request import IMAGE_COUNT, REQUEST_FIELDS

FieldValues = dict[str, Any]  # by the names of Request, beside `count` and, in a line of text, `a1111_clip_skip`

PROMPT_FIELDS = {**REQUEST_FIELDS, "count": IMAGE_COUNT}
FIELD_NAMES = {  # all that a field may be called: the field
    **{name: field for field, spec in PROMPT_FIELDS.items() for name in (field, spec.option, *spec.aliases)},
    "text": "prompt",  # captions of data sets
}

# Options in a line of text, as kohya's gen_img and AUTOMATIC1111's "Prompts from file" read them.
PROMPT_OPTIONS = {  # the name in messages
    **{name: PROMPT_FIELDS[field].option for name, field in FIELD_NAMES.items() if name != "text"},
    **{spec.kohya: spec.option for spec in PROMPT_FIELDS.values() if spec.kohya},
}
UNSUPPORTED_OPTIONS = {  # kohya's, which would change the image
    "am": "adapters have one weight in a whole job; give --lora FILE:WEIGHT to the command",
    **dict.fromkeys(("nl", "c", "ow", "oh", "nw", "nh", "ct", "cl", "f"), "this option of kohya's is not supported"),
}
OPTION_PATTERN = re.compile(r"(?:^|\s)--([A-Za-z]\w*)(?=\s|$)")


def resolve_field_name(key: Any) -> str:
    """The field that a key names; ValueError with the nearest name."""
    if key not in FIELD_NAMES:
        raise ValueError(f"unknown field {short_repr(key)}{suggest(str(key), FIELD_NAMES)}")
    return FIELD_NAMES[key]


def map_keys_to_fields(keys: Iterable[Any]) -> dict[str, str]:
    """Keys by the field that each names; ValueError where two name one."""
    found: dict[str, str] = {}
    for key in keys:
        name = resolve_field_name(key)
        if name in found:
            twice = "is given twice" if key == found[name] else f"and {found[name]} name the same field"
            raise ValueError(f"{key} {twice}")
        found[name] = key
    return found


def parse_field(name: str, key: str, value: Any) -> Any:
    """A field's value; ValueError with the key that the user wrote."""
    try:
        return PROMPT_FIELDS[name].parse(value)
    except ValueError as error:
        raise ValueError(f"{key} {short_repr(value)}: {error}") from None


def short_repr(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def parse_record(record: Mapping[str, Any]) -> FieldValues:
    """A record's values by the names of Request, without those that are None. ValueError says what is wrong."""
    keys = map_keys_to_fields(record)
    values = {name: parse_field(name, key, record[key]) for name, key in keys.items() if record[key] is not None}
    if "prompt" not in values:
        raise ValueError("no prompt")
    return resolve_a1111_sampler(values)


def parse_prompt_line(line: str) -> dict[str, str]:
    """The prompt and the options in a line; ValueError for options that cannot be read.

    A line that begins with an option's long name is the web UI's: `--prompt "a cat" --steps 20`, in a shell's quotes.
    Any other is a prompt, followed by kohya's options (`a cat --w 512 --n blurry`) or long names. A `--word` that is
    neither, nor similar to one, is text. `clip_skip` counts as in the web UI and kohya's scripts: 1 is the last layer.
    """
    line = line.strip()
    match = OPTION_PATTERN.match(line)
    if match and len(match[1]) > 1 and is_prompt_option(match[1]):
        return parse_a1111_line(line)
    marks = [match for match in OPTION_PATTERN.finditer(line) if is_prompt_option(match[1])]
    bounds = [*(match.start() for match in marks), len(line)]
    options = {"prompt": line[: bounds[0]].strip()}
    for match, (_, end) in zip(marks, pairwise(bounds), strict=True):
        add_option(options, match[1], line[match.end() : end].strip())
    return options


def is_prompt_option(name: str) -> bool:
    """Is it an option? ValueError where it is similar to one, and for kohya's that are not supported."""
    if name.lower() in UNSUPPORTED_OPTIONS:
        raise ValueError(f"--{name}: {UNSUPPORTED_OPTIONS[name.lower()]}")
    if name.lower() in PROMPT_OPTIONS:
        return True
    if hint := suggest(name, [option for option in PROMPT_OPTIONS if len(option) > 3], cutoff=0.8):
        raise ValueError(f"--{name}: unknown option{hint}")
    return False


def parse_a1111_line(line: str) -> dict[str, str]:
    """The options of a line that consists of them; a value extends to the next option."""
    try:
        words = shlex.split(line)
    except ValueError:
        raise ValueError("a quote is not closed") from None
    starts = [*(k for k, word in enumerate(words) if word.startswith("--")), len(words)]
    options: dict[str, str] = {}
    for start, end in pairwise(starts):
        name = words[start][2:]
        if not is_prompt_option(name):
            raise ValueError(f"--{name}: unknown option")
        add_option(options, name, " ".join(words[start + 1 : end]))
    return options


def add_option(options: dict[str, str], name: str, value: str) -> None:
    """Add an option; ValueError where it is given twice, or has no value."""
    option = PROMPT_OPTIONS[name.lower()]
    if option in options:
        raise ValueError(f"--{name}: {option} is given twice")
    if not value and option != "negative":
        raise ValueError(f"--{name}: no value")
    options[option] = value
