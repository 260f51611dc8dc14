"""A call of the pipeline: from arguments, ours or diffusers', to requests, and from images to the output."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.image_io import contact_sheet, read_image, read_mask, to_pil
from ldm.nn.vae import latent_shape
from ldm.pipeline.adapters_api import scale_weight
from ldm.pipeline.compat import CALL, bind_positional, translate
from ldm.pipeline.request import RANDOM_SEED, Request, draw_seed
from ldm.pipeline.scheduler import OnStep, StepEnd, num_concat_channels
from ldm.rng import TORCH_SEEDS

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline

Generators = torch.Generator | Sequence[torch.Generator]
CALLBACK_TENSORS = "latents", "x0"
IMAGE_FIELDS = {"image": read_image, "mask": read_mask}
PER_PROMPT = "negative_prompt", "seed", "guidance_scale"
NUMBER_LISTS = "timesteps", "sigmas"
EMBEDS = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
# diffusers' default denoising strengths for SDXL
XL_STRENGTHS = {False: 0.3, True: 0.9999}  # by whether there is a mask


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
class CallOptions:
    """The arguments of a call that are no fields of a request, by diffusers' names."""

    num_images_per_prompt: int = 1
    generator: Generators | None = None
    output_type: str | None = "pil"
    return_dict: bool = True
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    callback: Callable[..., Any] | None = None  # of diffusers before 0.24
    callback_steps: int | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    prompt_2: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    progress_bar: bool = True


OPTION_NAMES = {f.name for f in fields(CallOptions)}
ARGUMENTS = {f.name for f in fields(Request)} | OPTION_NAMES


