"""One file for a whole model, in its makers' layout (CompVis' LDM, Stability's SGM), and files of an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import detect, keys
from ldm.checkpoints.blueprint import Blueprint, Probe, Told
from ldm.checkpoints.directory import component
from ldm.checkpoints.families import FAMILIES, Family
from ldm.checkpoints.networks import Source, skeleton, sources
from ldm.checkpoints.schedule import DIFFUSERS_TYPES, schedule_of
from ldm.checkpoints.tensors import open_tensors
from ldm.diffusion.spacing import choose
from ldm.nn import text
from ldm.nn.unet import UNetConfig
from ldm.nn.vae import config_of, downscale

LOSS = "loss."  # what an autoencoder was trained with, in its own file


def read_single(
    path: Path,
    family: str | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
    ema: bool = False,
) -> Blueprint:
    """The model in a file; what the file does not say is its family's, which its tensors tell, or `family`.

    `ema` takes the U-Net's moving average. The file may lack an autoencoder, then the blueprint lacks its weights.
    ValueError names the file and what is missing, unknown or of another shape.
    """
    file = open_tensors(path)
    tensors = file.meta()
    try:
        detect.told(tensors, file.metadata, family=family, prediction=prediction)  # refuses contradictions
        record = FAMILIES[family or detect.family_of(tensors)]
        entries = keys.plan(_completed(tensors, record), record, ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def told(probe: Probe) -> Told:
        try:
            found = detect.verdict(
                tensors,
                file.metadata,
                lambda: probe(schedule_of(record.scheduler).sde),
                family=family,
                prediction=prediction,
                zero_snr=zero_snr,
            )
            own = FAMILIES[found.family]  # of the same tensors, maybe of another native size
            config = scheduler_config(own, found.prediction, found.zero_snr)
            return Told(schedule_of(config), found.family, UNetConfig.from_dict(own.unet))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    return Blueprint(
        {folder: skeleton(folder, config) for folder, config in record.configs.items()},
        ((Source(file, {given: entry for given, entry in entries.items() if given in tensors}),),),
        {
            folder: partial(
                text.Tower,
                tokenizer=text.clip_tokenizer(tower.pad),
                layer=tower.layer,
                final_norm=tower.final_norm,
                projected=tower.projected,
                dropped=tower.dropped,
            )
            for folder, tower in record.towers.items()
        },
        told,
        record.defaults,
        record.zero_negative,
    )


def scheduler_config(family: Family, prediction: str, zero_snr: bool) -> dict[str, Any]:
    """The scheduler_config.json of a family whose network predicts so; only trailing steps begin at zero SNR."""
    changes = {"prediction_type": choose(DIFFUSERS_TYPES, prediction, "prediction"), "rescale_betas_zero_snr": zero_snr}
    return {**family.scheduler, **changes, **({"timestep_spacing": "trailing"} if zero_snr else {})}


def _completed(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors, and those of an autoencoder where there is none; ValueError names another network that lacks."""
    prefixes = {"unet": keys.UNET_PREFIX, "vae": keys.VAE_PREFIX, **{n: t.prefix for n, t in family.towers.items()}}
    lacking = [n for n, prefix in prefixes.items() if not any(name.startswith(prefix) for name in tensors)]
    for folder in lacking:
        if folder != "vae":
            raise ValueError(f"no {folder} in it (nothing begins with {prefixes[folder]})")
    return {entry.single: entry.whole for entry in keys.layout(family) if entry.folder in lacking} | {**tensors}


def with_vae(model: Blueprint, source: Path) -> Blueprint:
    """The model with the autoencoder of a folder or a file instead, of the same latents.

    A folder has its own configuration, a file the model's; its names are diffusers' or LDM's, with or without their
    `first_stage_model.`
    """
    network, files = _autoencoder(source, config_of(model.networks["vae"]))
    ours, theirs = (
        f"of {a.config.latent_channels} channels, one for {downscale(a)} pixels a side"
        for a in (model.networks["vae"], network)
    )
    if ours != theirs:
        raise ValueError(f"{source}: its latents are {theirs}; the model's are {ours}")
    groups = [
        tuple(
            source._replace(entries={n: entry for n, entry in source.entries.items() if entry.folder != "vae"})
            for source in group
        )
        for group in model.groups
    ]
    kept = tuple(group for group in groups if any(source.entries for source in group))
    return replace(
        model,
        networks={**model.networks, "vae": network},
        groups=(*kept, files),
    )


def _autoencoder(source: Path, config: Mapping[str, Any]) -> tuple[Any, tuple[Source, ...]]:
    if source.is_dir():
        whole = not (source / "config.json").is_file() and (source / "vae").is_dir()
        return component(source / "vae" if whole else source, "vae")
    file = open_tensors(source)
    network = skeleton("vae", config)
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in file.slots):
        return network, sources("vae", network, [file])
    tensors = {name: a for name, a in file.meta().items() if not name.startswith((LOSS, keys.EMA_PREFIX))}
    prefixed = {keys.VAE_PREFIX + name.removeprefix(keys.VAE_PREFIX): name for name in tensors}
    family = replace(FAMILIES["sd1"], vae=config)
    others = {entry.single: entry.whole for entry in keys.layout(family) if entry.folder != "vae"}
    try:
        entries = keys.plan({**others, **{new: tensors[name] for new, name in prefixed.items()}}, family)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return network, (Source(file, {name: entries[new] for new, name in prefixed.items() if new in entries}),)
