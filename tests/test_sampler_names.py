"""The names of samplers and spacings that other tools write and their users type are ours."""

import json

import pytest

from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.timesteps import SPACINGS
from ldm.pipeline.request import Request
from ldm.sampler_names import (
    A1111_SAMPLERS,
    A1111_SPACINGS,
    SAMPLER_ALIASES,
    SPACING_ALIASES,
    normalize_sampler_name,
    resolve_sampler_names,
)

NAMES = {  # (sampler, spacing) as written: ours
    ("DPM++ 2M Karras", None): ("dpmpp_2m", "karras"),
    ("dpm++ 2m sde exponential", None): ("dpmpp_2m_sde", "exponential"),
    ("DPM++ 2M Karras", "beta"): ("dpmpp_2m", "beta"),
    ("Euler a", "SGM Uniform"): ("euler_ancestral", "sgm_uniform"),
    ("rk45", "karras"): ("rk45", "karras"),
    ("DPM++ 9M", None): ("DPM++ 9M", None),
    (None, "Normal"): (None, "linspace"),
    ("Euler", "Automatic"): ("euler", None),
    ("dpmpp_2m_sde_gpu", "karras"): ("dpmpp_2m_sde", "karras"),
    ("uni_pc", "ddim_uniform"): ("unipc", "leading"),
    ("k_euler_a", None): ("euler_ancestral", None),
    ("dpmpp_2m_k", None): ("dpmpp_2m", "karras"),
    ("dpmsolver++", None): ("dpmpp_2m", None),
    (None, "EulerAncestralDiscreteScheduler"): ("euler_ancestral", None),
    (None, "uniform"): (None, "uniform"),
    ("unipc_3", "log_snr"): ("unipc_3", "log_snr"),
}


@pytest.mark.parametrize("names", NAMES)
def test_other_tools_names_are_ours(names, pipe):
    values = resolve_sampler_names({"sampler": names[0], "spacing": names[1], "eta": 0.0})
    sampler, spacing = NAMES[names]
    assert (values["sampler"], values["spacing"], values["eta"]) == (sampler, spacing, 0.0)
    if sampler in SAMPLERS and (spacing or "karras") in SPACINGS:
        request = pipe.resolve(Request("a", sampler=names[0], spacing=names[1], num_inference_steps=5))
        assert request.sampler == sampler and request.spacing == (spacing or pipe.resolve(Request("a")).spacing)


@pytest.mark.parametrize("sampler", sorted(A1111_SAMPLERS.keys() & SAMPLERS))
def test_what_is_written_into_images_is_read_back(sampler, pipe):
    for spacing in A1111_SPACINGS.keys() & SPACINGS:
        request = pipe.resolve(Request("a", sampler=sampler, spacing=spacing, num_inference_steps=5))
        line = pipe.metadata(request, "m")["parameters"].split("\n")[-1]
        pairs = dict(pair.split(": ", 1) for pair in line.split(", "))
        again = resolve_sampler_names({"sampler": pairs["Sampler"], "spacing": pairs["Schedule type"]})
        assert again["sampler"] == sampler
        assert again["spacing"] == {"trailing": "sgm_uniform", "ays_sdxl": "ays"}.get(spacing, spacing)
        assert json.loads(pipe.metadata(request, "m")["ldm"])["request"]["sampler"] == sampler


def test_an_alias_hides_no_name_of_ours():
    for table, ours in ((SAMPLER_ALIASES, SAMPLERS), (SPACING_ALIASES, SPACINGS)):
        assert all(normalize_sampler_name(alias) == alias for alias in table)
        assert {name: table[name] for name in ours if name in table and table[name] != name} == {}