def call_pipeline(pipe: Pipeline, prompt: Any, args: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
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


def add_diffusers_defaults(pipe: Pipeline, values: dict[str, Any], options: CallOptions) -> None:
    """What a class of `ldm.compat` does as diffusers where `Pipeline` does otherwise.

    The noise is torch's own without a generator; a guidance scale of 1 or less is none (a scale of 0 is the
    unconditional model to us); inpainting is done at the model's own size; SDXL has other denoising strengths.
    """
    if options.generator is None and values.get("seed") is None and values.get("latents") is None:
        options.generator = torch.default_generator
    if (scale := values.get("guidance_scale")) is not None:
        values["guidance_scale"] = np.maximum(np.asarray(scale, float), 1.0).tolist()
    if values.get("image") is None:
        return
    if values.get("mask") is not None:
        values.update(
            {n: v for n, v in zip(("height", "width"), pipe._default_size(None), strict=True) if values.get(n) is None}
        )
    if len(pipe.model.text_encoders) > 1:
        values.setdefault("strength", XL_STRENGTHS[values.get("mask") is not None])


def make_requests(
    pipe: Pipeline, prompt: Any, values: dict[str, Any], options: CallOptions
) -> tuple[list[Request], int]:
    """A request per image, prompt by prompt, and the number of initial images that were given."""
    channels = pipe.model.vae.config.latent_channels
    inputs: dict[str, list[Any]] = {name: read_inputs(values.pop(name, None), name, channels) for name in IMAGE_FIELDS}
    if inputs["image"] and values.get("denoising_start") is not None and isinstance(inputs["image"][0], Tensor):
        values["latents"], inputs["image"] = torch.stack(inputs["image"]), []  # as they are: nothing is added
        values.pop("strength", None)
    embeds = {name: values.pop(name, None) for name in EMBEDS}
    rows = {
        name: list(a if a.ndim == 3 - ("pooled" in name) else a[None]) for name, a in embeds.items() if a is not None
    }
    prompts = list(prompt) if isinstance(prompt, list | tuple | np.ndarray) else [prompt]
    lengths = [len(prompts), *map(len, inputs.values()), *map(len, rows.values())]
    count = max(lengths) if len(prompts) == 1 else len(prompts)
    if prompt is None and "prompt_embeds" not in rows:
        raise ValueError("prompt: one is needed, or prompt_embeds")
    rows |= {"prompt": ["" if text is None else text for text in prompts], **{k: v for k, v in inputs.items() if v}}
    columns = {name: broadcast(name, row, count) for name, row in rows.items()}
    columns |= {name: per_prompt(name, values.pop(name), count) for name in PER_PROMPT if name in values}
    seeds = [0 if seed is None else seed for seed in columns.get("seed", [0] * count)]
    columns["seed"] = [draw_seed() if seed == RANDOM_SEED else seed for seed in seeds]
    settings: dict[str, Any] = {**values, **{n: read_numbers(n, values[n]) for n in NUMBER_LISTS if n in values}}
    latents = settings.pop("latents", None)
    settings["output_type"] = "latent" if options.output_type == "latent" else "pil"
    columns |= join_second_prompts(pipe, columns, options, int(settings.get("clip_skip") or 0))
    requests = [
        split_image_latents(pipe, {**{name: row[k] for name, row in columns.items()}, **settings}) for k in range(count)
    ]
    each = options.num_images_per_prompt
    requests = [replace(request, seed=request.seed + k) if k else request for request in requests for k in range(each)]
    if latents is not None:
        if len(latents) != len(requests):
            raise ValueError(f"latents: {len(latents)} given for {len(requests)} images")
        requests = [replace(request, latents=row) for request, row in zip(requests, latents, strict=True)]
    return requests, max(1, len(inputs["image"]))


def read_numbers(name: str, values: Any) -> tuple[float, ...] | None:
    """The numbers of a list, array or tensor."""
    values = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    if values is not None and not isinstance(values, list | tuple):
        raise ValueError(f"{name} {values!r:.60}: must be a list of numbers")
    return None if values is None else tuple(values)


def broadcast(name: str, row: list[Any], count: int) -> list[Any]:
    """One value for all prompts, or one for each."""
    if len(row) not in (1, count):
        raise ValueError(f"{name}: {len(row)} given for {count} prompts")
    return row * count if len(row) == 1 else row


def per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """A setting for each prompt: the same for all, or a list, array or tensor of one for each."""
    values = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    if not isinstance(values, list | tuple):
        return [values] * count
    if len(values) != count:
        raise ValueError(f"{name}: {len(values)} given for {count} prompts")
    return list(values)


def read_inputs(value: Any, name: str, latent_channels: int) -> list[Image.Image | Tensor]:
    """Images as path, PIL image, array, tensor or a list of these; a tensor of as many channels as latents is latents.

    Arrays are [H, W, C], tensors [C, H, W], with a row per image before, of uint8 or in [0, 1], or in [-1, 1] where any
    value is negative.
    """
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [image for one in value for image in read_inputs(one, name, latent_channels)]
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ValueError(f"{name} {value}: write {name}=ldm.compat.load_image(address)")
    if isinstance(value, str | Path):
        return [IMAGE_FIELDS[name](Path(value))]
    if not isinstance(value, np.ndarray | Tensor):
        return [value]
    if isinstance(value, Tensor):
        if name == "image" and value.ndim in (3, 4) and value.shape[-3] == latent_channels:
            return list(value if value.ndim == 4 else value[None])
        value = value.detach().float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
        value = np.moveaxis(value, -3, -1) if value.ndim > 2 else value
    elif name == "mask" and value.ndim == 3 and value.shape[-1] not in (1, 3):  # masks [B, H, W]
        value = value[..., None]
    levels = value
    if value.dtype != np.uint8:
        levels = value.astype(np.float64)
        levels = np.rint(np.clip((levels + 1) / 2 if levels.min() < 0 else levels, 0, 1) * 255).astype(np.uint8)
    levels = levels if levels.ndim == 4 else levels[None] if levels.ndim == 3 else levels[None, ..., None]
    return [Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row) for row in levels]


def split_image_latents(pipe: Pipeline, values: dict[str, Any]) -> Request:
    """The request of a prompt; an initial image that is given as latents is decoded for its size, too."""
    if isinstance(latents := values.get("image"), Tensor):
        with torch.inference_mode():
            (image,) = to_pil(pipe.batch_scheduler.batched_decode(latents[None].to(pipe.device).float()))
        values = {**values, "image": image, "image_latents": latents}
    return Request(**values)


