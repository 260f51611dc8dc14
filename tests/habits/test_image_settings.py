"""The settings in images of A1111, Forge, ComfyUI, InvokeAI and Fooocus are read, and what is lost of them is named."""

import json

import pytest
from images_of_tools import IMAGES

from ldm.jobs.comfy_graph import read_comfy_settings
from ldm.jobs.image_settings import read_image_settings, translate_compel
from ldm.sampler_names import resolve_sampler_names


@pytest.fixture
def image(request, tmp_path):
    case = IMAGES[request.param]
    (tmp_path / f"x.{case.suffix}").write_bytes(case.data)
    return case, tmp_path / f"x.{case.suffix}"


ALL = pytest.mark.parametrize("image", IMAGES, indirect=True)


def test_there_are_thirty_images_of_five_tools():
    assert len(IMAGES) >= 30 and {case.tool for case in IMAGES.values()} >= {"A1111", "Forge", "ComfyUI", "Fooocus"}


@ALL
def test_settings_are_read_and_what_is_lost_is_named(image):
    case, path = image
    settings = read_image_settings(path)
    assert {name: settings.values.get(name) for name in case.values} == case.values
    assert settings.tool == case.tool and tuple(map(str, settings.loras)) == case.loras
    assert case.model in ("", settings.model)
    assert all(any(words in text for text in settings.lost) for words in case.lost), settings.lost
    names = {text.split(" ")[0] for text in settings.lost} - {"the"}
    assert names <= {words.split(" ")[0] for words in case.lost} | {"spacing"}, settings.lost


@ALL
def test_info_prints_them(image, ldm_):
    case, path = image
    status, out, err = ldm_("info", path)
    assert (status, err) == (0, "") and out.startswith(f"tool                 {case.tool}\n")
    assert case.values["prompt"].split("\n")[0] in out
    assert json.loads(ldm_("info", path, "--json")[1])["prompt"] == case.values["prompt"]


NAMES = "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "sampler", "spacing", "upscale"


@pytest.mark.parametrize("image", ["a1111 hires fix", "comfy", "invoke", "fooocus jpeg"], indirect=True)
def test_generate_takes_them_over_and_options_override_them(image, ldm_, tiny, tmp_path):
    case, path = image
    words = "generate", "--from", path, "--model", tiny, "-W", 32, "-H", 48, "--steps", 3, "--out", tmp_path, "--json"
    status, out, err = ldm_(*words)
    assert status == 0 and err.count("warning: ") == err.count("\n") <= 2
    (record,) = json.loads(out)["images"]
    wanted = {**case.values, "num_inference_steps": 3}
    assert {n: record[n] for n in NAMES if n in case.values} == {n: wanted[n] for n in NAMES if n in case.values}
    assert (record["width"], record["height"]) == (32, 48)
    changed = json.loads(ldm_(*words, "a dog", "--seed", 3, "--sampler", "Heun")[1])["images"][0]
    assert (changed["prompt"], changed["seed"], changed["sampler"]) == ("a dog", 3, "heun")
    assert changed["guidance_scale"] == record["guidance_scale"]


def test_an_image_of_ours_is_made_again(ldm_, tiny, tmp_path):
    words = "a {cat}", "--expand", "none", "--sampler", "DPM++ 2M Karras", "--clip-skip", 2, "--guidance-interval", 0, 5
    first = ldm_("generate", *words, "--model", tiny, "--seed", 8, "--steps", 3, "--out", tmp_path / "a.webp")
    again = ldm_("generate", "--from", tmp_path / "a.webp", "--model", tiny, "--out", tmp_path / "b.webp")
    assert (first[0], again[0], again[2]) == (0, 0, "")
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()


def test_a_given_initial_image_has_the_strength_of_the_settings(ldm_, tiny, tmp_path):
    (tmp_path / "x.png").write_bytes(IMAGES["comfy img2img"].data)
    words = "generate", "--from", tmp_path / "x.png", "--model", tiny, "--json", "--steps", 4, "-W", 32, "-H", 32
    _, out, err = ldm_(*words, "--out", tmp_path / "o", "--image", tmp_path / "x.png")
    assert json.loads(out)["images"][0]["strength"] == 0.6 and "initial image" not in err
    _, out, err = ldm_(*words, "--out", tmp_path / "o")
    assert json.loads(out)["images"][0]["strength"] is None and "give it by --image" in err
    status, _, err = ldm_(*words, "--out", tmp_path / "p", "--strict")
    assert status == 2 and err.endswith("(--strict)\n") and not (tmp_path / "p").exists()


def test_an_image_without_settings_is_one_error_line(refused, tmp_path):
    from images_of_tools import png

    (tmp_path / "x.png").write_bytes(png())
    (tmp_path / "y.png").write_bytes(png(prompt="{}", Comment="x"))
    for command in (("generate", "--from"), ("info",)):
        refused(*command, tmp_path / "x.png", said="no settings of an image generator")
        refused(*command, tmp_path / "y.png", said="no sampler in its graph")
        refused(*command, tmp_path / "none.png", said="No such file")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("a cat", "a cat"),
        ("blue-eyed cat++, x-", "blue-eyed (cat:1.21), (x:0.9)"),
        ("(a cat)", "a cat"),
        ("(a (red)+ cat)1.5 b", "(a (red:1.1) cat:1.5) b"),
        (r"\(a\) [b] (c", r"\(a\) \[b\] \(c"),
        ("a) b", r"a\) b"),
        ("C++ (x)--", "(C:1.21) (x:0.81)"),
    ],
)
def test_weights_of_invokeai_are_ours(text, wanted):
    assert translate_compel(text) == (wanted, [])
    assert translate_compel("('a', 'b').and()")[1] == ["the syntax .and(...)"]


def test_names_of_samplers_in_invokeai_and_comfyui_are_known():
    for name in ("euler_a", "euler_k", "dpmpp_2m_sde_k", "unipc", "lcm", "ddim", "heun_k"):
        assert resolve_sampler_names({"sampler": name, "spacing": None})["sampler"] != name or "_k" not in name


UNKNOWN = {"class_type": "Oracle", "inputs": {"of": ["7", 0]}}


@pytest.mark.parametrize("source", [UNKNOWN, None], ids=["custom", "absent"])
def test_a_text_that_no_known_node_holds_is_among_what_is_lost(source):
    inputs = {"sampler_name": "euler", "steps": 4, "cfg": 2.0, "seed": 1, "positive": ["6", 0]}
    graph = {"3": {"class_type": "KSampler", "inputs": inputs}, "7": {"class_type": "X", "inputs": {"y": 1}}}
    graph["6"] = {"class_type": "CLIPTextEncode", "inputs": {"text": ["9", 0]}}
    if source:
        graph["9"] = source
    values, _, _, notes = read_comfy_settings(graph)
    assert values["prompt"] == "" and any("text of CLIPTextEncode (6)" in note for note in notes)


def test_texts_are_joined_by_any_names():
    inputs = {"sampler_name": "euler", "steps": 4, "cfg": 2.0, "seed": 1, "positive": ["6", 0]}
    graph = {"3": {"class_type": "KSampler", "inputs": inputs}}
    graph["6"] = {"class_type": "CLIPTextEncode", "inputs": {"text": ["9", 0]}}
    graph["9"] = {"class_type": "StringConcat", "inputs": {"a": "a red", "b": "apple", "delimiter": " "}}
    assert read_comfy_settings(graph)[0]["prompt"] == "a red apple"
