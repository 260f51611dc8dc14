"""Sprites and images to train on, and a recipe file of every kind."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from trainings import COMMON, objective

from ldm.picto import autoencoder, clip, diffusion
from ldm.picto.sprites import Sprite, write_sprites


@pytest.fixture(scope="session")
def sprites(tmp_path_factory):
    """Discs in eight colours and four styles: every kind of scene and both splits."""
    folder = tmp_path_factory.mktemp("sprites")
    y, x = np.mgrid[:32, :32] - 15.5
    records, pixels = [], []
    for s, style in enumerate(("noto", "flat", "3d", "blob")):
        for k in range(60):
            rgba = np.zeros((32, 32, 4), np.uint8)
            rgba[x**2 + y**2 < (10 + s) ** 2] = (*np.random.default_rng(k).integers(0, 255, 3), 255)
            records.append(Sprite(f"thing{k}", f"{k}", style, (f"thing{k}",), (), "objects"))
            pixels.append(rgba)
    write_sprites(folder, records, pixels, 32)
    return folder


@pytest.fixture
def recipe_file(sprites, tiny, tmp_path, tmp_path_factory, monkeypatch):
    """A file with a recipe; latents are cached beside its folder, once for all tests, and few images are held out."""
    for module, name in (
        (autoencoder, "NUM_VALIDATION_IMAGES"),
        (clip, "NUM_VALIDATION_PAIRS"),
        (diffusion, "NUM_VALIDATION_LATENTS"),
    ):
        monkeypatch.setattr(module, name, 64)
    cache = tmp_path_factory.getbasetemp() / "latents-cache"
    cache.mkdir(exist_ok=True)
    (tmp_path / "cache").symlink_to(cache)

    def write(kind, folder="run", **changes):
        values = {
            **COMMON,
            "output_dir": str(tmp_path / folder),
            "data": {"sprites": str(sprites), "size": 32, "latents": 64 if kind == "diffusion" else 0},
            "objective": {"kind": kind, **objective(kind, tiny)},
            **changes,
        }
        path = tmp_path / f"{kind}-{folder}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def tuning(tiny, tmp_path):
    """Writes a recipe that tunes the tiny model on six squares and four wide images, some to be cropped, of patches.

    They make two and a half batches.
    """
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    names = ["red", "blue", "green", "yellow", "black", "white", "gray", "purple", "pink", "brown"]
    for k, name in enumerate(names):
        size = (32, 32) if k < 3 else (44, 36) if k < 6 else (48, 16)
        patches = np.random.default_rng(k).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
        Image.fromarray(patches).resize(size, Image.Resampling.NEAREST).save(pictures / f"{name}.png")
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"a {n} zorb"}) for n in names]
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    sizes = {"resolution": 32, "min_bucket_reso": 16, "max_bucket_reso": 48, "bucket_reso_steps": 16}
    shown = {"center_crop": True, "random_flip": True, **sizes}

    def write(folder="run", data=None, changes=None, **objective):
        values = {
            **COMMON,
            "output_dir": str(tmp_path / folder),
            "objective": {"kind": "tune", "pretrained_model_name_or_path": str(tiny), **objective},
            "data": {"train_data_dir": str(pictures), **shown, **(data or {})},
            "validation_prompts": ["a red zorb"],
            **(changes or {}),
        }
        path = tmp_path / f"tune-{folder}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write
