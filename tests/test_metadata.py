"""Generation parameters in image files are what other tools read, and are read back."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from ldm.metadata import (
    create_infotext,
    parse_generation_parameters,
    quote,
    read_image_and_metadata,
    save_image,
    save_png,
    split_pairs,
    unquote,
)
from ldm.pipeline.request import Request

RECORD = Request("a red apple", "", 7, 32, 64, 20, 3.0, "dpmpp_2m", "karras").to_record()
NASTY = [
    "",
    "a, (b:1.2): c\nSteps: 3, Sampler: x\n\nlast",
    "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1",
    'say "hi", \\ and \\"',
    "é 雪 🎈",
    "negative prompt: no",
    "<lora:x:1> BREAK [a|b]",
]


def test_the_parameters_are_the_web_ui_s():
    text = create_infotext({**RECORD, "negative_prompt": "a dog"}, "my, model", "0123456789abcdef", "1.0")
    prompt, negative, last = text.split("\n")
    pairs = dict(pair.split(": ", 1) for pair in last.replace("my, model", "my; model").split(", "))
    assert (prompt, negative) == ("a red apple", "Negative prompt: a dog")
    assert pairs["Sampler"] == "DPM++ 2M" and pairs["Schedule type"] == "Karras" and pairs["CFG scale"] == "3"
    assert pairs["Size"] == "64x32" and pairs["Model"] == '"my; model"' and pairs["Model hash"] == "0123456789"
    assert "Negative" not in create_infotext(RECORD, "m", "h", "1")


def test_what_the_web_ui_has_a_field_for_stands_where_it_has_it():
    edited = {**RECORD, "strength": 0.75, "clip_skip": 2, "upscale": 2.0, "upscale_strength": 0.4}
    given = {"loras": {"style": "0" * 64, "b": "1" * 64}, "embeddings": {"word": "2" * 64}}
    text = create_infotext(edited, "m", "a" * 64, "1.0", vae=("other", "b" * 64), **given)
    assert text.split("\n")[1] == (
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 3, Seed: 7, Size: 64x32, "
        "Model hash: aaaaaaaaaa, Model: m, VAE hash: bbbbbbbbbb, VAE: other, Denoising strength: 0.4, Clip skip: 2, "
        'RNG: CPU, Hires upscale: 2.0, Hires upscaler: Lanczos, Lora hashes: "style: 000000000000, b: 111111111111", '
        'TI hashes: "word: 222222222222", Version: ldm 1.0'
    )
    assert parse_generation_parameters(text)["Lora hashes"] == "style: 000000000000, b: 111111111111"
    assert "Denoising strength: 0.75" in create_infotext({**edited, "upscale": None}, "m", "h", "1")
    for word in ("VAE", "Denoising", "Clip skip", "Hires", "Lora", "TI"):
        assert word not in create_infotext({**RECORD, "clip_skip": 0}, "m", "h", "1")


@pytest.mark.parametrize("negative", NASTY)
@pytest.mark.parametrize("prompt", NASTY)
def test_parameters_are_read_back(prompt, negative):
    text = create_infotext(
        {**RECORD, "prompt": prompt, "negative_prompt": negative}, 'a "model", v: 1\\', "f" * 64, "1.0"
    )
    assert parse_generation_parameters(text) == {
        "Prompt": prompt,
        "Negative prompt": negative,
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "3",
        "Seed": "7",
        "Size": "64x32",
        "Model hash": "f" * 10,
        "Model": 'a "model", v: 1\\',
        "RNG": "CPU",
        "Version": "ldm 1.0",
    }


def test_a_text_without_settings_is_a_prompt():
    assert parse_generation_parameters("a cat\nNegative prompt: a dog\nSteps: 3") == {
        "Prompt": "a cat",
        "Negative prompt": "a dog\nSteps: 3",
    }


@pytest.mark.parametrize(
    "value, wanted", [("a", "a"), ("a,b", '"a,b"'), ("a:b", '"a:b"'), ('a\n"', '"a\\n\\""'), ('"a"', '"\\"a\\""')]
)
def test_a_value_that_would_end_early_is_quoted(value, wanted):
    assert quote(value) == wanted and unquote(wanted) == value


def test_a_png_keeps_pixels_and_texts_and_its_bytes_are_a_function_of_them(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    texts = {"parameters": "é 雪\nsecond line", "ldm": "{}"}
    for name in ("a.png", "b.png"):
        save_png(picture, tmp_path / name, texts)
    assert read_image_and_metadata(tmp_path / "a.png")[1] == texts
    assert Image.open(tmp_path / "a.png").tobytes() == picture.tobytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("Steps: 20, Size: 64x32", [("Steps", "20"), ("Size", "64x32")]),
        ('Model: "a, b: c", Seed: 1', [("Model", '"a, b: c"'), ("Seed", "1")]),
        ('Model: "a \\" , b"  , Seed: 1', [("Model", '"a \\" , b"'), ("Seed", "1")]),
        ('Model: 5" disk, Seed: 1', [("Model", '5" disk'), ("Seed", "1")]),
        ('Model: "open, Seed: 1', [("Model", '"open'), ("Seed", "1")]),
        ('Model: "a" b, Seed: 1', [("Model", '"a" b'), ("Seed", "1")]),
        ("Version: v1: beta,, ,Seed:1,", [("Version", "v1: beta"), ("Seed", "1")]),
        ("a cat, (dog:1.2), a: b, : c, -x: 1, Hires/up_2-scale: 2", [("Hires/up_2-scale", "2")]),
        ("\u00c9tapes: 20, RNG:", [("\u00c9tapes", "20"), ("RNG", "")]),
        ("", []),
    ],
)
def test_a_line_is_split_at_commas_outside_of_quotes(line, wanted):
    assert list(split_pairs(line)) == wanted


def read_as_sd_prompt_reader(path):
    """Prompt, negative prompt and settings by sd-prompt-reader's rules: a PNG's `parameters`, else piexif's comment."""
    piexif = pytest.importorskip("piexif")
    from piexif.helper import UserComment

    with Image.open(path) as image:
        if image.format == "PNG":
            raw = image.info["parameters"]
        else:
            raw = UserComment.load(piexif.load(image.info["exif"])["Exif"][piexif.ExifIFD.UserComment])
    prompts, settings = raw.split("\nSteps:")
    prompt, _, negative = prompts.partition("\nNegative prompt:")
    values = dict(pair.split(": ", 1) for pair in f"Steps:{settings}".split(", "))
    return prompt.strip(), negative.strip(), values


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    "prompt, ldm", [("a red apple", "{}"), ("\u00e9 \u96ea \U0001f388, 2 lines\nof it", "{'a': 1}" * 99), ("", "")]
)
def test_other_readers_find_the_parameters_of_every_format(tmp_path, image_format, prompt, ldm):
    infotext = create_infotext({**RECORD, "prompt": prompt, "negative_prompt": "a dog"}, "m", "f" * 64, "1.0")
    texts, path = {"parameters": infotext, "ldm": ldm}, tmp_path / "image"
    save_image(Image.new("RGB", (8, 8), "red"), path, texts, image_format)
    found_prompt, negative, values = read_as_sd_prompt_reader(path)
    assert (found_prompt, negative) == (prompt, "a dog")
    assert values["Steps"] == "20" and values["Sampler"] == "DPM++ 2M" and values["Size"] == "64x32"
    assert read_image_and_metadata(path)[1] == {
        key: text for key, text in texts.items() if text or image_format == "png"
    }


