"""The processes of a training, as a launcher (`python -m torch.distributed.run`) started them; one without it."""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState


def get_partial_state() -> PartialState:
    """This process among all. accelerate joins processes on CPUs, by gloo, only where it is told of the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def create_accelerator(**options: object) -> Accelerator:
    """A new accelerator of this process; accelerate itself keeps the precision of the first one."""
    get_partial_state()
    AcceleratorState._reset_state()
    return Accelerator(cpu=not torch.accelerator.is_available(), **options)
