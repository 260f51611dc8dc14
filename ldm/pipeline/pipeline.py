"""The pipeline: requests in, images out, each a function of its own request alone."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from ldm import __version__
from ldm.adapters.lora import AdapterMerger, AdapterWeight
from ldm.checkpoints.families import LoadOptions
from ldm.checkpoints.formats import PICTO_PATH, Checkpoint, is_hub_source, load_checkpoint
from ldm.diffusion.denoiser import Denoise
from ldm.errors import choose
from ldm.hardware import best_device, preferred_dtype, supports_bf16
from ldm.image_io import from_uint8
from ldm.metadata import create_infotext
from ldm.nn.unet import native_size
from ldm.nn.vae import Posterior, encode_images, latent_shape, vae_scale_factor
from ldm.pipeline.adapters_api import AdaptersAPI
from ldm.pipeline.call import CallState, PipelineOutput, call_pipeline
from ldm.pipeline.compat import LOADING, say_once, translate
from ldm.pipeline.diffusers_api import DiffusersAPI
from ldm.pipeline.prompt_encoder import PromptEncoder
from ldm.pipeline.request import (
    RANDOM_SEED,
    Request,
    check_request,
    coerce_request,
    default_strength,
    draw_seed,
    round_size,
)
from ldm.pipeline.scheduler import BatchScheduler, OnStep, make_cfg_denoiser, num_concat_channels

DEFAULTS: dict[str, Any] = {"path": PICTO_PATH, "device": "auto", "dtype": "auto"}
HUB_FILE_URL = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/]+)/(?:blob|resolve)/(?P<revision>[^/]+)/(?P<file>[^?]+)(?:\?.*)?"
)
PIPELINE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READ_BY_CFG = "negative_prompt", "guidance_rescale", "guidance_interval"  # by nothing else


class Pipeline(AdaptersAPI, DiffusersAPI):
    """A model that generates images for requests: text to image, image to image, inpainting and hires fix in one class.

    Any mixture of requests shares network calls (`BatchScheduler`). Prompts may be of any length and are weighted in
    the syntax of `ldm.nn.prompts.parse_prompt_attention`.
    """

    def __init__(self, model: Checkpoint, batch_size: int = 8) -> None:
        self.model = model
        self.prompt_encoder = PromptEncoder(model)
        self.bundled_tokens, self.adapter_files, self.fused_weights, self.disabled_weights = {}, {}, {}, {}
        self.adapter_defaults = {}
        self.adapters = AdapterMerger(model.networks)
        self.batch_scheduler = BatchScheduler(model, self.prompt_encoder, batch_size)
        self.denoiser = self.batch_scheduler.denoiser
        self.call_state = CallState()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = PICTO_PATH,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int = 8,
        **load_options: Any,
    ) -> Self:
        """Load a model from a directory, a single file or the hub; ValueError names what is missing or invalid.

        device "auto" is CUDA if available, else the CPU; dtype "auto" is float32 on a CPU,
        else bfloat16 where that is native, or float16.
        `load_options`: the fields of `LoadOptions` (revision, variant, token, family, prediction, zero_snr, ema, vae),
        or diffusers' (torch_dtype, device_map, scheduler, safety_checker=None, ...).
        """
        own = {"path": path, "device": device, "dtype": dtype}
        given = {name: value for name, value in own.items() if value != DEFAULTS[name]}
        names = [*own, *(f.name for f in fields(LoadOptions)), "scheduler"]
        options = {**DEFAULTS, **translate(LOADING, {**given, **load_options}, names, "from_pretrained")}
        place, scheduler = choose_device(str(options.pop("device"))), options.pop("scheduler", None)
        dtype = choose_dtype(options.pop("dtype"), place)
        pipe = cls(load_checkpoint(options.pop("path"), place, dtype, LoadOptions(**options)), batch_size)
        if scheduler is not None:
            pipe.scheduler = scheduler
        return pipe

    @classmethod
    def from_single_file(cls, path: str | Path, **load_options: Any) -> Self:
        """Load a model from a file or a hub's address, https://huggingface.co/owner/name/blob/main/file.safetensors."""
        if match := HUB_FILE_URL.fullmatch(str(path)):
            path = f"{match['repo']}:{match['file']}"
            load_options = {"revision": match["revision"], **load_options}
        return cls.from_pretrained(path, **load_options)

    @property
    def device(self) -> torch.device:
        return self.model.unet.device

    def convert_clip_skip(self, a1111_clip_skip: int) -> int:
        """`Request.clip_skip` from the clip skip of the web UI and kohya, which counts layers from the last, 1."""
        return self.model.text_encoders[0].clip_skip_converter()(a1111_clip_skip)

    def __call__(self, prompt: str | Sequence[str] | None = None, *args: Any, **arguments: Any) -> PipelineOutput:
        """Generate `num_images_per_prompt` images of each prompt, image k with seed + k; names as in diffusers.

        The arguments are the fields of `Request`, with `negative_prompt`, `seed` (-1 draws one), `guidance_scale`,
        `image` and `mask` as one for all prompts or a list of one for each, and those of diffusers' pipelines:
        `generator` (one, or one per image), `latents` [B, C, h, w], `prompt_embeds`, `output_type` (pil, np, pt,
        latent), `callback_on_step_end`, `cross_attention_kwargs={"scale": ...}`, `return_dict`, `mask_image`, ...
        Positional are negative_prompt, num_images_per_prompt, seed and latents or, where a number or an image follows
        the prompt, diffusers' (height, width, ...; image, strength, ...). ValueError for an invalid request, TypeError
        for an unknown argument, with the nearest name.

        The image of a generator on the CPU is diffusers'. What cannot be equal: stochastic samplers add noise of their
        own, a function of the seed; prompts are weighted, and of any length; a mask's pixels are taken as a whole.
        """
        return call_pipeline(self, prompt, args, arguments)

    def generate(
        self, requests: Sequence[Request], on_progress: Callable[[float], None] = lambda delta: None
    ) -> list[Image.Image]:
        """The images of any mixture of requests, in their order."""
        images = dict(self.stream(requests, on_progress))
        return [images[k] for k in range(len(requests))]

    def stream(
        self,
        requests: Sequence[Request],
        on_progress: Callable[[float], None] = lambda delta: None,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[int, Image.Image]]:
        """Yield (index, image) as they finish; `on_progress(delta)` gets the progress since its last call, in images.

        `on_step` is called after each network evaluation. All requests are checked before the first is started.
        """
        return self.batch_scheduler.run([self.resolve(request) for request in requests], on_progress, on_step)

    def cfg_denoiser(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str | None],
        scale: float = 1.0,
        rescale: float = 0.0,
        interval: tuple[float, float | None] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Denoise:
        """The denoiser of one row per prompt, by classifier-free guidance; scale 1 is the conditional model.

        `size` (height, width) is SDXL's micro-conditioning; None is the model's default size. ValueError if the rows
        differ in `PromptEncoder.num_chunks`.
        """
        height, width = size or self.default_size(None)
        settings: dict[str, Any] = {"guidance_scale": scale, "guidance_rescale": rescale, "guidance_interval": interval}
        requests = [
            Request(prompt, negative, height=height, width=width, **settings)
            for prompt, negative in zip(prompts, negative_prompts, strict=True)
        ]
        return make_cfg_denoiser(self.denoiser, self.prompt_encoder, requests, [None] * len(requests))

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> Posterior:
        """q(z | x) of images of one size, each side a multiple of the VAE's scale factor; ValueError otherwise."""
        f = vae_scale_factor(self.model.vae)
        for image in images:
            if image.size != images[0].size or image.width % f or image.height % f:
                raise ValueError(f"image of {image.width}x{image.height}: one size, in multiples of {f}, is needed")
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return encode_images(self.model.vae, from_uint8(pixels).to(self.device))

    def metadata(self, request: Request, model_name: str) -> dict[str, str]:
        """The texts for an image file: A1111's `parameters`, and as `ldm` everything that regenerates it, in JSON.

        A model is recorded by its name and by the hashes of its files, not by the path where it lies.
        """
        hashes, settings = dict(self.model.weight_hashes), request.to_record()
        adapters = {name: (adapter, weight) for name, (adapter, weight) in self.adapters.loaded.items() if weight}
        record = {
            "version": __version__,
            "model": model_name,
            "load": omit_local_paths(self.model.load_options),
            "dtype": str(self.model.unet.dtype).removeprefix("torch."),
            "weights": hashes,
            "adapters": [{"name": k, "sha256": a.sha256, "weight": w} for k, (a, w) in adapters.items()],
            "embeddings": self.embedding_hashes,
            "request": settings,
        }
        if tensors := [f.name for f in fields(request) if not f.compare and getattr(request, f.name) is not None]:
            record["tensors"] = tensors  # which are not recorded
        encoder, skip = self.model.text_encoders[0], request.clip_skip
        tags = "".join(f"<lora:{name}:{format_lora_weight(weight)}>" for name, (_, weight) in adapters.items())
        a1111_clip_skip = skip and skip + encoder.num_dropped_layers - encoder.layer_idx
        infotext = create_infotext(
            settings | {"prompt": request.prompt + tags, "clip_skip": a1111_clip_skip},
            model_name,
            hashes["unet"],
            __version__,
            vae=None if self.model.vae_name is None else (self.model.vae_name, hashes["vae"]),
            loras={name: adapter.webui_hash for name, (adapter, _) in adapters.items()},
            embeddings=self.embedding_hashes,
        )
        return {"parameters": infotext, "ldm": json.dumps(record)}

    def _defaults(self, request: Request) -> dict[str, Any]:
        """The settings of the model and of its distilled adapters; where the steps end is a matter of its own sampler.

        Classes of `ldm.compat` do as diffusers, which takes none from adapters.
        """
        defaults, own = dict(self.model.generation_defaults), self.model.generation_defaults.get("sampler")
        for name in () if self.task else self.get_active_adapters():
            defaults |= self.adapter_defaults.get(name, {})
        if (request.sampler or defaults.get("sampler")) != own:
            defaults.pop("final_sigmas_type", None)
        return defaults

    def resolve(self, request: Request) -> Request:
        """The request with the model's defaults filled in; ValueError for one that cannot be generated."""
        multiple = vae_scale_factor(self.model.vae)
        request = round_size(coerce_request(request), multiple)
        if request.seed == RANDOM_SEED:
            request = replace(request, seed=draw_seed())
        height, width = self.default_size(request.image)
        if request.timesteps or request.sigmas:
            if request.timesteps and request.sigmas:
                raise ValueError("timesteps and sigmas: one of them is needed")
            count = sum(1 for value in request.timesteps or request.sigmas or () if request.timesteps or value)
            request = replace(request, num_inference_steps=count)
        if request.spacing == "ays" and len(self.model.text_encoders) > 1:
            request = replace(request, spacing="ays_sdxl")
        filled = replace(
            request,
            height=height if request.height is None else request.height,
            width=width if request.width is None else request.width,
            strength=default_strength(request) if request.strength is None else request.strength,
            **{name: value for name, value in self._defaults(request).items() if getattr(request, name) is None},
        )
        check_request(filled, multiple)
        unread = [name for name in READ_BY_CFG if getattr(request, name)]
        if self.prompt_encoder.is_distilled and unread:
            what = "not read: this distilled model takes the guidance scale as an input"
            warnings.warn(f"{' and '.join(unread)}: {what}", stacklevel=2)
        self.batch_scheduler.time_grid(filled)  # ValueError for more steps than it can distinguish
        for prompt in (filled.prompt, filled.negative_prompt):
            self.prompt_encoder.tokenize_prompt(prompt)  # ValueError for characters outside the vocabulary
        for encoder in self.model.text_encoders:
            encoder.check_clip_skip(filled.clip_skip or 0)
        concat, channels = num_concat_channels(self.model), self.model.unet.config.out_channels
        if concat not in (0, channels + 1):
            raise ValueError(f"U-Net of {concat + channels} channels: only {channels} and {2 * channels + 1} are known")
        if concat and filled.image is None:
            raise ValueError(
                "image: this is an inpainting model, which needs an image and a mask of what to regenerate"
            )
        self.prompt_encoder.check_embeddings(filled)
        shape = latent_shape(self.model.vae, filled.height or 0, filled.width or 0)
        shapes = {"latents": shape, "image_latents": shape, "posterior_noise": (2, *shape)}
        for name, expected in shapes.items():
            tensor = getattr(filled, name)
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(expected)}")
        return filled

    def default_size(self, image: Image.Image | None) -> tuple[int, int]:
        """The default height and width of a request: its image's, rounded down to a multiple, or the model's."""
        multiple = vae_scale_factor(self.model.vae)
        if image is not None:
            return image.height // multiple * multiple, image.width // multiple * multiple
        rows, columns = native_size(self.model.unet.config)
        return rows * multiple, columns * multiple


