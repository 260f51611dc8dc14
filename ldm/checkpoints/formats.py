"""Files and modules: diffusers' directory layout, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoints.files import DIFFUSERS, TRANSFORMERS, fill, place, read_json, sha256
from ldm.checkpoints.schedule import load_schedule
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.sde import VPSDE
from ldm.nn import text, vae
from ldm.nn.unet import UNet, UNetConfig

DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 7.5}  # diffusers' StableDiffusionPipeline
MODEL_INDEX = {  # what makes a folder a diffusers.StableDiffusionPipeline
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TEXT_ENCODERS = "text_encoder", "text_encoder_2"
NETWORKS = {"unet": DIFFUSERS, "vae": DIFFUSERS, "text_encoder": TRANSFORMERS}  # folder: file of weights


@dataclass(frozen=True)
class Checkpoint:
    """A whole text-to-image model: its networks, what the U-Net predicts, and under which SDE.

    `defaults` are the settings that its makers recommend; `hashes` the SHA-256 of each network's file.
    """

    unet: UNet
    vae: vae.AutoencoderKL
    towers: tuple[text.Tower, ...]
    sde: VPSDE
    prediction: Prediction
    defaults: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULTS))
    hashes: Mapping[str, str] = field(default_factory=dict)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders."""
        towers = {name: tower.model for name, tower in zip(TEXT_ENCODERS, self.towers, strict=False)}
        return {"unet": self.unet, "vae": self.vae, **towers}


def load_directory(folder: Path, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """A model in diffusers' directory layout; every tensor is accounted for.

    Raises ValueError in one line that names the file where something is missing, corrupt or of another shape.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: not a model (no model_index.json)")
    sde, prediction = load_schedule(folder / "scheduler" / "scheduler_config.json")
    unet, vae = load_unet(folder / "unet"), load_vae(folder / "vae")
    tower = text.Tower(load_text(folder / "text_encoder"), load_tokenizer(folder / "tokenizer"))
    for network in (unet, vae, tower.model):
        place(network, device, dtype).eval().requires_grad_(False)
    advice = folder / "generation_config.json"
    recommended = read_json(advice) if advice.is_file() else {}
    return Checkpoint(
        unet,
        vae,
        (tower,),
        sde,
        prediction,
        {name: recommended.get(name, value) for name, value in DEFAULTS.items()},
        {name: sha256(folder / name / file) for name, file in NETWORKS.items()},
    )


def load_unet(folder: Path) -> UNet:
    """Our U-Net from a `unet/` folder."""
    config = read_json(folder / "config.json")
    try:
        unet = UNet(UNetConfig.from_dict(config))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    return fill(unet, folder / DIFFUSERS)


def load_vae(folder: Path) -> vae.AutoencoderKL:
    """diffusers' autoencoder from a `vae/` folder."""
    return fill(vae.autoencoder(read_json(folder / "config.json")), folder / DIFFUSERS)


def load_text(folder: Path) -> text.CLIPTextModel:
    """transformers' text tower from a `text_encoder/` folder; files of transformers 4 name it `text_model.*`."""
    return fill(text.text_model(read_json(folder / "config.json")), folder / TRANSFORMERS, prefix="text_model.")


def load_tokenizer(folder: Path) -> text.CLIPTokenizer:
    """CLIP's tokenizer from a `tokenizer/` folder."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file")
    return text.load_tokenizer(folder)
