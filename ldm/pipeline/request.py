"""A request: everything that one image depends on beside the model, and the table of its fields.

Options of the command line, fields of prompt files, aliases and ranges are made from this table. `ldm --help` reads it,
so torch and Pillow are imported where they are used.
"""

from __future__ import annotations

import math
import numbers
import re
import secrets
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.errors import choose, warn_of_input
from ldm.sampler_names import resolve_sampler_names

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MAX_SIDE = 8192  # pixels
MAX_INFERENCE_STEPS = 10_000
MAX_SEED = 2**64 - 1
RANDOM_SEED = -1  # stands for one that is drawn and recorded, as in the web UI
# diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline
DEFAULT_IMG2IMG_STRENGTH, DEFAULT_INPAINT_STRENGTH = 0.8, 1.0

INTEGER_PATTERN = re.compile(r"([+-]?[0-9]{1,30})(\.0*)?")  # tables of spreadsheets hold 5.0
FLOAT_PATTERN = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf|nan", re.IGNORECASE)
SEED_RANGE_PATTERN = re.compile(r"([0-9]{1,30})\s*-\s*([0-9]{1,30})")
PAIR_SEPARATOR = re.compile(r"\s*[xX×,\s]\s*")


def parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    if "\0" in value:
        raise ValueError("must be text without a NUL")
    return value


def parse_int(value: Any) -> int:
    if isinstance(value, str) and (match := INTEGER_PATTERN.fullmatch(value.strip())):
        return int(match[1])
    if isinstance(value, float) and value.is_integer():  # columns with missing values hold integers as floats
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


def parse_int_pair(value: Any) -> tuple[int, int]:
    return parse_pair(parse_int, value)


def parse_interval(value: Any) -> tuple[float, float | None]:
    if isinstance(value, list) and len(value) == 2 and value[1] is None:
        value = [value[0], math.inf]
    low, high = parse_pair(parse_float, value)
    return low, None if high == math.inf else high


def parse_seeds(value: Any) -> tuple[range, ...]:
    """Ranges of seeds: one number, or in text several, separated by commas, each n or n-m."""
    return tuple(map(_parse_seed_range, value.split(",") if isinstance(value, str) else [value]))


def _parse_seed_range(part: Any) -> range:
    if match := SEED_RANGE_PATTERN.fullmatch(part.strip()) if isinstance(part, str) else None:
        first, last = int(match[1]), int(match[2])
        if first > last:
            raise ValueError("must run upwards")
        return range(first, last + 1)
    seed = parse_int(part)
    return range(seed, seed + 1)


class FieldSpec(NamedTuple):
    """How a field is read from text or JSON, bounded, and called outside Python."""

    parse: Callable[[Any], Any]  # ValueError says what the value must be
    help: str = ""  # of the command line's option; "": there is none
    option: str = ""  # its name on the command line, in prompt files and in messages; "": the field's own
    aliases: tuple[str, ...] = ()  # further names of the same: of AUTOMATIC1111's web UI, of diffusers
    kohya: str = ""  # kohya's option in a line of prompts
    short: str = ""  # the command line's short option
    low: float = -math.inf
    high: float = math.inf


def _field(default: Any, parse: Callable[[Any], Any], help: str = "", option: str = "", **spec: Any) -> Any:
    return field(default=default, metadata={"spec": FieldSpec(parse, help, option, **spec)})


