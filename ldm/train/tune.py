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

from ldm.checkpoints.files import place
from ldm.checkpoints.formats import Checkpoint, load
from ldm.conditioning import Conditioning
from ldm.config import FolderData, Recipe, TuneObjective
from ldm.data import visits as order
from ldm.data.latents import LatentCache, digest, fingerprint
from ldm.data.pictures import FolderDataset, Kept, held_out
from ldm.files import publish
from ldm.hardware import autocast, frozen_dtype
from ldm.images import contact_sheet, from_uint8
from ldm.nn.prompts import Words, divided
from ldm.nn.text import warn_of_cuts
from ldm.nn.vae import AutoencoderKL, downscale, encode
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.rng import keyed
from ldm.train.card import write_card
from ldm.train.learnable import Captions, Encoded, Learnable, facts, ids_of, lower, read
from ldm.train.methods import METHODS, source, untuned
from ldm.train.processes import process
from ldm.train.score import LEVELS, Matching, by_level, standard_error
from ldm.train.task import Batch, Figures, Visit

Said = Callable[[int, int], None]  # (done, of how many)


class TuneTask:
    """Denoising score matching of what learns of a model; its latents, and captions that are not learnt from, cached.

    With a prior (Ruiz et al. 2023, arXiv:2208.12242, eq. 2) the loss is the mean over the pictures plus
    `prior_loss_weight` times the mean over the class's, whichever come together in a batch.
    """

    divisible = True

    def __init__(self, recipe: Recipe, objective: TuneObjective, said: Said = lambda done, total: None) -> None:
        self.recipe, self.objective, self.method = recipe, objective, METHODS[objective.method]
        self.device = process().device
        self.frozen_dtype = frozen_dtype(objective.frozen_dtype, self.device)
        model = opened(objective, self.device)
        data = recipe.folder
        if objective.prior_preservation:
            folder = class_images(Pipeline(model), recipe, objective)
            data = data.model_copy(update={"train_data_dir": (*data.train_data_dir, folder)})
        torch.manual_seed(recipe.seed)  # the initial weights of what is added
        self.plain = model
        self.model = Learnable(self.method.prepare(model, objective))
        self.tuned = self.model.whole
        for network in self.tuned.networks.values():
            lower(place(network, self.device), self.frozen_dtype)
        self.matching = Matching(recipe.seed, objective, model.sde, model.prediction)
        self.words = new_words(self.tuned, objective)
        self._read_pictures(data, said)
        self._read_captions()

    def _read_pictures(self, data: FolderData, said: Said) -> None:
        """Find the pictures, those held out too, and encode what is kept."""
        recipe, objective, vae = self.recipe, self.objective, self.tuned.vae
        cache = LatentCache(recipe.output_dir.parent / "cache", fingerprint(vae, "moments", str(self.frozen_dtype)))
        kept, make = Kept(cache, partial(moments, vae)), partial(FolderDataset, downscale=downscale(vae))
        self.dataset = make(
            data,
            recipe.train_batch_size,
            recipe.seed,
            caption_dropout=objective.caption_dropout,
            kept=kept if data.center_crop else None,
        )
        if data.center_crop:
            ways = len(self.dataset.samples) * (1 + data.random_flip)
            self.dataset.fill(lambda done: said(done, ways))
        self.weights = row_weights(self.dataset, objective, len(data.train_data_dir))
        self.held_out = None
        if plain := held_out(recipe):
            self.held_out = make(plain, 1, recipe.seed, kept=kept)
            self.held_out.fill()

    def _read_captions(self) -> None:
        captions = [sample.caption for sample in self.dataset.samples]
        word = self.objective.placeholder_token
        if self.words and not any(len([*divided(caption, self.words)]) > 1 for caption in captions):
            raise ValueError(f"placeholder_token {word!r}: no caption has it")
        warn_of_cuts(self.tuned.towers[0].tokenizer, captions)
        learns = any(p.requires_grad for tower in self.tuned.towers for p in tower.model.parameters())
        self.encoded = None
        if not learns:
            texts = nn.ModuleList([tower.model for tower in self.tuned.towers])
            made = LatentCache(self.recipe.output_dir.parent / "cache", fingerprint(texts, facts(self.tuned)))
            self.encoded = Encoded(self.tuned, made)

    def batch(self, k: int, rows: range) -> Batch:
        visits = self.dataset.visits[k]
        data = self.dataset.rows(visits[rows.start : rows.stop])
        whole = [Visit(self.dataset.samples[visit.sample].key, visit.number) for visit in visits]
        shape = self.tuned.vae.config.latent_channels, *data["masks"].shape[2:]
        weights = self.weights[[visit.sample for visit in visits[rows.start : rows.stop]]]
        shown = {name: torch.from_numpy(data[name]) for name in ("latents", "pixels") if name in data}
        return {
            **self.matching.drawn(whole, rows, shape),
            **shown,
            "captions": self.captions(data),
            "masks": torch.from_numpy(data["masks"]),
            "weights": weights,
        }

    def captions(self, data: Batch) -> Captions:
        """The captions of a batch of pictures, and what SDXL is told of their sizes: original, crop, and target."""
        height, width = (side * self.dataset.downscale for side in data["masks"].shape[2:])
        target = np.full((len(data["captions"]), 2), (height, width))
        sizes = np.concatenate([data["original_sizes"], data["crops"], target], 1).astype(np.float32)
        ids = [ids_of(self.tuned.towers, caption, self.words) for caption in data["captions"]]
        return Captions(ids, torch.from_numpy(sizes), torch.tensor([float(bool(c)) for c in data["captions"]]))

    def texts(self, captions: Captions) -> Any:
        """What a network is given of captions: the captions themselves where it learns to read them."""
        return self.encoded(captions) if self.encoded else captions

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Figures]:
        found = batch["latents"] if "latents" in batch else torch.from_numpy(moments(self.tuned.vae, batch["pixels"]))
        mean, std = found.to(self.device, torch.float32).unbind(1)
        x0 = (mean + std * batch["posterior"].to(mean)).contiguous(memory_format=torch.channels_last)
        mask, weights = batch["masks"].to(x0), batch["weights"].to(x0)
        return weights * self.matching.losses(model, x0, self.texts(batch["captions"]), batch, mask), {}

    @torch.no_grad()
    def validate(self, model: Learnable) -> dict[str, float]:
        """The unweighted loss on held-out pictures at fixed noise: over all, and in the middle of each eighth of times.

        Each with its standard error `_se` over pictures. Nothing where none are held out.
        """
        if self.held_out is None:
            return {}
        pictures = range(len(self.held_out.samples))
        losses = torch.stack([self._held_out_losses(model, row) for row in pictures]).double()  # [pictures, LEVELS]
        means = losses.mean(1)
        return {"loss": means.mean().item(), "loss_se": standard_error(means).item(), **by_level(losses)}

    def _held_out_losses(self, model: Learnable, row: int) -> Tensor:
        """The losses of a held-out picture at all levels, noise by its name."""
        assert self.held_out
        data = self.held_out.rows([order.Visit(row, 0)])
        mean = torch.from_numpy(data["latents"][:, 0]).float().to(self.device)
        texts = self.texts(self.captions(data))
        cond = texts if isinstance(texts, Conditioning) else read(model.whole, texts)
        x0, rows = mean.expand(LEVELS, -1, -1, -1), torch.zeros(LEVELS, dtype=torch.long)
        seeds = [keyed("held out", data["keys"][0], level) for level in range(LEVELS)]
        return self.matching.at_levels(model, x0, cond[rows], seeds)

    @torch.no_grad()
    def samples(self, model: Learnable) -> Image.Image | None:
        """A grid of the recipe's prompts, one seed each."""
        prompts = self.recipe.validation_prompts
        if not prompts:
            return None
        pipe = self.method.drawing(self.plain, model.whole, self.objective)
        with autocast(self.device):
            return contact_sheet(pipe.generate(requests(self.recipe, prompts)), prompts, 10)

    def export(self, model: Learnable, folder: Path) -> None:
        """What was learnt, as the method writes it, and a model card."""
        self.method.export(model.whole, self.objective, folder)
        prompts = self.recipe.validation_prompts or tuple(dict.fromkeys(s.caption for s in self.dataset.samples))[:4]
        pipes = {"before": untuned(self.objective), "after": self.method.reopen(self.objective, folder)}
        drawn = {name: pipe.generate(requests(self.recipe, prompts)) for name, pipe in pipes.items()}
        write_card(self.recipe, self.dataset, drawn, prompts, folder)


