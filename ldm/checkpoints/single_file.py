"""A model as a single file (CompVis' LDM, Stability's SGM): it has no configuration, and its tensors tell its family.

They also tell the structure of its U-Net, where that was pruned (Segmind's SSD-1B and Vega, KOALA, BK-SDM).
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import detect, keys
from ldm.checkpoints.families import FAMILIES, LoadOptions, ModelFamily
from ldm.checkpoints.layouts import read_component, text_encoder_factories
from ldm.checkpoints.networks import (
    ModelSpec,
    ResolvedConfig,
    UNetProbe,
    WeightFile,
    match_weight_files,
    select_weights,
)
from ldm.checkpoints.schedule import family_scheduler_config, parse_scheduler_config
from ldm.checkpoints.tensors import SafetensorsFile, dequantize, open_safetensors
from ldm.errors import list_some
from ldm.nn.tokenizer import build_clip_tokenizer
from ldm.nn.unet import PER_LEVEL_FIELDS, UNetConfig
from ldm.nn.vae import vae_scale_factor

WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|module)\.")  # of torch.compile and DistributedDataParallel
UNET_MODULES = r"(?=(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.)"
ORIGINAL_PREFIXES = {  # patterns at the beginning of names, and what they stand for
    r"(?:model_)?state_dict\.": "",
    rf"(?:model\.|diffusion_model\.)+{UNET_MODULES}": keys.UNET_PREFIX,
    r"(?:model\.)?((?:first_stage_model|cond_stage_model|conditioner)\.)\1*": r"\1",
}
BARE_UNET_PREFIX = {UNET_MODULES: keys.UNET_PREFIX}
EMA_ALONE_NOTE = "holds no U-Net but its moving average, which is read"
VAE_TRAINING = re.compile(r"loss\.|model_ema\.")  # in an autoencoder's own file
TRANSFORMER_LAYER = re.compile(r"((?:input|output)_blocks\.\d+|middle_block)\.1\.transformer_blocks\.(\d+)\.")
RESNET_WEIGHT = "in_layers.2.weight"


def open_single_file(path: Path) -> tuple[SafetensorsFile, list[str]]:
    """A file under the names of the original layout, its fp8 weights scaled, and notes on what it is.

    Wrappers' prefixes are left out, a U-Net's is mended, and a moving average alone stands for the weights. ValueError
    where two tensors then have one name.
    """
    file, notes = open_safetensors(path), []
    names = dict(zip(file.tensor_infos, _original_names(file.tensor_infos), strict=True))
    if average := _average_alone(names.values()):
        names = {name: average.get(own, own) for name, own in names.items()}
        notes.append(EMA_ALONE_NOTE)
    if len(set(names.values())) < len(names):
        twice = next(own for own in names.values() if list(names.values()).count(own) > 1)
        raise ValueError(f"{path}: {twice} is given twice, once under another prefix")
    infos = {names[name]: info for name, info in file.tensor_infos.items()}
    return dequantize(replace(file, tensor_infos=infos)), notes


def _original_names(names: Iterable[str]) -> list[str]:
    """The names without wrappers, in their order."""
    own = [keys.resolve_key_alias(WRAPPERS.sub("", name), ORIGINAL_PREFIXES) for name in names]
    others = any(name.startswith((keys.VAE_PREFIX, "cond_stage_model.", "conditioner.")) for name in own)
    if others and detect.CONV_IN_KEY not in own:
        own = [keys.resolve_key_alias(name, BARE_UNET_PREFIX) for name in own]
    return own


def _average_alone(names: Iterable[str]) -> dict[str, str]:
    """The names of a U-Net's weights by those of its moving average, where a file has this alone; else nothing."""
    names = set(names)
    if detect.CONV_IN_KEY in names or not any(name.startswith(keys.EMA_PREFIX) for name in names):
        return {}
    for family in FAMILIES.values():
        average = {keys.ema_key(name): name for name in keys.original_unet_tensors(family.unet)}
        if average.keys() <= names:
            return average
    return {}


def list_unread(tensors: Mapping[str, Tensor], family: ModelFamily) -> list[str]:
    """A line for each kind of tensors that a model usually does not have, and that are passed over."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        if (reason := keys.ignored_reason(name, family)) in keys.UNUSUAL_REASONS:
            kinds[reason or ""].append(name)
    return [f"{len(names)} tensors not read, {reason}: {list_some(names)}" for reason, names in kinds.items()]


def with_unet_structure(family: ModelFamily, tensors: Mapping[str, Tensor]) -> ModelFamily:
    """The family with the levels, layers and transformers that the U-Net of a single file has."""
    return replace(family, unet={**family.unet, **find_structure_changes(family.unet, tensors)})


def find_structure_changes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a U-Net's configuration in which the tensors of a single file differ from it.

    Nothing where they are no whole U-Net: what is missing is then named by who compares them with the family.
    """
    known = UNetConfig.from_dict(config)
    try:
        fields = _read_structure(tensors, known)
        actual = UNetConfig.from_dict({**config, **fields})
    except (ValueError, LookupError):
        return {}

    def value(config: UNetConfig, name: str) -> Any:
        return config.per_level(name) if name in PER_LEVEL_FIELDS else getattr(config, name)

    return {name: fields[name] for name in fields if value(actual, name) != value(known, name)}


