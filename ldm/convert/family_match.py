"""Finds the family of a directory: a single file has no configurations, so it can stand only for a known family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints.families import FAMILIES, TEXT_ENCODER_CONFIG_SCHEMA, ModelFamily
from ldm.checkpoints.keys import build_meta_network, original_unet_tensors
from ldm.checkpoints.layouts import MODEL_INDEX_NAME, TOKENIZER_FOLDERS
from ldm.checkpoints.networks import POSITION_IDS, ModelSpec
from ldm.checkpoints.schedule import PREDICTION_TYPES, compute_alphas_cumprod
from ldm.checkpoints.single_file import with_unet_structure
from ldm.errors import choose, list_some
from ldm.nn.tokenizer import build_clip_tokenizer
from ldm.nn.unet import UNetConfig

IGNORED_CONFIG_FIELDS = {  # fields that change no result; token ids are the tokenizer's, and old files have others
    "unet": {"sample_size", "upcast_attention"},
    "vae": {"sample_size", "force_upcast"},
    "text_encoder": {"bos_token_id", "eos_token_id", "pad_token_id", "projection_dim"},  # it has no projection
    "text_encoder_2": {"bos_token_id", "eos_token_id", "pad_token_id"},
}
NOT_IN_SINGLE_FILE = "a single file has no place for it"


def match_family(
    model: ModelSpec, scheduler: Mapping[str, Any], prediction: str, src: Path, requested: str | None
) -> str:
    """The family that a directory equals, all or the requested one considered; of two the one with its prediction.

    ValueError names the differences from the nearest family.
    """
    families = FAMILIES if requested is None else {requested: choose(FAMILIES, requested, "family")}
    differences = {name: find_differences(model, scheduler, family) for name, family in families.items()}
    if equal := [name for name, found in differences.items() if not found]:
        same = (n for n in equal if PREDICTION_TYPES[FAMILIES[n].scheduler["prediction_type"]] == prediction)
        return next(same, equal[0])
    components = model.text_encoder_factories.keys()
    name = min(families, key=lambda n: (components != FAMILIES[n].text_encoders.keys(), len(differences[n])))
    differing = f"differences from {name}: {list_some(differences[name])}"
    raise ValueError(f"{src}: matches no known family, which a single file needs; {differing}")


def find_differences(model: ModelSpec, scheduler: Mapping[str, Any], family: ModelFamily) -> list[str]:
    """Where a directory differs from a family: configuration fields, noise schedule, tokenizers."""
    if model.text_encoder_factories.keys() != family.text_encoders.keys():
        return [f"text encoders {' and '.join(model.text_encoder_factories)}"]
    differences = []
    family = match_structure(family, model)
    for name, config in family.configs.items():
        actual = _comparable_config(name, model.networks[name].config)
        full = UNetConfig.from_dict(config) if name == "unet" else build_meta_network(name, config).config
        expected = _comparable_config(name, full)  # with the defaults of its class
        differences += [
            f"{name} has {f} = {actual.get(f)}" for f in actual | expected if actual.get(f) != expected.get(f)
        ]
    alphas = compute_alphas_cumprod({**scheduler, "rescale_betas_zero_snr": False})
    expected_alphas = compute_alphas_cumprod(family.scheduler)
    if alphas.shape != expected_alphas.shape or not torch.allclose(alphas, expected_alphas, rtol=1e-6):
        differences.append("another noise schedule")
    for name, spec in family.text_encoders.items():
        tokenizer = model.text_encoder_factories[name](None).tokenizer
        usual = build_clip_tokenizer(spec.pad_token_id)
        if tokenizer.vocab != usual.vocab or tokenizer.pad_token_id != usual.pad_token_id:
            differences.append(f"another vocabulary or padding in {TOKENIZER_FOLDERS[name]}")
    return differences


def match_structure(family: ModelFamily, model: ModelSpec) -> ModelFamily:
    """The family with the structure that a single file tells of the directory's U-Net, by its tensors."""
    config = model.networks["unet"].config
    if config == UNetConfig.from_dict(family.unet):
        return family
    try:
        return with_unet_structure(family, original_unet_tensors(config.to_dict()))
    except Exception:  # no network can be built from it: its fields are compared as they are
        return family


def _comparable_config(component: str, config: Any) -> dict[str, Any]:
    """The fields of a network's configuration that its results depend on, with lists for tuples."""
    if component in ("unet", "vae"):
        values = asdict(config)
    else:
        names = [*TEXT_ENCODER_CONFIG_SCHEMA.supported.split(), "hidden_act"]
        values = {name: getattr(config, name, None) for name in names}
    ignored = IGNORED_CONFIG_FIELDS[component]
    return json.loads(json.dumps({name: value for name, value in values.items() if name not in ignored}))


def list_omissions(model: ModelSpec, family: ModelFamily, src: Path) -> dict[str, str]:
    """What a single file cannot hold of a directory, or usually has and the directory lacks, with the reasons."""
    read = {MODEL_INDEX_NAME, "scheduler", *model.networks, *TOKENIZER_FOLDERS.values()}
    omissions = {path.name: NOT_IN_SINGLE_FILE for path in sorted(src.iterdir()) if path.name not in read}
    for file, key_mappings in model.weight_files:
        for name in file.tensor_infos.keys() - key_mappings.keys():
            reason = (
                "the numbers 0 to 76"
                if name.endswith(POSITION_IDS)
                else "not read: a part of CLIP, a scale or a single number"
            )
            omissions[f"{file.path.parent.name}/{name}"] = reason
    for spec in family.text_encoders.values():
        if spec.num_dropped_layers:
            name = f"{spec.prefix}transformer.resblocks.{spec.config['num_hidden_layers']}.*"
            omissions[name] = "not in a directory, and read by nothing"
    if model.force_zeros_for_empty_prompt != family.force_zeros_for_empty_prompt:
        omissions["force_zeros_for_empty_prompt"] = NOT_IN_SINGLE_FILE
    return omissions
