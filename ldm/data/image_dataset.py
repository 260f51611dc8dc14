"""Batches of captioned images: read from their sources, assigned to buckets, augmented, and cached as latents."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from ldm.config import FinetuneObjective, ImageDataConfig, Recipe
from ldm.data import augment
from ldm.data.augment import Augmentation, downsample_mask, resize_and_crop
from ldm.data.batch_sampler import BucketBatchSampler, SampleKey
from ldm.data.buckets import AspectRatioBuckets, BucketPlacement, ImageSize, format_size
from ldm.data.folders import open_image_sources, split_key
from ldm.data.latent_cache import LatentCache, blake2b_hexdigest
from ldm.data.sources import LENIENT_KINDS, DatasetIssue, ImageSample, raise_on_errors
from ldm.errors import error_text, warn_of_input
from ldm.image_io import DecodedImage, decode_image, decode_mask, read_image_size

ReadExtent = Literal["header", "body", "whole"]  # whole: the body without a missing end


class ImageInfo(NamedTuple):
    """What is known of an image before it is decoded: its upright size, its bucket, and the digest of its file."""

    size: ImageSize
    placement: BucketPlacement
    digest: str


def validation_data_config(recipe: Recipe) -> ImageDataConfig | None:
    """The recipe's data for its held-out images, read like the others but without augmentation; None without any."""
    objective = recipe.objective
    if not isinstance(objective, FinetuneObjective) or not objective.validation_data_dir:
        return None
    fixed = {"center_crop": True, "random_flip": False, "shuffle_caption": False, "masks": "none", "subsets": ()}
    fixed["caption_tag_dropout"] = 0
    return recipe.image_data.model_copy(update={**fixed, "train_data_dir": (objective.validation_data_dir,)})


