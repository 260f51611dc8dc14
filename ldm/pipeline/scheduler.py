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
from ldm.diffusion.guidance import classifier_free_guidance, inpaint
from ldm.diffusion.samplers import SAMPLERS, check_finite, ddim
from ldm.diffusion.sde import VPSDE
from ldm.diffusion.timesteps import SPACINGS, TimeGrid, truncate_grid
from ldm.image_io import to_pil
from ldm.nn.vae import decode_latents, vae_scale_factor
from ldm.pipeline.editing import EditInputs, prepare_edit_inputs
from ldm.pipeline.prompt_encoder import PromptEncoder
from ldm.pipeline.request import Request, get_add_time_ids, hires_pass, resolve_guidance_interval
from ldm.rng import Noise

MAX_PENDING_DECODES = 2  # groups that may wait to be decoded


@dataclass(frozen=True)
class RunningRequest:
    """A request on its way to a picture."""

    index: int  # by which the caller knows it
    request: Request
    progress_weight: float  # of the picture's progress
    edit_inputs: EditInputs | None = None  # what it begins from, once it has


class SampleGroup:
    """Rows that march in step: drawings of one shape, sampler and grid, driven by one coroutine."""

    def __init__(self, members: Sequence[RunningRequest], x: Tensor, grid: TimeGrid, noise: Noise) -> None:
        self.members = members
        first = members[0].request
        sampler = partial(ddim, eta=first.eta) if first.eta else SAMPLERS[first.sampler or ""].function
        self.coroutine = check_finite(sampler)(x, grid, noise)
        self.x, self.grid, self.level = x, grid, grid[0]
        self.progress = self._reported_progress = 0.0
        self._advance(None)

    def __len__(self) -> int:
        return len(self.members)

    def step(self, x0: Tensor) -> None:
        """Give E[x_0 | x]: the group asks on, or holds its latents in `x`."""
        self._advance(x0)
        self.progress = max(self.progress, sum(p.t > self.level.t for p in self.grid) / len(self.grid))

    def _advance(self, x0: Tensor | None) -> None:
        try:
            self.x, self.level = self.coroutine.send(x0)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            self.x, self.progress = end.value, 1.0

    def progress_delta(self) -> float:
        """How far its pictures came since it was last asked."""
        before, self._reported_progress = self._reported_progress, self.progress
        return (self.progress - before) * sum(drawing.progress_weight for drawing in self.members)

    @property
    def done(self) -> bool:
        return self.progress == 1


class RequestQueue:
    """Drawings that wait for room: second passes, then requests, which are asked for one at a time."""

    def __init__(self, requests: Iterable[Request | None]) -> None:
        self.hires_passes: deque[RunningRequest] = deque()
        self.exhausted = False
        self._requests, self._count = iter(requests), 0

    def take(self, max_count: int) -> list[RunningRequest]:
        """At most so many, fewer where no more is ready."""
        taken: list[RunningRequest] = []
        while len(taken) < max_count and (self.hires_passes or not self.exhausted):
            if self.hires_passes:
                taken.append(self.hires_passes.popleft())
                continue
            try:
                request = next(self._requests)
            except StopIteration:
                self.exhausted = True
                break
            if request is None:
                break
            taken.append(RunningRequest(self._count, request, 0.5 if request.upscale else 1.0))
            self._count += 1
        return taken


@dataclass
class MicroBatcher:
    """A function of rows, asked of at most `limit` at a time, and of half as many once memory runs out.

    What was being asked is asked again in parts. With `fixed` every call is of `limit` rows, copies of its last one
    filling it up, so that each row's answer is the same bit for bit whatever the others are: kernels are chosen by
    shapes. Such a limit stays.
    """

    function: Callable[..., Tensor]
    max_rows: int
    pad_to_max: bool = False

    def __call__(self, *rows: Any) -> Tensor:
        while True:
            asked = min(self.max_rows, len(rows[0]))
            try:
                return self._call_in_micro_batches(rows)
            except torch.OutOfMemoryError:
                if asked == 1 or self.pad_to_max:
                    raise
            self.max_rows = asked // 2  # outside of `except`, whose traceback holds tensors

    def _call_in_micro_batches(self, rows: Sequence[Any]) -> Tensor:
        count = len(rows[0])
        if count <= self.max_rows and not self.pad_to_max:
            return self.function(*rows)
        answers = []
        for start in range(0, count, self.max_rows):
            part = [row[start : start + self.max_rows] for row in rows]
            some = len(part[0])
            if self.pad_to_max:
                chosen = [*range(some), *[some - 1] * (self.max_rows - some)]
                part = [row[chosen] for row in part]
            answers.append(self.function(*part)[:some])
        return torch.cat(answers)


