"""The training of picto's U-Net from scratch, on latents of scenes that are encoded once and cached on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.checkpoints.formats import MODEL_INDEX, Checkpoint, load_component
from ldm.checkpoints.layouts import load_checked_tokenizer
from ldm.checkpoints.schedule import build_scheduler_config, parse_scheduler_config
from ldm.checkpoints.tensors import save_module
from ldm.conditioning import Conditioning
from ldm.config import DiffusionObjective, Recipe
from ldm.data.batch_sampler import SampleKey
from ldm.diffusion.prediction import PREDICTIONS
from ldm.errors import choose
from ldm.files import atomic_write, write_json
from ldm.hardware import preferred_dtype, to_device
from ldm.image_io import from_uint8
from ldm.nn.text_encoders import TextEncoder, warn_about_truncation
from ldm.nn.unet import UNet, UNetConfig
from ldm.nn.vae import AutoencoderKL, encode_images
from ldm.picto.scenes import SceneDataset, Split, make_scene_dataset
from ldm.rng import torch_seed
from ldm.train.diffusion import DiffusionTask
from ldm.train.score_matching import sample_uniform
from ldm.train.task import Batch
from ldm.train.trainable import TokenizedCaptions, encode_captions

NUM_VALIDATION_LATENTS = 512


class SceneLatents:
    """Posteriors, float16 [N, C, h, w] and memory-mapped, and captions of N scenes, from a folder of the cache."""

    def __init__(self, folder: Path) -> None:
        self.mean, self.std = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("mean", "std"))
        self.captions: list[str] = json.loads((folder / "captions.json").read_text(encoding="utf-8"))

    def moments(self, indices: Sequence[int]) -> Tensor:
        """Mean and standard deviation of some scenes, float16 [B, 2, C, h, w]."""
        return torch.from_numpy(np.stack([a[list(indices)] for a in (self.mean, self.std)], 1))


class SceneLatentDataset:
    """Latents of a recipe's scenes, as `LatentDataset` says, shuffled each epoch, with some captions dropped."""

    independent_levels = True

    def __init__(self, recipe: Recipe, caption_dropout: float, train: SceneLatents, validation: SceneLatents) -> None:
        self.recipe, self.caption_dropout = recipe, caption_dropout
        self.train, self.validation = train, validation

    def load_batch(self, step: int, rows: range) -> tuple[Sequence[SampleKey], Batch]:
        seed, size = self.recipe.seed, self.recipe.train_batch_size
        keys = shuffle_sample_keys(len(self.train.captions), seed, step * size, size)
        part = keys[rows.start : rows.stop]
        indices = [int(key.sample_id) for key in part]
        dropped = sample_uniform(seed, part, "caption") < self.caption_dropout
        captions = ["" if drop else self.train.captions[i] for drop, i in zip(dropped, indices, strict=True)]
        return keys, {"latents": self.train.moments(indices), "captions": captions}

    def validation_batches(self) -> Iterator[tuple[Tensor, Batch, Sequence[int]]]:
        """64 scenes each, every scene at one level, with noise seeded by its number."""
        for rows in range(NUM_VALIDATION_LATENTS // 64):
            indices = range(64 * rows, 64 * (rows + 1))
            captions = [self.validation.captions[i] for i in indices]
            yield self.validation.moments(indices)[:, 0].float(), {"captions": captions}, indices


def shuffle_sample_keys(num_samples: int, seed: int, start: int, count: int) -> list[SampleKey]:
    """The keys of samples number `start` .. `start + count - 1` that are seen: all once per epoch, shuffled."""
    places = (divmod(k, num_samples) for k in range(start, start + count))
    return [SampleKey(int(_epoch_permutation(num_samples, seed, epoch)[place]), epoch) for epoch, place in places]


@lru_cache(maxsize=2)
def _epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(num_samples)


class SceneDiffusionTask(DiffusionTask):
    """A random U-Net, or one of a folder, trained with the frozen VAE and text encoder of other folders."""

    model: UNet
    dataset: SceneLatentDataset

    def __init__(
        self,
        recipe: Recipe,
        objective: DiffusionObjective,
        device: torch.device,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        dtype = preferred_dtype(device)
        self.objective, tokenizer = objective, load_checked_tokenizer(objective.text / "tokenizer")
        text_encoder = load_component(objective.text / "text_encoder", "text_encoder").to(device, dtype).eval()
        vae = to_device(load_component(objective.vae, "vae"), device, dtype).eval()
        model = initialize_unet(objective, recipe.seed)
        self.scheduler_config = build_scheduler_config(objective.schedule, objective.prediction)
        if objective.rescale_betas_zero_snr:
            if objective.prediction == "eps":
                raise ValueError("rescale_betas_zero_snr: noise cannot be predicted from pure noise: choose v or x0")
            self.scheduler_config["rescale_betas_zero_snr"] = True
        self.generation_defaults = {
            "num_inference_steps": 30,
            "guidance_scale": recipe.validation_guidance,
            "sampler": "dpmpp_2m",
            "spacing": "trailing",
        }
        full_model = Checkpoint(
            model,
            vae,
            (TextEncoder(text_encoder, tokenizer),),
            parse_scheduler_config(self.scheduler_config).sde,
            choose(PREDICTIONS, objective.prediction, "prediction"),
            self.generation_defaults | {"num_inference_steps": 20},  # for the samples of a validation
        )
        data = recipe.scene_data

        def load_latents(split: Split, count: int, report: Callable[[int], None] = lambda done: None) -> SceneLatents:
            scenes, cache = make_scene_dataset(data, recipe.seed, split), recipe.output_dir.parent / "cache"
            return SceneLatents(cache_scene_latents(scenes, count, objective.vae, cache, vae, report))

        train = load_latents("train", data.latents, lambda done: on_progress(done, data.latents))
        validation = load_latents("held-out", NUM_VALIDATION_LATENTS)
        warn_about_truncation(tokenizer, [*train.captions, *validation.captions])
        dataset = SceneLatentDataset(recipe, objective.caption_dropout, train, validation)

        @torch.no_grad()
        def encode_text(captions: TokenizedCaptions) -> Conditioning:
            return encode_captions(full_model, captions)

        super().__init__(recipe, objective, model, full_model, dataset, encode_text, {})

    def export(self, folder: Path) -> None:
        """Write the whole model in diffusers' directory layout."""
        for name in ("tokenizer", "text_encoder", "image_encoder"):
            if (self.objective.text / name).is_dir():
                shutil.copytree(self.objective.text / name, folder / name)
        shutil.copytree(self.objective.vae, folder / "vae")
        save_module(self.model, self.model.config.to_dict(), folder / "unet")
        (folder / "scheduler").mkdir()
        write_json(self.scheduler_config, folder / "scheduler" / "scheduler_config.json")
        write_json(self.generation_defaults, folder / "generation_config.json")
        write_json(MODEL_INDEX, folder / "model_index.json")


def initialize_unet(objective: DiffusionObjective, seed: int) -> UNet:
    """The initial U-Net: that of a folder, or random weights by the seed."""
    if isinstance(objective.unet, Path):
        unet = load_component(objective.unet, "unet").train()
        unet.attention = objective.attention
        return unet
    torch.manual_seed(torch_seed(seed))
    return UNet(UNetConfig.from_dict(objective.unet), attention=objective.attention)


def cache_scene_latents(
    scenes: SceneDataset,
    num_scenes: int,
    vae_folder: Path,
    cache_dir: Path,
    vae: AutoencoderKL,
    on_progress: Callable[[int], None],
) -> Path:
    """The folder with the latents of scenes 0 .. num_scenes - 1, which are encoded unless it exists.

    Its name covers the files of the VAE, the sprites and the arguments of the scenes.
    """
    digest = hashlib.sha256(json.dumps([scenes.cache_key(), num_scenes]).encode())
    for file in sorted(vae_folder.iterdir()):
        digest.update(file.read_bytes())
    folder = cache_dir / f"latents-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        with atomic_write(folder) as draft, torch.no_grad():
            draft.mkdir()
            _encode_scenes(scenes, num_scenes, vae, draft, on_progress)
    return folder


class _FirstScenes(Dataset):
    def __init__(self, scenes: SceneDataset, count: int) -> None:
        self.scenes, self.count = scenes, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> tuple[np.ndarray, str]:
        return self.scenes[k]


def _encode_scenes(
    scenes: SceneDataset, num_scenes: int, vae: AutoencoderKL, folder: Path, on_progress: Callable[[int], None]
) -> None:
    batches = DataLoader(_FirstScenes(scenes, num_scenes), batch_size=64, num_workers=1, collate_fn=list)
    parts: list[list[Tensor]] = []
    captions: list[str] = []
    for batch in batches:
        posterior = encode_images(vae, from_uint8(np.stack([scene.image for scene in batch])).to(vae.device))
        parts.append([a.half().cpu() for a in posterior])
        captions += [scene.caption for scene in batch]
        on_progress(len(captions))
    for name, rows in zip(("mean", "std"), zip(*parts, strict=True), strict=True):
        np.save(folder / f"{name}.npy", torch.cat(rows).numpy())
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