def _read_structure(tensors: Mapping[str, Tensor], known: UNetConfig) -> dict[str, Any]:
    """The fields of diffusers' config.json by the names and shapes of a U-Net; ValueError if it is not whole."""
    unet = {n.removeprefix(keys.UNET_PREFIX): a for n, a in tensors.items() if n.startswith(keys.UNET_PREFIX)}
    down, up, middle, widths = _read_transformer_depths(unet)
    if [len(depths) for depths in up] != [len(depths) + 1 for depths in reversed(down)]:
        raise ValueError("not the blocks of a U-Net")
    usual = known.per_level("transformer_layers_per_block") if len(down) == len(known.block_out_channels) else [1] * 99
    layers = [_one_or_list(depths) if any(depths) else usual[i] for i, depths in enumerate(down)]
    if middle and not any(down[-1]):
        layers[-1] = middle
    if middle and middle != max(down[-1][0], middle * (not any(down[-1]))):
        raise ValueError("a middle block of its own depth")
    reverse = [
        _one_or_list(depths) if any(depths) else _one_or_list([layer]) if isinstance(layer, int) else 1
        for depths, layer in zip(up, reversed(layers), strict=True)
    ]
    symmetric = reverse == layers[::-1] and all(isinstance(layer, int) for layer in layers)
    heads = known.attention_head_dim
    if isinstance(heads, tuple):
        heads = tuple(width * heads[0] // known.block_out_channels[0] for width in widths)
    resnets = "middle_block.0.in_layers.2.weight" in unet
    guidance = unet.get("time_embed.cond_proj.weight")
    return {
        "block_out_channels": widths,
        "layers_per_block": _one_or_list([len(depths) for depths in down]),
        "down_block_types": ["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in down],
        "mid_block_type": ("UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D") if resnets else None,
        "up_block_types": ["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in up],
        "transformer_layers_per_block": layers if symmetric is False or len({*layers}) > 1 else layers[0],
        "reverse_transformer_layers_per_block": None if symmetric else reverse,
        "attention_head_dim": heads if isinstance(heads, int) else list(heads),
        "time_cond_proj_dim": None if guidance is None else guidance.shape[1],
    }


def _read_transformer_depths(unet: Mapping[str, Tensor]) -> tuple[list[list[int]], list[list[int]], int, list[int]]:
    """The layers of each transformer on the way down, up and in the middle, and the channels of each resolution."""
    found: dict[str, set[int]] = defaultdict(set)
    for match in filter(None, map(TRANSFORMER_LAYER.match, unet)):
        found[match[1]].add(int(match[2]))
    if any(len(layers) <= max(layers) for layers in found.values()):
        raise ValueError("a layer is missing")
    down: list[list[int]] = [[]]
    widths: list[int] = []
    n = 1
    while ((block := f"input_blocks.{n}") and f"{block}.0.op.weight" in unet) or f"{block}.0.{RESNET_WEIGHT}" in unet:
        if f"{block}.0.op.weight" in unet:
            down.append([])
        else:
            widths += [unet[f"{block}.0.{RESNET_WEIGHT}"].shape[0]] * (not down[-1])
            down[-1].append(len(found.get(block, ())))
        n += 1
    up: list[list[int]] = [[]]
    n = 0
    while (block := f"output_blocks.{n}") and f"{block}.0.{RESNET_WEIGHT}" in unet:
        up[-1].append(len(found.get(block, ())))
        up += [[]] * any(f"{block}.{k}.conv.weight" in unet for k in (1, 2))
        n += 1
    if any(0 < sum(map(bool, depths)) < len(depths) for depths in [*down, *up]) or not all([*down, *up]):
        raise ValueError("some residual blocks of a resolution have a transformer, and some have none")
    return down, up, len(found.get("middle_block", ())), widths


def _one_or_list(values: Sequence[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def read_single_file(path: Path, options: LoadOptions = LoadOptions()) -> ModelSpec:
    """The model in a file (diffusers' `from_single_file`), with the configurations of its family.

    The tensors tell the family, or `options.family` does.

    If the file has no autoencoder, the spec lacks its weights. ValueError names the file and what is missing, unknown
    or of another shape.
    """
    file, notes = open_single_file(path)
    tensors = file.meta_tensors()
    user_options = {"family": options.family, "prediction": options.prediction}
    try:
        detect.detect_prediction(tensors, file.metadata, **user_options)  # refuses contradictions
        family = with_unet_structure(FAMILIES[options.family or detect.detect_families(tensors)[0]], tensors)
        ema = options.ema and EMA_ALONE_NOTE not in notes
        mappings = keys.map_single_file_keys(_add_missing_vae(tensors, family), family, ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for note in [*notes, *list_unread(tensors, family)]:
        warnings.warn(f"{path}: {note}", stacklevel=2)

    def resolve(probe: UNetProbe) -> ResolvedConfig:
        try:
            detection = detect.detect_model(
                tensors,
                file.metadata,
                lambda: probe(parse_scheduler_config(family.scheduler).sde),
                **user_options,
                zero_snr=options.zero_snr,
            )
            # with the same tensors, but maybe another native size
            sibling = with_unet_structure(FAMILIES[detection.family], tensors)
            config = family_scheduler_config(sibling, detection.prediction, detection.zero_snr)
            unet_config = UNetConfig.from_dict(sibling.unet)
            return ResolvedConfig(parse_scheduler_config(config), detection.family, unet_config, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    tokenizers = {n: build_clip_tokenizer(spec.pad_token_id) for n, spec in family.text_encoders.items()}
    return ModelSpec(
        {component: keys.build_meta_network(component, config) for component, config in family.configs.items()},
        ((WeightFile(file, {name: mapping for name, mapping in mappings.items() if name in tensors}),),),
        text_encoder_factories(family, tokenizers, family),
        resolve,
        family.generation_defaults,
        family.force_zeros_for_empty_prompt,
    )


def _add_missing_vae(tensors: Mapping[str, Tensor], family: ModelFamily) -> dict[str, Tensor]:
    """The tensors, and a missing autoencoder's on the meta device; ValueError if another network is missing."""
    prefixes = {"unet": keys.UNET_PREFIX, "vae": keys.VAE_PREFIX}
    prefixes |= {name: spec.prefix for name, spec in family.text_encoders.items()}
    missing = [n for n, prefix in prefixes.items() if not any(name.startswith(prefix) for name in tensors)]
    for component in missing:
        if component != "vae":
            raise ValueError(f"no {component} in it (nothing begins with {prefixes[component]})")
    return {**_original_tensors(family, missing), **tensors}


def _original_tensors(family: ModelFamily, components: Container[str]) -> dict[str, Tensor]:
    """The tensors of some components in a family's single file, on the meta device."""
    return {m.original_key: m.original_tensor for m in keys.build_key_mappings(family) if m.component in components}


def replace_vae(model: ModelSpec, source: Path) -> ModelSpec:
    """The model with the autoencoder of a folder or file instead, which must have latents of the same shape.

    A folder has its own configuration, a file the model's; a file's names are those of diffusers or of LDM, without
    the prefix `first_stage_model.`, or with it, and then a whole model's other tensors are passed over.
    """
    network, files = _read_vae(source, model.networks["vae"].config.to_dict())
    expected, actual = (
        f"{a.config.latent_channels} channels at scale factor {vae_scale_factor(a)}"
        for a in (model.networks["vae"], network)
    )
    if expected != actual:
        raise ValueError(f"{source}: its latents have {actual}, the model's {expected}")
    groups = (select_weights(group, model.networks.keys() - {"vae"}) for group in model.shard_groups)
    return replace(
        model, networks={**model.networks, "vae": network}, shard_groups=(*(group for group in groups if group), files)
    )


def _read_vae(source: Path, config: Mapping[str, Any]) -> tuple[Any, tuple[WeightFile, ...]]:
    if source.is_dir():
        whole = not (source / "config.json").is_file() and (source / "vae").is_dir()
        return read_component(source / "vae" if whole else source, "vae")
    file, _ = open_single_file(source)
    network = keys.build_meta_network("vae", config)
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in file.tensor_infos):
        return network, match_weight_files("vae", network, [file])
    family, tensors = replace(FAMILIES["sd1"], vae=config), file.meta_tensors()
    whole = any(name.startswith(keys.VAE_PREFIX) for name in tensors)  # a whole model, or its part
    prefix, own = ("", keys.VAE_PREFIX) if whole else (keys.VAE_PREFIX, "")
    names = {
        prefix + name: name
        for name in tensors
        if name.startswith(own) and not keys.ignored_reason(prefix + name, family) and not VAE_TRAINING.match(name)
    }
    others = _original_tensors(family, family.configs.keys() - {"vae"})
    try:
        mappings = keys.map_single_file_keys(others | {key: tensors[name] for key, name in names.items()}, family)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return network, (WeightFile(file, {name: mappings[key] for key, name in names.items() if key in mappings}),)
