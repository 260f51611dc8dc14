"""Folders that we write load in diffusers' own three lines, without a dtype."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ldm.checkpoints.formats import PICTO_PATH
from ldm.checkpoints.saving import save_as_directory
from ldm.checkpoints.tensors import add_dtype


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
