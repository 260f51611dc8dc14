"""Text to picture: requests in, pictures out, each a function of its own request alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.formats import Checkpoint, load_directory
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import EVERYWHERE, guide
from ldm.diffusion.samplers import SAMPLERS, checked, ddim
from ldm.diffusion.sde import VPSDE
from ldm.diffusion.spacing import SPACINGS, Grid, choose
from ldm.images import from_uint8, to_pil
from ldm.nn.vae import Posterior, decode, downscale, encode
from ldm.request import Request, check, interval
from ldm.rng import Noise
from ldm.texts import Texts

PICTO = Path(__file__).resolve().parent.parent / "weights" / "picto"


@dataclass(frozen=True)
class Output:
    """Pictures and their seeds, in the order of the requests."""

    images: list[Image.Image]
    seeds: list[int]


class Group:
    """Rows that march in step: requests of one shape, sampler and grid, driven by one coroutine."""

    def __init__(self, members: Sequence[tuple[int, Request]], x: Tensor, grid: Grid, noise: Noise) -> None:
        self.members = members
        first = members[0][1]
        sampler = partial(ddim, eta=first.eta) if first.eta else SAMPLERS[first.sampler].function
        self.steps = checked(sampler)(x, grid, noise)
        self.x, self.point = next(self.steps)
        self.grid = grid
        self.progress = 0.0

    def __len__(self) -> int:
        return len(self.members)

    def answer(self, x0: Tensor) -> float:
        """Give E[x_0 | x]: the group asks on, or holds its latents in `x`. Returns how far it came."""
        before = self.progress
        try:
            self.x, self.point = self.steps.send(x0)
            self.progress = max(self.progress, sum(p.t > self.point.t for p in self.grid) / len(self.grid))
        except StopIteration as end:
            self.x, self.progress = end.value, 1.0
        return self.progress - before

    @property
    def done(self) -> bool:
        return self.progress == 1


class Pipeline:
    """A text-to-image model that draws requests of any mixture of prompts, seeds, sizes, steps, samplers and guidance.

    Its scheduler joins the questions of all running groups into one call of the network for each shape of latents and
    text, retires what is finished and admits what waits: continuous batching. Prompts may be of any length and weigh
    their words, as `ldm.nn.prompts.parse` says.
    """

    def __init__(self, model: Checkpoint, batch_size: int = 8) -> None:
        self.model = model
        self.batch_size = batch_size
        self.denoiser = Denoiser(model.unet, model.sde, model.prediction, model.unet.dtype)
        self.texts = Texts(model)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path = PICTO,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int = 8,
    ) -> Pipeline:
        """The model in a folder of diffusers' layout; ValueError names the file that is missing or at fault.

        device "auto" is CUDA where there is one; dtype "auto" is bfloat16 on CUDA and float32 on a CPU.
        """
        where = choose_device(device)
        return cls(load_directory(Path(path), where, choose_dtype(dtype, where)), batch_size)

    @property
    def device(self) -> torch.device:
        return self.model.unet.conv_in.weight.device

    def to(self, device: str | torch.device) -> Pipeline:
        """Move the networks; returns the pipeline itself."""
        for network in self.model.networks.values():
            network.to(device)
        self.texts.clear()
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        **settings: Any,
    ) -> Output:
        """Draw each prompt `num_images_per_prompt` times, picture k of a prompt with seed + k; names as in diffusers.

        `seed` may be one per prompt; `latents` [B, C, h, w] (N(0, I), prompt by prompt) replaces the initial noise;
        `settings` are the other fields of `Request`. ValueError for what cannot be drawn.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"seed: {len(seeds)} given for {len(prompts)} prompts")
        count = len(prompts) * num_images_per_prompt
        if latents is not None and len(latents) != count:
            raise ValueError(f"latents: {len(latents)} given for {count} pictures")
        requests = [
            Request(
                text,
                negative_prompt,
                first + k,
                latents=None if latents is None else latents[row * num_images_per_prompt + k],
                **settings,
            )
            for row, (text, first) in enumerate(zip(prompts, seeds, strict=True))
            for k in range(num_images_per_prompt)
        ]
        return Output(self.generate(requests), [request.seed for request in requests])

    def generate(
        self, requests: Sequence[Request], said: Callable[[float], None] = lambda share: None
    ) -> list[Image.Image]:
        """The pictures of any mixture of requests, in their order."""
        pictures = dict(self.stream(requests, said))
        return [pictures[k] for k in range(len(requests))]

    def stream(
        self, requests: Sequence[Request], said: Callable[[float], None] = lambda share: None
    ) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture) as they are finished; `said(share)` hears of that much more of a picture, 1 in all for each.

        All requests are checked before the first is drawn.
        """
        waiting = deque(enumerate(self.resolve(request) for request in requests))
        return self._run(waiting, said)

    @torch.inference_mode()
    def _run(
        self, waiting: deque[tuple[int, Request]], said: Callable[[float], None]
    ) -> Iterator[tuple[int, Image.Image]]:
        running: list[Group] = []
        asked: list[tuple[list[Group], Denoise]] = []
        while waiting or running:
            free = self.batch_size - sum(map(len, running))
            if waiting and free > 0:
                running += self._admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
                asked = self._join(running)
            for groups, denoise in asked:
                x0 = denoise(torch.cat([g.x for g in groups]), [g.point for g in groups for _ in range(len(g))])
                for group, part in zip(groups, x0.split([len(g) for g in groups]), strict=True):
                    said(group.answer(part) * len(group))
            finished = [group for group in running if group.done]
            if finished:
                running = [group for group in running if not group.done]
                asked = self._join(running)
            for group in finished:
                pictures = to_pil(decode(self.model.vae, group.x))
                yield from ((k, picture) for (k, _), picture in zip(group.members, pictures, strict=True))

    def _admit(self, arrivals: Sequence[tuple[int, Request]]) -> list[Group]:
        """Groups of consecutive requests that can march in step."""

        def march(item: tuple[int, Request]) -> tuple:
            k, r = item
            alone = k if SAMPLERS[r.sampler].adaptive else None  # its steps would depend on its neighbours
            length = self.texts.length(r.prompt, r.negative_prompt, r.guidance_scale)
            return r.height, r.width, r.sampler, r.spacing, r.num_inference_steps, r.eta, length, alone

        return [self._start(list(members)) for _, members in groupby(arrivals, march)]

    def _start(self, members: list[tuple[int, Request]]) -> Group:
        first = members[0][1]
        noise = Noise([request.seed for _, request in members])
        x = noise(torch.empty(len(members), *self.latent_shape(first), device=self.device))
        for row, (_, request) in enumerate(members):
            if request.latents is not None:
                x[row] = request.latents.to(x)
        return Group(members, x, self.grid(first), noise)

    def _join(self, groups: Sequence[Group]) -> list[tuple[list[Group], Denoise]]:
        """For each shape of latents and text the groups that share a call of the network, and their guided denoiser."""
        shapes: dict[tuple[torch.Size, int], list[Group]] = {}
        for group in groups:
            first = group.members[0][1]
            length = self.texts.length(first.prompt, first.negative_prompt, first.guidance_scale)
            shapes.setdefault((group.x.shape[1:], length), []).append(group)
        return [(some, self._guided([r for g in some for _, r in g.members])) for some in shapes.values()]

    def _guided(self, requests: Sequence[Request]) -> Denoise:
        return self.guided(
            [r.prompt for r in requests],
            [r.negative_prompt for r in requests],
            torch.tensor([r.guidance_scale for r in requests], dtype=torch.float64),
            torch.tensor([r.guidance_rescale for r in requests]),
            torch.tensor([interval(r) for r in requests], dtype=torch.float64),
        )

    def guided(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        scale: float | Tensor = 1.0,
        rescale: float | Tensor = 0.0,
        interval: tuple[float, float] | Tensor = EVERYWHERE,
    ) -> Denoise:
        """The denoiser of one row per prompt, guided as `guide` says; scale 1 is the conditional model.

        ValueError where rows differ in `texts.length`.
        """
        scales = torch.as_tensor(scale, dtype=torch.float64).expand(len(prompts)).tolist()
        rows = list(zip(prompts, negatives, scales, strict=True))
        lengths = sorted({self.texts.length(*row) for row in rows})
        if len(lengths) > 1:
            raise ValueError(f"prompts of {' and '.join(map(str, lengths))} chunks: one length is needed in a call")
        cond = Conditioning.cat([self.texts(prompt, lengths[0]) for prompt in prompts])
        uncond = Conditioning.cat([self.texts(negative if s != 1 else "", lengths[0]) for _, negative, s in rows])
        return guide(self.denoiser, cond, uncond, scale, rescale, interval)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image.Image]) -> Posterior:
        """q(z | x) of pictures of one size, each side a multiple of the VAE's factor; ValueError otherwise."""
        f = downscale(self.model.vae)
        for picture in pictures:
            if picture.size != pictures[0].size or picture.width % f or picture.height % f:
                raise ValueError(
                    f"picture of {picture.width}x{picture.height}: one size, in multiples of {f}, is needed"
                )
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        return encode(self.model.vae, from_uint8(pixels).to(self.device))

    def grid(self, request: Request) -> Grid:
        """The noise levels of a request whose number of steps is known."""
        return spaced(self.model.sde, request.spacing, request.num_inference_steps or 0)

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        """[C, h, w] of a request whose size is known."""
        f = downscale(self.model.vae)
        return self.model.unet.config.in_channels, (request.height or 0) // f, (request.width or 0) // f

    def resolve(self, request: Request) -> Request:
        """The request with the model's defaults filled in; ValueError in the user's words for what cannot be drawn."""
        f, native = downscale(self.model.vae), self.model.unet.config.sample_size
        rows, columns = native if isinstance(native, tuple) else (native or 64,) * 2
        missing = {name: value for name, value in self.model.defaults.items() if getattr(request, name) is None}
        height = rows * f if request.height is None else request.height
        width = columns * f if request.width is None else request.width
        filled = replace(request, height=height, width=width, **missing)
        check(filled, f)
        self.grid(filled)  # refuses more steps than it can tell apart
        for text in (filled.prompt, filled.negative_prompt):
            self.texts.chunks(text)  # refuses what cannot be read
        if filled.latents is not None and tuple(filled.latents.shape) != self.latent_shape(filled):
            raise ValueError(f"latents: shape {list(filled.latents.shape)}, expected {list(self.latent_shape(filled))}")
        return filled


@lru_cache(maxsize=256)
def spaced(sde: VPSDE, spacing: str, steps: int) -> Grid:
    """A time grid by the name of its spacing."""
    return SPACINGS[spacing](sde, steps)


def choose_device(name: str) -> torch.device:
    """A device from its name; "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name).tolist()  # also refuses the meta device, which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch dtype from its name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return choose({**names, "auto": torch.float32 if device.type == "cpu" else torch.bfloat16}, dtype, "dtype")
