"""People's own pictures as batches: found, surveyed, placed in buckets, and made ready visit by visit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.config import FolderData, Recipe, TuneObjective
from ldm.data import choices
from ldm.data.buckets import Buckets, Placement, Size
from ldm.data.folders import open_source
from ldm.data.latents import LatentCache, digest
from ldm.data.samples import Columns, Fault, Options, Sample, Source
from ldm.data.visits import Visit, Visits
from ldm.decode import Decoded, decode, grey, size_of


class Surveyed(NamedTuple):
    """What a look at a picture's file tells: the upright size, where it goes, and the digest of its bytes."""

    size: Size
    placement: Placement
    digest: str


class View(NamedTuple):
    """How a picture is shown: mirrored or not, then cropped from `corner` (left, top)."""

    flip: bool
    corner: Size


def source_of(data: FolderData) -> Source:
    """The samples and faults of a recipe's data."""
    columns = Columns(data.image_column, data.caption_column, data.mask_column)
    return open_source(data.train_data_dir, Options(columns, data.masks, data.instance_prompt))


def held_out(recipe: Recipe) -> FolderData | None:
    """The recipe's held-out pictures as data, read as the others are but always shown alike; None without any."""
    objective = recipe.objective
    if not isinstance(objective, TuneObjective) or not objective.validation_data_dir:
        return None
    still = {"center_crop": True, "random_flip": False, "shuffle_caption": False, "masks": "none"}
    return recipe.folder.model_copy(update={**still, "train_data_dir": (objective.validation_data_dir,)})


def buckets_of(data: FolderData) -> Buckets:
    """A recipe's buckets."""
    least, most = data.min_bucket_reso or data.resolution // 2, data.max_bucket_reso or data.resolution * 2
    return Buckets(data.resolution, data.bucket_reso_steps, least, most, data.bucket_no_upscale)


def survey(samples: Sequence[Sample], buckets: Buckets) -> list[Surveyed | Fault]:
    """Each sample's file read and placed by its head, or what is wrong with it, in order."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda sample: look(sample, buckets), samples))


def look(sample: Sample, buckets: Buckets) -> Surveyed | Fault:
    """One sample's part of `survey`."""
    part = ""
    try:
        data = sample.open()
        size = size_of(data)
        part = "the mask: "
        mask = size_of(sample.mask()) if sample.mask else size
    except (OSError, ValueError) as error:
        return Fault("broken picture", sample.key, part + (getattr(error, "strerror", None) or str(error)))
    if mask != size:
        return Fault("mask size", sample.key, f"the mask is {mask[0]}x{mask[1]}, the picture {size[0]}x{size[1]}")
    try:
        return Surveyed(size, buckets.assign(*size), digest(data))
    except ValueError as error:
        return Fault("too small", sample.key, str(error))


