"""Networks from files, straight to their device: known by name and shape first, then filled tensor by tensor.

A network is made on the meta device, where it has no memory; every tensor of every file is compared with it before the
first is read. Then the files are read once, in their own order, and each tensor is cast and moved as it comes: at no
time is there more than the model and one tensor.


A model that is known and not yet loaded: what both formats give, and `load_checkpoint` makes a Checkpoint of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoints.configs import TEXT_ENCODER_CONFIG_SCHEMA, VAE_CONFIG_SCHEMA
from ldm.checkpoints.detect import ProbeResult
from ldm.checkpoints.keys import DIFFUSERS_KEY_ALIASES, IDENTITY, KeyMapping, check_keys_and_shapes
from ldm.checkpoints.schedule import SchedulerSettings
from ldm.checkpoints.tensors import SafetensorsFile
from ldm.diffusion.sde import VPSDE
from ldm.nn import text_encoders, vae
from ldm.nn.text_encoders import TextEncoder
from ldm.nn.unet import UNet, UNetConfig

TEXT_ENCODERS = "text_encoder", "text_encoder_2"
IGNORED_KEY_SUFFIXES = (
    "position_ids",
)  # the numbers 0 to 76: what a folder may hold and no network has, by the end of its name
LAYER_COUNT_FIELDS, MAX_LAYERS = (
    ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers"),
    100,
)  # no endless networks
BUFFER_INITIALIZERS: dict[str, Callable[[Tensor], Tensor]] = {  # what no file holds, by the end of its name
    "position_ids": lambda like: torch.arange(like.shape[-1]).expand(like.shape),
}


class WeightFile(NamedTuple):
    """A file of weights, and what each of its tensors becomes, by its name in the file; the others are superfluous."""

    file: SafetensorsFile
    key_mappings: Mapping[str, KeyMapping]


def unet_from_config(config: Mapping[str, Any]) -> UNet:
    """Our U-Net, by the fields of a `unet/config.json`."""
    fields = UNetConfig.from_dict(config)
    for width in fields.block_out_channels:
        if width < 1:
            raise ValueError(f"U-Net block_out_channels {width}: at least 1 is needed")
    return UNet(fields)


def vae_from_config(config: Mapping[str, Any]) -> vae.AutoencoderKL:
    """The autoencoder of a `vae/config.json`, each of whose fields is heeded."""
    VAE_CONFIG_SCHEMA.validate(config)
    return vae.build_vae(config)


def text_encoder_from_config(config: Mapping[str, Any], with_projection: bool = False) -> text_encoders.CLIPTextModel:
    """The text tower of a `text_encoder/config.json`, each of whose fields is heeded."""
    TEXT_ENCODER_CONFIG_SCHEMA.validate(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(name) is not None and not 0 <= config[name] < config.get("vocab_size", 49408):
            raise ValueError(f"text encoder {name} {config[name]}: vocab_size is {config.get('vocab_size', 49408)}")
    return text_encoders.build_text_encoder(config, with_projection)


NETWORK_BUILDERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {  # by folder
    "unet": unet_from_config,
    "vae": vae_from_config,
    "text_encoder": text_encoder_from_config,
    "text_encoder_2": lambda config: text_encoder_from_config(config, with_projection=True),
}


def build_meta_network(component: str, config: Mapping[str, Any]) -> Any:
    """The network of a folder on the meta device; ValueError where its configuration says what is not understood."""
    for name in LAYER_COUNT_FIELDS:
        values = config.get(name, 1)
        for depth in values if isinstance(values, list | tuple) else (values,):
            if type(depth) is not int or not 0 <= depth <= MAX_LAYERS:
                raise ValueError(f"{name} {depth!r}: must be a whole number from 0 to {MAX_LAYERS}")
    with torch.device("meta"):
        return NETWORK_BUILDERS[component](config)


def match_weight_files(component: str, network: nn.Module, files: Iterable[SafetensorsFile]) -> tuple[WeightFile, ...]:
    """What the files of a folder of a directory hold for its network; ValueError names what does not fit.

    Names may be of either version of transformers, and of the first versions of diffusers.
    """
    wanted = {_diffusers_key(component, name): a for name, a in network.state_dict().items()}
    given: dict[str, Tensor] = {}
    found = []
    for file in files:
        names = {
            name: _resolve_alias(component, name)
            for name in file.tensor_infos
            if not name.endswith(IGNORED_KEY_SUFFIXES)
        }
        tensors = file.meta_tensors()
        for name, known in names.items():
            if known in given:
                raise ValueError(f"{file.path}: {known} is given twice")
            given[known] = tensors[name]
        entries = {
            n: KeyMapping(n, component, {known: wanted[known]}, IDENTITY)
            for n, known in names.items()
            if known in wanted
        }
        found.append(WeightFile(file, entries))
    try:
        check_keys_and_shapes(given, wanted)
    except ValueError as error:
        raise ValueError(f"{found[0].file.path}: {error}") from None
    return tuple(found)


def load_weights(
    networks: Mapping[str, nn.Module],
    shard_groups: Sequence[Sequence[WeightFile]],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, str]:
    """Give networks their weights on a device, and their buffers; returns the SHA-256 of each one's file, by folder.

    The files of a group are one content, in their order: the shards of a network. Every file is read once. ValueError
    where a tensor is none of real numbers, before anything is read, and where a file ends early.
    """
    for source in (source for group in shard_groups for source in group):
        for name in source.key_mappings:
            if not (dtype := source.file.tensor_infos[name].dtype).is_floating_point:
                raise ValueError(f"{source.file.path}: {name} has dtype {dtype}, real numbers are needed")
    weights: dict[str, dict[str, Tensor]] = {folder: {} for folder in networks}
    hashes = {}
    for group in shard_groups:
        hasher = hashlib.sha256()
        for source in group:
            for name, tensor in source.file.iter_tensors(hasher):
                if entry := source.key_mappings.get(name):
                    weights[entry.component].update(_split_and_cast(entry, tensor, device, dtypes[entry.component]))
        folders = {entry.component for source in group for entry in source.key_mappings.values()}
        hashes.update(dict.fromkeys(folders, hasher.hexdigest()))
    for folder, network in networks.items():
        names = {_diffusers_key(folder, name): name for name in network.state_dict()}
        network.load_state_dict({names[name]: a for name, a in weights.pop(folder).items()}, assign=True)
        _init_buffers(network, device)
    return hashes


def _split_and_cast(entry: KeyMapping, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a tensor of a file becomes, each part in memory of its own."""
    values = entry.transform.split(tensor.reshape(entry.original_tensor.shape))
    found = {}
    for (name, like), value in zip(entry.parts.items(), values, strict=True):
        layout = torch.channels_last if like.ndim == 4 else torch.contiguous_format
        own = len(values) > 1
        found[name] = value.reshape(like.shape).to(device=device, dtype=dtype, memory_format=layout, copy=own)
    return found