@dataclass(frozen=True)
class Request:
    """Everything that one image depends on beside the model. Sizes are pixels; None is the model's default.

    negative_prompt: None is the model's own unconditional input: zeros for SDXL, the embedding of "" otherwise.
    eta, s_churn, s_tmin, s_tmax, s_noise: options of some samplers (`SamplerSpec.options`), as in k-diffusion.
    guidance_interval: guides where sigma/alpha is in (low, high]; high None is no limit.
    clip_skip: counts layers of the text encoders as diffusers does: 0 is the model's own layer, 1 the one before it;
        unlike there, it applies to the negative prompt too.
    image: regenerated by the last `strength` of the steps. Without `height` and `width` it gives the size; otherwise it
        is resized, as in diffusers. It is stored as RGB, transparency on white.
    mask: only what is white in it is regenerated; it has the aspect ratio of `image` or of the output. It is stored as
        grey, as `ldm.image_io.inpaint_mask` reads it.
    upscale: a second pass over the finished image, that much larger, with `upscale_strength`.
    original_size, crops_coords_top_left, target_size: SDXL's micro-conditioning, each (height, width); None is the size
        of the image. Those of the negative prompt are the same unless `negative_...` say otherwise.
    timesteps, sigmas: the network's timesteps, or sigma/alpha, in place of `num_inference_steps` and `spacing`.
    final_sigmas_type: where the steps end, "zero" or, the model's lowest level, "sigma_min"; the model's is that of its
        own sampler.
    denoising_start, denoising_end: only the steps between these shares of the training timesteps (`clip_grid`).
    output_type: "pil", or "latent": the sample itself [C, h, w], as the U-Net scales it, in place of an image.
    latents: the sample [C, h, w] at the first noise level, in place of the seed's N(0, I).
    image_latents: the scaled latents of `image`, in place of the mean of its posterior; posterior_noise [2, C, h, w] is
        what its sample and that of the masked image are drawn with, as diffusers does.
    prompt_embeds, pooled_prompt_embeds: [T, C] and [P], in place of `prompt`, whatever that is; T is a multiple of the
        text encoder's length. Likewise those of the negative prompt.
    """

    prompt: str = _field(MISSING, parse_text, aliases=("prompts",))
    negative_prompt: str | None = _field(None, parse_text, "Negative prompt.", "negative", kohya="n", short="-n")
    seed: int = _field(
        0,
        parse_seeds,
        "Image k of a prompt uses seed + k; -1 draws one.",
        aliases=("seeds",),
        kohya="d",
        low=0,
        high=MAX_SEED,
    )
    height: int | None = _field(None, parse_int, "Pixels; default: the image's or the model's.", kohya="h", short="-H")
    width: int | None = _field(None, parse_int, "Pixels; default: the image's or the model's.", kohya="w", short="-W")
    num_inference_steps: int | None = _field(
        None, parse_int, "Sampling steps; default: the model's.", "steps", kohya="s", low=1, high=MAX_INFERENCE_STEPS
    )
    guidance_scale: float | None = _field(
        None,
        parse_float,
        "Classifier-free guidance scale (1 disables it); default: the model's.",
        "guidance",
        aliases=("cfg", "cfg_scale"),
        kohya="l",
        low=0,
        high=1000,
    )
    sampler: str | None = _field(
        None,
        parse_text,
        "dpmpp_2m, unipc, DPM++ 2M Karras, ...: `ldm info` lists all.",
        aliases=("sampler_name",),
        kohya="ss",
    )
    spacing: str | None = _field(
        None, parse_text, "Timestep spacing: trailing, karras, ...: `ldm info` lists all.", aliases=("scheduler",)
    )  # `scheduler` is ComfyUI's name; diffusers' schedulers are samplers
    eta: float | None = _field(
        None,
        parse_float,
        "Noise of a step: 0 is none (DDIM's own), 1 as in DDPM (ancestral ones').",
        low=0,
        high=1,
    )
    s_churn: float | None = _field(
        None, parse_float, "Noise added before the steps of euler, heun and dpm_2.", low=0, high=1000
    )
    s_tmin: float | None = _field(None, parse_float, "Lowest sigma/alpha of s_churn.", low=0, high=math.inf)
    s_tmax: float | None = _field(None, parse_float, "Highest sigma/alpha of s_churn.", low=0, high=math.inf)
    s_noise: float | None = _field(None, parse_float, "Scale of the noise that a sampler adds.", low=0, high=10)
    guidance_rescale: float = _field(0.0, parse_float, "Rescale the guided output, 0 to 1.", low=0, high=1)
    guidance_interval: tuple[float, float | None] | None = _field(
        None, parse_interval, "Guide only while sigma/alpha is in (LOW, HIGH]."
    )
    clip_skip: int | None = _field(
        None,
        parse_int,
        "Text encoder layer counted from the end, as in A1111: 1 is the last. (JSON, CSV: as in diffusers, from 0.)",
    )
    image: Image.Image | None = _field(None, parse_text, "Initial image (img2img).", short="-i")  # noqa: RUF009
    mask: Image.Image | None = _field(  # noqa: RUF009
        None, parse_text, "Inpainting mask: white or transparent areas are regenerated.", aliases=("mask_image",)
    )
    strength: float | None = _field(
        None, parse_float, "Denoising strength, 0 to 1.", aliases=("denoising_strength",), kohya="t", low=0, high=1
    )
    upscale: float | None = _field(None, parse_float, "Upscale factor (hires fix).")
    upscale_strength: float = _field(0.5, parse_float, "Denoising strength of the hires fix.", low=0, high=1)
    original_size: tuple[int, int] | None = _field(None, parse_int_pair)
    crops_coords_top_left: tuple[int, int] = _field((0, 0), parse_int_pair)
    target_size: tuple[int, int] | None = _field(None, parse_int_pair)
    # of Python alone; recorded where they are not the default
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    final_sigmas_type: str | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    output_type: str = "pil"
    # tensors, which are not recorded
    latents: Tensor | None = field(default=None, compare=False, repr=False)
    image_latents: Tensor | None = field(default=None, compare=False, repr=False)
    posterior_noise: Tensor | None = field(default=None, compare=False, repr=False)
    prompt_embeds: Tensor | None = field(default=None, compare=False, repr=False)
    pooled_prompt_embeds: Tensor | None = field(default=None, compare=False, repr=False)
    negative_prompt_embeds: Tensor | None = field(default=None, compare=False, repr=False)
    negative_pooled_prompt_embeds: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        from PIL import Image

        from ldm.image_io import convert_to_rgb, inpaint_mask

        for f in fields(self):
            if isinstance(value := getattr(self, f.name), list):  # JSON has no tuples
                object.__setattr__(self, f.name, tuple(value))
        for name, mode, convert in (("image", "RGB", lambda decoded: decoded.rgb), ("mask", "L", inpaint_mask)):
            value = getattr(self, name)
            if isinstance(value, Image.Image) and value.mode != mode:
                object.__setattr__(self, name, convert(convert_to_rgb(value)))

    def to_record(self) -> dict[str, Any]:
        """The request as JSON values, with digests in place of images.

        `Request(**record)` is the same request, without images and given tensors.
        """
        from PIL import Image

        from ldm.image_io import image_digest

        values = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        values = {name: v for name, v in values.items() if name in REQUEST_FIELDS or v != getattr(Request, name)}
        return {name: image_digest(v) if isinstance(v, Image.Image) else v for name, v in values.items()}


