"""Latent diffusion, text to image: one continuous VP-SDE behind training, sampling, editing and likelihood."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldm.version import VERSION as __version__

if TYPE_CHECKING:
    from ldm.pipeline import PipelineOutput, Pipeline
    from ldm.request import Request

__all__ = ["PipelineOutput", "Pipeline", "Request", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # torch is imported with the first of these, not with `ldm`
        return getattr(import_module("ldm.pipeline"), name)
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
