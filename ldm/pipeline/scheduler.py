"""Continuous batching: requests of any mixture in as few network evaluations as they allow.

Not a noise scheduler: those are `ldm.diffusion.samplers`, `timesteps` and `sde`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints.formats import Checkpoint
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import classifier_free_guidance, inpaint
from ldm.diffusion.samplers import SAMPLERS, check_finite
from ldm.diffusion.sde import VPSDE
from ldm.diffusion.timesteps import (
    SPACINGS,
    TimeGrid,
    clip_grid,
    end_at_lowest,
    grid_at_sigmas,
    grid_at_timesteps,
    truncate_grid,
)
from ldm.image_io import to_pil
from ldm.nn.vae import decode_latents, latent_shape, vae_scale_factor
from ldm.pipeline.editing import EditInputs, prepare_edit_inputs
from ldm.pipeline.prompt_encoder import PromptEncoder
from ldm.pipeline.request import Request, hires_pass, resolve_guidance_interval
from ldm.rng import Noise

MAX_PENDING_DECODES = 2  # groups that wait for the decoder


@dataclass(frozen=True)
class RunningRequest:
    """A request that has been admitted."""

    index: int  # in the caller's sequence
    request: Request
    progress_weight: float  # this pass's part of the image's progress
    edit_inputs: EditInputs | None = None


class StepEnd(NamedTuple):
    """What a network evaluation led to: `latents` [B, ...] are x after it, `x0` its output.

    `nfe` is the number of evaluations before it; `timestep` is the network's. The sampler goes on with
    what is written into `latents`.
    """

    nfe: int
    timestep: float
    latents: Tensor
    x0: Tensor


OnStep = Callable[[StepEnd], bool | None]  # true ends the sampling of these images


class SampleGroup:
    """Requests of one shape, sampler and time grid, sampled together by one coroutine."""

    def __init__(self, members: Sequence[RunningRequest], x: Tensor, grid: TimeGrid, noise: Noise) -> None:
        self.members = members
        request = members[0].request
        sampler = SAMPLERS[request.sampler or ""].with_options(vars(request))
        self.coroutine = check_finite(sampler)(x, grid, noise)
        self.x, self.grid, self.level = x, grid, grid[0]
        self.progress = self._reported_progress = 0.0
        self.nfe = 0
        self._advance(None)

    def __len__(self) -> int:
        return len(self.members)

    def step(self, x0: Tensor, on_step: OnStep | None = None) -> None:
        """Take E[x_0 | x] at `level`: the next evaluation is at the new `x` and `level`, or `x` is the sample."""
        timestep = self.grid.sde.timestep(self.level.t)
        self._advance(x0)
        if on_step and on_step(StepEnd(self.nfe, round(timestep, 6), self.x, x0)):
            self.progress = 1.0
        self.nfe += 1
        self.progress = max(self.progress, sum(level.t > self.level.t for level in self.grid) / len(self.grid))

    def _advance(self, x0: Tensor | None) -> None:
        try:
            self.x, self.level = self.coroutine.send(x0)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            self.x, self.progress = end.value, 1.0

    def progress_delta(self) -> float:
        """The progress of its images since the last call, in images."""
        before, self._reported_progress = self._reported_progress, self.progress
        return (self.progress - before) * sum(member.progress_weight for member in self.members)

    @property
    def done(self) -> bool:
        return self.progress == 1


class RequestQueue:
    """Requests that wait for admission: hires passes first, then new requests, taken one at a time."""

    def __init__(self, requests: Iterable[Request | None]) -> None:
        self.hires_passes: deque[RunningRequest] = deque()
        self.exhausted = False
        self._requests, self._count = iter(requests), 0

    def take(self, max_count: int) -> list[RunningRequest]:
        """At most `max_count`, fewer if no more are ready."""
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
    """Calls a function of rows with at most `max_rows` at a time, and with half as many once memory runs out.

    For the VAE this is diffusers' `enable_vae_slicing`; `enable_vae_tiling` is for images that are too large alone.
    After an out-of-memory error the call is repeated in smaller parts. With `pad_to` every call has exactly that many
    rows, the last one repeated, so that a row's output is the same bit for bit whatever the others are (kernels are
    chosen by shape); that number never shrinks.
    """

    function: Callable[..., Tensor]
    max_rows: int
    pad_to: int | None = None

    def __post_init__(self) -> None:
        self.max_rows = self.pad_to or self.max_rows

    def __call__(self, *rows: Any) -> Tensor:
        while True:
            size = min(self.max_rows, len(rows[0]))
            try:
                outputs = [self._call_micro_batch(rows, start) for start in range(0, len(rows[0]), self.max_rows)]
                return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
            except torch.OutOfMemoryError:
                if size == 1 or self.pad_to:
                    raise
            self.max_rows = size // 2  # outside of `except`, whose traceback holds tensors

    def _call_micro_batch(self, rows: Sequence[Any], start: int) -> Tensor:
        batch = [row[start : start + self.max_rows] for row in rows]
        size = len(batch[0])
        if self.pad_to:
            batch = [row[[*range(size), *[size - 1] * (self.pad_to - size)]] for row in batch]
        return self.function(*batch)[:size]


class BatchScheduler:
    """Generates any mixture of prompts, seeds, sizes, steps, samplers, guidance and editing with one model.

    The evaluations of all running groups are joined into one network call for each shape of latents and prompts;
    finished images leave and waiting requests enter between calls (continuous batching). A thread decodes images during
    the next calls. At most `batch_size` images are sampled at a time, fewer once memory runs out. With `pad_to` every
    network call has that many rows, as in `MicroBatcher`; a guided image takes two. Between two runs only the sizes of
    calls are kept, so that threads may share a scheduler.
    """

    def __init__(
        self, model: Checkpoint, prompt_encoder: PromptEncoder, batch_size: int, pad_to: int | None = None
    ) -> None:
        self.model, self.prompt_encoder = model, prompt_encoder
        self.denoiser = Denoiser(model.unet, model.sde, model.prediction, model.unet.dtype)
        self.batched_unet = MicroBatcher(model.unet, 2 * batch_size, pad_to)
        self.batched_decode = MicroBatcher(partial(decode_latents, model.vae), batch_size, pad_to and 1)
        self._batch_size = batch_size

    @property
    def batch_size(self) -> int:
        """The number of images that are sampled at a time."""
        return max(1, min(self._batch_size, self.batched_unet.max_rows // 2))

    @torch.inference_mode()
    def run(
        self,
        requests: Iterable[Request | None],
        on_progress: Callable[[float], None],
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, image) of resolved requests as they finish; latents in place of an image where one asks so.

        The next request is taken when there is room for it. None means that none is ready yet; it may come only while
        an image is being sampled. `on_progress(delta)` is called with the progress since its last call, in images, and
        `on_step` after each network evaluation of a group.
        """
        queue, running = RequestQueue(requests), list[SampleGroup]()
        batches: list[tuple[list[SampleGroup], Denoise]] = []
        decoding: deque[Future[list[tuple[RunningRequest, Any]]]] = deque()
        with ThreadPoolExecutor(1, "decode") as decoder:
            while running or decoding or queue.hires_passes or not queue.exhausted:
                arrivals = queue.take(self.batch_size - sum(map(len, running)))
                if arrivals:
                    running += self._admit(arrivals)
                    batches = self._make_batches(running)
                self._step(batches, on_step)
                on_progress(sum(group.progress_delta() for group in running))
                finished = [group for group in running if group.done]
                if finished:
                    running = [group for group in running if not group.done]
                    batches = self._make_batches(running)
                decoding += [decoder.submit(self._decode_group, group) for group in finished]
                while decoding and (decoding[0].done() or len(decoding) > MAX_PENDING_DECODES or not running):
                    for member, image in decoding.popleft().result():
                        if member.request.upscale:
                            request = hires_pass(member.request, image, vae_scale_factor(self.model.vae))
                            queue.hires_passes.append(RunningRequest(member.index, request, member.progress_weight))
                        else:
                            yield member.index, image

    def prefetch_prompt(self, request: Request) -> None:
        """Encode the prompts of a request ahead of its turn; may be called from another thread."""
        self.prompt_encoder.encode_request(request, 1)

    def _step(self, batches: Sequence[tuple[list[SampleGroup], Denoise]], on_step: OnStep | None) -> None:
        for groups, denoise in batches:
            x0 = denoise(torch.cat([g.x for g in groups]), [g.level for g in groups for _ in range(len(g))])
            for group, rows in zip(groups, x0.split([len(g) for g in groups]), strict=True):
                group.step(rows, on_step)

    def _admit(self, arrivals: Sequence[RunningRequest]) -> list[SampleGroup]:
        """Groups of consecutive requests that can be sampled in step."""

        def group_key(member: RunningRequest) -> tuple:
            r = member.request
            spec = SAMPLERS[r.sampler or ""]
            shape = r.height, r.width, self.prompt_encoder.num_chunks(r)
            settings = r.sampler, r.spacing, r.num_inference_steps, r.strength, r.output_type
            grid = r.timesteps, r.sigmas, r.final_sigmas_type, r.denoising_start, r.denoising_end
            options = (getattr(r, name) for name in spec.options)
            # the steps of an adaptive sampler would depend on the other rows
            return *shape, *settings, *grid, *options, member.index if spec.adaptive else None

        return [self._start(list(members)) for _, members in groupby(arrivals, group_key)]

    def _start(self, members: Sequence[RunningRequest]) -> SampleGroup:
        vae, inpaints, first = self.model.vae, num_concat_channels(self.model) > 0, members[0].request
        members = [replace(m, edit_inputs=prepare_edit_inputs(m.request, vae, inpaints)) for m in members]
        grid, noise = self.time_grid(first), Noise([member.request.seed for member in members])
        shape = latent_shape(vae, first.height or 0, first.width or 0)
        x = noise(torch.empty(len(members), *shape, device=self.model.unet.device))
        for row, member in enumerate(members):
            if member.request.latents is not None:
                x[row] = member.request.latents.to(x)
            if member.edit_inputs is not None:
                x[row] = member.edit_inputs.init_latents(x[row], grid[0])
        return SampleGroup(members, x, grid, noise)

    def _make_batches(self, groups: Sequence[SampleGroup]) -> list[tuple[list[SampleGroup], Denoise]]:
        """The unfinished groups that share a network call, by the shape of latents and prompts, and their denoiser."""
        shapes: dict[tuple[torch.Size, int], list[SampleGroup]] = {}
        for group in groups:
            if not group.done:
                num_chunks = self.prompt_encoder.num_chunks(group.members[0].request)
                shapes.setdefault((group.x.shape[1:], num_chunks), []).append(group)
        return [(some, self._make_denoiser([m for g in some for m in g.members])) for some in shapes.values()]

    def _make_denoiser(self, members: Sequence[RunningRequest]) -> Denoise:
        """The denoiser of a row per request, guided by its own prompts, and inpainting its own mask."""
        edits = [member.edit_inputs for member in members]
        denoise = make_cfg_denoiser(
            replace(self.denoiser, network=self.batched_unet),
            self.prompt_encoder,
            [member.request for member in members],
            [edit.concat if edit else None for edit in edits],
        )
        if all(member.request.mask is None for member in members):
            return denoise
        rows = [(edit.image_latents, edit.keep_mask) if edit else None for edit in edits]
        zeros = tuple(map(torch.zeros_like, next(filter(None, rows))))
        image_latents, keep_masks = zip(*(row or zeros for row in rows), strict=True)
        return inpaint(denoise, torch.stack(image_latents), torch.stack(keep_masks))

    @torch.inference_mode()
    def _decode_group(self, group: SampleGroup) -> list[tuple[RunningRequest, Any]]:
        if group.members[0].request.output_type == "latent":
            return list(zip(group.members, group.x, strict=True))
        images = zip(group.members, to_pil(self.batched_decode(group.x)), strict=True)
        return [(m, m.edit_inputs.composite(image) if m.edit_inputs else image) for m, image in images]

    def time_grid(self, request: Request) -> TimeGrid:
        """The noise levels of a resolved request."""
        sde = self.model.sde
        if request.timesteps:
            grid = grid_at_timesteps(sde, request.timesteps)
        elif request.sigmas:
            grid = grid_at_sigmas(sde, request.sigmas)
        else:
            grid = make_time_grid(sde, request.spacing or "", request.num_inference_steps or 0)
        if request.final_sigmas_type == "sigma_min":
            grid = end_at_lowest(grid)
        if request.strength is not None:
            grid = truncate_grid(grid, request.strength)
        start, end = request.denoising_start, request.denoising_end
        return grid if start is None and end is None else clip_grid(grid, start or 0, 1 if end is None else end)


