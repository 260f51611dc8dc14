"""Metadata that anybody may have written: a verdict in one line, no work beyond what the file is, no path opened."""

import json
import re

import pytest
from PIL import Image

from ldm.metadata import save_png
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request


@pytest.fixture(scope="module")
def record(pipe):
    """The record of a 32x32 image of the tiny model."""
    return json.loads(pipe.metadata(pipe.resolve(Request("a cat", num_inference_steps=2)), "tiny")["ldm"])


def changed(record, place, value):
    """The record with another value at a dotted place."""
    record = json.loads(json.dumps(record))
    *parents, last = place.split(".")
    inner = record
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return json.dumps(record)


RECORDS = [  # the text of the metadata (place None), or a place in a valid one and its value: what the verdict says
    (None, "", "no settings of ldm in it"),
    (None, "{", "invalid (not JSON"),
    (None, "[]", "invalid (: Input should be"),
    (None, "[" * 10**5, "invalid (not JSON: nested too deeply)"),
    (None, '{"weights": {}, "weights": {}}', "'weights' is given twice"),
    (None, '"' + "x" * 2**20 + '"', "longer than 1048576 characters"),
    (None, '{"request": NaN}', "NaN is not a value"),
    ("weights", 1, "weights: Input should be a valid dictionary"),
    ("weights", {"unet": "x"}, "weights.unet"),
    ("weights", {"unet": "0" * 64}, "unet differs: 0000000000 in the file"),
    ("weights", {"\x1b[2J\nok   /x.png: equal": "0" * 64}, "\\x1b[2J ok /x.png: equal differs"),
    ("weights", {"x" * 1001: "0" * 64}, "weights.x"),
    ("adapters", [5], "adapters.0"),
    ("adapters", {"a": 1}, "adapters: Input should be a valid list"),
    ("adapters", [{"name": [], "sha256": "", "weight": 1}], "adapters.0.name"),
    ("adapters", [{"name": "a", "sha256": "0" * 64, "weight": "1"}], "adapters.0.weight"),
    ("adapters", [{"name": "a", "sha256": "0" * 64, "weight": [1, 2, 3]}], "adapters.0.weight"),
    ("adapters", [{"name": "a\nok", "sha256": "0" * 64, "weight": [1, 0.5]}], "adapter a ok differs: 0000000000"),
    ("embeddings", {"a": None}, "embeddings.a"),
    ("dtype", ["x"], "dtype: Input should be a valid string"),
    ("dtype", "float8", "dtype: String should match pattern"),
    ("load", None, "load: Input should be"),
    ("load.prediction", {}, "load.prediction"),
    ("load.prediction", "w", "load.prediction"),
    ("load.variant", "../x", "load.variant"),
    ("load.family", "sd9", "load.family"),
    ("load.ema", 1, "load.ema"),
    ("version", 5, "version: Input should be a valid string"),
    ("request", None, "request: Input should be a valid dictionary"),
    ("request", {}, "request: no prompt"),
    ("request.colour", 1, "unknown field 'colour'"),
    ("request.prompt", 5, "prompt 5: not of its type"),
    ("request.seed", None, "seed None: not of its type"),
    ("request.seed", 2**70, "not of its type"),
    ("request.height", "a", "height 'a': not of its type"),
    ("request.height", 1024, "the image has 32x32 pixels, but is generated with 32x1024"),
    ("request.width", 10**18, "must be a multiple of 4 from 4 to 8192"),
    ("request.upscale", 8.0, "the image has 32x32 pixels, but is generated with 256x256"),
    ("request.upscale", 1e299, "must be above 1"),
    ("request.num_inference_steps", 0, "must be from 1"),
    ("request.num_inference_steps", 10**4, "10000 steps"),
    ("request.sampler", "\x1b[2J", "sampler '\\x1b[2J': choose from"),
    ("request.prompt", "a " * 99_999, "chunks of"),
    ("request.image", {"sha256": "0" * 64}, "made from an input image: give it by --image"),
    ("request.image", {"sha256": []}, "not of its type"),
]
NOT_READ = {  # values that a file may hold and that steer nothing: the image is verified with the model that was given
    "load.device": [],
    "load.path": "/etc/passwd",
    "load.vae": "~nosuchuser/x",
    "load.token": "secret",
    "load.revision": "x" * 300,
    "colour": {"a": [1]},
    "model": "\x1b]0;x\x07",
    "version": "1\nok   /real.png: equal",
}


def test_each_hostile_record_is_one_verdict_and_the_others_are_verified(record, pipe, ldm_, tiny, tmp_path):
    image = pipe("a cat", num_inference_steps=2).images[0]
    for k, (place, value, _) in enumerate(RECORDS):
        save_png(image, tmp_path / f"{k:02}.png", {"ldm": value if place is None else changed(record, place, value)})
    for place, value in NOT_READ.items():
        save_png(image, tmp_path / f"{place}.png", {"ldm": changed(record, place, value)})
    status, out, err = ldm_("verify", tmp_path, "--model", tiny)
    lines = sorted(out.splitlines())
    assert status == 1 and err == "" and all(line.isprintable() for line in lines)
    assert len(lines) == len(RECORDS) + len(NOT_READ)
    verdicts = zip(lines, RECORDS, strict=False)
    wrong = [line for line, (_, _, said) in verdicts if not line.startswith("FAIL ") or said not in line]
    assert wrong == []
    for line, place in zip(lines[len(RECORDS) :], sorted(NOT_READ), strict=True):
        verdict = line.removeprefix(f"ok   {tmp_path / f'{place}.png'}: ")  # 1 of 255: another batch
        assert verdict == "equal" or re.fullmatch(r"pixels differ by 1 of 255 at most, 0\.\d% of them at all", verdict)


@pytest.mark.parametrize("path", ["/etc/passwd", "/nothing/here", "~nosuchuser/x", "x" * 300, "a\0b"])
def test_no_path_of_a_record_is_opened_and_none_is_said_to_exist(record, refused, tmp_path, path):
    save_png(
        Image.new("RGB", (32, 32)), tmp_path / "x.png", {"ldm": changed(record, "load", {"path": path, "vae": path})}
    )
    refused("verify", tmp_path / "x.png", said="x.png: generated with tiny, U-Net ")


@pytest.mark.parametrize("load", [{"family": "sdxl", "ema": True}, {"variant": "none"}])
def test_options_that_the_model_does_not_take_are_left_out(record, pipe, ldm_, tiny, tmp_path, load):
    image = pipe("a cat", num_inference_steps=2).images[0]
    save_png(image, tmp_path / "x.png", {"ldm": changed(record, "load", load)})
    assert ldm_("verify", tmp_path / "x.png", "--model", tiny)[:2] == (0, f"ok   {tmp_path / 'x.png'}: equal\n")


def test_metadata_name_no_path_of_this_machine(tiny, tmp_path):
    pipe = Pipeline.from_pretrained(tiny, vae=tiny / "vae", prediction="v", device="cpu")
    texts = pipe.metadata(pipe.resolve(Request("a cat")), "tiny")
    assert json.loads(texts["ldm"])["load"] == {"prediction": "v"}
    assert str(tiny) not in "".join(texts.values())
