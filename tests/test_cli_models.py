"""The command line with other models: adapters, words, pictures to begin from, inspect and convert."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.checkpoints.formats import load
from ldm.checkpoints.lora_save import save_adapter
from ldm.images import read_parameters, read_texts
from ldm.nn.lora import Adapter, Delta, LoRA
from ldm.request import Request

TARGET = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
QUICK = "--steps", 2, "--guidance", 2


@pytest.fixture
def lora(tiny, tmp_path):
    networks = load(tiny, torch.device("cpu"), torch.float32).networks
    g = torch.Generator().manual_seed(0)
    factors = LoRA(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g))
    file = tmp_path / "style.safetensors"
    save_adapter(Adapter("style", {TARGET: Delta(factors, 2.0)}), file, "kohya", networks)
    return file


@pytest.fixture
def word(tmp_path):
    file = tmp_path / "blob.safetensors"
    save_file({"emb_params": torch.randn(2, 32, generator=torch.Generator().manual_seed(1))}, file)
    return file


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "given.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    return file


@pytest.fixture
def draw(ldm_, tiny, tmp_path):
    """The picture and texts of `ldm generate "a cat" WORDS...`."""

    def run(*words):
        status, out, err = ldm_("generate", "a cat", "--model", tiny, *QUICK, "--out", tmp_path / "out", *words)
        assert status == 0, err
        with Image.open(out.strip()) as drawn:
            return np.asarray(drawn.convert("RGB"), int), read_texts(out.strip())

    return run


def test_an_adapter_changes_the_picture_by_its_weight_and_is_recorded(draw, lora, pipe):
    (plain, _), (none, _), (some, texts) = draw(), draw("--lora", f"{lora}:0"), draw("--lora", f"{lora}:.5")
    assert (plain == none).all() and (plain != some).mean() > 0.1
    (record,) = json.loads(texts["ldm"])["adapters"]
    assert record["name"] == "style" and record["weight"] == 0.5
    assert read_parameters(texts["parameters"])["Lora hashes"] == f"style: {record['sha256'][:12]}"
    pipe.load_lora_weights(lora, 0.5)
    try:
        again = pipe.generate([Request(**json.loads(texts["ldm"])["request"])])[0]
    finally:
        pipe.unload_lora_weights()
    assert (np.asarray(again, int) == some).all()


def test_a_word_stands_for_its_vectors_and_is_recorded(draw, word):
    (plain, _), (other, texts) = draw(), draw("--embedding", f"cat2={word}", "--negative", "cat2")
    record = json.loads(texts["ldm"])["embeddings"]
    assert (plain != other).any() and read_parameters(texts["parameters"])["TI hashes"].startswith("cat2: ")
    assert set(record) == {"cat2"} and len(record["cat2"]) == 64


def test_a_mask_keeps_what_is_black_bit_for_bit(draw, picture, tmp_path):
    given = np.asarray(Image.open(picture), int)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    drawn, texts = draw("--image", picture, "--mask", tmp_path / "mask.png")
    assert (drawn[:, :16] == given[:, :16]).all() and (drawn[:, 16:] != given[:, 16:]).mean() > 0.5
    assert set(json.loads(texts["ldm"])["request"]["image"]) == {"size", "sha256"}
    kept, texts = draw("--image", picture, "--strength", 0)
    assert (kept == given).all() and read_parameters(texts["parameters"])["Denoising strength"] == "0.0"


def test_a_second_pass_is_larger(draw):
    drawn, texts = draw("--upscale", 1.5)
    assert drawn.shape == (48, 48, 3) and read_parameters(texts["parameters"])["Hires upscale"] == "1.5"


def test_clip_skip_counts_from_the_last_layer(draw):
    (plain, _), (last, _), (before, texts) = draw(), draw("--clip-skip", 1), draw("--clip-skip", 2)
    assert (plain == last).all() and (plain != before).any()
    assert read_parameters(texts["parameters"])["Clip skip"] == "2"


def test_another_autoencoder_is_used_and_recorded(draw, tiny, tmp_path):
    tensors = load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_out.bias"] += 1
    (tmp_path / "bright").mkdir()
    (tmp_path / "bright" / "config.json").write_bytes((tiny / "vae" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "bright" / "diffusion_pytorch_model.safetensors")
    (plain, _), (bright, texts) = draw(), draw("--vae", tmp_path / "bright")
    assert (bright - plain).mean() > 30 and read_parameters(texts["parameters"])["VAE"] == "bright"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora", "no.safetensors"], "no.safetensors"),
        (["--lora", "PICTURE:0.5"], "not a whole safetensors file"),
        (["--lora", "WORD"], "not an adapter"),
        (["--lora", "LORA:nan"], "weight nan"),
        (["--lora", "LORA", "--lora", "LORA"], "style"),
        (["--embedding", "cat=WORD"], "cat"),
        (["--embedding", "blob=LORA"], "style.safetensors"),
        (["--mask", "PICTURE"], "mask: is of an image"),
        (["--strength", "0.5"], "strength: is of an image"),
        (["--image", "LORA"], "not a picture"),
        (["--image", "PICTURE", "--strength", "2"], "strength 2"),
        (["--upscale", "1"], "upscale 1"),
        (["--clip-skip", "0"], "clip skip 0"),
        (["--clip-skip", "9"], "clip skip 9"),
        (["--vae", "PICTURE"], "given.png"),
        (["--family", "sd1"], "family cannot be said of a folder"),
        (["--prediction", "flow"], "flow"),
    ],
)
def test_what_cannot_be_is_one_error_line(refused, tiny, lora, word, picture, tmp_path, words, said):
    for name, file in (("LORA", lora), ("WORD", word), ("PICTURE", picture)):
        words = [text.replace(name, str(file)) for text in words]
    refused("generate", "a cat", "--model", tiny, "--out", tmp_path / "out", *words, said=said)
    assert not (tmp_path / "out").exists()


def test_inspect_tells_models_from_adapters_and_words(ldm_, tiny, lora, word):
    status, out, _ = ldm_("inspect", tiny, "--no-probe", "--json")
    model = json.loads(out)
    assert status == 0 and model["prediction"] == "v" and model["components"]["unet"]["tensors"] > 0
    status, out, _ = ldm_("inspect", lora)
    assert status == 0 and "kohya" in out
    status, out, _ = ldm_("inspect", word)
    assert status == 0 and "emb_params" in out or "textual inversion" in out


def test_an_adapter_is_rewritten_in_another_dialect(ldm_, refused, tmp_path):
    g, kohya, new = torch.Generator().manual_seed(0), tmp_path / "full.safetensors", tmp_path / "new.safetensors"
    factors = {"lora_down": torch.randn(2, 768, generator=g), "lora_up": torch.randn(320, 2, generator=g)}
    path = f"lora_{TARGET}".replace("/", "_").replace(".", "_")
    save_file({f"{path}.{name}.weight": a for name, a in factors.items()}, kohya)
    refused("convert", kohya, new, "--to", "esperanto", "--family", "sd1", said="'esperanto': choose from kohya")
    assert not new.exists()
    status, _, err = ldm_("convert", kohya, new, "--to", "diffusers")
    written = load_file(new)
    assert status == 0 and len(written) == 2, err
    assert torch.equal(written[f"{TARGET.replace('/', '.')}.lora_A.weight"], factors["lora_down"])
