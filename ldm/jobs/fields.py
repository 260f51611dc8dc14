"""Fields of a record: what each may be called, and its value from text or from JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from ldm.diffusion.samplers import SAMPLERS
from ldm.images import A1111_SAMPLERS, A1111_SPACINGS

Values = dict[str, Any]  # by the names of Request, beside `count`

WHOLE = re.compile(r"[+-]?[0-9]{1,30}")
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf|nan", re.IGNORECASE)
RUN = re.compile(r"([0-9]{1,30})\s*-\s*([0-9]{1,30})")
BETWEEN = re.compile(r"\s*[x,\s]\s*")  # the two numbers of a pair


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    if "\0" in value:
        raise ValueError("must be text without a NUL")
    return value


def prompt(value: Any) -> str:
    if not text(value).strip():
        raise ValueError("must not be blank")
    return value


def whole(value: Any) -> int:
    if isinstance(value, str) and WHOLE.fullmatch(value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer():  # columns with gaps turn whole numbers into these
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a whole number")
    return value


def real(value: Any) -> float:
    if isinstance(value, str) and REAL.fullmatch(value.strip()):
        return float(value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("must be a number")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def pair(number: Callable[[Any], Any], value: Any) -> tuple[Any, Any]:
    both = BETWEEN.split(value.strip()) if isinstance(value, str) else value
    try:
        first, second = (number(one) for one in both)
    except (TypeError, ValueError):
        raise ValueError("must be two numbers, such as 512x768") from None
    return first, second


def interval(value: Any) -> tuple[float, float | None]:
    if isinstance(value, list) and len(value) == 2 and value[1] is None:
        value = [value[0], math.inf]
    low, high = pair(real, value)
    return low, None if high == math.inf else high


def seeds(value: Any) -> tuple[range, ...]:
    """Runs of seeds: a number, or in text several, separated by commas, each n or n-m."""
    parts = value.split(",") if isinstance(value, str) else [value]
    return tuple(map(_run, parts))


def _run(part: Any) -> range:
    if match := RUN.fullmatch(part.strip()) if isinstance(part, str) else None:
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise ValueError("must run upwards")
        return range(first, last + 1)
    return one(whole(part))[0]


def one(seed: int) -> tuple[range]:
    """The run of a single seed."""
    return (range(seed, seed + 1),)


FIELDS: dict[str, Callable[[Any], Any]] = {
    "prompt": prompt,
    "negative_prompt": text,
    "seed": seeds,
    "count": whole,
    "height": whole,
    "width": whole,
    "num_inference_steps": whole,
    "guidance_scale": real,
    "sampler": text,
    "spacing": text,
    "eta": real,
    "guidance_rescale": real,
    "guidance_interval": interval,
    "clip_skip": whole,
    "image": text,
    "mask": text,
    "strength": real,
    "upscale": real,
    "upscale_strength": real,
    "original_size": partial(pair, whole),
    "crops_coords_top_left": partial(pair, whole),
    "target_size": partial(pair, whole),
}

ALIASES = {  # what else a field may be called, and whose word it is
    "prompts": "prompt",
    "text": "prompt",  # data sets' captions
    "negative": "negative_prompt",  # ldm generate
    "seeds": "seed",
    "steps": "num_inference_steps",  # ldm generate, AUTOMATIC1111's web UI
    "guidance": "guidance_scale",  # ldm generate
    "cfg_scale": "guidance_scale",  # web UI
    "sampler_name": "sampler",  # web UI
    "scheduler": "spacing",  # web UI
    "denoising_strength": "strength",  # web UI
    "n_iter": "count",  # web UI
    "num_images_per_prompt": "count",  # diffusers
    "mask_image": "mask",  # diffusers
}


def field(key: Any) -> str:
    """The field that a key names; ValueError with the nearest of those there are."""
    name = ALIASES.get(key, key)
    if name not in FIELDS:
        close = get_close_matches(str(key).strip().lower(), [*FIELDS, *ALIASES], 1)
        raise ValueError(f"unknown field {shown(key)}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return name


def named(keys: Iterable[Any]) -> dict[str, str]:
    """Keys by the field that each names; ValueError where two name one."""
    found: dict[str, str] = {}
    for key in keys:
        name = field(key)
        if name in found:
            raise ValueError(f"{key} is given twice" if key == found[name] else f"{key} and {found[name]} are one")
        found[name] = key
    return found


def value_of(name: str, key: str, value: Any) -> Any:
    """A field's value; ValueError with the key that the user wrote."""
    try:
        return FIELDS[name](value)
    except ValueError as error:
        raise ValueError(f"{key} {shown(value)}: {error}") from None


def shown(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def values(record: Mapping[str, Any]) -> Values:
    """A record's values by the names of Request; what is None goes unsaid. ValueError says what is wrong."""
    found = {name: value_of(name, key, record[key]) for name, key in named(record).items() if record[key] is not None}
    if "prompt" not in found:
        raise ValueError("no prompt")
    return {**found, **from_web(found)}


def from_web(found: Mapping[str, Any]) -> Values:
    """Sampler and spacing by our names where they go by the web UI's, which once had one for both: DPM++ 2M Karras."""
    labels = {label.lower(): name for name, label in A1111_SPACINGS.items()}
    ours = {label.lower(): name for name, label in A1111_SAMPLERS.items()}
    spacing = {"spacing": labels.get(found["spacing"].lower(), found["spacing"])} if "spacing" in found else {}
    name = found.get("sampler", "")
    if name in SAMPLERS or not name:
        return spacing
    if name.lower() in ours:
        return {**spacing, "sampler": ours[name.lower()]}
    first, _, last = name.lower().rpartition(" ")
    if first in ours and last in labels:
        return {"spacing": labels[last], **spacing, "sampler": ours[first]}
    return spacing
