"""Which family a directory is of: a single file has no configuration, so it can stand for a family's alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.configs import TEXT_ENCODER_CONFIG_SCHEMA, VAE_CONFIG_SCHEMA
from ldm.checkpoints.families import FAMILIES, ModelFamily
from ldm.checkpoints.layouts import MODEL_INDEX_NAME, TOKENIZER_FOLDERS
from ldm.checkpoints.networks import ModelSpec, build_meta_network
from ldm.checkpoints.schedule import PREDICTION_TYPES, compute_alphas_cumprod
from ldm.errors import choose
from ldm.nn import text_encoders
from ldm.nn.unet import UNetConfig

IGNORED_CONFIG_FIELDS = {"sample_size", "upcast_attention", "force_upcast"}  # no other numbers come of these
TOKEN_ID_FIELDS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # the tokenizer's; old files have others
PROJECTION_FIELDS = {"projection_dim"}  # of a vector that is not made
NOT_IN_SINGLE_FILE = "a single file has no place for it"


def match_family(
    model: ModelSpec, scheduler: Mapping[str, Any], prediction: str, src: Path, requested: str | None
) -> str:
    """The family whose configurations are the directory's; of two the one that predicts so.

    ValueError names what is unlike, as a single file could not say it.
    """
    choose(FAMILIES, requested, "family") if requested else None
    found = {}
    for name, family in FAMILIES.items() if requested is None else [(requested, FAMILIES[requested])]:
        found[name] = find_differences(model, scheduler, family)
    if alike := [name for name, faults in found.items() if not faults]:
        usual = (n for n in alike if PREDICTION_TYPES[FAMILIES[n].scheduler["prediction_type"]] == prediction)
        return next(usual, alike[0])
    name = min(
        found,
        key=lambda name: (model.text_encoder_factories.keys() != FAMILIES[name].text_encoders.keys(), len(found[name])),
    )
    faults = ", ".join(found[name][:3])
    raise ValueError(f"{src}: of no family that a single file could stand for; unlike {name}: {faults}")


def find_differences(model: ModelSpec, scheduler: Mapping[str, Any], family: ModelFamily) -> list[str]:
    """Where a directory differs from a family: fields of configurations, tokenizers, the noise schedule."""
    if model.text_encoder_factories.keys() != family.text_encoders.keys():
        return [f"text encoders {' and '.join(model.text_encoder_factories)}"]
    faults = []
    for folder, config in family.configs.items():
        ours, theirs = (
            comparable_config(folder, model.networks[folder].config),
            comparable_config(folder, _with_class_defaults(folder, config)),
        )
        faults += [f"{folder} has {n} = {ours.get(n)}" for n in ours | theirs if ours.get(n) != theirs.get(n)]
    alphas, usual = (
        compute_alphas_cumprod({**scheduler, "rescale_betas_zero_snr": False}),
        compute_alphas_cumprod(family.scheduler),
    )
    if alphas.shape != usual.shape or not torch.allclose(alphas, usual, rtol=1e-6):
        faults.append("another noise schedule")
    for name, tower in family.text_encoders.items():
        own, known = (
            model.text_encoder_factories[name](None).tokenizer,
            text_encoders.build_clip_tokenizer(tower.pad_token_id),
        )
        if own.get_vocab() != known.get_vocab() or own.pad_token_id != known.pad_token_id:
            faults.append(f"another vocabulary or padding in {TOKENIZER_FOLDERS[name]}")
    return faults


def comparable_config(component: str, config: Any) -> dict[str, Any]:
    """The fields of a network's configuration that its numbers depend on, lists for tuples."""
    if component == "unet":
        found = asdict(config)
    elif component == "vae":
        found = {name: value for name, value in config.items() if name in VAE_CONFIG_SCHEMA.supported.split()}
    else:
        moot = TOKEN_ID_FIELDS if component == "text_encoder_2" else TOKEN_ID_FIELDS | PROJECTION_FIELDS
        found = {
            name: getattr(config, name, None)
            for name in sorted({*TEXT_ENCODER_CONFIG_SCHEMA.supported.split(), "hidden_act"} - moot)
        }
    return json.loads(json.dumps({name: value for name, value in found.items() if name not in IGNORED_CONFIG_FIELDS}))


def _with_class_defaults(component: str, config: Mapping[str, Any]) -> Any:
    """A family's configuration with the defaults of its class."""
    return UNetConfig.from_dict(config) if component == "unet" else build_meta_network(component, config).config


def list_omissions(model: ModelSpec, family: ModelFamily, src: Path) -> dict[str, str]:
    """What of a directory does not go into a single file, and what such a file usually has and a directory lacks."""
    known = {MODEL_INDEX_NAME, "scheduler", *model.networks, *TOKENIZER_FOLDERS.values()}
    found = {path.name: NOT_IN_SINGLE_FILE for path in sorted(src.iterdir()) if path.name not in known}
    for source in (source for group in model.shard_groups for source in group):
        for name in source.file.tensor_infos.keys() - source.key_mappings.keys():
            found[f"{source.file.path.parent.name}/{name}"] = "the numbers 0 to 76"
    for tower in family.text_encoders.values():
        if tower.num_dropped_layers:
            found[f"{tower.prefix}transformer.resblocks.{tower.config['num_hidden_layers']}.*"] = (
                "a directory does not have it, nothing reads it; it is not made up"
            )
    if model.force_zeros_for_empty_prompt != family.force_zeros_for_empty_prompt:
        found["force_zeros_for_empty_prompt"] = NOT_IN_SINGLE_FILE
    return found
