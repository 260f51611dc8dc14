"""Fine-tuning: a pretrained model, or a part of it, on an image dataset."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoints.formats import Checkpoint, load_checkpoint
from ldm.config import FinetuneObjective, ImageDataConfig, Recipe, SubsetConfig
from ldm.data.batch_sampler import SampleKey
from ldm.data.image_dataset import CachedEncoder, ImageDataset, validation_data_config
from ldm.data.latent_cache import LatentCache, blake2b_hexdigest, hash_network_weights
from ldm.data.sources import is_image_file
from ldm.files import atomic_write
from ldm.hardware import resolve_frozen_dtype, to_device
from ldm.nn.prompts import PlaceholderTokens, split_on_tokens
from ldm.nn.text_encoders import warn_about_truncation
from ldm.nn.vae import vae_scale_factor
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request
from ldm.rng import derive_seed, torch_seed
from ldm.train.card import write_model_card
from ldm.train.diffusion import DiffusionTask, encode_latent_moments, validation_requests
from ldm.train.methods import (
    FINETUNE_METHODS,
    base_load_options,
    base_model_path,
    float32_components,
    load_base_pipeline,
    skip_text_layers,
)
from ldm.train.model_spec import describe_export
from ldm.train.score_matching import NUM_VALIDATION_LEVELS
from ldm.train.task import Batch
from ldm.train.trainable import CachedTextEncoder, TrainableModel, cast_frozen_parameters, text_encoder_settings

OnProgress = Callable[[int, int], None]  # (images encoded, of how many)


class FinetuneDataset:
    """The images of a recipe and those held out, as `LatentDataset` says; `loss_weights` [number of samples]."""

    independent_levels = False

    def __init__(self, images: ImageDataset, validation: ImageDataset | None, loss_weights: Tensor) -> None:
        self.images, self.validation, self.loss_weights = images, validation, loss_weights

    def load_batch(self, step: int, rows: range) -> tuple[Sequence[SampleKey], Batch]:
        sample_keys = self.images.batch_sampler[step]
        part = sample_keys[rows.start : rows.stop]
        data = self.images.load_batch(part)
        arrays = {name: torch.from_numpy(data[name]) for name in ("latents", "pixels", "masks") if name in data}
        weights = self.loss_weights[[key.sample_id for key in part]]
        keys = [SampleKey(self.images.samples[key.sample_id].key, key.times_seen) for key in sample_keys]
        return keys, {**arrays, **self._text_inputs(self.images, data), "weights": weights}

    def _text_inputs(self, images: ImageDataset, data: Batch) -> Batch:
        height, width = (side * images.vae_scale_factor for side in data["masks"].shape[2:])
        target = np.full((len(data["captions"]), 2), (height, width))
        time_ids = np.concatenate([data["original_sizes"], data["crops"], target], 1).astype(np.float32)
        return {"captions": data["captions"], "time_ids": torch.from_numpy(time_ids)}

    def validation_batches(self) -> Iterator[tuple[Tensor, Batch, Sequence[int]]]:
        """One image at all levels each, with noise seeded by its name."""
        for row in range(len(self.validation.samples) if self.validation else 0):
            assert self.validation
            data = self.validation.load_batch([SampleKey(row, 0)])
            mean = torch.from_numpy(data["latents"][:, 0]).float()
            seeds = [derive_seed("held out", data["keys"][0], level) for level in range(NUM_VALIDATION_LEVELS)]
            yield mean.expand(NUM_VALIDATION_LEVELS, -1, -1, -1), self._text_inputs(self.validation, data), seeds


class FinetuneTask(DiffusionTask):
    """Denoising score matching of the trainable part of a model; latents, and frozen text encoders' states, are cached.

    With prior preservation (Ruiz et al. 2023, arXiv:2208.12242, eq. 2) the loss is the mean over the images plus
    `prior_loss_weight` times the mean over the class's images, whichever come together in a batch.
    """

    dataset: FinetuneDataset

    def __init__(
        self,
        recipe: Recipe,
        objective: FinetuneObjective,
        device: torch.device,
        on_progress: OnProgress = lambda done, total: None,
    ) -> None:
        self.objective, self.method = objective, FINETUNE_METHODS[objective.method]
        self.base_model = load_base_model(objective, device)
        data = recipe.image_data
        if objective.prior_preservation:
            folder = generate_class_images(Pipeline(self.base_model), recipe, objective)
            data = add_class_folder(data, folder)
        torch.manual_seed(torch_seed(recipe.seed))  # initial weights of adapters
        full_model = self.method.prepare(self.base_model, objective)
        dtype = resolve_frozen_dtype(objective.frozen_dtype, device)
        for network in full_model.networks.values():
            cast_frozen_parameters(to_device(network, device), dtype)
        placeholder_tokens = make_placeholder_tokens(full_model, objective)
        dataset = prepare_dataset(recipe, data, full_model, dtype, on_progress)
        cache = prepare_captions(recipe, objective, full_model, dataset.images, placeholder_tokens)
        model = TrainableModel(full_model)
        encode_text = cache or (lambda captions: captions)  # text encoders that are trained encode in `forward`
        super().__init__(recipe, objective, model, full_model, dataset, encode_text, placeholder_tokens)

    def sample_digests(self) -> Mapping[str, str]:
        return self.dataset.images.sample_digests()

    def make_pipeline(self) -> Pipeline:
        if not self.placeholder_tokens:
            return Pipeline(self.full_model)
        with TemporaryDirectory() as folder:
            self.method.export(self.full_model, self.objective, Path(folder), {})
            return self.method.load_pipeline(self.objective, Path(folder), Pipeline(self.base_model))

    def export(self, folder: Path) -> None:
        """Write what was trained, as the method does, and a model card without samples."""
        metadata = describe_export(self.recipe, self.objective, self.full_model, self.dataset.images)
        self.method.export(self.full_model, self.objective, folder, metadata)
        self._write_model_card({}, folder)

    def export_samples(self, folder: Path) -> None:
        """Add samples of the validation prompts, before and after the training, to the card; without prompts none.

        The training's own networks are freed first, and one pipeline is in memory at a time.
        """
        if not self.recipe.validation_prompts:
            return
        free_networks(self.full_model, self.base_model)
        before = self._sample(load_base_pipeline(self.objective))
        after = self._sample(self.method.load_pipeline(self.objective, folder, None))
        self._write_model_card({"before": before, "after": after}, folder)

    def _write_model_card(self, samples: Mapping[str, Sequence[Image.Image]], folder: Path) -> None:
        family = self.full_model.family
        write_model_card(self.recipe, self.objective, family, self.dataset.images, samples, folder)

    def _sample(self, pipe: Pipeline) -> list[Image.Image]:
        images = pipe.generate(validation_requests(self.recipe, self.recipe.validation_prompts))
        free_networks(pipe.model)
        return images


def prepare_dataset(
    recipe: Recipe, data: ImageDataConfig, model: Checkpoint, frozen_dtype: torch.dtype, on_progress: OnProgress
) -> FinetuneDataset:
    """The images of `data` and the recipe's held-out ones, with their latents cached where their crops are fixed."""
    objective, vae = recipe.objective, model.vae
    assert isinstance(objective, FinetuneObjective)
    cache = LatentCache(recipe.output_dir.parent / "cache", hash_network_weights(vae, "moments", str(frozen_dtype)))
    encoder = CachedEncoder(cache, partial(encode_latent_moments, vae))
    open_images = partial(ImageDataset, seed=recipe.seed, vae_scale_factor=vae_scale_factor(vae))
    images = open_images(
        data,
        recipe.train_batch_size,
        caption_dropout=objective.caption_dropout,
        cached_encoder=encoder if data.center_crop else None,
    )
    if data.center_crop:
        total = sum(1 + images.options_of(row).random_flip for row in range(len(images.samples)))
        images.cache_latents(lambda done: on_progress(done, total))
    validation = None
    if config := validation_data_config(recipe):
        validation = open_images(config, 1, cached_encoder=encoder)
        validation.cache_latents()
    return FinetuneDataset(images, validation, compute_loss_weights(images, objective.prior_loss_weight))


