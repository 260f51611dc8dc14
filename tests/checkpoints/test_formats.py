"""Loading is strict: what is missing, unknown, torn or of another shape is named in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints.formats import load_directory
from ldm.checkpoints.schedule import table
from ldm.nn.text import embed, load_tokenizer, tokens

import ldm.nn._torchvision  # noqa: F401  isort: skip
from diffusers import DDIMScheduler  # isort: skip
from transformers import CLIPTextModel, CLIPTokenizer  # isort: skip

UNET = "unet/diffusion_pytorch_model.safetensors"


def load(folder):
    return load_directory(folder, torch.device("cpu"), torch.float32)


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FAULTS = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "not a model"),
    "no weights": (lambda f: (f / UNET).unlink(), UNET),
    "empty": (lambda f: (f / UNET).write_bytes(b""), "not a whole safetensors file"),
    "torn": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-64]), "not a whole safetensors file"),
    "text": (lambda f: (f / UNET).write_text("hello " * 99), "not a whole safetensors file"),
    "missing": (lambda f: edit(f / UNET, lambda t: t.pop("conv_in.bias")), "missing conv_in.bias"),
    "unknown": (lambda f: edit(f / UNET, lambda t: t.update(extra=torch.ones(1))), "unknown extra"),
    "shape": (
        lambda f: edit(f / UNET, lambda t: t.update({"conv_in.bias": torch.ones(3)})),
        r"conv_in.bias has shape \[3\], expected \[32\]",
    ),
    "not JSON": (lambda f: (f / "vae" / "config.json").write_text("{"), "vae/config.json: not JSON"),
    "not an object": (lambda f: (f / "vae" / "config.json").write_text("[]"), "vae/config.json: not a JSON object"),
    "no config": (lambda f: (f / "text_encoder" / "config.json").unlink(), "text_encoder/config.json"),
    "no merges": (lambda f: (f / "tokenizer" / "merges.txt").unlink(), "merges.txt"),
    "prediction": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", prediction_type="flow"),
        "prediction_type 'flow': choose from epsilon",
    ),
    "schedule": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", beta_schedule="step"),
        "beta_schedule 'step': choose from linear",
    ),
    "unheeded field": (
        lambda f: edit_json(f / "unet" / "config.json", class_embed_type="timestep"),
        "class_embed_type",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_in_one_line(copy, fault):
    spoil, said = FAULTS[fault]
    spoil(copy)
    with pytest.raises(ValueError, match=said) as error:
        load(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_every_weight_arrives(tiny):
    model = load(tiny)
    for name, network in (("unet", model.unet), ("vae", model.vae)):
        saved = load_file(tiny / name / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(network.state_dict()[key], value.float()) for key, value in saved.items())


def test_text_is_embedded_as_transformers_does(tiny):
    theirs = CLIPTokenizer.from_pretrained(tiny / "tokenizer"), CLIPTextModel.from_pretrained(tiny / "text_encoder")
    prompts = ["a red apple", "", "two stars to the left of a cat on a blue background and far too many words to fit"]
    ids = theirs[0](prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    assert torch.equal(ids, tokens(load_tokenizer(tiny / "tokenizer"), prompts))
    with torch.no_grad():
        expected = theirs[1].float()(ids).last_hidden_state
        torch.testing.assert_close(embed(load(tiny).towers[0].model, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    ],
)
def test_the_table_is_diffusers(config):
    expected = DDIMScheduler.from_config(config).alphas_cumprod
    torch.testing.assert_close(table(config).float(), expected, rtol=1e-4, atol=1e-7)
