"""A call of the pipeline: from its arguments to images, with callbacks and a progress bar on the way."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from ldm.adapters.lora import AdapterWeight
from ldm.image_io import contact_sheet
from ldm.pipeline.adapters_api import scale_weight
from ldm.pipeline.arguments import (
    ARGUMENTS,
    OPTION_NAMES,
    CallOptions,
    Models,
    add_diffusers_defaults,
    draw_noise,
    make_requests,
)
from ldm.pipeline.compat import CALL, bind_positional, translate
from ldm.pipeline.request import Request
from ldm.pipeline.scheduler import OnStep, StepEnd

CALLBACK_TENSORS = "latents", "x0"


@dataclass(frozen=True)
class PipelineOutput:
    """Images and their seeds, in the order of the requests.

    Like diffusers' outputs it is a tuple too: `output[0]` and `output["images"]` are the images. A notebook shows them.
    """

    images: Any
    seeds: list[int]
    nsfw_content_detected: None = None  # there is no safety checker

    def __getitem__(self, key: int | str) -> Any:
        return self.to_tuple()[key] if isinstance(key, int) else getattr(self, key)

    def to_tuple(self) -> tuple[Any, ...]:
        return self.images, self.nsfw_content_detected

    def _repr_png_(self) -> bytes | None:
        if not isinstance(self.images, list) or not self.images:
            return None
        image, data = self.images[0], io.BytesIO()
        if len(self.images) > 1:
            columns = min(4, len(self.images))
            image = contact_sheet(self.images, [f"seed {seed}" for seed in self.seeds], columns)
        image.save(data, "PNG")
        return data.getvalue()


@dataclass
class CallState:
    """What a callback may read and set while a call runs."""

    interrupt: bool = False
    num_timesteps: int = 0
    guidance_scale: float | None = None
    progress_bar: dict[str, Any] = field(default_factory=dict)

    def start(self, num_timesteps: int, guidance_scale: float | None) -> None:
        self.interrupt, self.num_timesteps, self.guidance_scale = False, num_timesteps, guidance_scale


class CalledPipeline(Models, Protocol):
    """What a call needs of a pipeline."""

    task: str
    call_state: CallState

    def resolve(self, request: Request) -> Request: ...

    def _weights(self) -> dict[str, AdapterWeight]: ...

    def _set_weights(self, weights: Mapping[str, AdapterWeight]) -> None: ...


def call_pipeline(pipe: CalledPipeline, prompt: Any, args: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
    """The output of a call: see `Pipeline.__call__`."""
    is_xl = len(pipe.model.text_encoders) > 1
    values = translate(CALL, bind_positional(pipe.task, is_xl, args, arguments), ARGUMENTS, "pipe(...)")
    options = CallOptions(**{name: values.pop(name) for name in OPTION_NAMES & values.keys()})
    on_step = make_on_step(pipe, options)
    if pipe.task:
        add_diffusers_defaults(pipe, values, options)
    requests, num_inputs = make_requests(pipe, prompt, values, options)
    requests = [pipe.resolve(request) for request in requests]
    if not requests:
        return PipelineOutput([], [])
    if options.generator is not None:
        requests = draw_noise(pipe, requests, options.generator, num_inputs)
    grid = pipe.batch_scheduler.time_grid(requests[0])
    pipe.call_state.start(len(grid) - 1, requests[0].guidance_scale)
    with (
        scale_adapters(pipe, options.cross_attention_kwargs),
        show_call_progress(pipe, options, len(requests)) as on_progress,
    ):
        images = dict(pipe.batch_scheduler.run(requests, on_progress, on_step))
    output = convert_images([images[k] for k in range(len(requests))], options.output_type)
    seeds = [request.seed for request in requests]
    if options.return_dict:
        return PipelineOutput(output, seeds)
    return (output,) if is_xl else (output, None)


def make_on_step(pipe: CalledPipeline, options: CallOptions) -> OnStep | None:
    """`callback_on_step_end(pipe, step, timestep, tensors)` of diffusers for our scheduler.

    It is called after each evaluation of the network, for the images that are sampled together. `latents` that it
    returns replace those it was given. `pipe._interrupt = True` ends the sampling. TypeError for other tensors.
    """
    callback, names = options.callback_on_step_end, options.callback_on_step_end_tensor_inputs
    if options.callback is not None:
        old, every = options.callback, options.callback_steps or 1
        callback = lambda _, step, timestep, tensors: step % every or old(step, timestep, tensors["latents"])
    if callback is None:
        return None
    names = getattr(callback, "tensor_inputs", names)
    if others := [name for name in names if name not in CALLBACK_TENSORS]:
        instead = f"{' or '.join(CALLBACK_TENSORS)}; guidance_interval=(sigma, None) ends guidance below a noise level"
        raise TypeError(f"callback_on_step_end: {others[0]} is not supported; write {instead}")

    def on_step(end: StepEnd) -> bool:
        given = {name: getattr(end, name) for name in names}
        timestep = torch.tensor(int(end.timestep) if end.timestep.is_integer() else end.timestep)
        returned = callback(pipe, end.nfe, timestep, dict(given))
        for name, value in returned.items() if isinstance(returned, Mapping) else ():
            if name == "latents" and value is not end.latents:
                end.latents.copy_(value)
            elif name not in given:
                raise TypeError(f"callback_on_step_end: returned {name}, which cannot be changed; only latents can")
        return pipe.call_state.interrupt

    return on_step


@contextmanager
def scale_adapters(pipe: CalledPipeline, kwargs: Mapping[str, Any] | None) -> Iterator[None]:
    """Adapters with their weights times `cross_attention_kwargs["scale"]`, for the time of a call."""
    if others := set(kwargs or ()) - {"scale"}:
        raise TypeError(
            f"cross_attention_kwargs: {sorted(others)[0]} is not supported; only scale, of the adapters, is"
        )
    scale = (kwargs or {}).get("scale", 1)
    before = pipe._weights()
    if scale == 1 or not before:
        yield
        return
    try:
        pipe._set_weights({name: scale_weight(weight, scale) for name, weight in before.items()})
        yield
    finally:
        pipe._set_weights(before)


@contextmanager
def show_call_progress(pipe: CalledPipeline, options: CallOptions, total: int) -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal or in a notebook; `progress_bar=False` and `set_progress_bar_config` turn it off."""
    config, visible = pipe.call_state.progress_bar, sys.stderr.isatty() or "ipykernel" in sys.modules
    if not options.progress_bar or config.get("disable") or not visible:
        yield lambda delta: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=not config.get("leave", True)) as bar:
        task = bar.add_task(config.get("desc") or "", total=total)
        yield lambda delta: bar.advance(task, delta)


def convert_images(images: list[Any], output_type: str | None) -> Any:
    """PIL images, an array [B, H, W, 3] ("np") or a tensor [B, 3, H, W] ("pt") in [0, 1], or latents [B, C, h, w]."""
    if output_type in ("pil", None):
        return images
    if output_type == "latent":
        return torch.stack(images)
    if output_type not in ("np", "pt"):
        raise ValueError(f"output_type {output_type!r}: choose from pil, np, pt, latent")
    array = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255
    return array if output_type == "np" else torch.from_numpy(array).permute(0, 3, 1, 2)
