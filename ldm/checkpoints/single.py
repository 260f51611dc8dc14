"""One file for a whole model, in its makers' layout (CompVis' LDM, Stability's SGM), and files of an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import detect, keys
from ldm.checkpoints.blueprint import ModelSpec, UNetProbe, ResolvedConfig
from ldm.checkpoints.directory import read_component
from ldm.checkpoints.families import FAMILIES, ModelFamily
from ldm.checkpoints.networks import WeightFile, build_meta_network, match_weight_files
from ldm.checkpoints.schedule import DIFFUSERS_PREDICTION_TYPES, parse_scheduler_config
from ldm.checkpoints.tensors import open_safetensors
from ldm.diffusion.spacing import choose
from ldm.nn import text
from ldm.nn.unet import UNetConfig
from ldm.nn.vae import get_vae_config, vae_scale_factor

LOSS_PREFIX = "loss."  # what an autoencoder was trained with, in its own file


def read_single_file(
    path: Path,
    family: str | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
    ema: bool = False,
) -> ModelSpec:
    """The model in a file; what the file does not say is its family's, which its tensors tell, or `family`.

    `ema` takes the U-Net's moving average. The file may lack an autoencoder, then the blueprint lacks its weights.
    ValueError names the file and what is missing, unknown or of another shape.
    """
    file = open_safetensors(path)
    tensors = file.meta_tensors()
    try:
        detect.detect_prediction(tensors, file.metadata, family=family, prediction=prediction)  # refuses contradictions
        record = FAMILIES[family or detect.detect_family(tensors)]
        entries = keys.map_single_file_keys(_add_missing_vae(tensors, record), record, ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    def told(probe: UNetProbe) -> ResolvedConfig:
        try:
            found = detect.detect_model(
                tensors,
                file.metadata,
                lambda: probe(parse_scheduler_config(record.scheduler).sde),
                family=family,
                prediction=prediction,
                zero_snr=zero_snr,
            )
            own = FAMILIES[found.family]  # of the same tensors, maybe of another native size
            config = family_scheduler_config(own, found.prediction, found.zero_snr)
            return ResolvedConfig(parse_scheduler_config(config), found.family, UNetConfig.from_dict(own.unet))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    return ModelSpec(
        {folder: build_meta_network(folder, config) for folder, config in record.configs.items()},
        ((WeightFile(file, {given: entry for given, entry in entries.items() if given in tensors}),),),
        {
            folder: partial(
                text.TextEncoder,
                tokenizer=text.build_clip_tokenizer(tower.pad_token_id),
                layer_idx=tower.layer_idx,
                final_norm=tower.final_norm,
                with_projection=tower.with_projection,
                num_dropped_layers=tower.num_dropped_layers,
            )
            for folder, tower in record.text_encoders.items()
        },
        told,
        record.generation_defaults,
        record.force_zeros_for_empty_prompt,
    )


def family_scheduler_config(family: ModelFamily, prediction: str, zero_snr: bool) -> dict[str, Any]:
    """The scheduler_config.json of a family whose network predicts so; only trailing steps begin at zero SNR."""
    changes = {
        "prediction_type": choose(DIFFUSERS_PREDICTION_TYPES, prediction, "prediction"),
        "rescale_betas_zero_snr": zero_snr,
    }
    return {**family.scheduler, **changes, **({"timestep_spacing": "trailing"} if zero_snr else {})}


def _add_missing_vae(tensors: Mapping[str, Tensor], family: ModelFamily) -> dict[str, Tensor]:
    """The tensors, and those of an autoencoder where there is none; ValueError names another network that lacks."""
    prefixes = {
        "unet": keys.UNET_PREFIX,
        "vae": keys.VAE_PREFIX,
        **{n: t.prefix for n, t in family.text_encoders.items()},
    }
    lacking = [n for n, prefix in prefixes.items() if not any(name.startswith(prefix) for name in tensors)]
    for folder in lacking:
        if folder != "vae":
            raise ValueError(f"no {folder} in it (nothing begins with {prefixes[folder]})")
    return {
        entry.original_key: entry.original_tensor
        for entry in keys.build_key_mappings(family)
        if entry.component in lacking
    } | {**tensors}


def replace_vae(model: ModelSpec, source: Path) -> ModelSpec:
    """The model with the autoencoder of a folder or a file instead, of the same latents.

    A folder has its own configuration, a file the model's; its names are diffusers' or LDM's, with or without their
    `first_stage_model.`
    """
    network, files = _read_vae(source, get_vae_config(model.networks["vae"]))
    ours, theirs = (
        f"of {a.config.latent_channels} channels, one for {vae_scale_factor(a)} pixels a side"
        for a in (model.networks["vae"], network)
    )
    if ours != theirs:
        raise ValueError(f"{source}: its latents are {theirs}; the model's are {ours}")
    groups = [
        tuple(
            source._replace(
                key_mappings={n: entry for n, entry in source.key_mappings.items() if entry.component != "vae"}
            )
            for source in group
        )
        for group in model.shard_groups
    ]
    kept = tuple(group for group in groups if any(source.key_mappings for source in group))
    return replace(
        model,
        networks={**model.networks, "vae": network},
        shard_groups=(*kept, files),
    )


def _read_vae(source: Path, config: Mapping[str, Any]) -> tuple[Any, tuple[WeightFile, ...]]:
    if source.is_dir():
        whole = not (source / "config.json").is_file() and (source / "vae").is_dir()
        return read_component(source / "vae" if whole else source, "vae")
    file = open_safetensors(source)
    network = build_meta_network("vae", config)
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in file.tensor_infos):
        return network, match_weight_files("vae", network, [file])
    tensors = {
        name: a for name, a in file.meta_tensors().items() if not name.startswith((LOSS_PREFIX, keys.EMA_PREFIX))
    }
    prefixed = {keys.VAE_PREFIX + name.removeprefix(keys.VAE_PREFIX): name for name in tensors}
    family = replace(FAMILIES["sd1"], vae=config)
    others = {
        entry.original_key: entry.original_tensor
        for entry in keys.build_key_mappings(family)
        if entry.component != "vae"
    }
    try:
        entries = keys.map_single_file_keys(
            {**others, **{new: tensors[name] for new, name in prefixed.items()}}, family
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return network, (WeightFile(file, {name: entries[new] for new, name in prefixed.items() if new in entries}),)
