"""Full-size models without full-size memory: each tensor of a layout has one place in the other."""

from collections import Counter
from functools import cache

import pytest
import torch

from ldm.checkpoints.detect import detect_families
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.keys import (
    EMA_PREFIX,
    UNET_PREFIX,
    build_key_mappings,
    convert_to_diffusers,
    map_diffusers_keys,
    map_single_file_keys,
)

TWINS = ("sd2-base", "sd2-v")  # have the same tensors
AVERAGED = 686  # tensors of a U-Net of 860 M parameters, each with its average; 1680 in SDXL
LAST = "cond_stage_model.model.transformer.resblocks.23."


@cache
def single(name):
    """What the makers' tools write, but for what a directory has no place for."""
    return {entry.original_key: entry.original_tensor for entry in build_key_mappings(FAMILIES[name])}


def averaged(tensors):
    """With LDM's LitEma: names without `model.` and dots, its own counters beside."""
    unet = {n: a for n, a in tensors.items() if n.startswith(UNET_PREFIX)}
    flat = {EMA_PREFIX + n.removeprefix("model.").replace(".", ""): a for n, a in unet.items()}
    return tensors | flat | {f"{EMA_PREFIX}{n}": torch.empty((), device="meta") for n in ("decay", "num_updates")}


def renamed(tensors):
    """By transformers 5, which leaves `text_model.` out."""
    return {name.replace(".transformer.text_model.", ".transformer."): a for name, a in tensors.items()}


def as_published(tensors):
    """With what the makers' files hold besides."""
    extra = {"betas": (1000,), "alphas_cumprod": (1000,)}
    if any(name.startswith("cond_stage_model.model.") for name in tensors):
        extra |= {f"{LAST}ln_1.weight": (1024,), "cond_stage_model.model.text_projection": (1024, 1024)}
    else:
        prefix = next(name.split(".text_model.")[0] for name in tensors if ".text_model." in name)
        extra |= {f"{prefix}.text_model.embeddings.position_ids": (1, 77)}
    return tensors | {name: torch.empty(shape, device="meta") for name, shape in extra.items()}


FORMS = {"plain": dict, "EMA": averaged, "transformers 5": renamed, "as published": as_published}
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
@pytest.mark.parametrize("form", FORMS)
def test_the_family_is_told(name, form):
    assert detect_families(FORMS[form](single(name))) == (TWINS if name in TWINS else (name,))


@every_family
def test_each_tensor_of_a_single_file_has_one_place(name):
    """With all that it may hold besides, and under other names."""
    tensors = averaged(renamed(as_published(single(name))))
    found = map_single_file_keys(tensors, FAMILIES[name])
    assert len(found) == len(single(name)) and len({entry.original_key for entry in found.values()}) == len(found)
    places = Counter((entry.component, part) for entry in found.values() for part in entry.parts)
    assert set(places.values()) == {1}
    assert sum(tensors[given].numel() for given in found) == sum(a.numel() for a in single(name).values())


@every_family
def test_each_tensor_of_a_directory_has_one_place(name):
    directory = convert_to_diffusers(single(name), FAMILIES[name])
    found = map_diffusers_keys(directory, FAMILIES[name])
    assert len(found) == sum(map(len, directory.values()))
    assert len({(entry.original_key, part) for entry, part in found.values()}) == len(found)
    assert {entry.original_key for entry, _ in found.values()} == single(name).keys()


@every_family
def test_the_average_takes_the_place_of_the_unet_alone(name):
    tensors = averaged(single(name))
    found = map_single_file_keys(tensors, FAMILIES[name], ema=True)
    averages = {given: entry for given, entry in found.items() if given.startswith(EMA_PREFIX)}
    assert {entry.component for entry in averages.values()} == {"unet"}
    assert len(averages) == (1680 if name.startswith("sdxl") else AVERAGED)
    assert len({entry.original_key for entry in found.values()}) == len(found) == len(single(name))
