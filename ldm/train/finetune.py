"""Tuning: a pretrained model, or a part of it, on people's own pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoints.formats import Checkpoint, load_checkpoint
from ldm.conditioning import Conditioning
from ldm.config import FinetuneObjective, ImageDataConfig, Recipe
from ldm.data import batch_sampler as order
from ldm.data.image_dataset import CachedEncoder, ImageDataset, validation_data_config
from ldm.data.latent_cache import LatentCache, blake2b_hexdigest, hash_network_weights
from ldm.files import atomic_write
from ldm.hardware import autocast, resolve_frozen_dtype, to_device
from ldm.image_io import contact_sheet, from_uint8
from ldm.nn.prompts import PlaceholderTokens, split_on_tokens
from ldm.nn.text_encoders import warn_about_truncation
from ldm.nn.vae import AutoencoderKL, encode_images, vae_scale_factor
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request
from ldm.rng import derive_seed
from ldm.train.card import write_model_card
from ldm.train.methods import FINETUNE_METHODS, base_load_options, base_model_path, load_base_pipeline
from ldm.train.processes import get_partial_state
from ldm.train.score_matching import NUM_VALIDATION_LEVELS, ScoreMatchingLoss, standard_error, summarize_level_losses
from ldm.train.task import Batch, Metrics, SampleKey
from ldm.train.trainable import (
    CachedTextEncoder,
    TokenizedCaptions,
    TrainableModel,
    cast_frozen_parameters,
    encode_captions,
    text_encoder_settings,
    tokenize_caption,
)

EncodingProgress = Callable[[int, int], None]  # (done, of how many)


class FinetuneTask:
    """Denoising score matching of what learns of a model; its latents, and captions that are not learnt from, cached.

    With a prior (Ruiz et al. 2023, arXiv:2208.12242, eq. 2) the loss is the mean over the pictures plus
    `prior_loss_weight` times the mean over the class's, whichever come together in a batch.
    """

    supports_accumulation = True

    def __init__(
        self, recipe: Recipe, objective: FinetuneObjective, on_progress: EncodingProgress = lambda done, total: None
    ) -> None:
        self.recipe, self.objective, self.method = recipe, objective, FINETUNE_METHODS[objective.method]
        self.device = get_partial_state().device
        self.frozen_dtype = resolve_frozen_dtype(objective.frozen_dtype, self.device)
        model = load_base_model(objective, self.device)
        data = recipe.image_data
        if objective.prior_preservation:
            folder = generate_class_images(Pipeline(model), recipe, objective)
            data = data.model_copy(update={"train_data_dir": (*data.train_data_dir, folder)})
        torch.manual_seed(recipe.seed)  # the initial weights of what is added
        self.base_model = model
        self.model = TrainableModel(self.method.prepare(model, objective))
        self.full_model = self.model.full_model
        for network in self.full_model.networks.values():
            cast_frozen_parameters(to_device(network, self.device), self.frozen_dtype)
        self.score_matching = ScoreMatchingLoss(recipe.seed, objective, model.sde, model.prediction)
        self.placeholder_tokens = make_placeholder_tokens(self.full_model, objective)
        self._prepare_images(data, on_progress)
        self._prepare_captions()

    def _prepare_images(self, data: ImageDataConfig, on_progress: EncodingProgress) -> None:
        """Find the pictures, those held out too, and encode what is kept."""
        recipe, objective, vae = self.recipe, self.objective, self.full_model.vae
        cache = LatentCache(
            recipe.output_dir.parent / "cache", hash_network_weights(vae, "moments", str(self.frozen_dtype))
        )
        kept, make = (
            CachedEncoder(cache, partial(encode_latent_moments, vae)),
            partial(ImageDataset, vae_scale_factor=vae_scale_factor(vae)),
        )
        self.dataset = make(
            data,
            recipe.train_batch_size,
            recipe.seed,
            caption_dropout=objective.caption_dropout,
            cached_encoder=kept if data.center_crop else None,
        )
        if data.center_crop:
            ways = len(self.dataset.samples) * (1 + data.random_flip)
            self.dataset.cache_latents(lambda done: on_progress(done, ways))
        self.loss_weights = compute_loss_weights(self.dataset, objective, len(data.train_data_dir))
        self.validation_dataset = None
        if plain := validation_data_config(recipe):
            self.validation_dataset = make(plain, 1, recipe.seed, cached_encoder=kept)
            self.validation_dataset.cache_latents()

    def _prepare_captions(self) -> None:
        captions = [sample.caption for sample in self.dataset.samples]
        word = self.objective.placeholder_token
        if self.placeholder_tokens and not any(
            len([*split_on_tokens(caption, self.placeholder_tokens)]) > 1 for caption in captions
        ):
            raise ValueError(f"placeholder_token {word!r}: no caption has it")
        warn_about_truncation(self.full_model.text_encoders[0].tokenizer, captions)
        learns = any(p.requires_grad for tower in self.full_model.text_encoders for p in tower.model.parameters())
        self.text_cache = None
        if not learns:
            texts = nn.ModuleList([tower.model for tower in self.full_model.text_encoders])
            made = LatentCache(
                self.recipe.output_dir.parent / "cache",
                hash_network_weights(texts, text_encoder_settings(self.full_model)),
            )
            self.text_cache = CachedTextEncoder(self.full_model, made)

    def make_batch(self, step: int, rows: range) -> Batch:
        visits = self.dataset.batch_sampler[step]
        data = self.dataset.load_batch(visits[rows.start : rows.stop])
        whole = [SampleKey(self.dataset.samples[visit.row].key, visit.times_seen) for visit in visits]
        shape = self.full_model.vae.config.latent_channels, *data["masks"].shape[2:]
        weights = self.loss_weights[[visit.row for visit in visits[rows.start : rows.stop]]]
        shown = {name: torch.from_numpy(data[name]) for name in ("latents", "pixels") if name in data}
        return {
            **self.score_matching.sample_noise_and_times(whole, rows, shape),
            **shown,
            "captions": self.tokenize_captions(data),
            "masks": torch.from_numpy(data["masks"]),
            "weights": weights,
        }

    def tokenize_captions(self, data: Batch) -> TokenizedCaptions:
        """The captions of a batch of pictures, and what SDXL is told of their sizes: original, crop, and target."""
        height, width = (side * self.dataset.vae_scale_factor for side in data["masks"].shape[2:])
        target = np.full((len(data["captions"]), 2), (height, width))
        sizes = np.concatenate([data["original_sizes"], data["crops"], target], 1).astype(np.float32)
        ids = [
            tokenize_caption(self.full_model.text_encoders, caption, self.placeholder_tokens)
            for caption in data["captions"]
        ]
        return TokenizedCaptions(ids, torch.from_numpy(sizes), torch.tensor([float(bool(c)) for c in data["captions"]]))

    def prepare_text_input(self, captions: TokenizedCaptions) -> Any:
        """What a network is given of captions: the captions themselves where it learns to read them."""
        return self.text_cache(captions) if self.text_cache else captions

    def compute_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        found = (
            batch["latents"]
            if "latents" in batch
            else torch.from_numpy(encode_latent_moments(self.full_model.vae, batch["pixels"]))
        )
        mean, std = found.to(self.device, torch.float32).unbind(1)
        x0 = (mean + std * batch["posterior"].to(mean)).contiguous(memory_format=torch.channels_last)
        mask, weights = batch["masks"].to(x0), batch["weights"].to(x0)
        return weights * self.score_matching.compute_losses(
            model, x0, self.prepare_text_input(batch["captions"]), batch, mask
        ), {}

    @torch.no_grad()
    def validate(self, model: TrainableModel) -> dict[str, float]:
        """The unweighted loss on held-out pictures at fixed noise: over all, and in the middle of each eighth of times.

        Each with its standard error `_se` over pictures. Nothing where none are held out.
        """
        if self.validation_dataset is None:
            return {}
        pictures = range(len(self.validation_dataset.samples))
        losses = torch.stack([self._validation_losses(model, row) for row in pictures]).double()  # [pictures, LEVELS]
        means = losses.mean(1)
        return {"loss": means.mean().item(), "loss_se": standard_error(means).item(), **summarize_level_losses(losses)}

    def _validation_losses(self, model: TrainableModel, row: int) -> Tensor:
        """The losses of a held-out picture at all levels, noise by its name."""
        assert self.validation_dataset
        data = self.validation_dataset.load_batch([order.SampleIndex(row, 0)])
        mean = torch.from_numpy(data["latents"][:, 0]).float().to(self.device)
        texts = self.prepare_text_input(self.tokenize_captions(data))
        cond = texts if isinstance(texts, Conditioning) else encode_captions(model.full_model, texts)
        x0, rows = mean.expand(NUM_VALIDATION_LEVELS, -1, -1, -1), torch.zeros(NUM_VALIDATION_LEVELS, dtype=torch.long)
        seeds = [derive_seed("held out", data["keys"][0], level) for level in range(NUM_VALIDATION_LEVELS)]
        return self.score_matching.compute_level_losses(model, x0, cond[rows], seeds)

    @torch.no_grad()
    def generate_samples(self, model: TrainableModel) -> Image.Image | None:
        """A grid of the recipe's prompts, one seed each."""
        prompts = self.recipe.validation_prompts
        if not prompts:
            return None
        pipe = self.method.make_pipeline(self.base_model, model.full_model, self.objective)
        with autocast(self.device):
            return contact_sheet(pipe.generate(make_validation_requests(self.recipe, prompts)), prompts, 10)

    def export(self, model: TrainableModel, folder: Path) -> None:
        """What was learnt, as the method writes it, and a model card."""
        self.method.export(model.full_model, self.objective, folder)
        prompts = self.recipe.validation_prompts or tuple(dict.fromkeys(s.caption for s in self.dataset.samples))[:4]
        pipes = {
            "before": load_base_pipeline(self.objective),
            "after": self.method.load_pipeline(self.objective, folder),
        }
        drawn = {name: pipe.generate(make_validation_requests(self.recipe, prompts)) for name, pipe in pipes.items()}
        write_model_card(self.recipe, self.dataset, drawn, prompts, folder)


