"""Latents of a fixed number of scenes, encoded once and kept on disk under the hash of what made them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.checkpoints.formats import load_component
from ldm.files import atomic_write
from ldm.hardware import preferred_dtype, to_device
from ldm.image_io import from_uint8
from ldm.nn.vae import Posterior, encode_images
from ldm.picto.scenes import SceneDataset


@dataclass(frozen=True)
class SceneLatents:
    """Posteriors [N, C, h, w] (float16, memory-mapped) and captions of N scenes."""

    mean: np.ndarray
    std: np.ndarray
    captions: Sequence[str]

    def __len__(self) -> int:
        return len(self.captions)

    def posterior(self, indices: np.ndarray) -> Posterior:
        """The posteriors of some scenes, float32."""
        return Posterior(*(torch.from_numpy(a[indices].astype(np.float32)) for a in (self.mean, self.std)))


def cache_scene_latents(
    scenes: SceneDataset,
    num_scenes: int,
    vae_folder: Path,
    cache_dir: Path,
    device: torch.device,
    on_progress: Callable[[int], None] = lambda done: None,
) -> SceneLatents:
    """The latents of scenes 0 .. count - 1 under the VAE in a folder, from the cache where they are there already.

    `said(done)` hears how many are done. The key covers the VAE's files, the sprites and the scenes' arguments.
    """
    folder = cache_dir / f"latents-{scene_latents_key(scenes, num_scenes, vae_folder)}"
    if not folder.is_dir():
        with atomic_write(folder) as draft, torch.no_grad():
            draft.mkdir()
            _encode_scenes(scenes, num_scenes, vae_folder, draft, device, on_progress)
    mean, std = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in Posterior._fields)
    return SceneLatents(mean, std, json.loads((folder / "captions.json").read_text(encoding="utf-8")))


def scene_latents_key(scenes: SceneDataset, num_scenes: int, vae_folder: Path) -> str:
    """Sixteen hex digits of SHA-256 over everything that the latents depend on."""
    digest = hashlib.sha256(json.dumps([scenes.cache_key(), num_scenes]).encode())
    for file in sorted(vae_folder.iterdir()):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class _SceneImages(Dataset):
    def __init__(self, scenes: SceneDataset, count: int) -> None:
        self.scenes, self.count = scenes, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> tuple[np.ndarray, str]:
        return self.scenes[k].image, self.scenes[k].caption


def _collate(rows: Sequence[tuple[np.ndarray, str]]) -> tuple[tuple[np.ndarray, ...], tuple[str, ...]]:
    images, captions = zip(*rows, strict=True)
    return images, captions


def _encode_scenes(
    scenes: SceneDataset,
    num_scenes: int,
    vae_folder: Path,
    folder: Path,
    device: torch.device,
    on_progress: Callable[[int], None],
) -> None:
    vae = to_device(load_component(vae_folder, "vae"), device, preferred_dtype(device)).eval()
    drawn = DataLoader(_SceneImages(scenes, num_scenes), batch_size=64, num_workers=1, collate_fn=_collate)
    parts: list[Sequence[Tensor]] = []
    captions: list[str] = []
    for images, texts in drawn:
        posterior = encode_images(vae, from_uint8(np.stack(images)).to(device))
        parts.append([a.half().cpu() for a in posterior])
        captions += texts
        on_progress(len(captions))
    for name, rows in zip(Posterior._fields, zip(*parts, strict=True), strict=True):
        np.save(folder / f"{name}.npy", torch.cat(rows).numpy())
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
