"""A request: everything that one picture depends on, beside the model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.guidance import FULL_INTERVAL
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.timesteps import SPACINGS
from ldm.errors import choose
from ldm.image_io import convert_to_rgb, image_digest, inpaint_mask

MAX_SIDE = 8192  # pixels
MAX_INFERENCE_STEPS = 10_000
DEFAULT_IMG2IMG_STRENGTH, DEFAULT_INPAINT_STRENGTH = (
    0.8,
    1.0,
)  # diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline
TUPLE_FIELDS = "guidance_interval", "original_size", "crops_coords_top_left", "target_size"


@dataclass(frozen=True)
class Request:
    """Everything that one picture depends on, beside the model. Sizes are pixels; None is the model's own value.

    A negative prompt of None is the model's own empty one: zeros for SDXL, the embedding of "" otherwise. `clip_skip`
    counts layers of the text encoders as diffusers does: 0 is the model's own, 1 the one before it; unlike there, it is
    the negative prompt's too. `image` is redrawn by the last `strength` of the steps, and of it only what is white in
    `mask`, which has its proportions or those of what is drawn. It gives the size where none is said, and is stretched
    to one that is, as in diffusers; it is kept as RGB, its transparency on white, the mask as grey, as
    `ldm.images.inpaint_mask` reads it. `upscale` draws the finished picture again, that much larger, with
    `upscale_strength`. SDXL is told of an original size, a crop's corner and a target size, each (height, width); None
    is the picture's own size.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    spacing: str | None = None
    eta: float = 0.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float | None] | None = None  # sigma/alpha (low, high]; None is no limit
    clip_skip: int | None = None
    image: Image.Image | None = field(default=None, repr=False)
    mask: Image.Image | None = field(default=None, repr=False)
    strength: float | None = None
    upscale: float | None = None
    upscale_strength: float = 0.5
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    latents: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in TUPLE_FIELDS:
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, mode, read in (("image", "RGB", lambda found: found.rgb), ("mask", "L", inpaint_mask)):
            picture = getattr(self, name)
            if isinstance(picture, Image.Image) and picture.mode != mode:
                object.__setattr__(self, name, read(convert_to_rgb(picture)))

    def to_record(self) -> dict[str, Any]:
        """The request as JSON values, fingerprints in place of pictures.

        `Request(**record)` is the same request, less pictures and latents given from outside.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "latents"}
        return {name: image_digest(v) if isinstance(v, Image.Image) else v for name, v in values.items()}


def resolve_guidance_interval(request: Request) -> tuple[float, float]:
    """Where a request guides, in sigma/alpha: (low, high]."""
    low, high = request.guidance_interval or (FULL_INTERVAL[0], None)
    return low, FULL_INTERVAL[1] if high is None else high


def default_strength(request: Request) -> float | None:
    """The strength of a request that says none: diffusers' defaults; None where there is no image."""
    if request.image is None:
        return None
    return DEFAULT_IMG2IMG_STRENGTH if request.mask is None else DEFAULT_INPAINT_STRENGTH


def get_add_time_ids(request: Request) -> Tensor:
    """What SDXL is told of sizes, [1, 6] float32: original height and width, the crop's top and left, target size."""
    own = request.height or 0, request.width or 0
    ids = *(request.original_size or own), *request.crops_coords_top_left, *(request.target_size or own)
    return torch.tensor([ids], dtype=torch.float32)


def hires_pass(request: Request, image: Image.Image, multiple: int) -> Request:
    """The second pass of a request with `upscale`: its finished picture, larger, drawn again (A1111's "hires. fix")."""
    width, height = upscale_size(image.size, request.upscale or 1, multiple)
    strength = request.upscale_strength
    return replace(request, image=image, width=width, height=height, strength=strength, upscale=None, latents=None)