def refuse(faults: Iterable[Fault]) -> None:
    """ValueError that says the first of the faults that a training refuses, and how many more there are."""
    fatal = [fault for fault in faults if fault.fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
        raise ValueError(f"{fatal[0].key}: {fatal[0].what}{more}")


class Kept(NamedTuple):
    """Latents that are made once: where they are kept, and what makes those of uint8 [B, H, W, 3], [B, ...]."""

    cache: LatentCache
    encode: Callable[[np.ndarray], np.ndarray]


class FolderDataset:
    """Batches of people's own pictures: `dataset[k]` is that of step k, a pure function of k.

    A batch holds, row by row: `visits`; `keys`, the samples' names; `captions`; `pixels` uint8 [B, H, W, 3], or
    `latents` [B, ...] where they are kept; `masks` float32 [B, 1, H / downscale, W / downscale], the share of each
    latent where the loss counts; `original_sizes` and `crops` int64 [B, 2], height and width of the file's picture, and
    top and left of the crop of the resized one (SDXL's time ids). All rows are of one bucket.

    Latents are kept for centred crops, once for each way round: crops at random hardly ever come again.
    """

    def __init__(
        self,
        data: FolderData,
        batch: int,
        seed: int,
        downscale: int,
        caption_dropout: float = 0,
        kept: Kept | None = None,
    ) -> None:
        """`downscale` is the pixels a side of a latent. ValueError says the first fault that a training refuses."""
        if data.bucket_reso_steps % downscale:
            raise ValueError(f"bucket_reso_steps: must be a multiple of {downscale}, the pixels a side of a latent")
        if kept and not data.center_crop:
            raise ValueError("center_crop: latents are kept for centred crops only")
        self.data, self.seed, self.downscale = data, seed, downscale
        self.caption_dropout, self.kept = caption_dropout, kept
        self.samples, faults = source_of(data)
        refuse(faults)
        found = survey(self.samples, buckets_of(data))
        refuse(fault for fault in found if isinstance(fault, Fault))
        self.surveyed = [look for look in found if isinstance(look, Surveyed)]
        self.buckets = sorted({look.placement.bucket for look in self.surveyed})
        homes = [self.buckets.index(look.placement.bucket) for look in self.surveyed]
        self.visits = Visits([sample.repeats for sample in self.samples], homes, batch, seed)

    def __getitem__(self, k: int) -> Mapping[str, Any]:
        return self.rows(self.visits[k])

    def rows(self, visits: Sequence[Visit]) -> Mapping[str, Any]:
        """The batch of some visits to one bucket, such as a part of `dataset.visits[k]`."""
        which = [visit.sample for visit in visits]
        views = [self.view(visit) for visit in visits]
        shown = {"latents": self._latents(which, views)} if self.kept else {"pixels": self._pixels(which, views)}
        return {
            "visits": list(visits),
            "keys": [self.samples[row].key for row in which],
            "captions": [self.caption(visit) for visit in visits],
            "original_sizes": np.array([self.surveyed[row].size[::-1] for row in which], np.int64),
            "crops": np.array([view.corner[::-1] for view in views], np.int64),
            "masks": np.stack([self._mask(row, view) for row, view in zip(which, views, strict=True)]),
            **shown,
        }

    def view(self, visit: Visit) -> View:
        """How a visit shows its picture."""
        chance = self.seed, self.samples[visit.sample].key, visit.number
        slack = self.surveyed[visit.sample].placement.slack
        corner = choices.centre(slack) if self.data.center_crop else choices.corner(slack, *chance)
        return View(self.data.random_flip and choices.flipped(*chance), corner)

    def caption(self, visit: Visit) -> str:
        """The caption of a visit: dropped, shuffled, or as it is."""
        sample, data = self.samples[visit.sample], self.data
        chance = self.seed, sample.key, visit.number
        if choices.dropped(self.caption_dropout, *chance):
            return ""
        if data.shuffle_caption:
            return choices.shuffled_tags(sample.caption, data.caption_separator, data.keep_tokens, *chance)
        return sample.caption

    def fill(self, said: Callable[[int], None] = lambda done: None) -> None:
        """Make all latents that are not kept yet; `said(done)` hears how many are there.

        Where the network sits on a device, do this before worker processes ask for batches.
        """
        done = 0
        for home in self.buckets:
            rows = [row for row, look in enumerate(self.surveyed) if look.placement.bucket == home]
            ways = [False, True] if self.data.random_flip else [False]
            todo = [
                (row, View(flip, choices.centre(self.surveyed[row].placement.slack))) for row in rows for flip in ways
            ]
            for start in range(0, len(todo), self.visits.batch):
                part = todo[start : start + self.visits.batch]
                self._latents([row for row, _ in part], [view for _, view in part])
                said(done := done + len(part))

    def _latents(self, rows: Sequence[int], views: Sequence[View]) -> np.ndarray:
        assert self.kept
        cache, encode = self.kept

        def make(missing: Sequence[int]) -> Sequence[np.ndarray]:
            return list(encode(self._pixels([rows[k] for k in missing], [views[k] for k in missing])))

        return np.stack(cache.get([self._key(row, view) for row, view in zip(rows, views, strict=True)], make))

    def _key(self, row: int, view: View) -> str:
        look = self.surveyed[row]
        return digest(look.digest, json.dumps([look.placement, view]))

    def _pixels(self, rows: Sequence[int], views: Sequence[View]) -> np.ndarray:
        lanczos = Image.Resampling.LANCZOS
        shown = (self._shown(self._decoded(row).rgb, row, view, lanczos) for row, view in zip(rows, views, strict=True))
        return np.stack([np.asarray(picture) for picture in shown])

    def _mask(self, row: int, view: View) -> np.ndarray:
        """The mean of the mask over each latent [1, h, w], all ones where the picture has none."""
        sample, (width, height) = self.samples[row], self.surveyed[row].placement.bucket
        shape = 1, height // self.downscale, width // self.downscale
        mask = grey(sample.mask()) if sample.mask else None
        if self.data.masks == "alpha":
            mask = self._decoded(row).alpha
        if mask is None:
            return np.ones(shape, np.float32)
        return averaged(np.asarray(self._shown(mask, row, view, Image.Resampling.BOX)), self.downscale)

    def _shown(self, picture: Image.Image, row: int, view: View, filter: Image.Resampling) -> Image.Image:
        """A picture resized to cover its bucket, turned round or not, then cropped to it."""
        (width, height), resized = self.surveyed[row].placement
        whole = picture.resize(resized, filter)
        if view.flip:
            whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = view.corner
        return whole.crop((left, top, left + width, top + height))

    def _decoded(self, row: int) -> Decoded:
        sample = self.samples[row]
        try:
            return decode(sample.open())
        except (OSError, ValueError) as error:
            raise ValueError(f"{sample.key}: {error}") from None


def averaged(mask: np.ndarray, downscale: int) -> np.ndarray:
    """A mask, uint8 [H, W], averaged over squares of `downscale` pixels: float32 [1, h, w] in [0, 1]."""
    height, width = mask.shape
    squares = mask.reshape(1, height // downscale, downscale, width // downscale, downscale)
    return (squares.mean((2, 4)) / 255).astype(np.float32)