NUMBER_TYPES: dict[str, tuple[Any, ...]] = {"int": (int,), "float": (float, int)}  # by the annotation of a field
REQUEST_FIELDS: dict[str, FieldSpec] = {
    f.name: f.metadata["spec"]._replace(option=f.metadata["spec"].option or f.name)
    for f in fields(Request)
    if f.metadata
}

# The number of images per prompt, an option and a field of prompt files beside those of a request.
IMAGE_COUNT = FieldSpec(parse_int, "Images per prompt.", "count", ("num_images", "num_images_per_prompt", "n_iter"))


RECORD_TYPES: dict[str, Callable[[Any], bool]] = {  # of JSON values, by the annotation of a field
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int and abs(value) < 2**64,
    "float": lambda value: type(value) in (int, float) and abs(value) < 1e300,  # NaN is not
    "tuple[float, ...": lambda value: isinstance(value, list | tuple) and all(map(RECORD_TYPES["float"], value)),
    "tuple[float": lambda value: _is_pair(value) and all(v is None or RECORD_TYPES["float"](v) for v in value),
    "tuple[int": lambda value: _is_pair(value) and all(map(RECORD_TYPES["int"], value)),
    "Image.Image": lambda value: isinstance(value, dict) and isinstance(value.get("sha256"), str),
}


