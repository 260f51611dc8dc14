"""A directory stands for a family only where every configuration field that its numbers depend on is the family's."""

from copy import copy
from dataclasses import fields
from functools import cache
from types import SimpleNamespace

import pytest

from ldm.checkpoints.families import FAMILIES, TEXT_ENCODER_CONFIG_SCHEMA, VAE_CONFIG_SCHEMA
from ldm.checkpoints.keys import build_meta_network
from ldm.convert import family_match
from ldm.convert.family_match import find_differences
from ldm.nn.tokenizer import build_clip_tokenizer
from ldm.nn.unet import UNetConfig

FAMILY = FAMILIES["sdxl"]
FIELDS = {
    "unet": [field.name for field in fields(UNetConfig)],
    "vae": VAE_CONFIG_SCHEMA.supported.split(),
    "text_encoder": [*TEXT_ENCODER_CONFIG_SCHEMA.supported.split(), "hidden_act"],
    "text_encoder_2": [*TEXT_ENCODER_CONFIG_SCHEMA.supported.split(), "hidden_act"],
}
TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # the tokenizer's, which is compared by itself
WITHOUT_EFFECT = {
    "unet": {"sample_size", "upcast_attention"},
    "vae": {"sample_size", "force_upcast"},
    "text_encoder": {*TOKEN_IDS, "projection_dim"},  # SDXL reads the pooled vector of the second one alone
    "text_encoder_2": TOKEN_IDS,
}


@pytest.fixture(scope="module")
def model():
    """What `find_differences` reads of a ModelSpec of the family itself."""
    build_tokenizer = cache(build_clip_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family_match, "build_clip_tokenizer", build_tokenizer)  # it takes a second each time
        yield SimpleNamespace(
            networks={folder: build_meta_network(folder, config) for folder, config in FAMILY.configs.items()},
            text_encoder_factories={
                name: lambda _, pad=spec.pad_token_id: SimpleNamespace(tokenizer=build_tokenizer(pad))
                for name, spec in FAMILY.text_encoders.items()
            },
        )


def test_a_family_s_own_configurations_are_alike(model):
    assert find_differences(model, FAMILY.scheduler, FAMILY) == []


@pytest.mark.parametrize("component, field", [(c, f) for c, fields in FIELDS.items() for f in fields])
def test_every_field_is_compared(component, field, model):
    config = model.networks[component].config
    changed = copy(config)
    object.__setattr__(changed, field, "changed")  # it is frozen
    networks = {**model.networks, component: SimpleNamespace(config=changed)}
    spoilt = SimpleNamespace(networks=networks, text_encoder_factories=model.text_encoder_factories)
    expected = [] if field in WITHOUT_EFFECT[component] else [f"{component} has {field} = changed"]
    assert find_differences(spoilt, FAMILY.scheduler, FAMILY) == expected
