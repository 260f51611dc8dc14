"""A request: everything that one picture depends on, beside the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ldm.diffusion.guidance import EVERYWHERE
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.spacing import SPACINGS, choose

MAX_SIDE = 8192  # pixels
MAX_STEPS = 10_000


@dataclass(frozen=True)
class Request:
    """Everything that one picture depends on, beside the model. Sizes are pixels; None is the model's own value."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str = "dpmpp_2m"
    spacing: str = "trailing"
    eta: float = 0.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float | None] | None = None  # sigma/alpha (low, high]; None is no limit
    latents: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.guidance_interval, list):  # JSON has no tuples
            object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))

    def record(self) -> dict[str, Any]:
        """The request as JSON values; `Request(**record)` is the same request, less latents given from outside."""
        return {name: value for name, value in asdict(self).items() if name != "latents"}


def interval(request: Request) -> tuple[float, float]:
    """Where a request guides, in sigma/alpha: (low, high]."""
    low, high = request.guidance_interval or (EVERYWHERE[0], None)
    return low, EVERYWHERE[1] if high is None else high


def check(request: Request, multiple: int) -> None:
    """ValueError for a value that no picture can have."""
    for name in ("height", "width"):
        side = getattr(request, name)
        if not (multiple <= side <= MAX_SIDE and side % multiple == 0):
            raise ValueError(f"{name} {side}: must be a multiple of {multiple} from {multiple} to {MAX_SIDE}")
    steps, scale = request.num_inference_steps, request.guidance_scale
    if steps is None or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps {steps}: must be from 1 to {MAX_STEPS}")
    if scale is None or not 0 <= scale <= 1000:  # also refuses NaN
        raise ValueError(f"guidance {scale}: must be from 0 to 1000")
    if not 0 <= request.guidance_rescale <= 1:
        raise ValueError(f"guidance rescale {request.guidance_rescale}: must be from 0 to 1")
    low, high = interval(request)
    if not 0 <= low < high:
        raise ValueError(f"guidance interval {low:g} to {high:g}: must be 0 <= low < high, in sigma/alpha")
    if not 0 <= request.seed < 2**63:
        raise ValueError(f"seed {request.seed}: must be from 0 to 2**63 - 1")
    choose(SAMPLERS, request.sampler, "sampler")
    choose(SPACINGS, request.spacing, "spacing")
    if not 0 <= request.eta <= 1 or (request.eta and request.sampler != "ddim"):
        raise ValueError(f"eta {request.eta}: must be from 0 to 1, and 0 for samplers other than ddim")