def make_cfg_denoiser(
    denoiser: Denoiser, prompt_encoder: PromptEncoder, requests: Sequence[Request], concats: Sequence[Tensor | None]
) -> Denoise:
    """The denoiser of a row per resolved request, by `classifier_free_guidance` with its prompts, scale and interval.

    `concats` holds what an inpainting U-Net takes beside x, [1 + C, h, w] per row. A distilled U-Net is evaluated once,
    whatever the scale. ValueError if the requests differ in `PromptEncoder.num_chunks`.
    """
    lengths = sorted(set(map(prompt_encoder.num_chunks, requests)))
    if len(lengths) > 1:
        raise ValueError(f"prompts have {' and '.join(map(str, lengths))} chunks: all must have the same number")
    rows = []
    for request, concat in zip(requests, concats, strict=True):
        pair = prompt_encoder.encode_request(request, lengths[0])
        rows.append(pair if concat is None else tuple(replace(cond, concat=concat[None]) for cond in pair))
    cond, uncond = map(Conditioning.cat, zip(*rows, strict=True))
    return classifier_free_guidance(
        denoiser,
        cond,
        uncond,
        torch.tensor([r.guidance_scale if prompt_encoder.uses_cfg(r) else 1.0 for r in requests], dtype=torch.float64),
        torch.tensor([r.guidance_rescale for r in requests]),
        torch.tensor([resolve_guidance_interval(r) for r in requests], dtype=torch.float64),
    )


def num_concat_channels(model: Checkpoint) -> int:
    """The channels that a U-Net takes beside its latents: 0, or, for inpainting, those of `EditInputs.concat`."""
    return model.unet.config.in_channels - model.unet.config.out_channels


@lru_cache(maxsize=256)
def make_time_grid(sde: VPSDE, spacing: str, steps: int) -> TimeGrid:
    """A time grid by the name of its spacing."""
    return SPACINGS[spacing](sde, steps)
