"""Models as specs (networks known by name and shape), and weights read straight to a device, tensor by tensor.

A network is built on the meta device, and every tensor of every file is compared with it before the first is read. Then
each file is read once, in its own order, and each tensor is cast and moved as it comes: memory never holds more than
the model and one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoints.detect import ProbeResult
from ldm.checkpoints.keys import IDENTITY, KeyMapping, check_keys_and_shapes, diffusers_key
from ldm.checkpoints.schedule import SchedulerSettings
from ldm.checkpoints.tensors import SafetensorsFile
from ldm.diffusion.sde import VPSDE
from ldm.files import FileHashes, FileVersion
from ldm.nn.text_encoders import TextEncoder
from ldm.nn.unet import UNetConfig

TEXT_ENCODERS = "text_encoder", "text_encoder_2"
NUM_TIME_IDS = 6  # of SDXL: original size, crop, target size
POSITION_IDS = "position_ids"  # the numbers 0 to 76, which directories may hold and no network loads


OTHER_CLIP_PARTS = re.compile(r"(text_projection\.|visual_projection\.|vision_model\.|logit_scale$)")
FP8_SCALES = re.compile(r"(.+\.)?(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8)$")


class WeightFile(NamedTuple):
    """A file of weights, and the mappings of its tensors by their names in the file; others are superfluous."""

    file: SafetensorsFile
    key_mappings: Mapping[str, KeyMapping]


class ResolvedConfig(NamedTuple):
    """What is known once the U-Net can be probed: its schedule, its family, its configuration in this family.

    `scheduler_config` is what the schedule was read from.
    """

    schedule: SchedulerSettings
    family: str | None
    unet_config: UNetConfig
    scheduler_config: Mapping[str, Any]


UNetProbe = Callable[[VPSDE], ProbeResult]  # measures what the U-Net predicts, at a noise level of this SDE


@dataclass(frozen=True)
class ModelSpec:
    """A whole model without its weights.

    `networks` are on the meta device, by component; `text_encoder_factories` make a TextEncoder of such a network. The
    files of one group of `shard_groups` are hashed as one. `resolve_config` tells what the U-Net predicts, and may
    probe it. `generation_defaults` are recommended settings besides the sampler and spacing of the schedule.
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


def check_model_spec(spec: ModelSpec, path: Path) -> None:
    """ValueError where a network has no weights, or networks do not fit together."""
    components = {mapping.component for file in spec.weight_files for mapping in file.key_mappings.values()}
    for component in spec.networks.keys() - components:
        raise ValueError(f"{path}: no {component} in it; give one by --{component}")
    unet, encoders = spec.networks["unet"].config, [spec.networks[n].config for n in spec.text_encoder_factories]
    widths = {
        "text of": (unet.cross_attention_dim, sum(encoder.hidden_size for encoder in encoders)),
        "latents of": (unet.out_channels, spec.networks["vae"].config.latent_channels),
    }
    if unet.addition_embed_type:
        pooled = unet.projection_class_embeddings_input_dim - NUM_TIME_IDS * unet.addition_time_embed_dim
        widths["pooled text of"] = (pooled, encoders[-1].projection_dim)
    for what, (expected, actual) in widths.items():
        if expected != actual:
            raise ValueError(f"{path}: the U-Net expects {what} {expected} channels, got {actual}")


def is_superfluous(component: str, name: str, tensor: Tensor, expected: Container[str]) -> bool:
    """Whether a directory's tensor is passed over: position ids, parts of CLIP, scales of fp8, a single number."""
    if diffusers_key(component, name) in expected:
        return False
    if tensor.numel() < 2 or FP8_SCALES.match(name):
        return True
    return name.endswith(POSITION_IDS) or (component in TEXT_ENCODERS and OTHER_CLIP_PARTS.match(name) is not None)


def match_weight_files(component: str, network: nn.Module, files: Iterable[SafetensorsFile]) -> tuple[WeightFile, ...]:
    """The mappings of a directory's files for a component; ValueError names what is missing, unknown or misshaped.

    Names may be of either version of transformers, and of the first versions of diffusers.
    """
    expected = {diffusers_key(component, name): a for name, a in network.state_dict().items()}
    actual: dict[str, Tensor] = {}
    matched = []
    for file in files:
        tensors, mappings = file.meta_tensors(), {}
        for name in tensors:
            if is_superfluous(component, name, tensors[name], expected):
                continue
            if (key := diffusers_key(component, name)) in actual:
                raise ValueError(f"{file.path}: {key} is given twice")
            actual[key] = tensors[name]
            if key in expected:
                mappings[name] = KeyMapping(name, component, {key: expected[key]}, IDENTITY)
        matched.append(WeightFile(file, mappings))
    try:
        check_keys_and_shapes(actual, expected)
    except ValueError as error:
        raise ValueError(f"{matched[0].file.path}: {error}") from None
    return tuple(matched)


def select_weights(group: Iterable[WeightFile], components: Container[str]) -> tuple[WeightFile, ...]:
    """The files of a group that hold weights of these components, with the mappings of these alone."""
    selected = (
        WeightFile(file, {name: mapping for name, mapping in mappings.items() if mapping.component in components})
        for file, mappings in group
    )
    return tuple(source for source in selected if source.key_mappings)


def load_weights(
    networks: Mapping[str, nn.Module],
    shard_groups: Sequence[Sequence[WeightFile]],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
) -> FileHashes:
    """Load networks' weights to a device; the SHA-256 of each component's files.

    ValueError for a tensor that is not floating-point, before anything is read, and for a file that ends early.
    """
    for source in (source for group in shard_groups for source in group):
        for name in source.key_mappings:
            if not (dtype := source.file.tensor_infos[name].dtype).is_floating_point:
                raise ValueError(f"{source.file.path}: {name} has dtype {dtype}, expected floating-point")
    weights: dict[str, dict[str, Tensor]] = {component: {} for component in networks}
    hashed_files: dict[str, tuple[FileVersion, ...]] = {}
    for group in shard_groups:
        versions = tuple(FileVersion.of(source.file.path) for source in group)
        for source in group:
            for name, tensor in source.file.map_tensors():
                if mapping := source.key_mappings.get(name):
                    parts = _split_and_cast(mapping, tensor, device, dtypes[mapping.component])
                    weights[mapping.component].update(parts)
        components = {mapping.component for source in group for mapping in source.key_mappings.values()}
        hashed_files.update(dict.fromkeys(components, versions))
    for component, network in networks.items():
        names = {diffusers_key(component, name): name for name in network.state_dict()}
        network.load_state_dict({names[key]: a for key, a in weights.pop(component).items()}, assign=True)
        left = [name for name, a in [*network.named_parameters(), *network.named_buffers()] if a.is_meta]
        assert not left, f"{left} have no values"
    return FileHashes(hashed_files)


def _split_and_cast(mapping: KeyMapping, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parts of a tensor of a file, each in memory of its own."""
    memory_formats = {
        name: torch.channels_last if a.ndim == 4 else torch.contiguous_format for name, a in mapping.parts.items()
    }
    return {
        name: part.to(device=device, dtype=dtype, memory_format=memory_formats[name], copy=True)
        for name, part in mapping.to_diffusers(tensor).items()
    }