class BatchScheduler:
    """Draws requests of any mixture of prompts, seeds, sizes, steps, samplers, guidance and editing with one model.

    It joins the questions of all running groups into one call of the network for each shape of latents and text,
    retires what is finished and admits what waits: continuous batching. Pictures are decoded beside the next calls, by
    a thread. `batch_size` pictures are drawn at a time, fewer from when memory runs out. With `fixed` every call of the
    network is of so many rows, as `MicroBatcher` says; a picture is two where it is guided. Beside the sizes of calls it
    keeps nothing between two runs, so that threads may run at the same time.
    """

    def __init__(
        self, model: Checkpoint, prompt_encoder: PromptEncoder, batch_size: int, pad_to: int | None = None
    ) -> None:
        self.model, self.prompt_encoder = model, prompt_encoder
        self.denoiser = Denoiser(model.unet, model.sde, model.prediction, model.unet.dtype)
        self.batched_unet = MicroBatcher(model.unet, pad_to or 2 * batch_size, pad_to is not None)
        self.batched_decode = MicroBatcher(
            partial(decode_latents, model.vae), 1 if pad_to else batch_size, pad_to is not None
        )
        self._batch_size = batch_size

    @property
    def batch_size(self) -> int:
        """How many pictures are drawn at a time."""
        return max(1, min(self._batch_size, self.batched_unet.max_rows // 2))

    @torch.inference_mode()
    def run(
        self, requests: Iterable[Request | None], on_progress: Callable[[float], None]
    ) -> Iterator[tuple[int, Image.Image]]:
        """(index, picture) of requests with their defaults filled in, as they are finished.

        A request is asked for when there is room for it; None says that none is ready yet, which shall be said only
        while a picture is being drawn. `said(share)` hears of that much more of a picture, 1 in all for each.
        """
        waiting, running = RequestQueue(requests), list[SampleGroup]()
        asked: list[tuple[list[SampleGroup], Denoise]] = []
        drawn: deque[Future[list[tuple[RunningRequest, Image.Image]]]] = deque()
        with ThreadPoolExecutor(1, "decode") as decoder:
            while running or drawn or waiting.hires_passes or not waiting.exhausted:
                arrivals = waiting.take(self.batch_size - sum(map(len, running)))
                if arrivals:
                    running += self._admit(arrivals)
                    asked = self._make_batches(running)
                self._step(asked)
                on_progress(sum(group.progress_delta() for group in running))
                finished = [group for group in running if group.done]
                if finished:
                    running = [group for group in running if not group.done]
                    asked = self._make_batches(running)
                drawn += [decoder.submit(self._decode_group, group) for group in finished]
                while drawn and (drawn[0].done() or len(drawn) > MAX_PENDING_DECODES or not running):
                    for drawing, picture in drawn.popleft().result():
                        if drawing.request.upscale:
                            request = hires_pass(drawing.request, picture, vae_scale_factor(self.model.vae))
                            waiting.hires_passes.append(RunningRequest(drawing.index, request, drawing.progress_weight))
                        else:
                            yield drawing.index, picture

    def prefetch_prompt(self, request: Request) -> None:
        """Encode a request's texts ahead of its turn, in another thread if need be."""
        self._encode_prompts(RunningRequest(0, request, 1.0), 1)

    def _step(self, batches: Sequence[tuple[list[SampleGroup], Denoise]]) -> None:
        """One call of the network for each shape: the groups go on with what it answers."""
        for groups, denoise in batches:
            x0 = denoise(torch.cat([g.x for g in groups]), [g.level for g in groups for _ in range(len(g))])
            for group, part in zip(groups, x0.split([len(g) for g in groups]), strict=True):
                group.step(part)

    def _admit(self, arrivals: Sequence[RunningRequest]) -> list[SampleGroup]:
        """Groups of consecutive drawings that can march in step."""

        def march(drawing: RunningRequest) -> tuple:
            r = drawing.request
            alone = (
                drawing.index if SAMPLERS[r.sampler or ""].adaptive else None
            )  # its steps would depend on neighbours
            shape = r.height, r.width, self._num_chunks(drawing)
            return *shape, r.sampler, r.spacing, r.num_inference_steps, r.eta, r.strength, alone

        return [self._start(list(members)) for _, members in groupby(arrivals, march)]

    def _start(self, members: Sequence[RunningRequest]) -> SampleGroup:
        inpaints = num_concat_channels(self.model) > 0
        members = [replace(d, edit_inputs=prepare_edit_inputs(d.request, self.model.vae, inpaints)) for d in members]
        grid = self.time_grid(members[0].request)
        noise = Noise([drawing.request.seed for drawing in members])
        shape = request_latent_shape(self.model, members[0].request)
        x = noise(torch.empty(len(members), *shape, device=self.model.unet.conv_in.weight.device))
        for row, drawing in enumerate(members):
            if drawing.request.latents is not None:
                x[row] = drawing.request.latents.to(x)
            if drawing.edit_inputs is not None:
                x[row] = drawing.edit_inputs.init_latents(x[row], grid[0])
        return SampleGroup(members, x, grid, noise)

    def _make_batches(self, groups: Sequence[SampleGroup]) -> list[tuple[list[SampleGroup], Denoise]]:
        """For each shape of latents and text the groups that share a call of the network, and their denoiser."""
        shapes: dict[tuple[torch.Size, int], list[SampleGroup]] = {}
        for group in groups:
            if not group.done:
                shapes.setdefault((group.x.shape[1:], self._num_chunks(group.members[0])), []).append(group)
        return [
            (some, self._make_denoiser([d for g in some for d in g.members], length))
            for (_, length), some in shapes.items()
        ]

    def _make_denoiser(self, members: Sequence[RunningRequest], num_chunks: int) -> Denoise:
        """The denoiser of a row per drawing, each guided by its own texts and keeping what its own mask keeps."""
        requests = [drawing.request for drawing in members]
        cond, uncond = zip(*(self._encode_prompts(drawing, num_chunks) for drawing in members), strict=True)
        denoise = classifier_free_guidance(
            replace(self.denoiser, network=self.batched_unet),
            Conditioning.cat(cond),
            Conditioning.cat(uncond),
            torch.tensor([r.guidance_scale for r in requests], dtype=torch.float64),
            torch.tensor([r.guidance_rescale for r in requests]),
            torch.tensor([resolve_guidance_interval(r) for r in requests], dtype=torch.float64),
        )
        if all(r.mask is None for r in requests):
            return denoise
        given = [(d.edit_inputs.image_latents, d.edit_inputs.keep_mask) if d.edit_inputs else None for d in members]
        nothing = tuple(map(torch.zeros_like, next(filter(None, given))))
        known, kept = zip(*(row or nothing for row in given), strict=True)
        return inpaint(denoise, torch.stack(known), torch.stack(kept))

    def _encode_prompts(self, member: RunningRequest, num_chunks: int) -> tuple[Conditioning, Conditioning]:
        """A row with and without its text; where it is not guided, nobody asks for the second."""
        r = member.request
        read = partial(
            self.prompt_encoder, num_chunks=num_chunks, clip_skip=r.clip_skip or 0, time_ids=get_add_time_ids(r)
        )
        cond = read(r.prompt)
        pair = cond, cond if r.guidance_scale == 1 else read(r.negative_prompt)
        if member.edit_inputs is None or member.edit_inputs.concat is None:
            return pair
        shown = member.edit_inputs.concat[None]
        return replace(pair[0], concat=shown), replace(pair[1], concat=shown)

    def _num_chunks(self, member: RunningRequest) -> int:
        r = member.request
        return self.prompt_encoder.num_chunks(r.prompt, r.negative_prompt, r.guidance_scale)

    @torch.inference_mode()
    def _decode_group(self, group: SampleGroup) -> list[tuple[RunningRequest, Image.Image]]:
        pictures = zip(group.members, to_pil(self.batched_decode(group.x)), strict=True)
        return [(d, picture if d.edit_inputs is None else d.edit_inputs.composite(picture)) for d, picture in pictures]

    def time_grid(self, request: Request) -> TimeGrid:
        """The noise levels of a request whose number of steps is known."""
        grid = make_time_grid(self.model.sde, request.spacing or "", request.num_inference_steps or 0)
        return grid if request.strength is None else truncate_grid(grid, request.strength)


def num_concat_channels(model: Checkpoint) -> int:
    """How many channels a U-Net reads beside its latents: 0, or, where it inpaints, those of `EditInputs.concat`."""
    return model.unet.config.in_channels - model.unet.config.out_channels


def request_latent_shape(model: Checkpoint, request: Request) -> tuple[int, int, int]:
    """[C, h, w] of a request whose size is known."""
    f = vae_scale_factor(model.vae)
    return model.unet.config.out_channels, (request.height or 0) // f, (request.width or 0) // f


@lru_cache(maxsize=256)
def make_time_grid(sde: VPSDE, spacing: str, steps: int) -> TimeGrid:
    """A time grid by the name of its spacing."""
    return SPACINGS[spacing](sde, steps)
