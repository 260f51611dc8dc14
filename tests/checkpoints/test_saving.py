"""Folders: ours load in diffusers' own three lines, and what transformers passes over in others is no fault."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from ldm.checkpoints.formats import PICTO_PATH, read_model_spec
from ldm.checkpoints.saving import save_as_directory
from ldm.checkpoints.tensors import add_dtype, open_safetensors
from ldm.convert.inspect import inspect_model


def test_diffusers_loads_the_shipped_model_in_one_dtype_and_its_copy_too(tmp_path):
    save_as_directory(PICTO_PATH, tmp_path / "copy")
    for folder in (PICTO_PATH, tmp_path / "copy"):
        assert json.loads((folder / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "copy")
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red apple", num_inference_steps=1, height=64, width=64).images


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"model_type": "clip_text_model", "torch_dtype": "float16"}, "float32"),
        ({"architectures": ["CLIPTextModelWithProjection"], "dtype": "bfloat16"}, "float32"),
        ({"_class_name": "AutoencoderKL"}, None),
    ],
)
def test_only_a_text_encoder_states_its_dtype(config, expected):
    found = add_dtype(config)
    assert found.get("dtype") == expected and "torch_dtype" not in found


def test_other_parts_of_clip_beside_a_text_encoder_are_passed_over_and_listed(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    path = folder / "text_encoder" / "model.safetensors"
    others = ["logit_scale", "text_projection.weight", "vision_model.embeddings.class_embedding"]
    save_file(load_file(path) | {name: torch.ones(1) for name in others}, path)
    spec, plain = read_model_spec(folder), read_model_spec(tiny)
    assert [len(f.key_mappings) for f in spec.weight_files] == [len(f.key_mappings) for f in plain.weight_files]
    assert inspect_model(folder, probe=False)["ignored"] == {
        "position ids, other parts of CLIP, scales, single numbers": 3
    }
    save_file(load_file(path) | {"text_model.surplus": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"unknown text_model\.surplus"):
        read_model_spec(folder)


def test_a_header_whose_metadata_is_null_is_read(tmp_path):
    header = b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert dict(open_safetensors(tmp_path / "a.safetensors").metadata) == {}
