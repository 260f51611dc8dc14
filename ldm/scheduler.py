"""The scheduler: drawings of any mixture of requests in as few calls of the network as they allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

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

AHEAD = 2  # groups that may wait to be decoded


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


class Waiting:
    """Drawings that wait for room: second passes, then requests, which are asked for one at a time."""

    def __init__(self, requests: Iterable[Request | None]) -> None:
        self.passes: deque[Drawing] = deque()
        self.ended = False
        self._requests, self._count = iter(requests), 0

    def take(self, room: int) -> list[Drawing]:
        """At most so many, fewer where no more is ready."""
        taken: list[Drawing] = []
        while len(taken) < room and (self.passes or not self.ended):
            if self.passes:
                taken.append(self.passes.popleft())
                continue
            try:
                request = next(self._requests)
            except StopIteration:
                self.ended = True
                break
            if request is None:
                break
            taken.append(Drawing(self._count, request, 0.5 if request.upscale else 1.0))
            self._count += 1
        return taken


@dataclass
class Thrifty:
    """A function of rows, asked of at most `limit` at a time, and of half as many once memory runs out.

    What was being asked is asked again in parts. With `fixed` every call is of `limit` rows, copies of its last one
    filling it up, so that each row's answer is the same bit for bit whatever the others are: kernels are chosen by
    shapes. Such a limit stays.
    """

    function: Callable[..., Tensor]
    limit: int
    fixed: bool = False

    def __call__(self, *rows: Any) -> Tensor:
        while True:
            asked = min(self.limit, len(rows[0]))
            try:
                return self._in_parts(rows)
            except torch.OutOfMemoryError:
                if asked == 1 or self.fixed:
                    raise
            self.limit = asked // 2  # outside of `except`, whose traceback holds tensors

    def _in_parts(self, rows: Sequence[Any]) -> Tensor:
        count = len(rows[0])
        if count <= self.limit and not self.fixed:
            return self.function(*rows)
        answers = []
        for start in range(0, count, self.limit):
            part = [row[start : start + self.limit] for row in rows]
            some = len(part[0])
            if self.fixed:
                chosen = [*range(some), *[some - 1] * (self.limit - some)]
                part = [row[chosen] for row in part]
            answers.append(self.function(*part)[:some])
        return torch.cat(answers)


class Scheduler:
    """Draws requests of any mixture of prompts, seeds, sizes, steps, samplers, guidance and editing with one model.

    It joins the questions of all running groups into one call of the network for each shape of latents and text,
    retires what is finished and admits what waits: continuous batching. Pictures are decoded beside the next calls, by
    a thread. `batch_size` pictures are drawn at a time, fewer from when memory runs out. With `fixed` every call of the
    network is of so many rows, as `Thrifty` says; a picture is two where it is guided. Beside the sizes of calls it
    keeps nothing between two runs, so that threads may run at the same time.
    """

    def __init__(self, model: Checkpoint, texts: Texts, batch_size: int, fixed: int | None = None) -> None:
        self.model, self.texts = model, texts
        self.denoiser = Denoiser(model.unet, model.sde, model.prediction, model.unet.dtype)
        self.calls = Thrifty(model.unet, fixed or 2 * batch_size, fixed is not None)
        self.decodes = Thrifty(partial(decode, model.vae), 1 if fixed else batch_size, fixed is not None)
        self._batch_size = batch_size

    @property
    def batch_size(self) -> int:
        """How many pictures are drawn at a time."""
        return max(1, min(self._batch_size, self.calls.limit // 2))

    @torch.inference_mode()
    def run(
        self, requests: Iterable[Request | None], said: Callable[[float], None]
    ) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture) of requests with their defaults filled in, as they are finished.

        A request is asked for when there is room for it; None says that none is ready yet, which shall be said only
        while a picture is being drawn. `said(share)` hears of that much more of a picture, 1 in all for each.
        """
        waiting, running = Waiting(requests), list[Group]()
        asked: list[tuple[list[Group], Denoise]] = []
        drawn: deque[Future[list[tuple[Drawing, Image.Image]]]] = deque()
        with ThreadPoolExecutor(1, "decode") as decoder:
            while running or drawn or waiting.passes or not waiting.ended:
                arrivals = waiting.take(self.batch_size - sum(map(len, running)))
                if arrivals:
                    running += self._admit(arrivals)
                    asked = self._join(running)
                self._step(asked)
                said(sum(group.news() for group in running))
                finished = [group for group in running if group.done]
                if finished:
                    running = [group for group in running if not group.done]
                    asked = self._join(running)
                drawn += [decoder.submit(self._finish, group) for group in finished]
                while drawn and (drawn[0].done() or len(drawn) > AHEAD or not running):
                    for drawing, picture in drawn.popleft().result():
                        if drawing.request.upscale:
                            request = again(drawing.request, picture, downscale(self.model.vae))
                            waiting.passes.append(Drawing(drawing.index, request, drawing.share))
                        else:
                            yield drawing.index, picture

    def prepare(self, request: Request) -> None:
        """Encode a request's texts ahead of its turn, in another thread if need be."""
        self._texts(Drawing(0, request, 1.0), 1)

    def _step(self, asked: Sequence[tuple[list[Group], Denoise]]) -> None:
        """One call of the network for each shape: the groups go on with what it answers."""
        for groups, denoise in asked:
            x0 = denoise(torch.cat([g.x for g in groups]), [g.point for g in groups for _ in range(len(g))])
            for group, part in zip(groups, x0.split([len(g) for g in groups]), strict=True):
                group.answer(part)

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
            replace(self.denoiser, network=self.calls),
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

    @torch.inference_mode()
    def _finish(self, group: Group) -> list[tuple[Drawing, Image.Image]]:
        pictures = zip(group.members, to_pil(self.decodes(group.x)), strict=True)
        return [(d, picture if d.canvas is None else d.canvas.finish(picture)) for d, picture in pictures]

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
