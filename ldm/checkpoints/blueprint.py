"""A model that is known and not yet loaded: what both formats give, and `load` makes a Checkpoint of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ldm.checkpoints.detect import Reply
from ldm.checkpoints.networks import Source
from ldm.checkpoints.schedule import Schedule
from ldm.diffusion.sde import VPSDE
from ldm.nn.text import Tower
from ldm.nn.unet import UNetConfig


class Told(NamedTuple):
    """What is known once the U-Net may be asked: its schedule, its family, its configuration in this family."""

    schedule: Schedule
    family: str | None
    unet: UNetConfig


Probe = Callable[[VPSDE], Reply]  # asks the U-Net what it predicts, at a noise level of this SDE


@dataclass(frozen=True)
class Blueprint:
    """A whole model without its weights, which are known by name and shape.

    `networks` are by folder, on the meta device; `towers` make a text tower of the network in a folder. Files of one
    group in `groups` are hashed as one. `verdict` says what the U-Net predicts, and may ask it. `defaults` are the
    settings that the model's makers recommend, beside those of the schedule.
    """

    networks: Mapping[str, Any]
    groups: tuple[tuple[Source, ...], ...]
    towers: Mapping[str, Callable[[Any], Tower]]
    verdict: Callable[[Probe], Told]
    defaults: Mapping[str, Any]
    zero_negative: bool
