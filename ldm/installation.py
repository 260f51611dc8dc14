"""How this copy of the package was installed: the command that adds an extra, and where the shipped model lies."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
MODEL_ENTRY_POINTS = "ldm.models"  # name -> a package whose folder is a model in the diffusers directory layout


def is_checkout() -> bool:
    """Whether the package runs from a clone of the repository (an editable install), not from a wheel."""
    return (CHECKOUT / "scripts" / "run.py").is_file()


def install_command(extra: str) -> str:
    """The pip command that installs an extra (`data`, `ray`, ...) beside this copy of the package.

    In a checkout it is the editable install with the pinned versions, by the running Python's own pip.
    """
    if is_checkout():
        return f"{sys.executable} -m pip install -e '{CHECKOUT}[{extra}]' -c {CHECKOUT / 'constraints.txt'}"
    return f"pip install 'ldm-diffusion[{extra}]'"


def find_picto() -> Path:
    """The folder of the shipped model: `weights/picto` of a checkout, else that of the package ldm-diffusion-picto.

    Where neither is there, the path that the checkout would have; loading from it fails with the advice of
    `missing_picto`.
    """
    own = CHECKOUT / "weights" / "picto"
    if own.is_dir():
        return own
    for entry in entry_points(group=MODEL_ENTRY_POINTS, name="picto"):
        spec = find_spec(entry.value)
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)))
    return own


def missing_picto() -> str:
    """The error where no model is named and the shipped one is not installed."""
    return "the shipped model is not installed: pip install ldm-diffusion-picto, or name one with --model"