def prepare_captions(
    recipe: Recipe, objective: FinetuneObjective, model: Checkpoint, images: ImageDataset, tokens: PlaceholderTokens
) -> CachedTextEncoder | None:
    """Check the captions; the cache of their embeddings, None where a text encoder is trained."""
    captions = [sample.caption for sample in images.samples]
    if tokens and not any(len([*split_on_tokens(caption, tokens)]) > 1 for caption in captions):
        raise ValueError(f"placeholder_token {objective.placeholder_token!r}: no caption has it")
    warn_about_truncation(model.text_encoders[0].tokenizer, captions)
    encoders = nn.ModuleList([encoder.model for encoder in model.text_encoders])
    if any(parameter.requires_grad for parameter in encoders.parameters()):
        return None
    namespace = hash_network_weights(encoders, text_encoder_settings(model))
    return CachedTextEncoder(model, LatentCache(recipe.output_dir.parent / "cache", namespace))


def load_base_model(objective: FinetuneObjective, device: torch.device) -> Checkpoint:
    """The pretrained model, frozen networks in their own dtype; ValueError for an inpainting model."""
    path, dtype = base_model_path(objective), resolve_frozen_dtype(objective.frozen_dtype, device)
    model = load_checkpoint(path, device, dtype, base_load_options(objective), float32_components(objective))
    model = skip_text_layers(model, objective)
    if model.unet.config.in_channels != model.unet.config.out_channels:
        raise ValueError(f"{path}: an inpainting model cannot be fine-tuned")
    model.unet.attention = objective.attention
    return model


