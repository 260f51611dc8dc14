"""Options in a line of text, as kohya's gen_img and AUTOMATIC1111's "Prompts from file" read them."""

from __future__ import annotations

import re
import shlex
from difflib import get_close_matches
from itertools import pairwise

from ldm.jobs.schema import FIELD_ALIASES, FIELD_PARSERS

KOHYA_OPTIONS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "cfg_scale",
    "t": "strength",
}
PROMPT_OPTIONS = {**{name: name for name in (*FIELD_PARSERS, *FIELD_ALIASES) if name != "text"}, **KOHYA_OPTIONS}
UNSUPPORTED_OPTIONS = {  # kohya's, which would change the picture
    "am": "adapters weigh the same in a whole job; give --lora FILE:WEIGHT to the command",
    **dict.fromkeys(("nl", "c", "ow", "oh", "nw", "nh", "ct", "cl", "f"), "of kohya's options this one is not known"),
}
OPTION_PATTERN = re.compile(r"(?:^|\s)--([A-Za-z]\w*)(?=\s|$)")


def parse_prompt_line(line: str) -> dict[str, str]:
    """The prompt and the options in a line; ValueError for options that cannot be read.

    A line that begins with an option's long name is the web UI's: `--prompt "a cat" --steps 20`, in a shell's quotes.
    Any other is a prompt, with kohya's options (`a cat --w 512 --n blurry`) or those names behind it. A `--word` that
    is neither, nor nearly, is text.
    """
    line = line.strip()
    match = OPTION_PATTERN.match(line)
    if match and len(match[1]) > 1 and is_prompt_option(match[1]):
        return parse_webui_line(line)
    marks = [match for match in OPTION_PATTERN.finditer(line) if is_prompt_option(match[1])]
    bounds = [*(match.start() for match in marks), len(line)]
    found = {"prompt": line[: bounds[0]].strip()}
    for match, (_, end) in zip(marks, pairwise(bounds), strict=True):
        add_option(found, match[1], line[match.end() : end].strip())
    return found


def is_prompt_option(name: str) -> bool:
    """Is it an option? ValueError where it nearly is, and for kohya's that cannot be followed."""
    if name.lower() in UNSUPPORTED_OPTIONS:
        raise ValueError(f"--{name}: {UNSUPPORTED_OPTIONS[name.lower()]}")
    if name.lower() in PROMPT_OPTIONS:
        return True
    close = get_close_matches(name.lower(), [option for option in PROMPT_OPTIONS if len(option) > 3], 1, 0.8)
    if close:
        raise ValueError(f"--{name}: unknown option; did you mean --{close[0]}?")
    return False


def parse_webui_line(line: str) -> dict[str, str]:
    """The options of a line that consists of them; a value reaches to the next."""
    try:
        words = shlex.split(line)
    except ValueError:
        raise ValueError("a quote is not closed") from None
    starts = [*(k for k, word in enumerate(words) if word.startswith("--")), len(words)]
    found: dict[str, str] = {}
    for start, end in pairwise(starts):
        name = words[start][2:]
        if not is_prompt_option(name):
            raise ValueError(f"--{name}: unknown option")
        add_option(found, name, " ".join(words[start + 1 : end]))
    return found


def add_option(options: dict[str, str], name: str, value: str) -> None:
    """Add an option; ValueError where it is there already, or has no value."""
    key = PROMPT_OPTIONS[name.lower()]
    if key in options:
        raise ValueError(f"--{name}: {key} is given twice")
    if not value and key != "negative_prompt":
        raise ValueError(f"--{name}: no value")
    options[key] = value