def read_by_sd_parsers(path):
    sd_parsers = pytest.importorskip("sd_parsers")
    info = sd_parsers.ParserManager().parse(path)
    (sampler,), (model,) = info.samplers, info.models
    prompts = (text.value for prompts in (info.prompts, info.negative_prompts) for text in prompts)
    return [*prompts], sampler.name, sampler.parameters, model.name, info.metadata["Size"]


def read_by_sd_prompt_reader(path):
    """Its package has pins of its own: `pip install --no-deps sd-prompt-reader`."""
    reader = pytest.importorskip("sd_prompt_reader.image_data_reader").ImageDataReader(path)
    values = reader.parameter
    parameters = {"cfg_scale": values["cfg"], "seed": values["seed"], "steps": values["steps"], "scheduler": "Karras"}
    return [reader.positive, reader.negative], values["sampler"], parameters, values["model"], values["size"]


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("read", [read_by_sd_parsers, read_by_sd_prompt_reader])
@pytest.mark.parametrize("prompt", ["a red apple", "\u00e9 \u96ea \U0001f388, (2 lines:1.2)\nof it"])
def test_the_readers_that_people_use_read_every_format(tmp_path, image_format, read, prompt):
    infotext = create_infotext({**RECORD, "prompt": prompt, "negative_prompt": "a dog"}, "m", "f" * 64, "1.0")
    path = tmp_path / f"x.{image_format}"
    save_image(Image.new("RGB", (64, 32), "red"), path, {"parameters": infotext, "ldm": "{}"}, image_format)
    parameters = {"cfg_scale": "3", "seed": "7", "steps": "20", "scheduler": "Karras"}
    assert read(path) == ([prompt, "a dog"], "DPM++ 2M", parameters, "m", "64x32")


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_a_user_comment_is_of_type_undefined(tmp_path, image_format):
    save_image(Image.new("RGB", (8, 8)), tmp_path / "x", {"parameters": "a", "ldm": "{}"}, image_format)
    entry = struct.pack(">HHI", 0x9286, 7, len(b"UNICODE\0") + 2)
    assert (tmp_path / "x").read_bytes().count(entry) == 1


def test_comments_of_type_byte_are_read_too(tmp_path):
    """Written by older versions of ours."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat".encode("utf-16-be")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    (tmp_path / "x.jpg").write_bytes(file.getvalue())
    assert read_image_and_metadata(tmp_path / "x.jpg")[1]["parameters"] == "a cat"
