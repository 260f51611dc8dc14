"""What a record of a prompt file may contain: names and values of fields, and options in a line of text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from ldm.errors import suggest
from ldm.pipeline.request import IMAGE_COUNT, REQUEST_FIELDS, FieldSpec, parse_int_pair
from ldm.sampler_names import resolve_sampler_names

FieldValues = dict[
    str, Any
]  # by the names of Request, beside `count`, `EXTRA`, `NOTICES` and, of text, `a1111_clip_skip`
EXTRA = "extra"  # the columns of a record that are no fields, which the manifest carries along
NOTICES = "notices"  # what of a record was not read, in words

IMAGE_SIZE = FieldSpec(parse_int_pair, option="size")  # width and height in one
PROMPT_FIELDS = {**REQUEST_FIELDS, "count": IMAGE_COUNT, "size": IMAGE_SIZE}
CAPTION_NAMES = "text", "caption"  # of data sets: the prompt, unless another column is called so
FIELD_NAMES = {  # all that a field may be called: the field
    **{name: field for field, spec in PROMPT_FIELDS.items() for name in (field, spec.option, *spec.aliases)},
    **dict.fromkeys(CAPTION_NAMES, "prompt"),
}
# Options in a line of text, as kohya's gen_img and AUTOMATIC1111's "Prompts from file" read them.
PROMPT_OPTIONS = {  # the name in messages
    **{name: PROMPT_FIELDS[field].option for name, field in FIELD_NAMES.items() if name not in CAPTION_NAMES},
    **{spec.kohya: spec.option for spec in PROMPT_FIELDS.values() if spec.kohya},
}
UNSUPPORTED_OPTIONS = {  # they would change the image
    "am": "adapters have one weight in a whole job; give --lora FILE:WEIGHT to the command",
    "g": "distilled guidance, which these models do not have; the guidance scale is --l",
    **dict.fromkeys(
        ("nl", "c", "ow", "oh", "nw", "nh", "ct", "cl", "f", "cn", "glt", "glr", "gls", "gle"),
        "this option of kohya's is not supported",
    ),
    **dict.fromkeys(
        ("ar", "aspect", "v", "version", "niji", "stylize", "chaos", "q", "quality", "iw", "no", "stop", "sref"),
        "an option of Midjourney, whose prompts have other options",
    ),
    "sd_model": "a job has one model; give --model to the command",
    "styles": "styles of the web UI are not supported: write their words into the prompt",
    "sampler_index": "the web UI's numbers of samplers are not known here; give --sampler_name",
}
IGNORED_OPTIONS: dict[str, tuple[str, ...] | None] = {  # the web UI's, with the values that change no image; None: any
    **dict.fromkeys(
        ("batch_size", "do_not_save_grid", "do_not_save_samples", "outpath_samples", "outpath_grids"), None
    ),
    **dict.fromkeys(("prompt_for_display", "restore_faces"), None),
    "tiling": ("false", "0"),
    "subseed": ("-1",),
    "subseed_strength": ("0", "0.0"),
    **dict.fromkeys(("seed_resize_from_h", "seed_resize_from_w"), ("-1", "0")),
}
MAX_SHORT_STEPS = 200  # of `--s`, which is another option in Midjourney's prompts
OPTION_PATTERN = re.compile(r"(?:^|\s)--([A-Za-z](?:[\w-]*\w)?)(?:=|(?=\s|$))")
QUOTED_PATTERN = re.compile(r"""\s*(?:"((?:\\.|[^"\\])*)"|'([^']*)')(?=\s|$)""", re.DOTALL)


def normalize_name(key: Any) -> str:
    """A key as the table of fields spells it: lower case, with underscores."""
    return re.sub(r"[\s-]+", "_", str(key).strip().lower())


def resolve_field_name(key: Any) -> str:
    """The field that a key names; ValueError with the nearest name."""
    name = normalize_name(key)
    if name not in FIELD_NAMES:
        raise ValueError(f"unknown field {short_repr(key)}{suggest(name, FIELD_NAMES)}")
    return FIELD_NAMES[name]