def load_base_model(objective: FinetuneObjective, device: torch.device) -> Checkpoint:
    """The pretrained model in float32; ValueError where it inpaints."""
    path = base_model_path(objective)
    model = load_checkpoint(path, device, torch.float32, base_load_options(objective))
    if model.unet.config.in_channels != model.unet.config.out_channels:
        raise ValueError(f"{path}: a model that inpaints cannot be tuned")
    model.unet.attention = objective.attention
    return model


def make_placeholder_tokens(model: Checkpoint, objective: FinetuneObjective) -> PlaceholderTokens:
    """The ids that the word of a textual inversion stands for; none for other methods."""
    if objective.method != "textual_inversion":
        return {}
    first = model.text_encoders[0].model.config.vocab_size
    return {objective.placeholder_token or "": range(first, first + objective.num_vectors)}


def make_validation_requests(recipe: Recipe, prompts: Sequence[str]) -> list[Request]:
    """Prompts to be drawn, the k-th with seed k."""
    return [Request(p, seed=k, guidance_scale=recipe.validation_guidance) for k, p in enumerate(prompts)]


def generate_class_images(pipe: Pipeline, recipe: Recipe, objective: FinetuneObjective) -> Path:
    """A folder of the model's own pictures of a class, drawn where it is not there yet."""
    prompt, count, side = objective.class_prompt or "", objective.num_class_images, recipe.image_data.resolution
    stamp = blake2b_hexdigest(prompt, f"{count} {side} {recipe.seed}", pipe.model.weight_hashes["unet"])[:8]
    folder = recipe.output_dir / f"class-images-{stamp}"
    if folder.is_dir():
        return folder
    asked = [Request(prompt, seed=derive_seed(recipe.seed, "class", k), height=side, width=side) for k in range(count)]
    with atomic_write(folder) as draft, torch.no_grad():
        draft.mkdir()
        for k, picture in pipe.stream(asked):
            picture.save(draft / f"{k:04d}.png")
            (draft / f"{k:04d}.txt").write_text(prompt + "\n", encoding="utf-8")
    return folder


def compute_loss_weights(dataset: ImageDataset, objective: FinetuneObjective, num_folders: int) -> Tensor:
    """What each sample's loss counts: 1, and for the class's pictures, in the last of so many folders, the prior's."""
    weights = torch.ones(len(dataset.samples))
    if objective.prior_preservation:
        prior = torch.tensor([sample.key.startswith(f"{num_folders}:") for sample in dataset.samples])
        shown = torch.tensor([float(sample.repeats) for sample in dataset.samples])
        weights[prior] = objective.prior_loss_weight * (shown[~prior].sum() / shown[prior].sum())
    return weights


@torch.no_grad()
def encode_latent_moments(vae: AutoencoderKL, pixels: np.ndarray | Tensor) -> np.ndarray:
    """Mean and deviation of scaled latents, float16 [B, 2, C, h, w], of uint8 [B, H, W, 3]."""
    posterior = encode_images(vae, from_uint8(pixels).to(vae.device))
    return torch.stack(posterior, 1).half().cpu().numpy()
