"""Identity: an item's name says all that its picture depends on, and nothing else."""

import json
from dataclasses import fields, replace

import pytest
from PIL import Image

from ldm.jobs.worker import canonical_json, compute_item_id, fingerprint_model
from ldm.pipeline.request import Request

MODEL = {"weights": {"unet": "0" * 64}, "adapters": [], "embeddings": {}}
PLAIN = Request("a cat", height=32, width=32, num_inference_steps=6, guidance_scale=3.0)
CHANGES = {
    "prompt": "a dog",
    "negative_prompt": "",
    "seed": 1,
    "height": 48,
    "width": 48,
    "num_inference_steps": 7,
    "guidance_scale": 3.0000000000000004,
    "sampler": "ddim",
    "spacing": "karras",
    "eta": 0.5,
    "guidance_rescale": 0.5,
    "guidance_interval": (0.5, None),
    "clip_skip": 1,
    "image": Image.new("RGB", (32, 32)),
    "mask": Image.new("L", (32, 32)),
    "strength": 0.5,
    "upscale": 2.0,
    "upscale_strength": 0.6,
    "original_size": (32, 32),
    "crops_coords_top_left": (1, 0),
    "target_size": (32, 32),
}


def test_every_field_of_a_request_and_of_the_model_is_in_its_name():
    assert CHANGES.keys() | {"latents"} == {field.name for field in fields(Request)}
    names = [compute_item_id(replace(PLAIN, **{name: value}), MODEL) for name, value in CHANGES.items()]
    others = [
        {**MODEL, "weights": {"unet": "1"}},
        {**MODEL, "adapters": [["2", 0.5]]},
        {**MODEL, "embeddings": {"a": "3"}},
    ]
    names += [compute_item_id(PLAIN, model) for model in [MODEL, *others]]
    assert len(set(names)) == len(names) and all(len(name) == 24 and int(name, 16) >= 0 for name in names)


def test_a_number_is_the_same_however_it_is_written_and_wherever_the_name_is_made():
    whole = replace(PLAIN, guidance_scale=3, eta=0, guidance_interval=(1, 2))
    real = replace(PLAIN, guidance_scale=3.0, eta=0.0, guidance_interval=[1.0, 2.0])
    assert compute_item_id(whole, MODEL) == compute_item_id(real, MODEL)
    assert compute_item_id(PLAIN, MODEL) == compute_item_id(Request(**json.loads(json.dumps(PLAIN.to_record()))), MODEL)
    assert compute_item_id(PLAIN, MODEL) == "17c3e9709eb8950351b1fe82"


def test_canonical_json_is_one_text_for_equal_values():
    assert canonical_json({"b": 0.1, "a": [1, None, "é"]}) == '{"a":[1,null,"\\u00e9"],"b":0.1}'
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


def test_a_model_is_its_hashes_and_an_adapter_without_weight_is_none(pipe, monkeypatch):
    monkeypatch.setattr(pipe.adapters, "loaded", {"x": (type("A", (), {"sha256": "9"}), 0.0)})
    assert fingerprint_model(pipe) == {"weights": pipe.model.weight_hashes, "adapters": [], "embeddings": {}}
    monkeypatch.setattr(
        pipe.adapters, "loaded", {k: (type("A", (), {"sha256": k}), w) for k, w in (("9", 0.5), ("1", 2))}
    )
    assert fingerprint_model(pipe)["adapters"] == [["1", 2], ["9", 0.5]]
