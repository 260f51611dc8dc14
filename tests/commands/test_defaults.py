"""Defaults of options from YAML files, and the words that every command line takes."""

import json
import os
import subprocess
import sys

import pytest

from ldm import __version__

CONFIG = """
steps: 3
cfg_scale: 2.5
workers: 2  # of ldm batch alone
W: 40
model: {tiny}
batch: {{steps: 5, count: 3}}
generate: {{W: 48, --H: 36, guidance-interval: [0.1, .inf], zero-snr: false}}
"""


@pytest.fixture
def generated(ldm_, tmp_path):
    """The record of the one image of `ldm generate WORDS...`."""

    def run(*words):
        status, out, err = ldm_("generate", "a cat", "--out", tmp_path / "out", "--json", *words)
        assert (status, err) == (0, "")
        return json.loads(out)["images"][0]

    return run


def test_defaults_are_a_file_s_and_the_command_line_overrides_them(generated, tiny, tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG.format(tiny=tiny))
    record = generated("--config", tmp_path / "c.yaml", "--steps", 4)
    assert (record["num_inference_steps"], record["guidance_scale"]) == (4, 2.5)
    assert (record["width"], record["height"], record["guidance_interval"]) == (48, 36, [0.1, None])
    assert generated("--config", tmp_path / "c.yaml")["num_inference_steps"] == 3


def test_the_user_s_own_file_is_read_unless_another_or_none_is_given(generated, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "ldm.yaml").write_text(f"steps: 2\nmodel: {tiny}")
    (tmp_path / "other.yaml").write_text(f"model: {tiny}")
    assert generated()["num_inference_steps"] == 2
    assert generated("--config", tmp_path / "other.yaml")["num_inference_steps"] == 6
    assert generated("--config", "", "--model", tiny)["num_inference_steps"] == 6


@pytest.mark.parametrize(
    "text, said",
    [
        ("steps: many", "steps: Input should be a valid integer"),
        ("stepz: 3", "stepz: no option has this name; did you mean 'steps'?"),
        ("steps: 3\nnum_inference_steps: 4", "num_inference_steps: --steps is given twice"),
        ("steps: 3\nsteps: 4", "line 2: key 'steps' is given twice"),
        ("guidance-interval: 3", "guidance-interval: "),
        ("ema: 3", "ema: Input should be a valid boolean"),
        ("generate: {colour: red}", "colour: no option"),
        ("- 3", "expected options"),
        ("steps: [", "c.yaml"),
    ],
)
def test_a_wrong_default_names_the_file_and_the_key(refused, tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    refused("generate", "a cat", "--config", tmp_path / "c.yaml", "--out", tmp_path / "out", said=said)
    refused("generate", "a cat", "--config", tmp_path / "c.yaml", said="c.yaml: ")
    assert os.listdir(tmp_path) == ["c.yaml"]


def test_a_file_that_is_none_is_an_error_of_the_option(refused, tmp_path):
    refused("generate", "a cat", "--config", tmp_path / "none.yaml", said="--config")
    refused("generate", "a cat", "--config", tmp_path, said="--config")


def test_version_and_short_help(ldm_):
    assert ldm_("--version") == (0, f"ldm {__version__}\n", "")
    assert ldm_("-h") == ldm_("--help")
    status, out, _ = ldm_("batch", "-h")
    assert status == 0 and "--engine" in out


def test_completion_names_options_and_commands():
    script = "import sys; sys.argv = ['ldm']; from ldm.cli import main; main()"
    for words, wanted in (("ldm generate --st", "--steps"), ("ldm ver", "verify")):
        asked = {"_LDM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **asked}, capture_output=True)
        assert wanted in done.stdout.decode().split()
