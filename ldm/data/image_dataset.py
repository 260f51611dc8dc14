"""People's own pictures as batches: found, surveyed, placed in buckets, and made ready visit by visit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.config import FinetuneObjective, ImageDataConfig, Recipe
from ldm.data import augment
from ldm.data.batch_sampler import BucketBatchSampler, SampleIndex
from ldm.data.buckets import AspectRatioBuckets, BucketPlacement, ImageSize
from ldm.data.folders import open_image_sources
from ldm.data.latent_cache import LatentCache, blake2b_hexdigest
from ldm.data.sources import ColumnNames, DatasetIssue, ImageSample, ImageSource, SourceOptions
from ldm.image_io import DecodedImage, decode_image, decode_mask, read_image_size


class ImageInfo(NamedTuple):
    """What a look at a picture's file tells: the upright size, where it goes, and the digest of its bytes."""

    size: ImageSize
    placement: BucketPlacement
    digest: str


class Augmentation(NamedTuple):
    """How a picture is shown: mirrored or not, then cropped from `random_crop_corner` (left, top)."""

    flip: bool
    crop_corner: ImageSize


def source_from_config(data_config: ImageDataConfig) -> ImageSource:
    """The samples and faults of a recipe's data."""
    columns = ColumnNames(data_config.image_column, data_config.caption_column, data_config.mask_column)
    return open_image_sources(
        data_config.train_data_dir, SourceOptions(columns, data_config.masks, data_config.instance_prompt)
    )


def validation_data_config(recipe: Recipe) -> ImageDataConfig | None:
    """The recipe's held-out pictures as data, read as the others are but always shown alike; None without any."""
    objective = recipe.objective
    if not isinstance(objective, FinetuneObjective) or not objective.validation_data_dir:
        return None
    still = {"center_crop": True, "random_flip": False, "shuffle_caption": False, "masks": "none"}
    return recipe.image_data.model_copy(update={**still, "train_data_dir": (objective.validation_data_dir,)})


def buckets_from_config(data_config: ImageDataConfig) -> AspectRatioBuckets:
    """A recipe's buckets."""
    least, most = (
        data_config.min_bucket_reso or data_config.resolution // 2,
        data_config.max_bucket_reso or data_config.resolution * 2,
    )
    return AspectRatioBuckets(
        data_config.resolution, data_config.bucket_reso_steps, least, most, data_config.bucket_no_upscale
    )


def collect_image_infos(samples: Sequence[ImageSample], buckets: AspectRatioBuckets) -> list[ImageInfo | DatasetIssue]:
    """Each sample's file read and placed by its head, or what is wrong with it, in order."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda sample: read_image_info(sample, buckets), samples))


def read_image_info(sample: ImageSample, buckets: AspectRatioBuckets) -> ImageInfo | DatasetIssue:
    """One sample's part of `collect_image_infos`."""
    part = ""
    try:
        data = sample.read_bytes()
        size = read_image_size(data)
        part = "the mask: "
        mask = read_image_size(sample.read_mask()) if sample.read_mask else size
    except (OSError, ValueError) as error:
        return DatasetIssue("broken picture", sample.key, part + (getattr(error, "strerror", None) or str(error)))
    if mask != size:
        return DatasetIssue(
            "mask size", sample.key, f"the mask is {mask[0]}x{mask[1]}, the picture {size[0]}x{size[1]}"
        )
    try:
        return ImageInfo(size, buckets.assign(*size), blake2b_hexdigest(data))
    except ValueError as error:
        return DatasetIssue("too small", sample.key, str(error))