def upscale_size(size: tuple[int, int], factor: float, multiple: int) -> tuple[int, int]:
    """A size that much larger, rounded down to fit."""
    width, height = (round(side * factor) // multiple * multiple for side in size)
    return width, height


def check_request(request: Request, multiple: int) -> None:
    """ValueError for a value that no picture can have, in a request with all defaults filled in."""
    check_image_size(request, multiple)
    steps, scale = request.num_inference_steps, request.guidance_scale
    if steps is None or not 1 <= steps <= MAX_INFERENCE_STEPS:
        raise ValueError(f"steps {steps}: must be from 1 to {MAX_INFERENCE_STEPS}")
    if scale is None or not 0 <= scale <= 1000:  # also refuses NaN
        raise ValueError(f"guidance {scale}: must be from 0 to 1000")
    if not 0 <= request.guidance_rescale <= 1:
        raise ValueError(f"guidance rescale {request.guidance_rescale}: must be from 0 to 1")
    low, high = resolve_guidance_interval(request)
    if not 0 <= low < high:
        raise ValueError(f"guidance interval {low:g} to {high:g}: must be 0 <= low < high, in sigma/alpha")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"seed {request.seed}: must be from 0 to 2**63 - 1")
    choose(SAMPLERS, request.sampler or "", "sampler")
    choose(SPACINGS, request.spacing or "", "spacing")
    if not 0 <= request.eta <= 1 or (request.eta and request.sampler != "ddim"):
        raise ValueError(f"eta {request.eta}: must be from 0 to 1, and 0 for samplers other than ddim")
    check_micro_conditioning(request)
    check_edit_inputs(request)
    check_upscale(request, multiple)


def check_image_size(request: Request, multiple: int) -> None:
    """ValueError for a size that cannot be drawn."""
    for name in ("height", "width"):
        side, image = getattr(request, name), request.image
        if multiple <= side <= MAX_SIDE and side % multiple == 0:
            continue
        if image is not None and side == getattr(image, name) // multiple * multiple:
            own = f"image of {image.width}x{image.height}"
            raise ValueError(f"{own}: {name} must be from {multiple} to {MAX_SIDE}, unless another size is said")
        raise ValueError(f"{name} {side}: must be a multiple of {multiple} from {multiple} to {MAX_SIDE}")


def check_micro_conditioning(request: Request) -> None:
    """ValueError for sizes that SDXL cannot be told."""
    for name in ("original_size", "crops_coords_top_left", "target_size"):
        pair = getattr(request, name)
        if pair is not None and (len(pair) != 2 or not all(isinstance(n, int) and 0 <= n <= 2**16 for n in pair)):
            raise ValueError(f"{name} {pair}: must be two whole numbers from 0 to {2**16}, height before width")


def check_edit_inputs(request: Request) -> None:
    """ValueError for a change of a picture that cannot be made."""
    steps, strength = request.num_inference_steps or 0, request.strength
    if request.image is None and (request.mask is not None or strength is not None):
        raise ValueError(f"{'strength' if request.mask is None else 'mask'}: is of an image, and none is given")
    for name, share in (("strength", strength), ("upscale strength", request.upscale and request.upscale_strength)):
        if share is None:
            continue
        if not 0 <= share <= 1:
            raise ValueError(f"{name} {share}: must be from 0 to 1")
        if share > 0 and int(steps * share) == 0:
            raise ValueError(f"{name} {share} of {steps} steps: leaves none")
    if request.image is not None and request.mask is not None:
        mask, sizes = request.mask, (request.image.size, (request.width or 0, request.height or 0))
        if not any(same_aspect_ratio(mask.size, size) for size in sizes):
            image = "x".join(map(str, request.image.size))
            raise ValueError(f"mask of {mask.width}x{mask.height}: its image is {image}, other proportions")


def check_upscale(request: Request, multiple: int) -> None:
    """ValueError for a second pass that is not larger, or too large."""
    if (factor := request.upscale) is None:
        return
    size = request.width or 0, request.height or 0
    if not 1 < factor <= MAX_SIDE / max(size):
        raise ValueError(f"upscale {factor}: must be above 1, and draw at most {MAX_SIDE} pixels a side")
    if any(new <= old for new, old in zip(upscale_size(size, factor, multiple), size, strict=True)):
        raise ValueError(f"upscale {factor} of {size[0]}x{size[1]}: must add {multiple} pixels to each side, or more")


def same_aspect_ratio(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Is one size the other times a factor, its sides rounded?"""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(sum(size), sum(other)) / 2