def free_networks(*models: Checkpoint) -> None:
    """Give back the memory of models' weights, whoever still refers to their networks."""
    for network in (network for model in models for network in model.networks.values()):
        nn.Module.to(network, device="meta")


def make_placeholder_tokens(model: Checkpoint, objective: FinetuneObjective) -> PlaceholderTokens:
    """The token ids of a textual inversion's placeholder; none for other methods."""
    if objective.method != "textual_inversion":
        return {}
    first = model.text_encoders[0].model.config.vocab_size
    return {objective.placeholder_token or "": range(first, first + objective.num_vectors)}


def generate_class_images(pipe: Pipeline, recipe: Recipe, objective: FinetuneObjective) -> Path:
    """The folder of a class's images, those of `class_data_dir` and what lacks of them the model's own.

    It is made unless it exists.
    """
    prompt, side = objective.class_prompt or "", recipe.image_data.resolution
    own = list_class_images(objective.class_data_dir)
    count = max(0, objective.num_class_images - len(own))
    names = " ".join(map(str, own))
    digest = blake2b_hexdigest(prompt, f"{count} {side} {recipe.seed}{names}", pipe.model.weight_hashes["unet"])[:8]
    folder = recipe.output_dir / f"class-images-{digest}"
    if folder.is_dir():
        return folder
    seeds = [derive_seed(recipe.seed, "class", k) for k in range(count)]
    with atomic_write(folder) as draft, torch.no_grad():
        draft.mkdir()
        for k, path in enumerate(own):
            shutil.copyfile(path, draft / f"own-{k:04d}{path.suffix}")
            (draft / f"own-{k:04d}.txt").write_text(prompt + "\n", encoding="utf-8")
        for k, image in pipe.stream([Request(prompt, seed=seed, height=side, width=side) for seed in seeds]):
            image.save(draft / f"{k:04d}.png")
            (draft / f"{k:04d}.txt").write_text(prompt + "\n", encoding="utf-8")
    return folder


def list_class_images(folder: Path | None) -> list[Path]:
    """The images in a folder of a class, none without a folder; ValueError for a folder that is not there."""
    if folder is None:
        return []
    if not folder.is_dir():
        raise ValueError(f"class_data_dir {folder}: no such folder")
    return sorted(path for path in folder.rglob("*") if path.is_file() and is_image_file(path.name))


def add_class_folder(data: ImageDataConfig, folder: Path) -> ImageDataConfig:
    """The data with a folder of a class's images, which are regularization images."""
    subsets = *map(data.subset, range(len(data.train_data_dir))), SubsetConfig.model_validate({"is_reg": True})
    return data.model_copy(update={"train_data_dir": (*data.train_data_dir, folder), "subsets": subsets})


def compute_loss_weights(images: ImageDataset, prior_loss_weight: float) -> Tensor:
    """The loss weight of each sample: 1, and for regularization images the prior's, whose sum is that of the others."""
    weights = torch.ones(len(images.samples))
    folders = map(images.folder_of, range(len(images.samples)))
    prior = torch.tensor([images.data_config.subset(k).is_reg for k in folders])
    if prior.any():
        repeats = torch.tensor([float(sample.repeats) for sample in images.samples])
        weights[prior] = prior_loss_weight * (repeats[~prior].sum() / repeats[prior].sum())
    return weights