def join_second_prompts(
    pipe: Pipeline, columns: Mapping[str, list[Any]], options: CallOptions, clip_skip: int
) -> dict[str, list[Tensor]]:
    """Embeddings of which the second text encoder's part, and the pooled ones, are those of `prompt_2`."""
    joined: dict[str, list[Tensor]] = {}
    for name, second in (("prompt", options.prompt_2), ("negative_prompt", options.negative_prompt_2)):
        if second is None:
            continue
        if len(pipe.model.text_encoders) == 1:
            raise TypeError(f"pipe(...): {name}_2 is not supported; write {name}=..., this model has one text encoder")
        firsts = columns.get(name) or [""] * len(columns["prompt"])
        pairs = zip(firsts, per_prompt(f"{name}_2", second, len(firsts)), strict=True)
        rows = [pipe.prompt_encoder.encode(first, 1, clip_skip, other) for first, other in pairs]
        joined[f"{name}_embeds"] = [states.context[0] for states, _ in rows]
        joined[f"{name.replace('prompt', 'pooled_prompt')}_embeds"] = [
            pooled[0] for _, pooled in rows if pooled is not None
        ]
    return joined


def draw_noise(pipe: Pipeline, requests: Sequence[Request], generator: Generators, num_inputs: int) -> list[Request]:
    """The requests with the noise that diffusers draws: of the image's posterior, the start, the masked image's.

    A fresh generator on the CPU, of a seed below 2**32, that gives one image from noise alone is its seed. Other images
    have latents, and a hash of these as the seed of what stochastic samplers add, which is not diffusers'.
    """
    generators: list[Any] = list(generator) if isinstance(generator, list | tuple) else [generator]
    if others := [g for g in generators if not isinstance(g, torch.Generator)]:
        raise ValueError(f"generator {others[0]!r:.60}: must be a torch.Generator")
    if len(generators) not in (1, len(requests)):
        raise ValueError(f"generator: {len(generators)} given for {len(requests)} images")
    first, fresh = requests[0], [is_fresh(g) for g in generators]
    shape = latent_shape(pipe.model.vae, first.height or 0, first.width or 0)
    if any((r.height, r.width) != (first.height, first.width) for r in requests) and len(generators) == 1:
        raise ValueError("generator: one for each image is needed where sizes differ")

    def draw(count: int) -> list[Tensor]:
        if len(generators) == 1:
            rows = torch.randn((count, *shape), generator=generators[0], device=generators[0].device)
            return [rows[k % count] for k in range(len(requests))]
        return [torch.randn((1, *shape), generator=g, device=g.device)[0] for g in generators]

    zeros = [torch.zeros(shape)] * len(requests)
    has_image, has_mask = first.image is not None, first.mask is not None
    from_image = has_image and first.image_latents is None
    if has_mask and num_concat_channels(pipe.model):
        from_image = from_image and (first.strength or 0) < 1
    image = draw(num_inputs) if from_image else zeros
    noise: list[Any] = draw(len(requests)) if first.latents is None else [r.latents for r in requests]
    masked = draw(num_inputs) if has_mask else zeros
    if len(generators) == len(requests) and all(fresh) and not has_image and first.latents is None:
        return [replace(r, seed=g.initial_seed()) for r, g in zip(requests, generators, strict=True)]
    posterior = [torch.stack(pair) if has_image else None for pair in zip(image, masked, strict=True)]
    return [
        replace(r, latents=x, posterior_noise=z, seed=hash_tensor(x))
        for r, x, z in zip(requests, noise, posterior, strict=True)
    ]


def is_fresh(generator: torch.Generator) -> bool:
    """Whether a generator is on the CPU, has drawn nothing since it was seeded, and has a seed below 2**32."""
    seed = generator.initial_seed()
    if generator.device.type != "cpu" or not 0 <= seed < TORCH_SEEDS:
        return False
    return torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state())


def hash_tensor(tensor: Tensor) -> int:
    """A seed of 64 bits from the values of a tensor."""
    data = tensor.detach().float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def make_on_step(pipe: Pipeline, options: CallOptions) -> OnStep | None:
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


@dataclass
class CallState:
    """What a callback may read and set while a call runs."""

    interrupt: bool = False
    num_timesteps: int = 0
    guidance_scale: float | None = None
    progress_bar: dict[str, Any] = field(default_factory=dict)

    def start(self, num_timesteps: int, guidance_scale: float | None) -> None:
        self.interrupt, self.num_timesteps, self.guidance_scale = False, num_timesteps, guidance_scale


@contextmanager
def scale_adapters(pipe: Pipeline, kwargs: Mapping[str, Any] | None) -> Iterator[None]:
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
def show_call_progress(pipe: Pipeline, options: CallOptions, total: int) -> Iterator[Callable[[float], None]]:
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
