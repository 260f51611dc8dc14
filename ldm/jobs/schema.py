"""Fields of a record: what each may be called, and its value from text or from JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from ldm.diffusion.samplers import SAMPLERS
from ldm.metadata import A1111_SAMPLERS, A1111_SPACINGS

FieldValues = dict[str, Any]  # by the names of Request, beside `compose_count`

INTEGER_PATTERN = re.compile(r"[+-]?[0-9]{1,30}")
FLOAT_PATTERN = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf|nan", re.IGNORECASE)
SEED_RANGE_PATTERN = re.compile(r"([0-9]{1,30})\s*-\s*([0-9]{1,30})")
PAIR_SEPARATOR = re.compile(r"\s*[x,\s]\s*")  # the two numbers of a pair


def parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    if "\0" in value:
        raise ValueError("must be text without a NUL")
    return value


def parse_nonblank_text(value: Any) -> str:
    if not parse_text(value).strip():
        raise ValueError("must not be blank")
    return value


def parse_int(value: Any) -> int:
    if isinstance(value, str) and INTEGER_PATTERN.fullmatch(value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer():  # columns with gaps turn whole numbers into these
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a whole number")
    return value


def parse_float(value: Any) -> float:
    if isinstance(value, str) and FLOAT_PATTERN.fullmatch(value.strip()):
        return float(value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("must be a number")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def parse_pair(parse_number: Callable[[Any], Any], value: Any) -> tuple[Any, Any]:
    both = PAIR_SEPARATOR.split(value.strip()) if isinstance(value, str) else value
    try:
        first, second = (parse_number(one) for one in both)
    except (TypeError, ValueError):
        raise ValueError("must be two numbers, such as 512x768") from None
    return first, second


def parse_interval(value: Any) -> tuple[float, float | None]:
    if isinstance(value, list) and len(value) == 2 and value[1] is None:
        value = [value[0], math.inf]
    low, high = parse_pair(parse_float, value)
    return low, None if high == math.inf else high


def parse_seeds(value: Any) -> tuple[range, ...]:
    """Runs of seeds: a number, or in text several, separated by commas, each n or n-m."""
    parts = value.split(",") if isinstance(value, str) else [value]
    return tuple(map(_parse_seed_range, parts))


def _parse_seed_range(part: Any) -> range:
    if match := SEED_RANGE_PATTERN.fullmatch(part.strip()) if isinstance(part, str) else None:
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise ValueError("must run upwards")
        return range(first, last + 1)
    return single_seed_range(parse_int(part))[0]


def single_seed_range(seed: int) -> tuple[range]:
    """The run of a single seed."""
    return (range(seed, seed + 1),)


FIELD_PARSERS: dict[str, Callable[[Any], Any]] = {
    "prompt": parse_nonblank_text,
    "negative_prompt": parse_text,
    "seed": parse_seeds,
    "count": parse_int,
    "height": parse_int,
    "width": parse_int,
    "num_inference_steps": parse_int,
    "guidance_scale": parse_float,
    "sampler": parse_text,
    "spacing": parse_text,
    "eta": parse_float,
    "guidance_rescale": parse_float,
    "guidance_interval": parse_interval,
    "clip_skip": parse_int,
    "image": parse_text,
    "mask": parse_text,
    "strength": parse_float,
    "upscale": parse_float,
    "upscale_strength": parse_float,
    "original_size": partial(parse_pair, parse_int),
    "crops_coords_top_left": partial(parse_pair, parse_int),
    "target_size": partial(parse_pair, parse_int),
}

FIELD_ALIASES = {  # what else a field may be called, and whose word it is
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


def resolve_field_name(key: Any) -> str:
    """The field that a key names; ValueError with the nearest of those there are."""
    name = FIELD_ALIASES.get(key, key)
    if name not in FIELD_PARSERS:
        close = get_close_matches(str(key).strip().lower(), [*FIELD_PARSERS, *FIELD_ALIASES], 1)
        raise ValueError(f"unknown field {short_repr(key)}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return name


def map_keys_to_fields(keys: Iterable[Any]) -> dict[str, str]:
    """Keys by the field that each names; ValueError where two name one."""
    found: dict[str, str] = {}
    for key in keys:
        name = resolve_field_name(key)
        if name in found:
            raise ValueError(f"{key} is given twice" if key == found[name] else f"{key} and {found[name]} are one")
        found[name] = key
    return found


def parse_field(name: str, key: str, value: Any) -> Any:
    """A field's value; ValueError with the key that the user wrote."""
    try:
        return FIELD_PARSERS[name](value)
    except ValueError as error:
        raise ValueError(f"{key} {short_repr(value)}: {error}") from None


def short_repr(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def parse_record(record: Mapping[str, Any]) -> FieldValues:
    """A record's values by the names of Request; what is None goes unsaid. ValueError says what is wrong."""
    found = {
        name: parse_field(name, key, record[key])
        for name, key in map_keys_to_fields(record).items()
        if record[key] is not None
    }
    if "prompt" not in found:
        raise ValueError("no prompt")
    return {**found, **resolve_webui_sampler(found)}


def resolve_webui_sampler(fields: Mapping[str, Any]) -> FieldValues:
    """Sampler and spacing by our names where they go by the web UI's, which once had one for both: DPM++ 2M Karras."""
    labels = {label.lower(): name for name, label in A1111_SPACINGS.items()}
    ours = {label.lower(): name for name, label in A1111_SAMPLERS.items()}
    spacing = {"spacing": labels.get(fields["spacing"].lower(), fields["spacing"])} if "spacing" in fields else {}
    name = fields.get("sampler", "")
    if name in SAMPLERS or not name:
        return spacing
    if name.lower() in ours:
        return {**spacing, "sampler": ours[name.lower()]}
    first, _, last = name.lower().rpartition(" ")
    if first in ours and last in labels:
        return {"spacing": labels[last], **spacing, "sampler": ours[first]}
    return spacing
