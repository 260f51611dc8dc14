"""Files of `ldm generate`: names by a pattern, formats, a preview; and prompts of files with the adapters in them."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.adapters import lora_tags
from ldm.adapters.factors import LoRA
from ldm.adapters.lora import Adapter, ModuleDelta
from ldm.adapters.lora_saving import save_adapter
from ldm.adapters.lora_tags import LoraTag, split_lora_tags
from ldm.commands import image_files
from ldm.metadata import read_image_and_metadata


@pytest.fixture
def generated(ldm_, tiny, tmp_path):
    """The records of the images of `ldm generate WORDS...`, and what it printed on stderr."""

    def run(*words, out=None):
        command = "generate", *words, "--model", tiny, "--steps", 2, "--json", "--out", out or tmp_path / "out"
        status, text, err = ldm_(*command)
        assert status == 0, err
        return json.loads(text)["images"], err

    return run


def names(images):
    return [image["file"].rsplit("/", 1)[1] for image in images]


def test_names_follow_a_pattern_and_no_file_is_written_over(generated):
    images, _ = generated(
        "A Cat", "--count", 2, "--seed", 5, "--name-pattern", "{seed}_{width}x[height]-[cfg]-[sampler]"
    )
    assert names(images) == ["5_32x32-3-ddim.png", "6_32x32-3-ddim.png"]
    assert names(generated("A Cat", "b", "--name-pattern", "[prompt_spaces]")[0]) == ["a-cat.png", "b.png"]
    assert names(generated("a cat", "a/cat", "--name-pattern", "{prompt}")[0]) == ["a-cat-2.png", "a-cat-3.png"]
    assert names(generated("a", "--name-pattern", "x{number}")[0]) == ["x0000.png"]
    assert names(generated("a", "--name-pattern", "x{number}", "--format", "webp")[0]) == ["x0001.webp"]
    assert names(generated("é", "--name-pattern", "{model}-{prompt}é")[0]) == ["tiny-imageé.png"]


@pytest.mark.parametrize("name, form", [("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"), ("a.png", "PNG")])
def test_a_file_s_suffix_tells_its_format_and_its_metadata_stay(generated, tmp_path, name, form):
    ((record,), _), ((again,), _) = generated("é", out=tmp_path / name), generated("--from", tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.format == form
    assert {**record, "file": ""} == {**again, "file": ""} and record["prompt"] == "é"
    (lossy,), _ = generated("é", "--format", "jpg")
    assert lossy["file"].endswith("0001-image-0.jpg") or lossy["file"].endswith(".jpg")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--name-pattern", "{sed}"], "{sed}; did you mean 'seed'? (fields are {prompt}, "),
        (["--name-pattern", "a/{seed}"], "is no name of a file; a folder is given by --out"),
        (["--name-pattern", "..{seed}"], "is no name"),
        (["--format", "gif"], "--format 'gif': choose from png, webp, jpeg"),
        (["--out", "x.png", "--format", "jpeg"], "--format needs a folder"),
        (["--out", "x.png", "--name-pattern", "a"], "--name-pattern needs a folder"),
        (["--out", "x.gif"], "--out x.gif: images are written as png, webp or jpeg"),
        (["--preview", "x.txt"], "--preview x.txt: must be a file that ends in .png"),
        (["--preview", "/dev/null/x.png"], "--preview /dev/null"),
        (["--lora-dir", "none"], "--lora-dir none: not a folder"),
        (["--from-file", "none.txt"], "none.txt"),
    ],
)
def test_what_is_wrong_is_refused_before_an_image(refused, tiny, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    refused("generate", "a", "--model", tiny, "--steps", 1, *words, said=said)
    assert list(tmp_path.iterdir()) == []


def test_a_preview_is_a_whole_image_at_every_step_and_the_finished_one_at_last(generated, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "PREVIEW_INTERVAL", 0.0)
    monkeypatch.setattr(image_files, "PREVIEW_SHARE", 1e9)
    write, seen = image_files.Preview.write, []

    def record(preview, image):
        write(preview, image)
        with Image.open(preview.path) as shown:
            seen.append(np.asarray(shown.convert("RGB"), int))

    monkeypatch.setattr(image_files.Preview, "write", record)
    (made,), _ = generated("a cat", "--preview", tmp_path / "p" / "now.png", "-W", 48)
    last = np.asarray(read_image_and_metadata(tmp_path / "out" / names([made])[0])[0], int)
    assert len(seen) == 3 and all(image.shape == (32, 48, 3) for image in seen)
    assert (seen[-1] == last).all() and (seen[0] != last).any()


def test_prompts_of_a_file_and_of_standard_input_have_their_options(generated, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text(
        "# x\na cat --d 7 --w 48 --n dog\n--prompt \"two stars\" --sampler_name 'DPM++ 2M Karras'\n"
    )
    images, _ = generated("first", "--from-file", tmp_path / "p.txt", "--seed", 3)
    assert [(i["prompt"], i["seed"], i["width"]) for i in images] == [
        ("first", 3, 32),
        ("a cat", 7, 48),
        ("two stars", 3, 32),
    ]
    assert images[1]["negative_prompt"] == "dog" and (images[2]["sampler"], images[2]["spacing"]) == (
        "dpmpp_2m",
        "karras",
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a --s 3\n{b|b}\n")))
    assert [(i["prompt"], i["num_inference_steps"]) for i in generated("-")[0]] == [("a", 3), ("b", 2)]
    (tmp_path / "p.txt").write_text("a\nb --seed -1\n")
    drawn = [generated("--from-file", tmp_path / "p.txt", "--seed", -1)[0] for _ in range(2)]
    assert len({image["seed"] for images in drawn for image in images}) == 4


def test_a_wrong_line_of_a_file_is_named(refused, tiny, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb --steps 0\n")
    refused("generate", "--model", tiny, "--from-file", tmp_path / "p.txt", said="p.txt:2: steps 0")


@pytest.fixture
def loras(pipe, tmp_path):
    (tmp_path / "loras" / "styles").mkdir(parents=True)
    target = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    for k, name in enumerate(("Ink", "styles/oil")):
        g = torch.Generator().manual_seed(k)
        delta = ModuleDelta(LoRA(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g)))
        save_adapter(
            Adapter(name, {target: delta}), tmp_path / "loras" / f"{name}.safetensors", "kohya", pipe.model.networks
        )
    return tmp_path / "loras"


def pixels(image):
    return np.asarray(read_image_and_metadata(image["file"])[0], int)


def test_tags_in_prompts_load_adapters_of_a_folder_each_prompt_its_own(generated, loras):
    texts = (
        "a",
        "a <lora:ink:0.5>",
        "a <lora:oil:0.5:0.8>",
        "a <lora:styles/oil:1><lora:ink:.5>",
        "a <lora:ink:0.5>",
        "a",
    )
    images, err = generated(*texts, "--lora-dir", loras)
    assert err == "" and {image["prompt"] for image in images} == {"a"}
    first, ink, oil, both, again, last = map(pixels, images)
    assert (first == last).all() and (ink == again).all()
    assert all((one != other).any() for one, other in ((first, ink), (first, oil), (ink, both), (oil, both)))
    by_option, _ = generated("a", "--lora", f"ink={loras / 'Ink.safetensors'}:0.5")
    assert (pixels(by_option[0]) == ink).all()
    records = [json.loads(read_image_and_metadata(image["file"])[1]["ldm"])["adapters"] for image in images]
    assert [[(a["name"], a["weight"]) for a in record] for record in records] == [
        [], [("ink", 0.5)], [("oil", [0.8, 0.5])], [("ink", 0.5), ("styles/oil", 1.0)], [("ink", 0.5)], [],
    ]  # fmt: skip
    restored, err = generated("--from", images[1]["file"], "--lora-dir", loras)
    assert err == "" and (pixels(restored[0]) == ink).all()


def test_a_tag_without_a_file_is_left_out_and_said(generated, refused, loras, tiny, tmp_path):
    plain, named = generated("a")[0], generated("a <lora:none:0.5>", "--lora-dir", loras)
    assert (pixels(named[0][0]) == pixels(plain[0])).all()
    assert named[1] == f"warning: <lora:none:0.5>: left out: not in {loras}\n"
    words = "a <lora:none:0.5>", "--model", tiny, "--steps", 1, "--out", tmp_path / "new"
    refused("generate", *words, "--strict", said="(--strict)")
    refused("generate", "a <lora:none:much>", *words[1:], said="the weight 'much' is not a number")


def test_tags_have_the_web_ui_s_weights():
    tags = "<lora:a><lora:b:0.5> x <lyco:c:0.5:0.8><lora:d:te=0.5:unet=1>"
    text, found = split_lora_tags(tags)
    assert text == "x"
    assert found == (LoraTag("a"), LoraTag("b", 0.5), LoraTag("c", 0.8, 0.5), LoraTag("d", 1.0, 0.5))
    assert "".join(map(str, found)) == "<lora:a:1><lora:b:0.5><lora:c:0.5:0.8><lora:d:0.5:1>"
    assert split_lora_tags(" a ") == (" a ", ())


def test_a_folder_of_too_many_adapters_is_refused_and_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_tags, "MAX_FILES", 1)
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="2 files, at most 1 are read"):
        lora_tags.index_adapter_files(tmp_path)
