"""The scheduler: drawings of any mixture of requests in as few calls of the network as they allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.formats import Checkpoint
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import guide
from ldm.diffusion.inverse import keep
from ldm.diffusion.samplers import SAMPLERS, checked, ddim
from ldm.diffusion.sde import VPSDE
from ldm.diffusion.spacing import SPACINGS, Grid, cut
from ldm.editing import Canvas, canvas
from ldm.images import to_pil
from ldm.nn.vae import decode, downscale
from ldm.request import Request, again, interval, time_ids
from ldm.rng import Noise
from ldm.texts import Texts


@dataclass(frozen=True)
class Drawing:
    """A request on its way to a picture."""

    index: int  # by which the caller knows it
    request: Request
    share: float  # of the picture's progress
    canvas: Canvas | None = None  # what it begins from, once it has


class Group:
    """Rows that march in step: drawings of one shape, sampler and grid, driven by one coroutine."""

    def __init__(self, members: Sequence[Drawing], x: Tensor, grid: Grid, noise: Noise) -> None:
        self.members = members
        first = members[0].request
        sampler = partial(ddim, eta=first.eta) if first.eta else SAMPLERS[first.sampler or ""].function
        self.steps = checked(sampler)(x, grid, noise)
        self.x, self.grid, self.point = x, grid, grid[0]
        self.progress = self._told = 0.0
        self._advance(None)

    def __len__(self) -> int:
        return len(self.members)

    def answer(self, x0: Tensor) -> None:
        """Give E[x_0 | x]: the group asks on, or holds its latents in `x`."""
        self._advance(x0)
        self.progress = max(self.progress, sum(p.t > self.point.t for p in self.grid) / len(self.grid))

    def _advance(self, x0: Tensor | None) -> None:
        try:
            self.x, self.point = self.steps.send(x0)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            self.x, self.progress = end.value, 1.0

    def news(self) -> float:
        """How far its pictures came since it was last asked."""
        before, self._told = self._told, self.progress
        return (self.progress - before) * sum(drawing.share for drawing in self.members)

    @property
    def done(self) -> bool:
        return self.progress == 1


class Scheduler:
    """Draws requests of any mixture of prompts, seeds, sizes, steps, samplers, guidance and editing with one model.

    It joins the questions of all running groups into one call of the network for each shape of latents and text,
    retires what is finished and admits what waits: continuous batching. It keeps nothing between two runs, so that
    threads may run at the same time.
    """

    def __init__(self, model: Checkpoint, texts: Texts, batch_size: int) -> None:
        self.model, self.texts, self.batch_size = model, texts, batch_size
        self.denoiser = Denoiser(model.unet, model.sde, model.prediction, model.unet.dtype)

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], said: Callable[[float], None]) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture) of requests with their defaults filled in, as they are finished.

        `said(share)` hears of that much more of a picture, 1 in all for each.
        """
        waiting = deque(Drawing(k, r, 0.5 if r.upscale else 1.0) for k, r in enumerate(requests))
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
                    group.answer(part)
            said(sum(group.news() for group in running))
            finished = [group for group in running if group.done]
            if finished:
                running = [group for group in running if not group.done]
                asked = self._join(running)
            for drawing, picture in self._finish(finished):
                if drawing.request.upscale:
                    request = again(drawing.request, picture, downscale(self.model.vae))
                    waiting.appendleft(Drawing(drawing.index, request, drawing.share))
                else:
                    yield drawing.index, picture

    def _admit(self, arrivals: Sequence[Drawing]) -> list[Group]:
        """Groups of consecutive drawings that can march in step."""

        def march(drawing: Drawing) -> tuple:
            r = drawing.request
            alone = (
                drawing.index if SAMPLERS[r.sampler or ""].adaptive else None
            )  # its steps would depend on neighbours
            shape = r.height, r.width, self._length(drawing)
            return *shape, r.sampler, r.spacing, r.num_inference_steps, r.eta, r.strength, alone

        return [self._start(list(members)) for _, members in groupby(arrivals, march)]

    def _start(self, members: Sequence[Drawing]) -> Group:
        inpaints = channels(self.model) > 0
        members = [replace(d, canvas=canvas(d.request, self.model.vae, inpaints)) for d in members]
        grid = self.grid(members[0].request)
        noise = Noise([drawing.request.seed for drawing in members])
        shape = latent_shape(self.model, members[0].request)
        x = noise(torch.empty(len(members), *shape, device=self.model.unet.conv_in.weight.device))
        for row, drawing in enumerate(members):
            if drawing.request.latents is not None:
                x[row] = drawing.request.latents.to(x)
            if drawing.canvas is not None:
                x[row] = drawing.canvas.begin(x[row], grid[0])
        return Group(members, x, grid, noise)

    def _join(self, groups: Sequence[Group]) -> list[tuple[list[Group], Denoise]]:
        """For each shape of latents and text the groups that share a call of the network, and their denoiser."""
        shapes: dict[tuple[torch.Size, int], list[Group]] = {}
        for group in groups:
            if not group.done:
                shapes.setdefault((group.x.shape[1:], self._length(group.members[0])), []).append(group)
        return [
            (some, self._denoise([d for g in some for d in g.members], length)) for (_, length), some in shapes.items()
        ]

    def _denoise(self, drawings: Sequence[Drawing], length: int) -> Denoise:
        """The denoiser of a row per drawing, each guided by its own texts and keeping what its own mask keeps."""
        requests = [drawing.request for drawing in drawings]
        cond, uncond = zip(*(self._texts(drawing, length) for drawing in drawings), strict=True)
        denoise = guide(
            self.denoiser,
            Conditioning.cat(cond),
            Conditioning.cat(uncond),
            torch.tensor([r.guidance_scale for r in requests], dtype=torch.float64),
            torch.tensor([r.guidance_rescale for r in requests]),
            torch.tensor([interval(r) for r in requests], dtype=torch.float64),
        )
        if all(r.mask is None for r in requests):
            return denoise
        given = [(d.canvas.latents, d.canvas.kept) if d.canvas else None for d in drawings]
        nothing = tuple(map(torch.zeros_like, next(filter(None, given))))
        known, kept = zip(*(row or nothing for row in given), strict=True)
        return keep(denoise, torch.stack(known), torch.stack(kept))

    def _texts(self, drawing: Drawing, length: int) -> tuple[Conditioning, Conditioning]:
        """A row with and without its text; where it is not guided, nobody asks for the second."""
        r = drawing.request
        read = partial(self.texts, length=length, skip=r.clip_skip or 0, time_ids=time_ids(r))
        cond = read(r.prompt)
        pair = cond, cond if r.guidance_scale == 1 else read(r.negative_prompt)
        if drawing.canvas is None or drawing.canvas.channels is None:
            return pair
        shown = drawing.canvas.channels[None]
        return replace(pair[0], channels=shown), replace(pair[1], channels=shown)

    def _length(self, drawing: Drawing) -> int:
        r = drawing.request
        return self.texts.length(r.prompt, r.negative_prompt, r.guidance_scale)

    def _finish(self, groups: Sequence[Group]) -> Iterator[tuple[Drawing, Image.Image]]:
        for group in groups:
            pictures = to_pil(decode(self.model.vae, group.x))
            for drawing, picture in zip(group.members, pictures, strict=True):
                yield drawing, picture if drawing.canvas is None else drawing.canvas.finish(picture)

    def grid(self, request: Request) -> Grid:
        """The noise levels of a request whose number of steps is known."""
        grid = spaced(self.model.sde, request.spacing or "", request.num_inference_steps or 0)
        return grid if request.strength is None else cut(grid, request.strength)


def channels(model: Checkpoint) -> int:
    """How many channels a U-Net reads beside its latents: 0, or, where it inpaints, those of `Canvas.channels`."""
    return model.unet.config.in_channels - model.unet.config.out_channels


def latent_shape(model: Checkpoint, request: Request) -> tuple[int, int, int]:
    """[C, h, w] of a request whose size is known."""
    f = downscale(model.vae)
    return model.unet.config.out_channels, (request.height or 0) // f, (request.width or 0) // f


@lru_cache(maxsize=256)
def spaced(sde: VPSDE, spacing: str, steps: int) -> Grid:
    """A time grid by the name of its spacing."""
    return SPACINGS[spacing](sde, steps)
