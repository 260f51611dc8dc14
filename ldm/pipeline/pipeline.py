"""Text to picture: requests in, pictures out, each a function of its own request alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import __version__
from ldm.adapters.lora import AdapterMerger, AdapterWeight
from ldm.adapters.lora_loading import load_adapter
from ldm.adapters.textual_inversion import read_placeholder_token
from ldm.checkpoints import hub
from ldm.checkpoints.families import LoadOptions
from ldm.checkpoints.formats import PICTO_PATH, Checkpoint, is_hub_source, load_checkpoint, locate_weights
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.guidance import FULL_INTERVAL, classifier_free_guidance
from ldm.errors import choose
from ldm.files import file_sha256
from ldm.hardware import best_device
from ldm.image_io import from_uint8
from ldm.metadata import create_infotext
from ldm.nn.text_encoders import convert_clip_skip
from ldm.nn.vae import Posterior, encode_images, vae_scale_factor
from ldm.pipeline.prompt_encoder import PromptEncoder
from ldm.pipeline.request import Request, check_request, coerce_request, default_strength, get_add_time_ids
from ldm.pipeline.scheduler import BatchScheduler, num_concat_channels, request_latent_shape

PIPELINE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class PipelineOutput:
    """Pictures and their seeds, in the order of the requests."""

    images: list[Image.Image]
    seeds: list[int]


class Pipeline:
    """A model that draws requests: text to image, image to image, inpainting and second passes are one function.

    A list may hold any mixture of them, as `Scheduler` says. Prompts may be of any length and weigh their words, as
    `ldm.nn.prompts.parse_prompt_attention` says.
    """

    def __init__(self, model: Checkpoint, batch_size: int = 8) -> None:
        self.model = model
        self.prompt_encoder = PromptEncoder(model)
        self.adapters = AdapterMerger(model.networks)
        self.embedding_hashes: dict[str, str] = {}  # word: SHA-256 of its file
        self.batch_scheduler = BatchScheduler(model, self.prompt_encoder, batch_size)
        self.denoiser = self.batch_scheduler.denoiser

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = PICTO_PATH,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int = 8,
        **load_options: Any,
    ) -> Pipeline:
        """The model in a folder, a single file or a hub repository; ValueError names what is missing or at fault.

        device "auto" is CUDA where there is one; dtype "auto" is bfloat16 on CUDA and float32 on a CPU. `load_options` are
        the fields of `LoadOptions`: revision, variant, token, family, prediction, zero_snr, ema, vae.
        """
        where = choose_device(device)
        return cls(load_checkpoint(path, where, choose_dtype(dtype, where), LoadOptions(**load_options)), batch_size)

    @property
    def device(self) -> torch.device:
        return self.model.unet.conv_in.weight.device

    def to(self, device: str | torch.device) -> Pipeline:
        """Move the networks; returns the pipeline itself."""
        for network in self.model.networks.values():
            network.to(device)
        self.prompt_encoder.clear()
        return self

    def load_lora_weights(self, path: str | Path, weight: AdapterWeight = 1.0, adapter_name: str | None = None) -> None:
        """Merge an adapter of any dialect into the weights, so much of it (or so much of U-Net and text encoders).

        `path` is a file, a folder or a hub id; it names the adapter unless `adapter_name` is given. Nothing may be
        drawn meanwhile. ValueError, with nothing changed, for a file that does not fit; see
        `ldm.checkpoints.lora.load_adapter`.
        """
        adapter = load_adapter(locate_weights(path, kind="adapter"), self.model.networks, self.model.family)
        name = adapter_name or (hub.name_from_repo_id(str(path)) if is_hub_source(path) else adapter.name)
        self.adapters.load(replace(adapter, name=name), weight)
        self.prompt_encoder.clear()

    def set_adapters(self, adapter_names: Sequence[str], adapter_weights: Sequence[AdapterWeight]) -> None:
        """Give loaded adapters their weights; those not named get 0. ValueError for unequal lists and unknown names."""
        if isinstance(adapter_names, str) or len(adapter_names) != len(adapter_weights):
            raise ValueError(
                f"set_adapters: names {adapter_names!r} and weights {adapter_weights!r} must be two lists of one length"
            )
        self.adapters.set_weights(dict(zip(adapter_names, adapter_weights, strict=True)))
        self.prompt_encoder.clear()

    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """Take out one adapter, or all: the weights are as they were, bit for bit."""
        self.adapters.unload(adapter_name)
        self.prompt_encoder.clear()

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Let a word of prompts, which is returned, stand for the vectors in a file, or of a hub id.

        It is the file's own, as `read_placeholder_token` says, unless `token` is given. ValueError as `Texts.add_embedding` says.
        """
        file = locate_weights(path, kind="embedding")
        word = read_placeholder_token(file) if token is None else token
        digest = file_sha256(file)
        self.prompt_encoder.add_embedding(word, file)
        self.embedding_hashes[word] = digest
        return word

    def unload_textual_inversion(self, token: str) -> None:
        """Forget such a word."""
        self.prompt_encoder.remove_embedding(token)
        del self.embedding_hashes[token]

    def convert_clip_skip(self, a1111_clip_skip: int) -> int:
        """`Request.clip_skip` from the number of the web UI and kohya, which count layers from the last, 1."""
        return convert_clip_skip(a1111_clip_skip, self.model.text_encoders[0])

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Draw each prompt `num_images_per_prompt` times, picture k of a prompt with seed + k; names as in diffusers.

        `seed` and `negative_prompt` may be one per prompt; `cache_scene_latents` [B, C, h, w] (N(0, I), prompt by prompt) replaces
        the initial noise; `flatten_settings` are the other fields of `Request`. ValueError for what cannot be drawn.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int | np.integer) else list(seed)
        negatives = (
            list(negative_prompt)
            if isinstance(negative_prompt, Sequence) and not isinstance(negative_prompt, str)
            else [negative_prompt] * len(prompts)
        )
        lists: dict[str, Sequence[Any]] = {"seed": seeds, "negative_prompt": negatives}
        for name, given in lists.items():
            if len(given) != len(prompts):
                raise ValueError(f"{name}: {len(given)} given for {len(prompts)} prompts")
        count = len(prompts) * num_images_per_prompt
        if latents is not None and len(latents) != count:
            raise ValueError(f"latents: {len(latents)} given for {count} pictures")
        requests = [
            Request(
                text,
                negative,
                int(first) + k,
                latents=None if latents is None else latents[row * num_images_per_prompt + k],
                **settings,
            )
            for row, (text, negative, first) in enumerate(zip(prompts, negatives, seeds, strict=True))
            for k in range(num_images_per_prompt)
        ]
        return PipelineOutput(self.generate(requests), [request.seed for request in requests])

    def generate(
        self, requests: Sequence[Request], on_progress: Callable[[float], None] = lambda share: None
    ) -> list[Image.Image]:
        """The pictures of any mixture of requests, in their order."""
        pictures = dict(self.stream(requests, on_progress))
        return [pictures[k] for k in range(len(requests))]

    def stream(
        self, requests: Sequence[Request], on_progress: Callable[[float], None] = lambda share: None
    ) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture) as they are finished; `said(share)` hears of that much more of a picture, 1 in all for each.

        All requests are checked before the first is drawn.
        """
        return self.batch_scheduler.run([self.resolve(request) for request in requests], on_progress)

    def cfg_denoiser(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str | None],
        scale: float | Tensor = 1.0,
        rescale: float | Tensor = 0.0,
        interval: tuple[float, float] | Tensor = FULL_INTERVAL,
        size: tuple[int, int] | None = None,
    ) -> Denoise:
        """The denoiser of one row per prompt, guided as `classifier_free_guidance` says; scale 1 is the conditional model.

        `size` (height, width) is what SDXL is told; None is the model's own. ValueError where rows differ in
        `texts.length`.
        """
        height, width = size or self._default_size(None)
        read = partial(self.prompt_encoder, time_ids=get_add_time_ids(Request("", height=height, width=width)))
        scales = torch.as_tensor(scale, dtype=torch.float64).expand(len(prompts)).tolist()
        rows = list(zip(prompts, negative_prompts, scales, strict=True))
        lengths = sorted({self.prompt_encoder.num_chunks(*row) for row in rows})
        if len(lengths) > 1:
            raise ValueError(f"prompts of {' and '.join(map(str, lengths))} chunks: one length is needed in a call")
        cond = [read(prompt, lengths[0]) for prompt in prompts]
        uncond = [c if s == 1 else read(n, lengths[0]) for c, (_, n, s) in zip(cond, rows, strict=True)]
        return classifier_free_guidance(
            self.denoiser, Conditioning.cat(cond), Conditioning.cat(uncond), scale, rescale, interval
        )

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> Posterior:
        """q(z | x) of pictures of one size, each side a multiple of the VAE's factor; ValueError otherwise."""
        f = vae_scale_factor(self.model.vae)
        for picture in images:
            if picture.size != images[0].size or picture.width % f or picture.height % f:
                raise ValueError(
                    f"picture of {picture.width}x{picture.height}: one size, in multiples of {f}, is needed"
                )
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in images])
        return encode_images(self.model.vae, from_uint8(pixels).to(self.device))

    def metadata(self, request: Request, model_name: str) -> dict[str, str]:
        """The texts in a picture's file: A1111's `parameters`, and as `ldm` all that draws it again, in JSON."""
        hashes, settings = self.model.weight_hashes, request.to_record()
        adapters = {name: (adapter, weight) for name, (adapter, weight) in self.adapters.loaded.items() if weight}
        record = {
            "version": __version__,
            "model": model_name,
            "load": dict(self.model.load_options),
            "dtype": str(self.model.unet.dtype).removeprefix("torch."),
            "weights": hashes,
            "adapters": [{"name": k, "sha256": a.sha256, "weight": w} for k, (a, w) in adapters.items()],
            "embeddings": self.embedding_hashes,
            "request": settings,
        }
        tower, skip = self.model.text_encoders[0], request.clip_skip
        tags = "".join(f"<lora:{name}:{format_lora_weight(weight)}>" for name, (_, weight) in adapters.items())
        words = create_infotext(
            settings
            | {
                "prompt": request.prompt + tags,
                "clip_skip": skip and skip + tower.num_dropped_layers - tower.layer_idx,
            },
            model_name,
            hashes["unet"],
            __version__,
            vae=None if self.model.vae_name is None else (self.model.vae_name, hashes["vae"]),
            loras={name: adapter.webui_hash for name, (adapter, _) in adapters.items()},
            embeddings=self.embedding_hashes,
        )
        return {"parameters": words, "ldm": json.dumps(record)}

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        """[C, h, w] of a request whose size is known."""
        return request_latent_shape(self.model, request)

    def resolve(self, request: Request) -> Request:
        """The request with the model's defaults filled in; ValueError in the user's words for what cannot be drawn."""
        multiple, request = vae_scale_factor(self.model.vae), coerce_request(request)
        height, width = self._default_size(request.image)
        filled = replace(
            request,
            height=height if request.height is None else request.height,
            width=width if request.width is None else request.width,
            strength=default_strength(request) if request.strength is None else request.strength,
            **{name: value for name, value in self.model.generation_defaults.items() if getattr(request, name) is None},
        )
        check_request(filled, multiple)
        self.batch_scheduler.time_grid(filled)  # refuses more steps than it can tell apart
        for text in (filled.prompt, filled.negative_prompt):
            self.prompt_encoder.tokenize_prompt(text)  # refuses what cannot be read
        for tower in self.model.text_encoders:
            tower.check_clip_skip(filled.clip_skip or 0)
        self._check_channels(filled)
        if filled.latents is not None and tuple(filled.latents.shape) != self.latent_shape(filled):
            raise ValueError(f"latents: shape {list(filled.latents.shape)}, expected {list(self.latent_shape(filled))}")
        return filled

    def _default_size(self, image: Image.Image | None) -> tuple[int, int]:
        """The height and width of a request that says none: its image's, rounded down to fit, or the model's."""
        multiple, native = vae_scale_factor(self.model.vae), self.model.unet.config.sample_size
        if image is not None:
            return image.height // multiple * multiple, image.width // multiple * multiple
        rows, columns = native if isinstance(native, tuple) else (native or 64,) * 2
        return rows * multiple, columns * multiple

    def _check_channels(self, request: Request) -> None:
        """ValueError where the U-Net reads channels that the request cannot give."""
        beside, latents = num_concat_channels(self.model), self.model.unet.config.out_channels
        if beside not in (0, latents + 1):
            raise ValueError(f"U-Net of {beside + latents} channels: only {latents} and {2 * latents + 1} are known")
        if beside and request.image is None:
            raise ValueError("image: this model inpaints, so an image is needed, and a mask of what to redraw in it")


def format_lora_weight(weight: AdapterWeight) -> str:
    """An adapter's weight in a prompt of the web UI, which names the text encoders' before the U-Net's."""
    return f"{weight[1]:g}:{weight[0]:g}" if isinstance(weight, tuple) else f"{weight:g}"


def choose_device(name: str) -> torch.device:
    """A device from its name; "auto" is CUDA where there is one."""
    if name == "auto":
        return best_device()
    try:
        torch.empty(0, device=name).tolist()  # also refuses the meta device, which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch dtype from its name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return choose(
        {**PIPELINE_DTYPES, "auto": torch.float32 if device.type == "cpu" else torch.bfloat16}, dtype, "dtype"
    )
