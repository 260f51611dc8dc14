"""Latent diffusion, text to image: one continuous VP-SDE behind training, sampling, editing and likelihood."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline, PipelineOutput
    from ldm.pipeline.request import Request

__version__ = "0.1.0"
__all__ = ["Pipeline", "PipelineOutput", "Request", "__version__"]
EXPORTS = {
    "Pipeline": "ldm.pipeline.pipeline",
    "PipelineOutput": "ldm.pipeline.pipeline",
    "Request": "ldm.pipeline.request",
}


def __getattr__(name: str) -> Any:
    if name in EXPORTS:  # imports torch with the first of these, not with `ldm`
        return getattr(import_module(EXPORTS[name]), name)
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