def split_keys(keys: Iterable[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Keys by the field that each names, and those that name none; ValueError where two name one."""
    fields: dict[str, Any] = {}
    others: list[Any] = []
    keys = list(keys)
    names = {key: normalize_name(key) for key in keys}
    has_prompt = any(name in ("prompt", "prompts") for name in names.values())
    for key in keys:
        if names[key] not in FIELD_NAMES or (has_prompt and names[key] in CAPTION_NAMES):
            others.append(key)
            continue
        name = FIELD_NAMES[names[key]]
        if name in fields:
            twice = "is given twice" if key == fields[name] else f"and {fields[name]} name the same field"
            raise ValueError(f"{key} {twice}")
        fields[name] = key
    if "size" in fields and (side := fields.get("width", fields.get("height"))):
        raise ValueError(f"{fields['size']} and {side} name the same field")
    return fields, others


def map_keys_to_fields(keys: Iterable[Any]) -> dict[str, Any]:
    """Keys by the field that each names; ValueError where two name one, or one names none."""
    fields, others = split_keys(keys)
    for key in others:
        resolve_field_name(key)
        raise ValueError(f"{key} and {fields['prompt']} name the same field")
    return fields


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
    """A record's values by the names of Request, without those that are None. ValueError says what is wrong.

    What names no field is kept as `EXTRA`, with a notice.
    """
    keys, others = split_keys(record)
    values = {name: parse_field(name, key, record[key]) for name, key in keys.items() if record[key] is not None}
    if "prompt" not in values and "negative_prompt" not in values:
        raise ValueError("no prompt")
    values.setdefault("prompt", "")
    if others:
        names = [name for name in FIELD_NAMES if name not in CAPTION_NAMES]
        hints = (f"{short_repr(key)}{suggest(str(key), names, 0.8).replace(';', ',')}" for key in others)
        values[NOTICES] = [f"carried along into the manifest, not read: {'; '.join(hints)}"]
        values[EXTRA] = {str(key): to_json_value(record[key]) for key in others if record[key] is not None}
    return resolve_names(values)


def resolve_names(values: FieldValues) -> FieldValues:
    """Values with the samplers of other tools by our names, and a size as width and height."""
    if "size" in values:
        values["width"], values["height"] = values.pop("size")
    return resolve_sampler_names(values)


def to_json_value(value: Any) -> Any:
    """A value of a table as JSON has it; what JSON does not have is text, and bytes are their number."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping):
        return {str(key): to_json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(inner) for inner in value]
    is_finite = isinstance(value, float) and math.isfinite(value)
    return value if value is None or is_finite or isinstance(value, str | int) else str(value)


def parse_prompt_line(line: str, lenient: bool = False) -> dict[str, Any]:
    """The prompt and the options in a line; ValueError for options that cannot be read.

    A line that begins with an option's long name is the web UI's: `--prompt "a cat" --steps 20`. Any other is a prompt,
    followed by kohya's options (`a cat --w 512 --n blurry`) or long names. A `--word` that is neither is an error
    beside options; if `lenient`, it is left out. Elsewhere it is text, unless it is similar to an option. Of both there
    are `NOTICES`. `clip_skip` counts as in the web UI and kohya's scripts: 1 is the last layer.
    """
    line = line.strip()
    match = OPTION_PATTERN.match(line)
    if match and len(match[1]) > 1 and (is_prompt_option(match[1]) or is_ignored_option(match[1])):
        return parse_a1111_line(line, lenient)
    marks = list(OPTION_PATTERN.finditer(line))
    if not any(is_prompt_option(mark[1]) or is_ignored_option(mark[1]) for mark in marks):
        words = {f"--{mark[1]} is no option: read as text" for mark in marks}
        return {"prompt": line, **({NOTICES: sorted(words)} if words else {})}
    bounds = [*(match.start() for match in marks), len(line)]
    options: dict[str, Any] = {"prompt": line[: bounds[0]].strip()}
    for match, (_, end) in zip(marks, pairwise(bounds), strict=True):
        add_option(options, match[1], line[match.end() : end].strip(), lenient)
    return options


def is_prompt_option(name: str) -> bool:
    """Is it an option? ValueError where it is similar to one, and for those that are not supported."""
    key = normalize_name(name)
    if key in UNSUPPORTED_OPTIONS:
        raise ValueError(f"--{name}: {UNSUPPORTED_OPTIONS[key]}")
    if key in PROMPT_OPTIONS or is_ignored_option(name):
        return key in PROMPT_OPTIONS
    if hint := suggest(name, [option for option in PROMPT_OPTIONS if len(option) > 3], cutoff=0.8):
        raise ValueError(f"--{name}: unknown option{hint}")
    return False


def is_ignored_option(name: str) -> bool:
    """Is it an option of the web UI that may change no image?"""
    return normalize_name(name) in IGNORED_OPTIONS


def parse_a1111_line(line: str, lenient: bool = False) -> dict[str, Any]:
    """The options of a line that consists of them; a value, which may begin with a quote, extends to the next option.

    A backslash is text, so that the prompt's own grammar sees it, except before a double quote within such quotes.
    """
    options: dict[str, Any] = {}
    match = OPTION_PATTERN.match(line)
    while match:
        start = match.end()
        if quoted := QUOTED_PATTERN.match(line, start):
            start = quoted.end()
        elif line[start:].lstrip().startswith('"'):
            raise ValueError("a quote is not closed")
        following = OPTION_PATTERN.search(line, start)
        raw = line[start : following.start() if following else len(line)].strip()
        value = "" if quoted is None else re.sub(r'\\(["\\])', r"\1", quoted[1]) if quoted[2] is None else quoted[2]
        add_option(options, match[1], f"{value} {raw}".strip() if raw else value, lenient)
        match = following
    return options


def add_option(options: dict[str, Any], name: str, value: str, lenient: bool = False) -> None:
    """Add an option, or a notice of one without effect; ValueError where it is unknown, repeated, or has no value."""
    key = normalize_name(name)
    if not is_prompt_option(name):
        values = IGNORED_OPTIONS.get(key)
        if values is not None and value.lower() not in values:
            raise ValueError(f"--{name} {value}: not supported")
        if key not in IGNORED_OPTIONS and not lenient:
            raise ValueError(f"--{name}: unknown option; leave it out, or give --lenient to the command")
        reason = "has no effect here" if key in IGNORED_OPTIONS else "is unknown"
        options.setdefault(NOTICES, []).append(f"--{name} {reason}: left out")
        return
    option = PROMPT_OPTIONS[key]
    if option in options:
        raise ValueError(f"--{name}: {option} is given twice")
    if not value and option != "negative":
        raise ValueError(f"--{name}: no value")
    if key == "s" and value.isdecimal() and int(value) > MAX_SHORT_STEPS:
        raise ValueError(f"--s {value}: as steps write --steps {value}; Midjourney's --s is another option")
    options[option] = value
