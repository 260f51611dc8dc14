"""Which family a directory is of: a single file has no configuration, so it can stand for a family's alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.blueprint import Blueprint
from ldm.checkpoints.configs import TEXT_FIELDS, VAE_FIELDS
from ldm.checkpoints.directory import INDEX, TOKENIZERS
from ldm.checkpoints.families import FAMILIES, Family
from ldm.checkpoints.networks import skeleton
from ldm.checkpoints.schedule import PREDICTION_TYPES, table
from ldm.diffusion.spacing import choose
from ldm.nn import text
from ldm.nn.unet import UNetConfig

FREE = {"sample_size", "upcast_attention", "force_upcast"}  # no other numbers come of these
IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # the tokenizer's; old files have others
PROJECTION = {"projection_dim"}  # of a vector that is not made
NO_PLACE = "a single file has no place for it"


def chosen_family(model: Blueprint, scheduler: Mapping[str, Any], prediction: str, src: Path, asked: str | None) -> str:
    """The family whose configurations are the directory's; of two the one that predicts so.

    ValueError names what is unlike, as a single file could not say it.
    """
    choose(FAMILIES, asked, "family") if asked else None
    found = {}
    for name, family in FAMILIES.items() if asked is None else [(asked, FAMILIES[asked])]:
        found[name] = unlike(model, scheduler, family)
    if alike := [name for name, faults in found.items() if not faults]:
        usual = (n for n in alike if PREDICTION_TYPES[FAMILIES[n].scheduler["prediction_type"]] == prediction)
        return next(usual, alike[0])
    name = min(found, key=lambda name: (model.towers.keys() != FAMILIES[name].towers.keys(), len(found[name])))
    faults = ", ".join(found[name][:3])
    raise ValueError(f"{src}: of no family that a single file could stand for; unlike {name}: {faults}")


def unlike(model: Blueprint, scheduler: Mapping[str, Any], family: Family) -> list[str]:
    """Where a directory differs from a family: fields of configurations, tokenizers, the noise schedule."""
    if model.towers.keys() != family.towers.keys():
        return [f"text encoders {' and '.join(model.towers)}"]
    faults = []
    for folder, config in family.configs.items():
        ours, theirs = facts(folder, model.networks[folder].config), facts(folder, _resolved(folder, config))
        faults += [f"{folder} has {n} = {ours.get(n)}" for n in ours | theirs if ours.get(n) != theirs.get(n)]
    alphas, usual = table({**scheduler, "rescale_betas_zero_snr": False}), table(family.scheduler)
    if alphas.shape != usual.shape or not torch.allclose(alphas, usual, rtol=1e-6):
        faults.append("another noise schedule")
    for name, tower in family.towers.items():
        own, known = model.towers[name](None).tokenizer, text.clip_tokenizer(tower.pad)
        if own.get_vocab() != known.get_vocab() or own.pad_token_id != known.pad_token_id:
            faults.append(f"another vocabulary or padding in {TOKENIZERS[name]}")
    return faults


def facts(folder: str, config: Any) -> dict[str, Any]:
    """The fields of a network's configuration that its numbers depend on, lists for tuples."""
    if folder == "unet":
        found = asdict(config)
    elif folder == "vae":
        found = {name: value for name, value in config.items() if name in VAE_FIELDS.heeded}
    else:
        moot = IDS if folder == "text_encoder_2" else IDS | PROJECTION
        found = {name: getattr(config, name, None) for name in sorted({*TEXT_FIELDS.heeded, "hidden_act"} - moot)}
    return json.loads(json.dumps({name: value for name, value in found.items() if name not in FREE}))


def _resolved(folder: str, config: Mapping[str, Any]) -> Any:
    """A family's configuration with the defaults of its class."""
    return UNetConfig.from_dict(config) if folder == "unet" else skeleton(folder, config).config


def unsaid(model: Blueprint, family: Family, src: Path) -> dict[str, str]:
    """What of a directory does not go into a single file, and what such a file usually has and a directory lacks."""
    known = {INDEX, "scheduler", *model.networks, *TOKENIZERS.values()}
    found = {path.name: NO_PLACE for path in sorted(src.iterdir()) if path.name not in known}
    for source in (source for group in model.groups for source in group):
        for name in source.file.slots.keys() - source.entries.keys():
            found[f"{source.file.path.parent.name}/{name}"] = "the numbers 0 to 76"
    for tower in family.towers.values():
        if tower.dropped:
            found[f"{tower.prefix}transformer.resblocks.{tower.config['num_hidden_layers']}.*"] = (
                "a directory does not have it, nothing reads it; it is not made up"
            )
    if model.zero_negative != family.zero_negative:
        found["force_zeros_for_empty_prompt"] = NO_PLACE
    return found
