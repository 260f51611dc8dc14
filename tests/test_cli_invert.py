"""`ldm invert`: the latent comes back, the files say what they are, and wrong input is one line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ldm.analysis.inversion import bdia_decode, ode_decode
from ldm.metadata import read_png_texts
from ldm.pipeline.scheduler import make_time_grid


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.mark.parametrize("guidance", [1, 3])
def test_the_exact_scheme_returns_the_latent_and_its_file_leads_back(ldm_, tiny, pipe, picture, tmp_path, guidance):
    words = ["--prompt", "a cat", "--steps", 7, "--guidance", guidance, "--model", tiny, "--out", tmp_path / "out"]
    status, out, _ = ldm_("invert", picture, *words, "--json")
    record = json.loads(out)
    assert status == 0 and record["latent_max_error"] < 1e-10
    noise, back = record["files"]
    with safe_open(noise, "pt") as file:
        state, settings = tuple(file.get_tensor(name) for name in ("noise", "below")), file.metadata()
    assert settings == {
        "prompt": "a cat",
        "model": "tiny",
        "scheme": "exact",
        "steps": "7",
        "guidance": f"{guidance}.0",
    }
    assert record["noise_std"] == pytest.approx(state[0].std().item())
    z = pipe.encode_images([Image.open(picture)]).mean
    with torch.inference_mode():
        denoise = pipe.cfg_denoiser(["a cat"], [""], float(guidance))
        returned = bdia_decode(denoise, state, make_time_grid(pipe.model.sde, "log_snr", 7))
    torch.testing.assert_close(returned, z.double(), rtol=0, atol=1e-10)
    assert json.loads(read_png_texts(back)["ldm-invert"])["scheme"] == "exact"
    assert record["picture_rms_error"] == record["picture_rms_error_of_vae"]  # nothing was lost on the way
    assert record["evaluations"] == 8 + 6


def test_the_ode_s_error_is_that_of_the_way_back_from_its_file(ldm_, tiny, pipe, picture, tmp_path):
    words = ["--scheme", "ode", "--rtol", "1e-2", "--atol", "1e-3", "--model", tiny, "--out", tmp_path / "out"]
    status, out, _ = ldm_("invert", picture, *words, "--json")
    record = json.loads(out)
    with safe_open(record["files"][0], "pt") as file:
        state, settings = (file.get_tensor("noise"),), file.metadata()
    assert status == 0 and (settings["rtol"], settings["atol"]) == ("0.01", "0.001")
    with torch.inference_mode():
        grid = make_time_grid(pipe.model.sde, "log_snr", 50)
        back = ode_decode(pipe.cfg_denoiser([""], [""]), state, grid, rtol=1e-2, atol=1e-3)
    error = (back - pipe.encode_images([Image.open(picture)]).mean).abs()
    assert record["latent_max_error"] == pytest.approx(error.max().item(), rel=1e-6)
    assert record["latent_rms_error"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-6)


def test_the_table_says_what_json_says(ldm_, tiny, picture, tmp_path):
    words = ["invert", picture, "--steps", 3, "--model", tiny, "--out", tmp_path / "out"]
    record = json.loads(ldm_(*words, "--json")[1])
    table = ldm_(*words)[1]
    assert all(name.replace("_", " ") in table for name in record) and all(file in table for file in record["files"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["NONE"], "none.png"),
        (["TEXT"], "not a picture"),
        (["ODD"], "multiples of 4"),
        (["CAT", "--scheme", "edict"], "--scheme edict: choose from exact, ode"),
        (["CAT", "--steps", "0"], "--steps 0"),
        (["CAT", "--guidance", "nan"], "--guidance nan"),
        (["CAT", "--rtol", "0"], "--rtol 0"),
        (["CAT", "--atol", "-1"], "--atol -1"),
        (["CAT", "--out", "TEXT"], "--out"),
        (["CAT", "--model", "NONE"], "none.png"),
        ([], "IMAGE"),
    ],
)
def test_wrong_input_is_one_error_line_status_2_and_nothing_written(refused, tiny, picture, tmp_path, words, said):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (30, 31)).save(tmp_path / "odd.png")
    places = {"NONE": "none.png", "TEXT": "text.png", "ODD": "odd.png", "CAT": "cat.png"}
    words = [tmp_path / places[word] if word in places else word for word in words]
    before = sorted(tmp_path.rglob("*"))
    defaults = [
        w for name, v in (("--model", tiny), ("--out", tmp_path / "out")) if name not in words for w in (name, v)
    ]
    refused("invert", *words, *defaults, said=said)
    assert sorted(tmp_path.rglob("*")) == before