def complete_record(values: Any) -> dict[str, Any]:
    """The values of a `Request.to_record` that a file holds, what it lacks by its default.

    ValueError for what is no object, has no prompt, an unknown field, or a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError("no request")
    types = {f.name: str(f.type) for f in fields(Request) if f.compare}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"request: unknown field {name!r:.60}")
        kind = next(kind for kind in RECORD_TYPES if types[name].startswith(kind))
        if not RECORD_TYPES[kind](value) and not (value is None and types[name].endswith("None")):
            raise ValueError(f"request: {name} {value!r:.60}: not of its type")
    if "prompt" not in values:
        raise ValueError("request: no prompt")
    if "s_noise" not in values and values.get("eta") == 0:  # of a version in which 0 stood for the sampler's own
        values = {**values, "eta": None}
    return {**Request("").to_record(), **values}


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def coerce_request(request: Request) -> Request:
    """The request with numbers of other libraries as Python's own, and other tools' samplers by our names.

    ValueError for what is no number or image.
    """
    from PIL import Image

    changes: dict[str, Any] = {}
    for f in fields(Request):
        value, kind = getattr(request, f.name), str(f.type).split(" ")[0]
        if kind == "str" and not isinstance(value, str) and value is not f.default:
            raise ValueError(f"{f.name} {value!r:.60}: must be text")
        if kind not in NUMBER_TYPES or (value is None and f.default is None) or type(value) in NUMBER_TYPES[kind]:
            continue
        if not isinstance(value, numbers.Integral if kind == "int" else numbers.Real):
            raise ValueError(f"{f.name} {value!r}: must be a {'whole ' if kind == 'int' else ''}number")
        changes[f.name] = NUMBER_TYPES[kind][0](value)
    for name in ("image", "mask"):
        if not isinstance(getattr(request, name), Image.Image | None):
            raise ValueError(f"{name} {getattr(request, name)!r:.60}: must be a PIL image, as Image.open returns it")
    names = {"sampler": request.sampler, "spacing": request.spacing}
    return replace(request, **changes, **resolve_sampler_names(names))


def resolve_guidance_interval(request: Request) -> tuple[float, float]:
    """The noise levels at which a request is guided, in sigma/alpha: (low, high]."""
    low, high = request.guidance_interval or (0.0, None)
    return low, math.inf if high is None else high


def default_strength(request: Request) -> float | None:
    """diffusers' default denoising strengths; None without an image."""
    if request.image is None:
        return None
    return DEFAULT_IMG2IMG_STRENGTH if request.mask is None else DEFAULT_INPAINT_STRENGTH


TIME_ID_FIELDS = "original_size", "crops_coords_top_left", "target_size"


def get_add_time_ids(request: Request, prefix: str = "") -> Tensor:
    """SDXL's micro-conditioning, [1, 6] float32: original height and width, the crop's top and left, target size.

    With the prefix "negative_" that of the negative prompt.
    """
    import torch

    own = (getattr(request, prefix + name) for name in TIME_ID_FIELDS)
    pairs = [pair or getattr(request, name) for name, pair in zip(TIME_ID_FIELDS, own, strict=True)]
    ids = [n for pair in pairs for n in pair or (request.height or 0, request.width or 0)]
    return torch.tensor([ids], dtype=torch.float32)


def hires_pass(request: Request, image: Image.Image, multiple: int) -> Request:
    """The second pass of a request with `upscale`: img2img of its finished image, resized (A1111's "hires. fix")."""
    width, height = upscale_size(image.size, request.upscale or 1, multiple)
    strength = request.upscale_strength
    start: dict[str, Any] = dict.fromkeys(("latents", "image_latents", "posterior_noise"))
    return replace(request, image=image, width=width, height=height, strength=strength, upscale=None, **start)