def resolve_num_train_epochs(recipe: Recipe) -> Recipe:
    """The recipe with the steps of its `num_train_epochs`, which `max_train_steps` overrides, as in diffusers' scripts.

    An epoch has as many steps as samples, repeats and the class's images included, fill batches. ValueError for data
    without epochs.
    """
    if recipe.num_train_epochs is None or recipe.max_train_steps:
        return recipe
    num_samples = sum(sample.repeats for sample in open_image_sources(recipe.image_data).samples)
    objective = recipe.objective
    if isinstance(objective, FinetuneObjective) and objective.prior_preservation:
        num_samples += objective.num_class_images
    steps = max(1, -(-recipe.num_train_epochs * num_samples // recipe.train_batch_size))
    return recipe.model_copy(update={"max_train_steps": steps})


def buckets_from_config(data: ImageDataConfig) -> AspectRatioBuckets:
    """A recipe's buckets. ValueError as for AspectRatioBuckets."""
    min_size = data.min_bucket_reso or data.resolution // 2
    max_size = data.max_bucket_reso or data.resolution * 2
    return AspectRatioBuckets(data.resolution, data.bucket_reso_steps, min_size, max_size, data.bucket_no_upscale)


def collect_usable_samples(
    samples: Sequence[ImageSample], data: ImageDataConfig
) -> tuple[list[tuple[ImageSample, ImageInfo]], list[DatasetIssue]]:
    """The samples that have a bucket, and an issue for each other: an error, or with `skip_broken` a notice."""
    extent: ReadExtent = "whole" if data.strict else "body" if data.skip_broken else "header"
    infos = collect_image_infos(samples, buckets_from_config(data), extent)
    issues = [info for info in infos if isinstance(info, DatasetIssue)]
    if data.skip_broken:
        issues = [issue.as_left_out()._replace(strict=data.strict) for issue in issues]
    pairs = zip(samples, infos, strict=True)
    return [(sample, info) for sample, info in pairs if isinstance(info, ImageInfo)], issues


def collect_image_infos(
    samples: Sequence[ImageSample], buckets: AspectRatioBuckets, extent: ReadExtent = "header"
) -> list[ImageInfo | DatasetIssue]:
    """Each sample's `read_image_info`, in order."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda sample: read_image_info(sample, buckets, extent), samples))


def read_image_info(
    sample: ImageSample, buckets: AspectRatioBuckets, extent: ReadExtent = "header"
) -> ImageInfo | DatasetIssue:
    """A sample's size by its file's header, and its bucket, or what is wrong with it, as far as it is read."""
    part = ""
    try:
        data = sample.read_image()
        size = read_image_size(data)
        part = "the mask: "
        mask_size = read_image_size(sample.read_mask()) if sample.read_mask else size
        if extent != "header":
            part = ""
            notices = dict(decode_image(data).notices)
            if extent == "whole" and "truncated" in notices:
                return DatasetIssue("truncated", sample.key, notices["truncated"], strict=True)
            part = "the mask: "
            _ = sample.read_mask and decode_mask(sample.read_mask())
    except (OSError, ValueError) as error:
        return DatasetIssue("broken image", sample.key, part + error_text(error))
    if mask_size != size:
        what = f"the mask is {format_size(mask_size)}, the image {format_size(size)}"
        return DatasetIssue("mask size", sample.key, what)
    try:
        return ImageInfo(size, buckets.assign(*size), blake2b_hexdigest(data))
    except ValueError as error:
        return DatasetIssue("too small", sample.key, str(error))


def make_batch_sampler(
    samples: Sequence[ImageSample], image_infos: Sequence[ImageInfo], batch_size: int, seed: int
) -> BucketBatchSampler:
    """The order of samples in training; buckets are numbered from narrow to wide."""
    buckets = sorted({info.placement.bucket for info in image_infos})
    bucket_ids = [buckets.index(info.placement.bucket) for info in image_infos]
    return BucketBatchSampler([sample.repeats for sample in samples], bucket_ids, batch_size, seed)


class CachedEncoder(NamedTuple):
    """A cache of latents, and the function that computes those of uint8 [B, H, W, 3] as [B, ...]."""

    cache: LatentCache
    encode: Callable[[np.ndarray], np.ndarray]


class ImageDataset:
    """Batches of captioned images: `dataset[k]` is that of step k, a function of k and the seed alone.

    A batch holds, row by row: `indices`, SampleKey each; `keys` of the samples; `captions`; `pixels` uint8
    [B, H, W, 3], or `latents` [B, ...] where they are cached; `masks` float32 [B, 1, H / f, W / f] with f the
    `vae_scale_factor`, the part of each latent's area where the loss counts; `original_sizes` and `crops` int64 [B, 2]:
    height and width of the file's image, top and left of the crop of the resized one (SDXL's time ids). All rows are of
    one bucket.

    Latents are cached for center crops only, one for each flip: random crops hardly ever repeat.
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
        """`vae_scale_factor` is the side of a latent in pixels. ValueError with the first error among the issues."""
        if data_config.bucket_reso_steps % vae_scale_factor:
            raise ValueError(f"bucket_reso_steps: must be a multiple of {vae_scale_factor}, the VAE's scale factor")
        if cached_encoder and not data_config.center_crop:
            raise ValueError("center_crop: latents are cached for center crops only")
        self.data_config, self.seed, self.vae_scale_factor = data_config, seed, vae_scale_factor
        self.caption_dropout, self.cached_encoder = caption_dropout, cached_encoder
        self.folder_options = [data_config.for_folder(k) for k in range(len(data_config.train_data_dir))]
        self.samples, issues = open_image_sources(data_config)
        raise_on_errors(issues)
        pairs, wrong = collect_usable_samples(self.samples, data_config)
        raise_on_errors(wrong)
        self.samples, self.image_infos = [sample for sample, _ in pairs], [info for _, info in pairs]
        self.notices = [issue for issue in (*issues, *wrong) if issue.kind in LENIENT_KINDS]
        self.batch_sampler = make_batch_sampler(self.samples, self.image_infos, batch_size, seed)

    def __getitem__(self, k: int) -> Mapping[str, Any]:
        return self.load_batch(self.batch_sampler[k])

    def load_batch(self, sample_keys: Sequence[SampleKey[int]]) -> Mapping[str, Any]:
        """The batch of some samples of one bucket, such as a part of `dataset.batch_sampler[k]`."""
        rows = [key.sample_id for key in sample_keys]
        augmentations = [self.choose_augmentation(key) for key in sample_keys]
        pairs = list(zip(rows, augmentations, strict=True))
        images = {"latents": self._load_latents(pairs)} if self.cached_encoder else {"pixels": self._load_pixels(pairs)}
        return {
            "indices": list(sample_keys),
            "keys": [self.samples[row].key for row in rows],
            "captions": [self.augment_caption(key) for key in sample_keys],
            "original_sizes": np.array([self.image_infos[row].size[::-1] for row in rows], np.int64),
            "crops": np.array([augmentation.crop_corner[::-1] for augmentation in augmentations], np.int64),
            "masks": np.stack([self._load_mask(*pair) for pair in pairs]),
            **images,
        }

    def sample_digests(self) -> dict[str, str]:
        """A digest of each sample's image, size, caption and repeats, by its key; paths of folders are no part."""
        return {
            sample.key: blake2b_hexdigest(info.digest, json.dumps([info.size, sample.caption, sample.repeats]))[:16]
            for sample, info in zip(self.samples, self.image_infos, strict=True)
        }

    def choose_augmentation(self, key: SampleKey[int]) -> Augmentation:
        """Flip and crop of one use of a sample."""
        seed = self.seed, self.samples[key.sample_id].key, key.times_seen
        margin = self.image_infos[key.sample_id].placement.crop_margin
        center = self.data_config.center_crop
        corner = augment.center_crop_corner(margin) if center else augment.random_crop_corner(margin, *seed)
        return Augmentation(self.options_of(key.sample_id).random_flip and augment.should_flip(*seed), corner)

    def options_of(self, row: int) -> ImageDataConfig:
        """The options of the folder that a sample is of."""
        return self.folder_options[self.folder_of(row)]

    def folder_of(self, row: int) -> int:
        """The number of the folder that a sample is of, from 0."""
        folder = split_key(self.samples[row].key)[0]
        return folder if folder < len(self.folder_options) else 0  # a file's name with a number and a colon

    def augment_caption(self, key: SampleKey[int]) -> str:
        """The caption of one use of a sample: dropped, shuffled, or as it is."""
        sample, data = self.samples[key.sample_id], self.options_of(key.sample_id)
        seed = self.seed, sample.key, key.times_seen
        rate = self.data_config.subset(self.folder_of(key.sample_id)).caption_dropout
        if augment.should_drop_caption(self.caption_dropout if rate is None else rate, *seed):
            return ""
        if data.shuffle_caption or data.caption_tag_dropout or data.keep_tokens_separator:
            return augment.augment_tags(sample.caption, data, *seed)
        return sample.caption

    def cache_latents(self, on_progress: Callable[[int], None] = lambda done: None) -> None:
        """Compute all latents that are not cached yet; `on_progress(done)` is called after each batch.

        To be called before worker processes load batches if the network is on a GPU.
        """
        done, size = 0, self.batch_sampler.batch_size
        for bucket in sorted({info.placement.bucket for info in self.image_infos}):
            pairs = [
                (row, Augmentation(flip, augment.center_crop_corner(info.placement.crop_margin)))
                for row, info in enumerate(self.image_infos)
                for flip in ((False, True) if self.options_of(row).random_flip else (False,))
                if info.placement.bucket == bucket
            ]
            for start in range(0, len(pairs), size):
                self._load_latents(batch := pairs[start : start + size])
                on_progress(done := done + len(batch))

    def _load_latents(self, pairs: Sequence[tuple[int, Augmentation]]) -> np.ndarray:
        assert self.cached_encoder
        cache, encode = self.cached_encoder
        infos = self.image_infos
        keys = [blake2b_hexdigest(infos[row].digest, json.dumps([infos[row].placement, a])) for row, a in pairs]
        compute = lambda missing: list(encode(self._load_pixels([pairs[k] for k in missing])))
        return np.stack(cache.get_or_compute(keys, compute))

    def _load_pixels(self, pairs: Sequence[tuple[int, Augmentation]]) -> np.ndarray:
        images = ((self._decode_image(row).rgb, self.image_infos[row].placement, a) for row, a in pairs)
        return np.stack([np.asarray(resize_and_crop(*image)) for image in images])

    def _load_mask(self, row: int, augmentation: Augmentation) -> np.ndarray:
        """The mean of the mask over each latent, float32 [1, h, w]; ones if the image has none."""
        sample, placement = self.samples[row], self.image_infos[row].placement
        mask = decode_mask(sample.read_mask()) if sample.read_mask else None
        if self.data_config.masks == "alpha":
            mask = self._decode_image(row).alpha
        if mask is None:
            width, height = placement.bucket
            return np.ones((1, height // self.vae_scale_factor, width // self.vae_scale_factor), np.float32)
        cropped = resize_and_crop(mask, placement, augmentation, Image.Resampling.BOX)
        return downsample_mask(np.asarray(cropped), self.vae_scale_factor)

    def _decode_image(self, row: int) -> DecodedImage:
        sample = self.samples[row]
        try:
            decoded = decode_image(sample.read_image())
        except (OSError, ValueError) as error:
            raise ValueError(f"{sample.key}: {error}") from None
        for kind, text in decoded.notices:
            if kind == "truncated":
                warn_of_input(f"{sample.key}: {kind}: {text}")
        return decoded
