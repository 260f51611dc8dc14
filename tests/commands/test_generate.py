"""The command line: what it generates, what it refuses, and how it says so."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ldm.commands.image_files import ImageFiles
from ldm.metadata import read_image_and_metadata
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request


def test_generate_writes_a_png_for_each_prompt_and_seed_and_the_same_bytes_again(ldm_, tiny, tmp_path):
    words = ["generate", "a cat", "two stars", "a/../b: é", "--model", tiny, "--seed", 7, "--count", 2]
    status, out, _ = ldm_(*words, "--out", tmp_path / "a")
    files = out.split("\n")[:-1]
    assert status == 0 and files == [str(f) for f in sorted((tmp_path / "a").iterdir())] and len(files) == 6
    assert ldm_(*words, "--out", tmp_path / "b", "--batch-size", 8)[0] == 0
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_file_s_metadata_reproduces_it(ldm_, tiny, pipe, tmp_path):
    prompt = "a cat, on a: \n \"blue\" 'background' é 雪"
    words = [prompt, "--negative", "a dog", "--sampler", "heun", "--width", 48, "--seed", 3, "--guidance", 2.5]
    _, out, _ = ldm_("generate", *words, "--model", tiny, "--out", tmp_path, "--json")
    (image,) = json.loads(out)["images"]
    texts = read_image_and_metadata(image["file"])[1]
    record = json.loads(texts["ldm"])
    with Image.open(image["file"]) as drawn:
        assert pipe.generate([Request(**record["request"])])[0].tobytes() == drawn.tobytes()
    assert set(record["weights"]) == {"unet", "vae", "text_encoder"}
    first, negative, settings = texts["parameters"].removeprefix(prompt).split("\n")
    assert (first, negative) == ("", "Negative prompt: a dog")
    pairs = dict(pair.split(": ", 1) for pair in settings.split(", "))
    wanted = {"Steps": "6", "Sampler": "Heun", "CFG scale": "2.5", "Seed": "3", "Size": "48x32", "Model": "tiny"}
    assert wanted.items() <= pairs.items() and record["weights"]["unet"].startswith(pairs["Model hash"])


def test_two_runs_at_once_into_one_folder_write_over_nothing(ldm_, tiny, tmp_path, monkeypatch):
    stream, others = Pipeline.stream, []

    def beside_another(self, requests, *rest):
        monkeypatch.setattr(Pipeline, "stream", stream)
        for k, drawn in enumerate(stream(self, requests, *rest)):
            if k == 1:  # the names of the second and third image
                same = [self.resolve(replace(request, num_inference_steps=2)) for request in requests[1:]]
                others.extend(ImageFiles(tmp_path, model="tiny").write(same, self, stream(self, same)))
            yield drawn

    monkeypatch.setattr(Pipeline, "stream", beside_another)
    status, out, _ = ldm_("generate", "a cat", "--count", 3, "--model", tiny, "--out", tmp_path)
    ours, theirs = out.split("\n")[:-1], [str(path) for path in others]
    assert status == 0 and ours == sorted(ours) and sorted(ours + theirs) == sorted(map(str, tmp_path.iterdir()))
    assert len({os.path.basename(file)[:4] for file in ours + theirs}) == 5
    for files, steps, seeds in ((ours, 6, [0, 1, 2]), (theirs, 2, [1, 2])):
        drawn = [json.loads(read_image_and_metadata(Path(file))[1]["ldm"])["request"] for file in files]
        assert [(r["num_inference_steps"], r["seed"]) for r in drawn] == [(steps, seed) for seed in seeds]


OURS = ["--negative", "a dog", "--steps", 3, "--guidance", 2.5, "--sampler", "dpmpp_2m", "--spacing", "karras"]


@pytest.mark.parametrize(
    "options",
    [
        [
            "--negative-prompt",
            "a dog",
            "--num-inference-steps",
            3,
            "--guidance-scale=2.5",
            "--sampler",
            "DPM++ 2M Karras",
        ],
        ["--negative_prompt", "a dog", "--steps", 3, "--cfg", 2.5, "--sampler", "dpm++ 2m", "--scheduler", "Karras"],
        ["--negative", "a dog", "--num_inference_steps=3", "--cfg_scale", 2.5, "--sampler_name", "DPM++ 2M karras"],
    ],
)
def test_options_as_people_spell_them_are_the_same_request(ldm_, tiny, tmp_path, options):
    words = ["generate", "--model", tiny, "--json"]
    _, out, _ = ldm_(*words, "a cat", *OURS, "--width", 48, "--height", 36, "--count", 2, "--out", tmp_path / "a")
    _, same, err = ldm_(
        *words, "--prompt", "a cat", *options, "-W", 48, "-H", 36, "--num-images", 2, "-o", tmp_path / "b"
    )
    assert err == "" and same.replace(str(tmp_path / "b"), str(tmp_path / "a")) == out
    assert json.loads(out)["images"][1]["sampler"] == "dpmpp_2m" and json.loads(out)["images"][1]["seed"] == 1


def truncated(tiny, tmp_path):
    import shutil

    folder = tmp_path / "torn"
    shutil.copytree(tiny, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "PROMPT"),
        (["a cat", "--steps", "0"], "steps 0"),
        (["a cat", "--steps", "many"], "'--steps': Input should be a valid integer"),
        (["a cat", "--steps", "2000"], "2000 steps"),
        (["a cat", "--sampler", "dpm"], "sampler 'dpm': choose from ddpm, ddim"),
        (["a cat", "--spacing", "even"], "spacing 'even': choose from linspace"),
        (["a cat", "--guidance", "nan"], "guidance nan"),
        (["a cat", "--guidance", "-1"], "guidance -1"),
        (["a cat", "--seed", "-2"], "seed -2"),
        (["a cat", "--count", "0"], "--count 0"),
        (["a cat", "--batch-size", "0"], "--batch-size 0"),
        (["a cat", "--width", "3"], "width 3: must be a multiple of 4"),
        (["a cat", "--height", "99999999999"], "height 99999999999"),
        (["a cat", "--eta", "2"], "eta 2"),
        (["a cat", "--guidance-rescale", "2"], "guidance rescale 2"),
        (["a cat", "--guidance-interval", "5", "1"], "guidance interval 5 to 1"),
        (["a cat", "--dtype", "int8"], "dtype 'int8': choose from"),
        (["a cat", "--device", "gpu"], "gpu"),
        (["a cat", "--device", "meta"], "meta"),
        (["a \udcff cat"], "prompt: not valid UTF-8"),
        (["a (cat:1000)"], "1000"),
        (["a cat", "--colour", "red"], "--colour"),
        (["a cat", "--model", "no/such/folder"], "no/such/folder"),
        (["a cat", "--model", "TORN"], "diffusion_pytorch_model.safetensors"),
        (["a cat", "--out", "FILE/pictures"], "--out"),
    ],
)
def test_wrong_input_is_one_error_line_status_2_and_nothing_written(refused, tiny, tmp_path, words, said):
    (tmp_path / "file").write_text("")
    if "--model" not in words:
        words = [*words, "--model", str(tiny)]
    if "--out" not in words:
        words = [*words, "--out", str(tmp_path / "out")]
    places = {"TORN": lambda: str(truncated(tiny, tmp_path)), "FILE/pictures": lambda: str(tmp_path / "file" / "x")}
    refused("generate", *[places[w]() if w in places else w for w in words], said=said)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.png"))


def test_no_words_at_all_print_the_help(ldm_):
    assert ldm_()[:2] == ldm_("--help")[:2]


@pytest.mark.parametrize("words", [["paint"], ["train"], ["train", "no.yaml"], ["--colour"]])
def test_an_unknown_command_or_file_is_one_error_line(refused, words):
    refused(*words)


def test_help_names_every_command(ldm_):
    status, out, _ = ldm_("--help")
    assert status == 0 and all(name in out for name in ("generate", "train", "info"))


def test_info_lists_versions_and_back_ends(ldm_):
    status, out, _ = ldm_("info")
    assert status == 0 and "torch" in out and "attention sdpa" in out and "xformers" in out
    assert "packed weights float32" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_whole_files_only_and_status_130(tiny, tmp_path, number):
    words = ["generate", "a cat", "--count", "1000", "--batch-size", "1", "--model", str(tiny), "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm.cli", *words],
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores Ctrl-C, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.glob("*.png")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err
    for file in tmp_path.iterdir():
        assert file.suffix == ".png" and Image.open(file).load()


def test_standard_input_wildcards_and_one_file(ldm_, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a cat\n\n{a|a} dog\n")))
    words = ["generate", "--model", tiny, "--steps", 2, "--json"]
    status, out, _ = ldm_(*words, "-", "--out", tmp_path)
    assert status == 0 and [image["prompt"] for image in json.loads(out)["images"]] == ["a cat", "a dog"]
    status, out, _ = ldm_(*words, "a {@red|blue} cat", "--seed", 1, "--out", tmp_path / "foo.png")
    assert status == 0 and (tmp_path / "foo.png").is_file()
    assert json.loads(out)["images"][0]["prompt"] == "a blue cat"
    for arguments, said in ((["a", "b"], "is one file, for 2 images"), (["{a"], "is not closed")):
        status, _, err = ldm_(*words, *arguments, "--out", tmp_path / "new.png")
        assert status == 2 and said in err and not (tmp_path / "new.png").exists()


def test_wildcards_are_kept_as_text_where_that_is_asked(ldm_, refused, tiny, tmp_path):
    """As the gallery's command asks for prompts with braces."""
    arguments = ["generate", "a {b|c}", "--model", str(tiny), "--steps", "1", "--json", "--out", str(tmp_path)]
    status, out, error = ldm_(*arguments, "--expand", "none")
    assert status == 0, error
    assert json.loads(out)["images"][0]["prompt"] == "a {b|c}"
    assert json.loads(ldm_(*arguments)[1])["images"][0]["prompt"] in ("a b", "a c")
    refused(*arguments, "--expand", "both", said="--expand")
