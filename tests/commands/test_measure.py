"""`ldm likelihood` and `ldm invert`: what they print is repeatable and agrees with itself; wrong input is one line."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ldm.analysis.inversion import bdia_decode, ode_decode
from ldm.metadata import read_image_and_metadata
from ldm.pipeline.scheduler import make_time_grid

SMALL = ["--steps", "4", "--probes", "3", "--device", "cpu"]


def noise_image(path, height, width):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def image_file(tmp_path):
    return noise_image(tmp_path / "cat.png", 32, 32)


@pytest.fixture
def wide_file(tmp_path):
    return noise_image(tmp_path / "cat.png", 32, 48)


def measured(ldm_, *words):
    status, out, err = ldm_("likelihood", *words, "--json")
    assert status == 0, err
    return json.loads(out)


def test_a_prompt_and_none_see_the_same_noise_so_the_empty_prompt_makes_no_difference(ldm_, tiny, image_file):
    words = [image_file, "--model", tiny, *SMALL]
    empty = measured(ldm_, *words, "--prompt", "")
    for method in ("ode", "elbo"):
        difference = empty[method]["difference"]
        assert (difference["nats"], difference["standard_error"]) == (0, 0)
    prompted = measured(ldm_, *words, "--prompt", "two stars")
    for method in ("ode", "elbo"):
        rows = prompted[method]
        assert rows["log p(z)"] == empty[method]["log p(z)"]
        gain = rows["log p(z | prompt)"]["nats"] - rows["log p(z)"]["nats"]
        assert rows["difference"]["nats"] == pytest.approx(gain, abs=1e-9) and gain != 0


def test_numbers_are_a_function_of_the_seed_and_agree_with_one_another(ldm_, tiny, image_file):
    words = [image_file, "--model", tiny, *SMALL]
    both, again, other = (measured(ldm_, *words, "--seed", seed) for seed in (1, 1, 2))
    assert both == again and both["ode"]["log p(z)"] != other["ode"]["log p(z)"]
    for method in ("ode", "elbo"):
        alone = measured(ldm_, *words, "--seed", 1, "--method", method)
        assert alone[method] == both[method] and {"ode", "elbo"} & set(alone) == {method}
        row, dim = both[method]["log p(z)"], math.prod(both["latent"])
        assert row["bits_per_dim"] == pytest.approx(-row["nats"] / dim / math.log(2))
    terms = both["elbo_terms"]["log p(z)"]
    total = terms["prior"] + sum(terms["diffusion"]) + terms["reconstruction"]
    assert both["elbo"]["log p(z)"]["nats"] == pytest.approx(-total)


def test_adaptive_steps_agree_with_many_fixed_ones(ldm_, tiny, image_file):
    words = [image_file, "--model", tiny, "--device", "cpu", "--method", "ode", "--probes", 4]
    fixed = measured(ldm_, *words, "--steps", 16)["ode"]["log p(z)"]
    adaptive = measured(ldm_, *words, "--tolerance", 1e-2)["ode"]["log p(z)"]
    error = math.hypot(fixed["standard_error"], adaptive["standard_error"])
    assert abs(fixed["nats"] - adaptive["nats"]) < 4 * error and fixed["evaluations"] == 64


def test_the_likelihood_table_says_what_the_record_says(ldm_, tiny, image_file):
    words = [image_file, "--model", tiny, "--prompt", "a cat", *SMALL]
    record = measured(ldm_, *words)
    status, out, _ = ldm_("likelihood", *words)
    assert status == 0
    for method in ("ode", "elbo"):
        for name, row in record[method].items():
            assert f"{method.upper():5}{name:27}{row['nats']:11.2f}{row['standard_error']:9.2f}" in out
    assert f"{record['vae']['entropy of q(z | picture)']['nats']:.2f}" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (["no.png"], "no.png"),
        (["TEXT"], "not an image"),
        (["ODD"], "odd.png: image of 30x32: one size, in multiples of 4"),
        (["PICTURE", "--method", "exact"], "--method exact: choose from ode, elbo, both"),
        (["PICTURE", "--steps", "1"], "--steps 1"),
        (["PICTURE", "--probes", "1"], "--probes 1"),
        (["PICTURE", "--tolerance", "0"], "--tolerance 0"),
        (["PICTURE", "--seed", "-1"], "--seed -1"),
        (["PICTURE", "--dtype", "int8"], "dtype 'int8': choose from"),
        (["PICTURE", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_wrong_input_of_likelihood_is_one_error_line_and_status_2(refused, tiny, image_file, tmp_path, words, said):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (30, 32)).save(tmp_path / "odd.png")
    places = {"TEXT": tmp_path / "text.png", "ODD": tmp_path / "odd.png", "PICTURE": image_file}
    words = [places.get(word, word) for word in words]
    refused("likelihood", *words, *([] if "--model" in words else ["--model", tiny]), said=said)


@pytest.mark.parametrize("guidance", [1, 3])
def test_the_exact_scheme_returns_the_latent_and_its_file_leads_back(ldm_, tiny, pipe, wide_file, tmp_path, guidance):
    words = ["--prompt", "a cat", "--steps", 7, "--guidance", guidance, "--model", tiny, "--out", tmp_path / "out"]
    status, out, _ = ldm_("invert", wide_file, *words, "--json")
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
    z = pipe.encode_images([Image.open(wide_file)]).mean
    with torch.inference_mode():
        denoise = pipe.cfg_denoiser(["a cat"], [""], float(guidance))
        returned = bdia_decode(denoise, state, make_time_grid(pipe.model.sde, "log_snr", 7))
    torch.testing.assert_close(returned, z.double(), rtol=0, atol=1e-10)
    assert json.loads(read_image_and_metadata(back)[1]["ldm-invert"])["scheme"] == "exact"
    assert record["picture_rms_error"] == record["picture_rms_error_of_vae"]  # nothing was lost on the way
    assert record["evaluations"] == 8 + 6


def test_the_ode_s_error_is_that_of_the_way_back_from_its_file(ldm_, tiny, pipe, wide_file, tmp_path):
    words = ["--scheme", "ode", "--rtol", "1e-2", "--atol", "1e-3", "--model", tiny, "--out", tmp_path / "out"]
    status, out, _ = ldm_("invert", wide_file, *words, "--json")
    record = json.loads(out)
    with safe_open(record["files"][0], "pt") as file:
        state, settings = (file.get_tensor("noise"),), file.metadata()
    assert status == 0 and (settings["rtol"], settings["atol"]) == ("0.01", "0.001")
    with torch.inference_mode():
        grid = make_time_grid(pipe.model.sde, "log_snr", 50)
        back = ode_decode(pipe.cfg_denoiser([""], [""]), state, grid, rtol=1e-2, atol=1e-3)
    error = (back - pipe.encode_images([Image.open(wide_file)]).mean).abs()
    assert record["latent_max_error"] == pytest.approx(error.max().item(), rel=1e-6)
    assert record["latent_rms_error"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-6)


def test_the_invert_table_says_what_json_says(ldm_, tiny, wide_file, tmp_path):
    words = ["invert", wide_file, "--steps", 3, "--model", tiny, "--out", tmp_path / "out"]
    record = json.loads(ldm_(*words, "--json")[1])
    table = ldm_(*words)[1]
    assert all(name.replace("_", " ") in table for name in record) and all(file in table for file in record["files"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["NONE"], "none.png"),
        (["TEXT"], "not an image"),
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
def test_wrong_input_of_invert_is_one_error_line_and_nothing_written(refused, tiny, wide_file, tmp_path, words, said):
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