def opened(objective: TuneObjective, device: torch.device) -> Checkpoint:
    """The pretrained model in float32; ValueError where it inpaints."""
    path = source(objective)
    model = load(path, device, torch.float32, revision=objective.revision, variant=objective.variant)
    if model.unet.config.in_channels != model.unet.config.out_channels:
        raise ValueError(f"{path}: a model that inpaints cannot be tuned")
    model.unet.attention = objective.attention
    return model


def new_words(model: Checkpoint, objective: TuneObjective) -> Words:
    """The ids that the word of a textual inversion stands for; none for other methods."""
    if objective.method != "textual_inversion":
        return {}
    first = model.towers[0].model.config.vocab_size
    return {objective.placeholder_token or "": range(first, first + objective.num_vectors)}


def requests(recipe: Recipe, prompts: Sequence[str]) -> list[Request]:
    """Prompts to be drawn, the k-th with seed k."""
    return [Request(p, seed=k, guidance_scale=recipe.validation_guidance) for k, p in enumerate(prompts)]


def class_images(pipe: Pipeline, recipe: Recipe, objective: TuneObjective) -> Path:
    """A folder of the model's own pictures of a class, drawn where it is not there yet."""
    prompt, count, side = objective.class_prompt or "", objective.num_class_images, recipe.folder.resolution
    stamp = digest(prompt, f"{count} {side} {recipe.seed}", pipe.model.hashes["unet"])[:8]
    folder = recipe.output_dir / f"class-images-{stamp}"
    if folder.is_dir():
        return folder
    asked = [Request(prompt, seed=keyed(recipe.seed, "class", k), height=side, width=side) for k in range(count)]
    with publish(folder) as draft, torch.no_grad():
        draft.mkdir()
        for k, picture in pipe.stream(asked):
            picture.save(draft / f"{k:04d}.png")
            (draft / f"{k:04d}.txt").write_text(prompt + "\n", encoding="utf-8")
    return folder


def row_weights(dataset: FolderDataset, objective: TuneObjective, folders: int) -> Tensor:
    """What each sample's loss counts: 1, and for the class's pictures, in the last of so many folders, the prior's."""
    weights = torch.ones(len(dataset.samples))
    if objective.prior_preservation:
        prior = torch.tensor([sample.key.startswith(f"{folders}:") for sample in dataset.samples])
        shown = torch.tensor([float(sample.repeats) for sample in dataset.samples])
        weights[prior] = objective.prior_loss_weight * (shown[~prior].sum() / shown[prior].sum())
    return weights


@torch.no_grad()
def moments(vae: AutoencoderKL, pixels: np.ndarray | Tensor) -> np.ndarray:
    """Mean and deviation of scaled latents, float16 [B, 2, C, h, w], of uint8 [B, H, W, 3]."""
    posterior = encode(vae, from_uint8(pixels).to(vae.device))
    return torch.stack(posterior, 1).half().cpu().numpy()
