"""Models and adapters that were distilled for few steps (LCM, Lightning, Turbo, Hyper-SD, TCD, DMD2), by their names.

Their files hold nothing else that tells them from others: their makers recommend settings on the model's page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ldm.errors import print_message


class Distillation(NamedTuple):
    """A method of distillation: the names of its models and, stricter, of its adapters, and what its makers recommend.

    An adapter's name may be that of its subject: a lightning, a hyper-realistic style, a 911 turbo.
    """

    model_name: str
    adapter_name: str
    sampler: str
    spacing: str
    num_inference_steps: int


LCM, TCD, DMD = (rf"(?<![a-z]){word}(?![a-z])" for word in ("lcm", "tcd", "dmd ?2"))
HYPER = r"(?<![a-z])hyper ?(sd|xl|lora|\d)"
DISTILLATIONS = {
    "LCM": Distillation(LCM, LCM, "lcm", "lcm", 4),
    "TCD": Distillation(TCD, TCD, "tcd", "lcm", 4),
    "DMD2": Distillation(DMD, DMD, "lcm", "lcm", 4),
    "Hyper-SD": Distillation(HYPER, HYPER, "ddim", "trailing", 8),
    "Lightning": Distillation("lightning", r"xl ?lightning|lightning ?(xl|lora|\d+ ?steps?)", "euler", "trailing", 4),
    "Turbo": Distillation("turbo", r"(sd|xl)[0-9]* ?turbo|turbo ?(lora|xl)", "euler_ancestral", "trailing", 4),
}
STEPS = re.compile(r"(?<!\d)(\d{1,2}) ?steps?")
# files that are named after their format, not their content
GENERIC_NAME = re.compile(r"(pytorch_lora_weights|adapter_model|(diffusion_pytorch_)?model)([.-].*)?", re.IGNORECASE)


def list_names(path: Path) -> list[str]:
    """The names that a file or folder goes by: its own, or its folder's where that is generic, and its repository's."""
    own = path.stem if path.suffix in (".safetensors", ".ckpt", ".pt", ".bin") else path.name
    names = [path.parent.name if GENERIC_NAME.fullmatch(own) else own]
    parts = path.parts
    return [parts[parts.index("snapshots") - 1], *names] if "snapshots" in parts[1:] else names  # of the hub's cache


def few_step_defaults(names: Iterable[str], what: str = "model") -> dict[str, Any]:
    """The settings for a distilled "model" or "adapter" of these names, said in one line; {} for any other.

    Guidance is part of such a model, and its scale 1; adapters with "CFG" in their names keep it.
    """
    text = re.sub(r"[^a-z0-9]+", " ", " ".join(names).lower())
    for name, kind in DISTILLATIONS.items():
        if not re.search(kind.adapter_name if what == "adapter" else kind.model_name, text):
            continue
        steps = STEPS.search(text)
        settings: dict[str, Any] = {
            "sampler": kind.sampler,
            "spacing": kind.spacing,
            "num_inference_steps": max(1, int(steps[1])) if steps else kind.num_inference_steps,
        }
        if name == "Hyper-SD" and settings["num_inference_steps"] == 1:
            settings |= {"sampler": "tcd", "spacing": "lcm"}
        if " cfg" not in text:
            settings["guidance_scale"] = 1.0
        shown = ", ".join(f"{option} {value}" for option, value in settings.items())
        print_message("note", f"{text.strip()}: by its name a {what} of {name}: unless given, {shown}")
        return settings
    return {}
