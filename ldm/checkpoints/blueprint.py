"""A model that is known and not yet loaded: what both formats give, and `load_checkpoint` makes a Checkpoint of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ldm.checkpoints.detect import ProbeResult
from ldm.checkpoints.networks import WeightFile
from ldm.checkpoints.schedule import SchedulerSettings
from ldm.diffusion.sde import VPSDE
from ldm.nn.text import TextEncoder
from ldm.nn.unet import UNetConfig


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