def upscale_size(size: tuple[int, int], factor: float, multiple: int) -> tuple[int, int]:
    """`size` times `factor`, each side rounded down to a multiple."""
    width, height = (round(side * factor) // multiple * multiple for side in size)
    return width, height


def check_request(request: Request, multiple: int) -> None:
    """ValueError for a value out of range, in a request with all defaults filled in."""
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.diffusion.timesteps import FINAL_SIGMAS_TYPES, SPACINGS

    _check_edit_inputs(request)
    for name, spec in REQUEST_FIELDS.items():
        value = getattr(request, name)
        if isinstance(value, int | float) and not spec.low <= value <= spec.high:  # also refuses NaN
            raise ValueError(f"{spec.option.replace('_', ' ')} {value}: must be from {spec.low} to {spec.high}")
    _check_image_size(request, multiple)
    _warn_of_single_step(request)
    low, high = resolve_guidance_interval(request)
    if not 0 <= low < high:
        raise ValueError(f"guidance interval {low:g} to {high:g}: must be 0 <= low < high, in sigma/alpha")
    sampler, steps = choose(SAMPLERS, request.sampler or "", "sampler"), request.num_inference_steps or 0
    if steps < sampler.min_steps:
        raise ValueError(f"steps {steps}: sampler {request.sampler} needs {sampler.min_steps} or more")
    choose(SPACINGS, request.spacing or "", "spacing")
    _check_sampler_options(request)
    choose(dict.fromkeys(FINAL_SIGMAS_TYPES), request.final_sigmas_type or "zero", "final_sigmas_type")
    for name in (*TIME_ID_FIELDS, *(f"negative_{name}" for name in TIME_ID_FIELDS)):
        pair = getattr(request, name)
        if pair is not None and (len(pair) != 2 or not all(isinstance(n, int) and 0 <= n <= 2**16 for n in pair)):
            raise ValueError(f"{name} {pair}: must be two whole numbers from 0 to {2**16}, height before width")
    _check_upscale(request, multiple)
    choose({"pil": 0, "latent": 0}, request.output_type, "output_type")
    if request.output_type == "latent" and request.upscale:
        raise ValueError("output_type 'latent': a request with upscale gives an image")


def _check_sampler_options(request: Request) -> None:
    """ValueError for an option that the sampler does not have; an eta of 0 is no noise, which others have anyway."""
    from ldm.diffusion.samplers import SAMPLERS

    for name in dict.fromkeys(name for spec in SAMPLERS.values() for name in spec.options):
        value, owners = getattr(request, name), [k for k, spec in SAMPLERS.items() if name in spec.options]
        if value is not None and request.sampler not in owners and (name != "eta" or value):
            raise ValueError(f"{name} {value}: {request.sampler} has none; samplers that do: {', '.join(owners)}")


def _warn_of_single_step(request: Request) -> None:
    """A warning where a strength is too small for one of the steps: `truncate_grid` keeps one."""
    steps = request.num_inference_steps or 0
    for name, strength in (("strength", request.strength), ("upscale strength", request.upscale_strength)):
        if strength and int(steps * strength) == 0 and (name == "strength" or request.upscale):
            warn_of_input(f"{name} {strength} with {steps} steps: one step is run")


def round_size(request: Request, multiple: int) -> Request:
    """The request with height and width rounded down to a multiple, with a warning, as the web UI and kohya's do."""
    changes: dict[str, Any] = {}
    for name in ("height", "width"):
        side = getattr(request, name)
        if isinstance(side, int) and multiple < side <= MAX_SIDE and side % multiple:
            changes[name] = side // multiple * multiple
            warn_of_input(f"{name} {side}: rounded to {changes[name]}, a multiple of {multiple}")
    return replace(request, **changes)


def draw_seed() -> int:
    """A seed of 32 bits from the operating system, for a seed of `RANDOM_SEED`."""
    return secrets.randbelow(2**32)


def _check_image_size(request: Request, multiple: int) -> None:
    for name in ("height", "width"):
        side, image = getattr(request, name), request.image
        if multiple <= side <= MAX_SIDE and side % multiple == 0:
            continue
        if image is not None and side == getattr(image, name) // multiple * multiple:
            size = f"image of {image.width}x{image.height}"
            raise ValueError(f"{size}: {name} must be from {multiple} to {MAX_SIDE}, unless another size is given")
        raise ValueError(f"{name} {side}: must be a multiple of {multiple} from {multiple} to {MAX_SIDE}")


def _check_edit_inputs(request: Request) -> None:
    for name in ("mask", "strength"):
        if request.image is None and getattr(request, name) is not None:
            raise ValueError(f"{name}: needs an image")
    if request.image is not None and request.mask is not None:
        mask, sizes = request.mask, (request.image.size, (request.width or 0, request.height or 0))
        if not any(same_aspect_ratio(mask.size, size) for size in sizes):
            image = "x".join(map(str, request.image.size))
            raise ValueError(f"mask of {mask.width}x{mask.height}: its image is {image}, of another aspect ratio")


def _check_upscale(request: Request, multiple: int) -> None:
    if (factor := request.upscale) is None:
        return
    size = request.width or 0, request.height or 0
    if not 1 < factor <= MAX_SIDE / max(size):
        raise ValueError(f"upscale {factor}: must be above 1, and give at most {MAX_SIDE} pixels a side")
    if any(new <= old for new, old in zip(upscale_size(size, factor, multiple), size, strict=True)):
        raise ValueError(f"upscale {factor} of {size[0]}x{size[1]}: must add {multiple} pixels to each side, or more")


def same_aspect_ratio(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Is one size the other times a factor, its sides rounded?"""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(sum(size), sum(other)) / 2