def omit_local_paths(load_options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of loading for a file that others may see: hub ids stay, paths, which hold names of users, do not."""
    return {n: v for n, v in load_options.items() if n not in ("path", "vae") or is_hub_source(v)}


def format_lora_weight(weight: AdapterWeight) -> str:
    """An adapter's weight in a <lora:...> tag of the web UI, which has that of the text encoders before the U-Net's."""
    return f"{weight[1]:g}:{weight[0]:g}" if isinstance(weight, tuple) else f"{weight:g}"


def choose_device(name: str) -> torch.device:
    """A device by name; "auto" is CUDA, MPS or XPU where there is one, else the CPU."""
    if name == "auto":
        return best_device()
    try:
        torch.empty(0, device=name).tolist()  # fails for the meta device too, which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch dtype by name; "auto" is float32 on a CPU, else bfloat16 where it is native, or float16.

    On a CPU float16 takes 88 times as long as float32 (AMD Zen 4, torch 2.13): its name is a ValueError, and torch's
    own, which diffusers' examples give, becomes float32.
    """
    reduced = preferred_dtype(device) if device.type != "cuda" or supports_bf16(device) else torch.float16
    auto = torch.float32 if device.type == "cpu" else reduced
    chosen = dtype if isinstance(dtype, torch.dtype) else choose({**PIPELINE_DTYPES, "auto": auto}, dtype, "dtype")
    if chosen != torch.float16 or device.type != "cpu":
        return chosen
    if isinstance(dtype, str):
        raise ValueError("dtype float16: a CPU takes 88 times as long in it: choose float32 or bfloat16")
    say_once("float16 on a CPU: float32 instead, which takes an 88th of the time")
    return torch.float32
