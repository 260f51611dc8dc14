"""The pipeline: requests in, images out, each a function of its own request alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import __version__
from ldm.adapters.lora import Adapter, AdapterMerger, AdapterWeight
from ldm.adapters.lora_loading import load_adapter
from ldm.adapters.textual_inversion import has_bundled_embeddings, read_placeholder_tokens
from ldm.checkpoints import hub
from ldm.checkpoints.families import LoadOptions
from ldm.checkpoints.formats import PICTO_PATH, Checkpoint, is_hub_source, load_checkpoint, locate_weights
from ldm.checkpoints.tensors import open_safetensors
from ldm.diffusion.denoiser import Denoise
from ldm.errors import choose
from ldm.hardware import best_device
from ldm.image_io import from_uint8
from ldm.metadata import create_infotext
from ldm.nn.vae import Posterior, encode_images, latent_shape, vae_scale_factor
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
from ldm.pipeline.scheduler import BatchScheduler, make_cfg_denoiser, num_concat_channels

PIPELINE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READ_BY_CFG = "negative_prompt", "guidance_rescale", "guidance_interval"  # by nothing else


@dataclass(frozen=True)
class PipelineOutput:
    """Images and their seeds, in the order of the requests."""

    images: list[Image.Image]
    seeds: list[int]


class Pipeline:
    """A model that generates images for requests: text to image, image to image, inpainting and hires fix in one class.

    Any mixture of requests shares network calls (`BatchScheduler`). Prompts may be of any length and are weighted in
    the syntax of `ldm.nn.prompts.parse_prompt_attention`.
    """

    def __init__(self, model: Checkpoint, batch_size: int = 8) -> None:
        self.model = model
        self.prompt_encoder = PromptEncoder(model)
        self.bundled_tokens: dict[str, list[str]] = {}  # by adapter: placeholder tokens that came in its file
        self.adapters = AdapterMerger(model.networks)
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
        """Load a model from a directory, a single file or the hub; ValueError names what is missing or invalid.

        device "auto" is CUDA if available, else the CPU; dtype "auto" is bfloat16 on CUDA and float32 on a CPU.
        `load_options`: the fields of `LoadOptions` (revision, variant, token, family, prediction, zero_snr, ema, vae).
        """
        place = choose_device(device)
        return cls(load_checkpoint(path, place, choose_dtype(dtype, place), LoadOptions(**load_options)), batch_size)

    @property
    def device(self) -> torch.device:
        return self.model.unet.conv_in.weight.device

    def to(self, device: str | torch.device) -> Pipeline:
        """Move the networks to a device, and return the pipeline."""
        for network in self.model.networks.values():
            network.to(device)
        self.prompt_encoder.clear()
        return self

    def load_lora_weights(self, path: str | Path, weight: AdapterWeight = 1.0, adapter_name: str | None = None) -> None:
        """Merge (fuse) an adapter of any format into the weights, times `weight` (or a pair: U-Net, text encoders).

        `path` is a file, a directory or a hub id; it names the adapter unless `adapter_name` does, with its folder (or
        owner) where another one has that name. Not to be called while images are generated. ValueError, with nothing
        changed, for a file that does not fit: `ldm.adapters.lora_loading.load_adapter`. Embeddings in the file
        (OneTrainer's) become placeholder tokens.
        """
        file = locate_weights(path, kind="adapter")
        adapter = load_adapter(file, self.model.networks, self.model.family)
        name = adapter_name or self._choose_adapter_name(path, adapter)
        self.adapters.load(replace(adapter, name=name), weight)
        self.prompt_encoder.clear()
        if file.is_file() and has_bundled_embeddings(open_safetensors(file).tensor_infos):
            try:
                tokens = self._add_embeddings(file, read_placeholder_tokens(file), may_rename=False)
                self.bundled_tokens[name] = tokens
            except ValueError:
                self.unload_lora_weights(name)
                raise

    def _choose_adapter_name(self, path: str | Path, adapter: Adapter) -> str:
        """The name of a file, folder or repository; with its folder's name where another adapter has that name."""
        if is_hub_source(path):
            name, longer = hub.name_from_repo_id(str(path)), str(path)
        else:
            name, longer = adapter.name, f"{Path(path).expanduser().absolute().parent.name}/{adapter.name}"
        other, _ = self.adapters.loaded.get(name, (adapter, 0.0))
        return name if other.sha256 == adapter.sha256 else longer

    def set_adapters(self, adapter_names: Sequence[str], adapter_weights: Sequence[AdapterWeight]) -> None:
        """Set the weights of loaded adapters; others get 0. ValueError for unequal lists and unknown names."""
        if isinstance(adapter_names, str) or len(adapter_names) != len(adapter_weights):
            lists = f"names {adapter_names!r} and weights {adapter_weights!r}"
            raise ValueError(f"set_adapters: {lists} must be two lists of one length")
        self.adapters.set_weights(dict(zip(adapter_names, adapter_weights, strict=True)))
        self.prompt_encoder.clear()

    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """Remove one adapter, or all: the weights are as before, bit for bit."""
        self.adapters.unload(adapter_name)
        for name in list(self.bundled_tokens) if adapter_name is None else [adapter_name]:
            for token in self.bundled_tokens.pop(name, []):
                self.prompt_encoder.remove_embedding(token)
        self.prompt_encoder.clear()

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> str:
        """Add the embeddings in a file, or of a hub id, under placeholder tokens, and return the first of these.

        A token is the file's own (`read_placeholder_tokens`), or the file's stem where the vocabulary has that word;
        `token` names that of a file with one. ValueError as `PromptEncoder.add_embedding`.
        """
        file = locate_weights(path, kind="embedding")
        tokens = read_placeholder_tokens(file) or {"": file.stem}
        if token is not None and len(tokens) > 1:
            raise ValueError(f"{file}: holds {len(tokens)} tokens ({', '.join(tokens)}), which are not renamed")
        added = self._add_embeddings(file, tokens if token is None else dict.fromkeys(tokens, token), token is None)
        return added[0]

    def _add_embeddings(self, file: Path, tokens: Mapping[str, str], may_rename: bool) -> list[str]:
        """Add all of a file's embeddings, by its own names for their tokens, or none."""
        added: list[str] = []
        try:
            for own, token in tokens.items():
                known = may_rename and len(tokens) == 1 and self.prompt_encoder.is_in_vocabulary(token)
                self.prompt_encoder.add_embedding(file.stem if known else token, file, own)
                added.append(file.stem if known else token)
        except ValueError:
            for token in added:
                self.prompt_encoder.remove_embedding(token)
            raise
        return added

    def unload_textual_inversion(self, token: str) -> None:
        """Remove a placeholder token."""
        self.prompt_encoder.remove_embedding(token)

    @property
    def embedding_hashes(self) -> dict[str, str]:
        """The SHA-256 of the file of each placeholder token."""
        return {token: embedding.sha256 for token, embedding in self.prompt_encoder.embeddings.items()}

    def convert_clip_skip(self, a1111_clip_skip: int) -> int:
        """`Request.clip_skip` from the clip skip of the web UI and kohya, which counts layers from the last, 1."""
        return self.model.text_encoders[0].clip_skip_converter()(a1111_clip_skip)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        **settings: Any,
    ) -> PipelineOutput:
        """Generate `num_images_per_prompt` images of each prompt, image k with seed + k; names as in diffusers.

        Seed -1 draws one.

        `seed` and `negative_prompt` may be one per prompt; `latents` [B, C, h, w] (N(0, I), prompt by prompt) replaces
        the initial noise; `settings` are the other fields of `Request`. ValueError for an invalid request.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int | np.integer) else list(seed)
        if negative_prompt is None or isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * len(prompts)
        seeds = [draw_seed() if first == RANDOM_SEED else first for first in seeds]
        lists: dict[str, Sequence[Any]] = {"seed": seeds, "negative_prompt": negative_prompt}
        for name, values in lists.items():
            if len(values) != len(prompts):
                raise ValueError(f"{name}: {len(values)} given for {len(prompts)} prompts")
        requests = [
            Request(text, negative, int(first) + k, **settings)
            for text, negative, first in zip(prompts, negative_prompt, seeds, strict=True)
            for k in range(num_images_per_prompt)
        ]
        if latents is not None:
            if len(latents) != len(requests):
                raise ValueError(f"latents: {len(latents)} given for {len(requests)} images")
            requests = [replace(request, latents=row) for request, row in zip(requests, latents, strict=True)]
        return PipelineOutput(self.generate(requests), [request.seed for request in requests])

    def generate(
        self, requests: Sequence[Request], on_progress: Callable[[float], None] = lambda delta: None
    ) -> list[Image.Image]:
        """The images of any mixture of requests, in their order."""
        images = dict(self.stream(requests, on_progress))
        return [images[k] for k in range(len(requests))]

    def stream(
        self, requests: Sequence[Request], on_progress: Callable[[float], None] = lambda delta: None
    ) -> Iterator[tuple[int, Image.Image]]:
        """Yield (index, image) as they finish; `on_progress(delta)` gets the progress since its last call, in images.

        All requests are checked before the first is started.
        """
        return self.batch_scheduler.run([self.resolve(request) for request in requests], on_progress)

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
        height, width = size or self._default_size(None)
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
        """The texts for an image file: A1111's `parameters`, and as `ldm` everything that regenerates it, in JSON."""
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

    def resolve(self, request: Request) -> Request:
        """The request with the model's defaults filled in; ValueError for one that cannot be generated."""
        multiple = vae_scale_factor(self.model.vae)
        request = round_size(coerce_request(request), multiple)
        if request.seed == RANDOM_SEED:
            request = replace(request, seed=draw_seed())
        height, width = self._default_size(request.image)
        if request.timesteps or request.sigmas:
            if request.timesteps and request.sigmas:
                raise ValueError("timesteps and sigmas: one of them is needed")
            count = sum(1 for value in request.timesteps or request.sigmas or () if request.timesteps or value)
            request = replace(request, num_inference_steps=count)
        filled = replace(
            request,
            height=height if request.height is None else request.height,
            width=width if request.width is None else request.width,
            strength=default_strength(request) if request.strength is None else request.strength,
            **{name: value for name, value in self.model.generation_defaults.items() if getattr(request, name) is None},
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

    def _default_size(self, image: Image.Image | None) -> tuple[int, int]:
        """The default height and width of a request: its image's, rounded down to a multiple, or the model's."""
        multiple, native = vae_scale_factor(self.model.vae), self.model.unet.config.sample_size
        if image is not None:
            return image.height // multiple * multiple, image.width // multiple * multiple
        rows, columns = native if isinstance(native, tuple) else (native or 64,) * 2
        return rows * multiple, columns * multiple


def format_lora_weight(weight: AdapterWeight) -> str:
    """An adapter's weight in a <lora:...> tag of the web UI, which has that of the text encoders before the U-Net's."""
    return f"{weight[1]:g}:{weight[0]:g}" if isinstance(weight, tuple) else f"{weight:g}"


def choose_device(name: str) -> torch.device:
    """A device by name; "auto" is CUDA if available, else the CPU."""
    if name == "auto":
        return best_device()
    try:
        torch.empty(0, device=name).tolist()  # fails for the meta device too, which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch dtype by name; "auto" is float32 on a CPU and bfloat16 elsewhere."""
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    return dtype if isinstance(dtype, torch.dtype) else choose({**PIPELINE_DTYPES, "auto": auto}, dtype, "dtype")
