"""`ldm verify`: a picture regenerates from its own metadata, or it is said what differs."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.adapters.lora import Adapter, LoRA, ModuleDelta
from ldm.adapters.lora_saving import save_adapter
from ldm.checkpoints.formats import load_checkpoint
from ldm.metadata import read_png_texts, save_png

STEPS = "--steps", 2
TARGET = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def draw(ldm_, tiny, tmp_path):
    """The file of `ldm generate "a cat" WORDS...`."""

    def run(*words):
        status, out, err = ldm_("generate", "a cat", "--model", tiny, "--steps", 2, "--out", tmp_path / "out", *words)
        assert status == 0, err
        return out.strip()

    return run


@pytest.fixture
def verify(ldm_, tiny):
    def run(path, *words, model=tiny):
        status, out, err = ldm_("verify", path, "--model", model, *words)
        assert err == ""
        return status, out

    return run


@pytest.fixture
def lora(tiny, tmp_path):
    g = torch.Generator().manual_seed(0)
    factors = LoRA(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g))
    networks = load_checkpoint(tiny, torch.device("cpu"), torch.float32).networks
    save_adapter(
        Adapter("style", {TARGET: ModuleDelta(factors, 2.0)}), tmp_path / "style.safetensors", "kohya", networks
    )
    return tmp_path / "style.safetensors"


def changed(tiny, folder, part, name):
    """The model with one number of a network changed."""
    shutil.copytree(tiny, folder)
    path = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path)
    return folder


def test_a_picture_regenerates_and_one_changed_pixel_shows(draw, verify, tmp_path):
    file = draw("--sampler", "euler_ancestral", "--width", 48)
    assert verify(file) == (0, f"ok   {file}: equal\n")
    with Image.open(file) as picture:
        pixels = np.asarray(picture).copy()
    pixels[3, 5, 1] = np.where(pixels[3, 5, 1] > 100, pixels[3, 5, 1] - 9, pixels[3, 5, 1] + 9)
    save_png(Image.fromarray(pixels), tmp_path / "wrong.png", read_png_texts(file))
    status, out = verify(tmp_path / "wrong.png", "--json")
    found = json.loads(out)
    assert status == 1 and found["worst"] == 9 and found["share"] == 1 / (48 * 32) and not found["equal"]
    assert found["said"] == "pixels differ by 9 of 255 at most, 0.1% of them at all"


def test_the_version_is_named_where_pixels_differ(draw, verify, tmp_path):
    texts = read_png_texts(draw())
    texts["ldm"] = json.dumps({**json.loads(texts["ldm"]), "version": "0.0.1"})
    save_png(Image.new("RGB", (32, 32)), tmp_path / "old.png", texts)
    status, out = verify(tmp_path / "old.png")
    assert status == 1 and "(drawn by version 0.0.1; this is " in out
    save_png(Image.new("RGB", (16, 32)), tmp_path / "old.png", texts)
    assert "is of 16x32 pixels, and is drawn with 32x32 (drawn by version 0.0.1" in verify(tmp_path / "old.png")[1]


@pytest.mark.parametrize("part, name", [("unet", "conv_in.bias"), ("vae", "decoder.conv_out.bias")])
def test_another_network_is_named(draw, verify, tiny, tmp_path, part, name):
    file, other = draw(), changed(tiny, tmp_path / "other", part, name)
    status, out = verify(file, model=other)
    assert status == 1 and out.count("differs") == 1 and f"{part} differs: " in out
    if part == "vae":
        status, out = verify(file, "--vae", other / "vae")
        assert status == 1 and "vae differs" in out


def test_an_adapter_and_a_word_are_named_and_with_them_it_regenerates(draw, verify, lora, tmp_path):
    word = tmp_path / "blob.safetensors"
    save_file({"emb_params": torch.randn(2, 32, generator=torch.Generator().manual_seed(1))}, word)
    words = ["--lora", f"{lora}:0.5", "--embedding", f"cat2={word}"]
    file = draw(*words, "--negative", "cat2")
    status, out = verify(file)
    assert status == 1 and "adapter style differs: " in out and "with weight 0.5 in the file, none here" in out
    assert "embedding cat2 differs" in out
    assert "with weight 0.5 in the file" in verify(file, "--lora", lora, "--embedding", f"cat2={word}")[1]
    assert verify(file, *words)[0] == 0
    assert "adapter style differs: none in the file" in verify(draw(), *words)[1]


def test_a_picture_that_began_from_another_needs_it(draw, verify, tmp_path):
    given, other = tmp_path / "given.png", tmp_path / "other.png"
    Image.effect_noise((32, 32), 60).convert("RGB").save(given)
    Image.new("RGB", (32, 32)).save(other)
    file = draw("--image", given)
    assert "began from a picture: give it by --image" in verify(file)[1]
    assert "--image: another picture" in verify(file, "--image", other)[1]
    assert verify(file, "--image", given)[0] == 0


def test_the_dtype_is_the_picture_s_own(draw, verify):
    file = draw("--dtype", "bfloat16")
    assert verify(file)[0] == 0
    assert verify(file, "--dtype", "float32")[0] == 1


@pytest.mark.parametrize("kind, suffix", [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
def test_a_job_s_folder_is_verified_file_by_file(ldm_, verify, tiny, tmp_path, kind, suffix):
    (tmp_path / "p.txt").write_text("a cat\ntwo stars --s 3\na dog\n")
    job = tmp_path / "job"
    assert ldm_("batch", tmp_path / "p.txt", "--model", tiny, "--steps", 2, "--out", job, "--format", kind)[0] == 0
    status, out = verify(job)
    assert status == 0 and out.count("ok  ") == 3
    first = sorted(job.rglob(f"*.{suffix}"))[0]
    with Image.open(first) as picture:
        options = {"exif": picture.getexif()} if kind != "png" else {}
        changed = Image.fromarray(255 - np.asarray(picture.convert("RGB")))
    if kind == "png":
        save_png(changed, first, read_png_texts(first))
    else:
        changed.save(first, **options)
    Image.new("RGB", (8, 8)).save(job / f"stray.{suffix}")
    (job / f"torn.{suffix}").write_bytes(first.read_bytes()[:200])
    status, out = verify(job)
    assert status == 1 and out.count("ok  ") == 2 and f"stray.{suffix}: no settings of ldm in it" in out
    assert f"FAIL {first}: pixels differ" in out and f"FAIL {job}/torn.{suffix}: " in out


@pytest.mark.parametrize(
    "record",
    ["{", "[]", '{"weights": 1, "request": {}, "adapters": [], "embeddings": {}}'],
)
def test_what_says_nothing_of_itself_is_refused(refused, tiny, tmp_path, record):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "x.png", {"ldm": record})
    refused("verify", tmp_path / "x.png", "--model", tiny, said="x.png: no settings of ldm in it")


@pytest.mark.parametrize("change", [{"height": "a"}, {"colour": 1}, {"seed": None}, {"num_inference_steps": 0}])
def test_settings_that_cannot_be_drawn_are_said(draw, verify, tmp_path, change):
    texts = read_png_texts(draw())
    record = json.loads(texts["ldm"])
    record["request"] |= change
    save_png(Image.new("RGB", (32, 32)), tmp_path / "x.png", {"ldm": json.dumps(record)})
    status, out = verify(tmp_path / "x.png")
    assert status == 1 and "its settings cannot be drawn" in out


@pytest.mark.parametrize(
    "name, said", [("none.png", "none.png: No such file"), ("text.png", "not a picture"), (".", "no picture")]
)
def test_what_is_no_picture_is_refused(refused, tiny, tmp_path, name, said):
    (tmp_path / "text.png").write_text("no")
    path = tmp_path / name if name != "." else (tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    refused("verify", path, "--model", tiny, said=said)


def test_a_picture_says_which_model_drew_it_and_how_that_was_read(ldm_, refused, tiny, tmp_path):
    moved = shutil.copytree(tiny, tmp_path / "moved")
    status, out, _ = ldm_("generate", "a cat", "--model", moved, "--prediction", "eps", *STEPS, "--out", tmp_path / "e")
    file = out.strip()
    assert status == 0 and ldm_("verify", file)[0] == 0
    assert ldm_("verify", file, "--prediction", "v")[0] == 1
    shutil.rmtree(moved)
    refused("verify", file, said="which is not here: give it by --model")
    assert ldm_("verify", file, "--model", tiny)[0] == 0
