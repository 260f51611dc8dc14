"""Samplers and timestep spacings by the names of A1111, ComfyUI, InvokeAI, kohya and diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Our names and those of AUTOMATIC1111's web UI, which we write; what it does not have keeps our name.
A1111_SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "deis": "DEIS",
    "plms": "PLMS",
    "lcm": "LCM",
    "tcd": "TCD",
}
A1111_SPACINGS = {
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "beta": "Beta",
    "linspace": "Normal",
    "trailing": "SGM Uniform",  # it differs by rounding
    "sgm_uniform": "SGM Uniform",
    "leading": "DDIM",
    "simple": "Simple",
    "kl_optimal": "KL Optimal",
    "ays": "Align Your Steps",
    "ays_sdxl": "Align Your Steps",
}
# Other tools' names, as `normalize_sampler_name` gives them: ours.
SAMPLER_ALIASES = {
    **{name: name for name in (*A1111_SAMPLERS, "dpmpp_2s", "dpmpp_3m", "pndm")},
    "euler_a": "euler_ancestral",
    "eulerancestral": "euler_ancestral",  # ComfyUI's node
    "dpm2": "dpm_2",
    "dpm2_a": "dpm_2_ancestral",
    "dpm_2_a": "dpm_2_ancestral",
    "kdpm_2": "dpm_2",
    "kdpm_2_a": "dpm_2_ancestral",
    "dpmpp_2s_a": "dpmpp_2s_ancestral",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    "dpmsolver": "dpmpp_2m",
    "dpmsolverpp": "dpmpp_2m",
    "dpm_solver": "dpmpp_2m",
    "dpm_solverpp": "dpmpp_2m",
    "ddimscheduler": "ddim",
    "ddpmscheduler": "ddpm",
    "pndmscheduler": "pndm",
    "eulerdiscretescheduler": "euler",
    "eulerancestraldiscretescheduler": "euler_ancestral",
    "heundiscretescheduler": "heun",
    "lmsdiscretescheduler": "lms",
    "kdpm2discretescheduler": "dpm_2",
    "kdpm2ancestraldiscretescheduler": "dpm_2_ancestral",
    "dpmsolvermultistepscheduler": "dpmpp_2m",
    "dpmsolversinglestepscheduler": "dpmpp_singlestep",
    "dpmsolversdescheduler": "dpmpp_sde",
    "unipcmultistepscheduler": "unipc",
    "deismultistepscheduler": "deis",
    "lcmscheduler": "lcm",
    "tcdscheduler": "tcd",
}
SPACING_ALIASES = {
    **{name: name for name in A1111_SPACINGS},
    "normal": "linspace",
    "ddim": "leading",
    "ddim_uniform": "leading",
    "align_your_steps": "ays",
    "alignyoursteps": "ays",  # ComfyUI's nodes
    "betasampling": "beta",
    "sdturbo": "trailing",
    "turbo": "trailing",  # the timesteps that the turbo models are distilled at
    "k": "karras",  # InvokeAI's suffix
}
SEPARATORS = re.compile(r"[\s_-]+")


def normalize_sampler_name(label: str) -> str:
    """A name as the tables of aliases spell it: "DPM++ 2M SDE" is dpmpp_2m_sde."""
    return SEPARATORS.sub("_", label.strip().lower().replace("++", "pp"))


def resolve_sampler_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `sampler` and `spacing` by our names where they are another tool's; unknown ones stay.

    A sampler's name may end in a spacing's ("DPM++ 2M Karras", InvokeAI's "dpmpp_2m_k"), which a given spacing
    overrides. "Automatic" is no spacing. What other tools call a scheduler may be a sampler.
    """
    sampler, spacing = values.get("sampler"), values.get("spacing")
    if isinstance(spacing, str) and sampler is None and find_spacing(spacing) is None and find_sampler(spacing)[0]:
        sampler, spacing = spacing, None
    if isinstance(sampler, str):
        name, implied = find_sampler(sampler)
        sampler, spacing = name or sampler, implied if spacing is None else spacing
    if isinstance(spacing, str):
        spacing = None if normalize_sampler_name(spacing) == "automatic" else find_spacing(spacing) or spacing
    names = {"sampler": sampler, "spacing": spacing}
    return {**values, **{name: value for name, value in names.items() if name in values or value is not None}}


def find_sampler(label: str) -> tuple[str | None, str | None]:
    """Our name of a sampler, None for an unknown one, and the spacing that its name ends in."""
    name = (
        normalize_sampler_name(label).removesuffix("_gpu").removeprefix("k_")
    )  # k-diffusion's, in kohya's and InvokeAI's
    if name in SAMPLER_ALIASES:
        return SAMPLER_ALIASES[name], None
    for ending, spacing in SPACING_ALIASES.items():
        base = name.removesuffix(f"_{ending}")
        if base != name and base in SAMPLER_ALIASES:
            return SAMPLER_ALIASES[base], spacing
    return None, None


def find_spacing(label: str) -> str | None:
    """Our name of a spacing; None for an unknown one."""
    return SPACING_ALIASES.get(normalize_sampler_name(label))
