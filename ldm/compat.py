"""diffusers' class names: `from ldm.compat import StableDiffusionPipeline` in place of `from diffusers import ...`.

Each class is `ldm.Pipeline`, and does as diffusers in three things: without a generator the noise is torch's own, a
guidance scale of 1 or less is none, and the positional arguments are those of the class. Scheduler classes
(`EulerDiscreteScheduler`, ...) hold a configuration, for `pipe.scheduler = X.from_config(pipe.scheduler.config)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.request import urlopen

from PIL import Image

from ldm.checkpoints.schedule import DIFFUSERS_SCHEDULERS
from ldm.errors import suggest
from ldm.image_io import convert_to_rgb, decode_image, read_image
from ldm.pipeline.compat import scheduler_class
from ldm.pipeline.pipeline import Pipeline, PipelineOutput

TASKS = {  # of diffusers' classes
    "AutoPipelineForText2Image": "auto",
    "AutoPipelineForImage2Image": "auto",
    "AutoPipelineForInpainting": "auto",
    "StableDiffusionPipeline": "text2image",
    "StableDiffusionImg2ImgPipeline": "image2image",
    "StableDiffusionInpaintPipeline": "inpainting",
    "StableDiffusionXLPipeline": "text2image",
    "StableDiffusionXLImg2ImgPipeline": "image2image",
    "StableDiffusionXLInpaintPipeline": "inpainting",
}
__all__ = ["DiffusionPipeline", "PipelineOutput", "load_image", "make_image_grid", *TASKS, *DIFFUSERS_SCHEDULERS]
OWN_FOLDER = "; write Pipeline.from_pretrained(a folder with that component)"
MISSING = {  # classes of diffusers, and what to write instead
    **dict.fromkeys(("UNet2DConditionModel", "CLIPTextModel"), OWN_FOLDER),
    **dict.fromkeys(("AutoencoderTiny", "ConsistencyDecoderVAE"), '; write from_pretrained(..., vae="...")'),
    **dict.fromkeys(("ControlNetModel", "T2IAdapter"), "; write pipe(..., image=..., strength=...)"),
    "AysSchedules": '; write pipe(..., sigmas=[...]), or spacing="..." as `ldm info` lists them',
    "BitsAndBytesConfig": "; write torch_dtype=torch.bfloat16",
}


class DiffusionPipeline(Pipeline):
    """A pipeline that does as diffusers'; `X(**pipe.components)` and `X.from_pipe(pipe)` share its networks."""

    task = "auto"

    def __init__(self, *args: Any, **options: Any) -> None:
        if "unet" not in options:
            super().__init__(*args, **options)
            return
        pipe = getattr(options.get("scheduler"), "pipeline", None)
        if pipe is None or pipe.unet is not options["unet"]:
            raise TypeError(f"{type(self).__name__}(...): write {type(self).__name__}.from_pipe(pipe)")
        self.__dict__.update(pipe.__dict__)

    @classmethod
    def from_pipe(cls, pipe: Pipeline, **options: Any) -> Self:
        """A pipeline of this class with the networks and adapters of another."""
        return cls(**{**pipe.components, **{name: v for name, v in options.items() if name in pipe.components}})


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """An image from a file, an address or PIL, upright, in RGB; ValueError for what is no image."""
    if isinstance(source, Image.Image):
        return convert_to_rgb(source).rgb
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        with urlopen(source) as answer:
            return decode_image(answer.read()).rgb
    return read_image(Path(source))


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Images of one size in rows of `cols`."""
    if len(images) != rows * cols:
        raise ValueError(f"make_image_grid: {len(images)} images for {rows} rows of {cols}")
    images = [image.resize((resize, resize)) for image in images] if resize else images
    width, height = images[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for k, image in enumerate(images):
        grid.paste(image, (k % cols * width, k // cols * height))
    return grid


def __getattr__(name: str) -> Any:
    if name in TASKS:
        globals()[name] = type(name, (DiffusionPipeline,), {"task": TASKS[name], "__module__": __name__})
    elif name in DIFFUSERS_SCHEDULERS:
        globals()[name] = scheduler_class(name)
    elif name == "AutoencoderKL":
        from ldm.nn.vae import import_diffusers_class

        globals()[name] = import_diffusers_class()
    elif name.startswith("_"):
        raise AttributeError(name)
    else:  # no AttributeError, whose text `from ldm.compat import ...` does not show
        hint = MISSING.get(name) or suggest(name, __all__)
        raise ImportError(f"ldm.compat has no {name!r}{hint}")
    return globals()[name]
