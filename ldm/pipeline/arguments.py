"""The arguments of a call of the pipeline, ours or diffusers', as requests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.formats import Checkpoint
from ldm.image_io import read_image, read_mask, to_pil
from ldm.nn.vae import latent_shape
from ldm.pipeline.prompt_encoder import PromptEncoder
from ldm.pipeline.request import RANDOM_SEED, Request, draw_seed
from ldm.pipeline.scheduler import BatchScheduler, num_concat_channels
from ldm.rng import TORCH_SEEDS

Generators = torch.Generator | Sequence[torch.Generator]
IMAGE_FIELDS = {"image": read_image, "mask": read_mask}
PER_PROMPT = "negative_prompt", "seed", "guidance_scale"
NUMBER_LISTS = "timesteps", "sigmas"
EMBEDS = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
# diffusers' default denoising strengths for SDXL
XL_STRENGTHS = {False: 0.3, True: 0.9999}  # by whether there is a mask


class Models(Protocol):
    """What arguments are read with: a pipeline's networks."""

    model: Checkpoint
    prompt_encoder: PromptEncoder
    batch_scheduler: BatchScheduler

    @property
    def device(self) -> torch.device: ...

    def default_size(self, image: Image.Image | None) -> tuple[int, int]: ...


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


def add_diffusers_defaults(pipe: Models, values: dict[str, Any], options: CallOptions) -> None:
    """What a class of `ldm.compat` does as diffusers where `Pipeline` does otherwise.

    The noise is torch's own without a generator; a guidance scale of 1 or less is none (a scale of 0 is the
    unconditional model to us); eta is 0, which only DDIM and TCD read; inpainting is done at the model's own size; SDXL
    has other denoising strengths.
    """
    if options.generator is None and values.get("seed") is None and values.get("latents") is None:
        options.generator = torch.default_generator
    if (scale := values.get("guidance_scale")) is not None:
        values["guidance_scale"] = np.maximum(np.asarray(scale, float), 1.0).tolist()
    sampler = values.get("sampler") or pipe.model.generation_defaults.get("sampler")
    values["eta"] = (values.get("eta") or 0.0) if sampler in ("ddim", "tcd") else None
    if values.get("image") is None:
        return
    if values.get("mask") is not None:
        values.update(
            {n: v for n, v in zip(("height", "width"), pipe.default_size(None), strict=True) if values.get(n) is None}
        )
    if len(pipe.model.text_encoders) > 1:
        values.setdefault("strength", XL_STRENGTHS[values.get("mask") is not None])


def make_requests(pipe: Models, prompt: Any, values: dict[str, Any], options: CallOptions) -> tuple[list[Request], int]:
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


def split_image_latents(pipe: Models, values: dict[str, Any]) -> Request:
    """The request of a prompt; an initial image that is given as latents is decoded for its size, too."""
    if isinstance(latents := values.get("image"), Tensor):
        with torch.inference_mode():
            (image,) = to_pil(pipe.batch_scheduler.batched_decode(latents[None].to(pipe.device).float()))
        values = {**values, "image": image, "image_latents": latents}
    return Request(**values)


def join_second_prompts(
    pipe: Models, columns: Mapping[str, list[Any]], options: CallOptions, clip_skip: int
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


def draw_noise(pipe: Models, requests: Sequence[Request], generator: Generators, num_inputs: int) -> list[Request]:
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
