"""The command line with other models: adapters, words, images to begin from, inspect and convert."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.adapters.factors import LoRA
from ldm.adapters.lora import Adapter, ModuleDelta
from ldm.adapters.lora_saving import save_adapter
from ldm.checkpoints.formats import PICTO_PATH, load_checkpoint
from ldm.commands.options import parse_lora
from ldm.metadata import parse_generation_parameters, read_image_and_metadata
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request

TARGET = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
QUICK = "--steps", 2, "--guidance", 2


@pytest.fixture
def lora(tiny, tmp_path):
    networks = load_checkpoint(tiny, torch.device("cpu"), torch.float32).networks
    g = torch.Generator().manual_seed(0)
    factors = LoRA(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g))
    file = tmp_path / "style.safetensors"
    save_adapter(Adapter("style", {TARGET: ModuleDelta(factors, 2.0)}), file, "kohya", networks)
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
            return np.asarray(drawn.convert("RGB"), int), read_image_and_metadata(out.strip())[1]

    return run


def test_an_adapter_changes_the_image_by_its_weight_and_is_recorded(draw, lora, pipe):
    (plain, _), (none, _), (some, texts) = draw(), draw("--lora", f"{lora}:0"), draw("--lora", f"{lora}:.5")
    assert (plain == none).all() and (plain != some).mean() > 0.1
    (record,) = json.loads(texts["ldm"])["adapters"]
    assert record["name"] == "style" and record["weight"] == 0.5
    data = lora.read_bytes()
    behind = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()  # what the web UI hashes
    read = parse_generation_parameters(texts["parameters"])
    assert read["Lora hashes"] == f"style: {behind[:12]}" and record["sha256"] == hashlib.sha256(data).hexdigest()
    assert read["Prompt"] == "a cat<lora:style:0.5>" and json.loads(texts["ldm"])["request"]["prompt"] == "a cat"
    pipe.load_lora_weights(lora, 0.5)
    try:
        again = pipe.generate([Request(**json.loads(texts["ldm"])["request"])])[0]
    finally:
        pipe.unload_lora_weights()
    assert (np.asarray(again, int) == some).all()


def test_an_adapter_has_two_weights_and_the_hash_that_kohya_gave_it(draw, lora):
    save_file(load_file(lora), lora, {"sshs_model_hash": "0123456789abcdef"})
    (plain, _), (half, texts) = draw("--lora", f"a={lora}:0:0.25"), draw("--lora", f"a={lora}:0.5:0.25")
    assert (plain == draw()[0]).all() and (plain != half).any()
    read = parse_generation_parameters(texts["parameters"])
    assert read["Lora hashes"] == "a: 0123456789ab" and read["Prompt"] == "a cat<lora:a:0.25:0.5>"
    assert json.loads(texts["ldm"])["adapters"][0]["weight"] == [0.5, 0.25]


def test_adapters_of_one_file_s_name_are_called_by_their_folders(draw, lora, tmp_path):
    words = []
    for name in ("x-v1.5", "y"):
        (tmp_path / name).mkdir()
        words += ["--lora", shutil.copy(lora, tmp_path / name / "pytorch_lora_weights.safetensors")]
    _, texts = draw(*words[:3], tmp_path / "y")
    assert [record["name"] for record in json.loads(texts["ldm"])["adapters"]] == ["x-v1.5", "y"]


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, None)),
        ("a.safetensors:-.5", ("a.safetensors", -0.5, None)),
        ("b=a.safetensors:1:0", ("a.safetensors", (1.0, 0.0), "b")),
        ("owner/name:a.safetensors:0.8", ("owner/name:a.safetensors", 0.8, None)),
        ("a:b", ("a:b", 1.0, None)),
        ("a:nan", ("a", pytest.approx(float("nan"), nan_ok=True), None)),
    ],
)
def test_an_adapter_s_option_is_read_in_parts(word, parts):
    assert parse_lora(word) == parts


def test_an_equals_sign_of_a_file_s_own_is_no_name(tmp_path):
    (tmp_path / "a=b.safetensors").touch()
    assert parse_lora(f"{tmp_path}/a=b.safetensors:2") == (f"{tmp_path}/a=b.safetensors", 2.0, None)


def test_the_model_is_loaded_again_as_the_record_says(ldm_, tiny, tmp_path):
    tensors = load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors")
    other = shutil.copytree(tiny, tmp_path / "other")
    save_file({n: 0.5 * a for n, a in tensors.items()}, other / "vae" / "diffusion_pytorch_model.safetensors")
    words = "generate", "a cat", "--model", tiny, *QUICK
    (plain,), (changed,) = (
        json.loads(ldm_(*words, "--out", tmp_path / "out", "--json", *more)[1])["images"]
        for more in ([], ["--prediction", "eps", "--vae", other])
    )
    record = json.loads(read_image_and_metadata(changed["file"])[1]["ldm"])
    assert record["load"] == {"prediction": "eps"}  # no paths
    pipe = Pipeline.from_pretrained(tiny, vae=other, **record["load"], dtype=record["dtype"], device="cpu")
    again = pipe.generate([Request(**record["request"])])[0]
    pixels = [np.asarray(Image.open(image["file"])) for image in (plain, changed)]
    assert (np.asarray(again) == pixels[1]).all() and (pixels[0] != pixels[1]).any()


def test_images_of_an_earlier_command_stay(ldm_, tiny, tmp_path):
    words = "generate", "a cat", "--count", 2, "--model", tiny, *QUICK, "--out", tmp_path
    first, second = (ldm_(*words)[1].split() for _ in range(2))
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == ["0000-a-cat-0.png", "0001-a-cat-1.png", "0002-a-cat-0.png", "0003-a-cat-1.png"]
    for old, new in zip(first, second, strict=True):
        assert old != new and Path(old).read_bytes() == Path(new).read_bytes()


@pytest.mark.parametrize("words", [["--sampler", "x"], ["--spacing", "x"], ["--out", "/dev/null/x"]])
def test_what_needs_no_model_is_checked_before_one_is_loaded(refused, words):
    refused("generate", "a cat", "--model", "no/such/folder", *words, said=words[0].removeprefix("--"))


def test_what_is_not_drawn_of_the_web_ui_s_syntax_is_said(ldm_, tiny, tmp_path):
    words = "--model", tiny, *QUICK, "--out", tmp_path
    status, _, err = ldm_("generate", "a cat <lora:x:0.8> AND [cat:dog:0.5]", *words)
    assert status == 0 and err.count("\n") == 2
    assert (
        "warning: <lora:x:0.8>: left out: give --lora-dir" in err and "warning: " in err and "AND, [cat:dog:0.5]" in err
    )
    assert ldm_("generate", "a [cat] (dog:1.2) and BREAK", *words)[2] == ""


def test_a_word_is_the_file_s_own_unless_another_is_said(draw, ldm_, tiny, tmp_path):
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    save_file({"<cat-toy>": vectors}, tmp_path / "learned_embeds.safetensors")
    _, texts = draw("--embedding", tmp_path / "learned_embeds.safetensors")
    assert set(json.loads(texts["ldm"])["embeddings"]) == {"<cat-toy>"}
    words = "--model", tiny, *QUICK, "--out", tmp_path, "--embedding", tmp_path / "learned_embeds.safetensors"
    assert "its token is <cat-toy>" in ldm_("generate", "a", *words)[2]


def test_a_word_stands_for_its_vectors_and_is_recorded(draw, word):
    (plain, _), (other, texts) = draw(), draw("--embedding", f"cat2={word}", "--negative", "cat2")
    record = json.loads(texts["ldm"])["embeddings"]
    assert (plain != other).any() and parse_generation_parameters(texts["parameters"])["TI hashes"].startswith("cat2: ")
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
    assert (kept == given).all() and parse_generation_parameters(texts["parameters"])["Denoising strength"] == "0.0"


def test_a_second_pass_is_larger(draw):
    drawn, texts = draw("--upscale", 1.5)
    assert drawn.shape == (48, 48, 3) and parse_generation_parameters(texts["parameters"])["Hires upscale"] == "1.5"


def test_clip_skip_counts_from_the_last_layer(draw):
    (plain, _), (last, _), (before, texts) = draw(), draw("--clip-skip", 1), draw("--clip-skip", 2)
    assert (plain == last).all() and (plain != before).any()
    assert parse_generation_parameters(texts["parameters"])["Clip skip"] == "2"


def test_another_autoencoder_is_used_and_recorded(draw, tiny, tmp_path):
    tensors = load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_out.bias"] += 1
    (tmp_path / "bright").mkdir()
    (tmp_path / "bright" / "config.json").write_bytes((tiny / "vae" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "bright" / "diffusion_pytorch_model.safetensors")
    (plain, _), (bright, texts) = draw(), draw("--vae", tmp_path / "bright")
    assert (bright - plain).mean() > 30 and parse_generation_parameters(texts["parameters"])["VAE"] == "bright"


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
        (["--mask", "PICTURE"], "mask: needs an image"),
        (["--strength", "0.5"], "strength: needs an image"),
        (["--image", "LORA"], "not an image"),
        (["--image", "PICTURE", "--strength", "2"], "strength 2"),
        (["--upscale", "1"], "upscale 1"),
        (["--clip-skip", "0"], "clip skip 0"),
        (["--clip-skip", "9"], "clip skip 9"),
        (["--vae", "PICTURE"], "given.png"),
        (["--family", "sd1"], "family does not apply to a folder"),
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
    assert (status == 0 and "emb_params" in out) or "textual inversion" in out


@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/x/y"])
def test_a_place_that_cannot_be_made_is_refused(refused, tiny, lora, place):
    refused("convert", tiny, place, said=f"{Path(place).parent}: ")
    refused("convert", lora, place, "--to", "kohya", "--family", "sd1", said="")


def test_an_adapter_s_conversion_refuses_a_model_s_options_by_name(refused, lora, tmp_path):
    words = "--to", "peft", "--trust", "--dtype", "float16", "--no-zero-snr", "--ema", "--prediction", "v"
    refused(
        "convert", lora, tmp_path / "x", *words, said="--trust and --dtype and --prediction and --zero-snr and --ema"
    )


def test_an_adapter_s_and_an_autoencoder_s_folder_are_described(ldm_, lora, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copy(lora, tmp_path / "a" / "pytorch_lora_weights.safetensors")
    status, out, _ = ldm_("inspect", tmp_path / "a", "--json")
    assert status == 0 and json.loads(out)["dialect"] == "kohya"
    status, out, _ = ldm_("inspect", PICTO_PATH / "vae", "--json")
    assert status == 0 and "--vae" in json.loads(out)["kind"]


def test_a_name_cannot_write_on_the_terminal(ldm_, tmp_path):
    header = {"\x1b[2J\ud800.lora_A.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}
    header["a.lora_x"] = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    header["\x1b[2J\ud800"] = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    status, out, _ = ldm_("inspect", tmp_path / "x.safetensors")
    assert status == 0 and "\x1b" not in out and r"\x1b[2J\ud800" in out


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


def test_info_tells_the_memory_of_a_model(ldm_, tiny):
    status, out, err = ldm_("info", "--size", tiny, "--dtype", "bfloat16")
    rows = dict(line.split(maxsplit=1) for line in out.replace("memory ", "memory_").splitlines())
    assert (status, err, rows["dtype"]) == (0, "", "bfloat16")
    names = "memory_load", "memory_32x32", "memory_512x512", "memory_1024x1024"
    sizes = [float(rows[name].split()[0]) for name in names]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert ldm_("info", "--size", tiny / "no")[0] == ldm_("info", "--dtype", "float32")[0] == 2