def _init_buffers(network: nn.Module, device: torch.device) -> None:
    """Real values for the buffers that are in no file."""
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            setattr(network.get_submodule(owner), last, BUFFER_INITIALIZERS[last](buffer).to(device))
    left = [name for name, a in [*network.named_parameters(), *network.named_buffers()] if a.is_meta]
    assert not left, f"{left} have no values"


def _diffusers_key(component: str, name: str) -> str:
    """A tensor of ours under the name that published directories have: transformers 5 says no `build_text_encoder`."""
    return _resolve_alias(component, name) if component in TEXT_ENCODERS else name


def _resolve_alias(component: str, name: str) -> str:
    """A tensor of a folder under the name that published directories have."""
    found = f"{component}/{name}"
    for pattern, replacement in DIFFUSERS_KEY_ALIASES.items():
        found = re.sub(rf"\A{pattern}", replacement, found)
    return found.removeprefix(f"{component}/")


class ResolvedConfig(NamedTuple):
    """What is known once the U-Net may be asked: its schedule, its family, its configuration in this family."""

    schedule: SchedulerSettings
    family: str | None
    unet_config: UNetConfig


UNetProbe = Callable[[VPSDE], ProbeResult]  # asks the U-Net what it predicts, at a noise level of this SDE


@dataclass(frozen=True)
class ModelSpec:
    """A whole model without its weights, which are known by name and shape.

    `networks` are by folder, on the meta device; `split_clip` make a text tower of the network in a folder. Files of one
    group in `iter_row_groups` are hashed as one. `detect_model` says what the U-Net predicts, and may ask it. `defaults` are the
    settings that the model's makers recommend, beside those of the schedule.
    """

    networks: Mapping[str, Any]
    shard_groups: tuple[tuple[WeightFile, ...], ...]
    text_encoder_factories: Mapping[str, Callable[[Any], TextEncoder]]
    resolve_config: Callable[[UNetProbe], ResolvedConfig]
    generation_defaults: Mapping[str, Any]
    force_zeros_for_empty_prompt: bool

    @property
    def weight_files(self) -> list[WeightFile]:
        """All files, those of one network after those of another."""
        return [file for group in self.shard_groups for file in group]