def raise_on_fatal_issues(issues: Iterable[DatasetIssue]) -> None:
    """ValueError that says the first of the faults that a training refuses, and how many more there are."""
    fatal = [fault for fault in issues if fault.is_fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
        raise ValueError(f"{fatal[0].key}: {fatal[0].what}{more}")


class CachedEncoder(NamedTuple):
    """Latents that are made once: where they are kept, and what makes those of uint8 [B, H, W, 3], [B, ...]."""

    cache: LatentCache
    encode: Callable[[np.ndarray], np.ndarray]


class ImageDataset:
    """Batches of people's own pictures: `dataset[k]` is that of step k, a pure function of k.

    A batch holds, row by row: `visits`; `keys`, the samples' names; `captions`; `to_feature_map` uint8 [B, H, W, 3], or
    `cache_scene_latents` [B, ...] where they are kept; `masks` float32 [B, 1, H / downscale, W / downscale], the share of each
    latent where the loss counts; `original_sizes` and `crops` int64 [B, 2], height and width of the file's picture, and
    top and left of the crop of the resized one (SDXL's time ids). All rows are of one bucket.

    Latents are kept for centred crops, once for each way round: crops at random hardly ever come again.
    """

    def __init__(
        self,
        data_config: ImageDataConfig,
        batch_size: int,
        seed: int,
        vae_scale_factor: int,
        caption_dropout: float = 0,
        cached_encoder: CachedEncoder | None = None,
    ) -> None:
        """`vae_scale_factor` is the pixels a side of a latent. ValueError says the first fault that a training refuses."""
        if data_config.bucket_reso_steps % vae_scale_factor:
            raise ValueError(
                f"bucket_reso_steps: must be a multiple of {vae_scale_factor}, the pixels a side of a latent"
            )
        if cached_encoder and not data_config.center_crop:
            raise ValueError("center_crop: latents are kept for centred crops only")
        self.data_config, self.seed, self.vae_scale_factor = data_config, seed, vae_scale_factor
        self.caption_dropout, self.cached_encoder = caption_dropout, cached_encoder
        self.samples, faults = source_from_config(data_config)
        raise_on_fatal_issues(faults)
        found = collect_image_infos(self.samples, buckets_from_config(data_config))
        raise_on_fatal_issues(fault for fault in found if isinstance(fault, DatasetIssue))
        self.image_infos = [look for look in found if isinstance(look, ImageInfo)]
        self.buckets = sorted({look.placement.bucket for look in self.image_infos})
        homes = [self.buckets.index(look.placement.bucket) for look in self.image_infos]
        self.batch_sampler = BucketBatchSampler([sample.repeats for sample in self.samples], homes, batch_size, seed)

    def __getitem__(self, k: int) -> Mapping[str, Any]:
        return self.load_batch(self.batch_sampler[k])

    def load_batch(self, indices: Sequence[SampleIndex]) -> Mapping[str, Any]:
        """The batch of some visits to one bucket, such as a part of `dataset.visits[k]`."""
        which = [visit.row for visit in indices]
        views = [self.choose_augmentation(visit) for visit in indices]
        shown = (
            {"latents": self._load_latents(which, views)}
            if self.cached_encoder
            else {"pixels": self._load_pixels(which, views)}
        )
        return {
            "visits": list(indices),
            "keys": [self.samples[row].key for row in which],
            "captions": [self.augment_caption(visit) for visit in indices],
            "original_sizes": np.array([self.image_infos[row].size[::-1] for row in which], np.int64),
            "crops": np.array([view.crop_corner[::-1] for view in views], np.int64),
            "masks": np.stack([self._load_mask(row, view) for row, view in zip(which, views, strict=True)]),
            **shown,
        }

    def choose_augmentation(self, index: SampleIndex) -> Augmentation:
        """How a visit shows its picture."""
        chance = self.seed, self.samples[index.row].key, index.times_seen
        slack = self.image_infos[index.row].placement.crop_margin
        corner = (
            augment.center_crop_corner(slack)
            if self.data_config.center_crop
            else augment.random_crop_corner(slack, *chance)
        )
        return Augmentation(self.data_config.random_flip and augment.should_flip(*chance), corner)

    def augment_caption(self, index: SampleIndex) -> str:
        """The caption of a visit: dropped, shuffled, or as it is."""
        sample, data = self.samples[index.row], self.data_config
        chance = self.seed, sample.key, index.times_seen
        if augment.should_drop_caption(self.caption_dropout, *chance):
            return ""
        if data.shuffle_caption:
            return augment.shuffle_tags(sample.caption, data.caption_separator, data.keep_tokens, *chance)
        return sample.caption

    def cache_latents(self, on_progress: Callable[[int], None] = lambda done: None) -> None:
        """Make all latents that are not kept yet; `said(done)` hears how many are there.

        Where the network sits on a device, do this before worker processes ask for batches.
        """
        done = 0
        for home in self.buckets:
            rows = [row for row, look in enumerate(self.image_infos) if look.placement.bucket == home]
            ways = [False, True] if self.data_config.random_flip else [False]
            todo = [
                (row, Augmentation(flip, augment.center_crop_corner(self.image_infos[row].placement.crop_margin)))
                for row in rows
                for flip in ways
            ]
            for start in range(0, len(todo), self.batch_sampler.batch_size):
                part = todo[start : start + self.batch_sampler.batch_size]
                self._load_latents([row for row, _ in part], [view for _, view in part])
                on_progress(done := done + len(part))

    def _load_latents(self, rows: Sequence[int], augmentations: Sequence[Augmentation]) -> np.ndarray:
        assert self.cached_encoder
        cache, encode = self.cached_encoder

        def make(missing: Sequence[int]) -> Sequence[np.ndarray]:
            return list(encode(self._load_pixels([rows[k] for k in missing], [augmentations[k] for k in missing])))

        return np.stack(
            cache.get_or_compute(
                [self._cache_key(row, view) for row, view in zip(rows, augmentations, strict=True)], make
            )
        )

    def _cache_key(self, row: int, augmentation: Augmentation) -> str:
        look = self.image_infos[row]
        return blake2b_hexdigest(look.digest, json.dumps([look.placement, augmentation]))

    def _load_pixels(self, rows: Sequence[int], augmentations: Sequence[Augmentation]) -> np.ndarray:
        lanczos = Image.Resampling.LANCZOS
        shown = (
            self._augment_image(self._decode_image(row).rgb, row, view, lanczos)
            for row, view in zip(rows, augmentations, strict=True)
        )
        return np.stack([np.asarray(picture) for picture in shown])

    def _load_mask(self, row: int, augmentation: Augmentation) -> np.ndarray:
        """The mean of the mask over each latent [1, h, w], all ones where the picture has none."""
        sample, (width, height) = self.samples[row], self.image_infos[row].placement.bucket
        shape = 1, height // self.vae_scale_factor, width // self.vae_scale_factor
        mask = decode_mask(sample.read_mask()) if sample.read_mask else None
        if self.data_config.masks == "alpha":
            mask = self._decode_image(row).alpha
        if mask is None:
            return np.ones(shape, np.float32)
        return downsample_mask(
            np.asarray(self._augment_image(mask, row, augmentation, Image.Resampling.BOX)), self.vae_scale_factor
        )

    def _augment_image(
        self, image: Image.Image, row: int, augmentation: Augmentation, resample: Image.Resampling
    ) -> Image.Image:
        """A picture resized to cover its bucket, turned round or not, then cropped to it."""
        (width, height), resized = self.image_infos[row].placement
        whole = image.resize(resized, resample)
        if augmentation.flip:
            whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = augmentation.crop_corner
        return whole.crop((left, top, left + width, top + height))

    def _decode_image(self, row: int) -> DecodedImage:
        sample = self.samples[row]
        try:
            return decode_image(sample.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{sample.key}: {error}") from None


def downsample_mask(mask: np.ndarray, vae_scale_factor: int) -> np.ndarray:
    """A mask, uint8 [H, W], averaged over squares of `vae_scale_factor` pixels: float32 [1, h, w] in [0, 1]."""
    height, width = mask.shape
    squares = mask.reshape(1, height // vae_scale_factor, vae_scale_factor, width // vae_scale_factor, vae_scale_factor)
    return (squares.mean((2, 4)) / 255).astype(np.float32)
