"""`ldm likelihood`: what it prints of a picture, that it is repeatable and paired, and what it refuses."""

import json
import math

import numpy as np
import pytest
from PIL import Image

SMALL = ["--steps", "4", "--probes", "3", "--device", "cpu"]


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def measured(ldm_, *words):
    status, out, err = ldm_("likelihood", *words, "--json")
    assert status == 0, err
    return json.loads(out)


def test_a_prompt_and_none_see_the_same_noise_so_the_empty_prompt_makes_no_difference(ldm_, tiny, picture):
    words = [picture, "--model", tiny, *SMALL]
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


def test_numbers_are_a_function_of_the_seed_and_agree_with_one_another(ldm_, tiny, picture):
    words = [picture, "--model", tiny, *SMALL]
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


def test_adaptive_steps_agree_with_many_fixed_ones(ldm_, tiny, picture):
    words = [picture, "--model", tiny, "--device", "cpu", "--method", "ode", "--probes", 4]
    fixed = measured(ldm_, *words, "--steps", 16)["ode"]["log p(z)"]
    adaptive = measured(ldm_, *words, "--tolerance", 1e-2)["ode"]["log p(z)"]
    error = math.hypot(fixed["standard_error"], adaptive["standard_error"])
    assert abs(fixed["nats"] - adaptive["nats"]) < 4 * error and fixed["evaluations"] == 64


def test_the_table_says_what_the_record_says(ldm_, tiny, picture):
    words = [picture, "--model", tiny, "--prompt", "a cat", *SMALL]
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
        (["TEXT"], "not a picture"),
        (["ODD"], "odd.png: picture of 30x32: one size, in multiples of 4"),
        (["PICTURE", "--method", "exact"], "--method exact: choose from ode, elbo, both"),
        (["PICTURE", "--steps", "1"], "--steps 1"),
        (["PICTURE", "--probes", "1"], "--probes 1"),
        (["PICTURE", "--tolerance", "0"], "--tolerance 0"),
        (["PICTURE", "--seed", "-1"], "--seed -1"),
        (["PICTURE", "--dtype", "int8"], "dtype 'int8': choose from"),
        (["PICTURE", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_wrong_input_is_one_error_line_and_status_2(refused, tiny, picture, tmp_path, words, said):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (30, 32)).save(tmp_path / "odd.png")
    places = {"TEXT": tmp_path / "text.png", "ODD": tmp_path / "odd.png", "PICTURE": picture}
    words = [places.get(word, word) for word in words]
    refused("likelihood", *words, *([] if "--model" in words else ["--model", tiny]), said=said)
