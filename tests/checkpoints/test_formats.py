"""Loading is strict: what is missing, unknown, torn or of another shape is named in one line."""

import hashlib
import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from ldm.checkpoints import formats
from ldm.checkpoints.families import FAMILIES, LoadOptions
from ldm.checkpoints.formats import PICTO_PATH
from ldm.checkpoints.keys import diffusers_key
from ldm.checkpoints.layouts import choose_weight_files
from ldm.diffusion.prediction import PREDICTIONS
from ldm.nn.text_encoders import tokenize_captions
from ldm.nn.tokenizer import load_clip_tokenizer

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"
FOLDERS = "unet", "vae", "text_encoder", "text_encoder_2"
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def load(folder):
    return formats.load_checkpoint(folder, CPU, torch.float32)


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FAULTS = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "not a model"),
    "no weights": (lambda f: (f / UNET).unlink(), UNET),
    "empty": (lambda f: (f / UNET).write_bytes(b""), "not a whole safetensors file"),
    "torn": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-64]), "not a whole safetensors file"),
    "text": (lambda f: (f / UNET).write_text("hello " * 99), "not a whole safetensors file"),
    "missing": (lambda f: edit(f / UNET, lambda t: t.pop("conv_in.bias")), "missing conv_in.bias"),
    "unknown": (lambda f: edit(f / UNET, lambda t: t.update(extra=torch.ones(2))), "unknown extra"),
    "shape": (
        lambda f: edit(f / UNET, lambda t: t.update({"conv_in.bias": torch.ones(3)})),
        r"conv_in.bias has shape \[3\], expected \[32\]",
    ),
    "not JSON": (lambda f: (f / "vae" / "config.json").write_text("{"), "vae/config.json: not JSON"),
    "not an object": (lambda f: (f / "vae" / "config.json").write_text("[]"), "vae/config.json: not a JSON object"),
    "no config": (lambda f: (f / "text_encoder" / "config.json").unlink(), "text_encoder/config.json"),
    "no merges": (lambda f: (f / "tokenizer" / "merges.txt").unlink(), "merges.txt"),
    "prediction": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", prediction_type="flow"),
        "prediction_type 'flow': choose from epsilon",
    ),
    "schedule": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", beta_schedule="step"),
        "beta_schedule 'step': choose from linear",
    ),
    "unheeded field": (
        lambda f: edit_json(f / "unet" / "config.json", class_embed_type="timestep"),
        "class_embed_type",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_in_one_line(copy, fault):
    spoil, said = FAULTS[fault]
    spoil(copy)
    with pytest.raises(ValueError, match=said) as error:
        load(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_every_weight_arrives(tiny):
    model = load(tiny)
    for name, network in (("unet", model.unet), ("vae", model.vae)):
        saved = load_file(tiny / name / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(network.state_dict()[key], value.float()) for key, value in saved.items())


def test_text_is_encoded_as_transformers_does(tiny):
    theirs = CLIPTokenizer.from_pretrained(tiny / "tokenizer"), CLIPTextModel.from_pretrained(tiny / "text_encoder")
    prompts = ["a red apple", "", "two stars to the left of a cat on a blue background and far too many words to fit"]
    ids = theirs[0](prompts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    assert torch.equal(ids, tokenize_captions(load_clip_tokenizer(tiny / "tokenizer"), prompts))
    with torch.no_grad():
        expected = theirs[1].float()(ids).last_hidden_state
        torch.testing.assert_close(load(tiny).text_encoders[0].encode_ids(ids)[0], expected, rtol=0, atol=1e-5)


XL = {
    "cross_attention_dim": 48,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}


def text_config(tokenizer, width):
    sizes = {"hidden_size": width, "intermediate_size": 32, "projection_dim": 24, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=16, num_hidden_layers=3, hidden_act="gelu", **sizes, **ends
    )


def unet(**changes):
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    sizes = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2}
    return UNet2DConditionModel(**{"sample_size": 8, "cross_attention_dim": 16, **blocks, **sizes, **changes})


@pytest.fixture(scope="module")
def theirs(tiny):
    """Pipelines of diffusers' own classes, random."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    autoencoder = AutoencoderKL(**VAE)
    plain = StableDiffusionPipeline(
        unet=unet(),
        vae=autoencoder,
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler.from_config(FAMILIES["sd1"].scheduler),
        safety_checker=None,
        feature_extractor=None,
    )
    xl = StableDiffusionXLPipeline(
        unet=unet(**XL),
        vae=autoencoder,
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 32)),
        tokenizer=tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(tiny / "tokenizer", pad_token="!</w>"),
        scheduler=EulerDiscreteScheduler.from_config(FAMILIES["sdxl"].scheduler),
    )
    return {"plain": plain, "xl": xl}


def arrived(model, pipeline):
    """Is every weight of diffusers' pipeline in the model?"""
    return all(
        torch.equal(
            value, {diffusers_key(folder, n): a for n, a in getattr(pipeline, folder).state_dict().items()}[name]
        )
        for folder, network in model.networks.items()
        for name, value in network.state_dict().items()
    )


SAVED = {  # as diffusers saves: its options, ours
    "plain": ({}, {}),
    "a variant alone": ({"variant": "fp16"}, {}),
    "a variant": ({"variant": "fp16"}, {"variant": "fp16"}),
    "in shards": ({"max_shard_size": "20KB"}, {}),
    "a variant in shards": ({"max_shard_size": "20KB", "variant": "fp16"}, {"variant": "fp16"}),
}


@pytest.mark.parametrize("way", SAVED)
@pytest.mark.parametrize("kind", ["plain", "xl"])
def test_what_diffusers_saves_is_loaded(theirs, tmp_path, kind, way):
    saving, loading = SAVED[way]
    theirs[kind].save_pretrained(tmp_path, **saving)
    model = formats.load_checkpoint(tmp_path, CPU, torch.float32, LoadOptions(**loading))
    assert arrived(model, theirs[kind]) and list(model.networks) == [n for n in FOLDERS if hasattr(theirs[kind], n)]
    xl = kind == "xl"
    assert model.force_zeros_for_empty_prompt == xl and model.family is None
    expected = {"num_inference_steps": 50, "guidance_scale": 5.0 if xl else 7.5, "spacing": "leading"}
    own = {"sampler": "euler"} if xl else {"sampler": "plms", "final_sigmas_type": "sigma_min"}
    assert model.generation_defaults == {**expected, **own}
    assert [t.with_projection for t in model.text_encoders] == ([False, True] if xl else [False])
    assert {(t.layer_idx, t.final_norm) for t in model.text_encoders} == ({(-2, False)} if xl else {(-1, True)})
    assert [t.tokenizer.pad_token for t in model.text_encoders] == ["<|endoftext|>", "!</w>"][
        : len(model.text_encoders)
    ]


def test_of_several_variants_one_must_be_named(theirs, tmp_path):
    for variant in ("fp16", "non_ema"):
        theirs["plain"].save_pretrained(tmp_path, variant=variant)
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model\.safetensors: .* variants here: fp16, non_ema"):
        load(tmp_path)
    assert arrived(
        formats.load_checkpoint(tmp_path, CPU, torch.float32, LoadOptions(variant="non_ema")), theirs["plain"]
    )


@pytest.mark.parametrize(
    "names, variant, chosen",
    [
        (["m.safetensors", "m.fp16.safetensors"], None, ["m.safetensors"]),
        (["m.safetensors", "m.fp16.safetensors"], "fp16", ["m.fp16.safetensors"]),
        (["m.non_ema.safetensors", "m.bin"], None, ["m.non_ema.safetensors"]),
        (
            ["m.safetensors.index.fp16.json", "m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"],
            None,
            ["m.safetensors.index.fp16.json", "m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"],
        ),
        (
            ["m-00001-of-00001.safetensors", "m-00001-of-00001.fp16.safetensors", "m.safetensors.index.json"],
            None,
            ["m.safetensors.index.json", "m-00001-of-00001.safetensors"],
        ),
        (["m.safetensors.index.json", "m.safetensors", "m-00001-of-00001.safetensors"], None, ["m.safetensors"]),
    ],
)
def test_the_weights_of_a_variant(names, variant, chosen):
    assert choose_weight_files(names, "m", variant) == chosen


def test_old_key_names_are_known(theirs, tmp_path):
    """Of the first diffusers (attention of the autoencoder) and of transformers 4 (text_model, position_ids)."""
    theirs["plain"].save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in list(tensors):
            for new, former in old.items():
                if f".attentions.0.{new}." in name:
                    a = tensors.pop(name)
                    a = a[..., None, None].contiguous() if a.ndim == 2 else a
                    tensors[name.replace(f".{new}.", f".{former}.")] = a

    def prefix(tensors):
        for name in list(tensors):
            tensors[f"text_model.{name.removeprefix('text_model.')}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]

    edit(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", rename)
    edit(tmp_path / "text_encoder" / "model.safetensors", prefix)
    assert arrived(load(tmp_path), theirs["plain"])


def test_hashes_are_the_files(theirs, tmp_path):
    theirs["plain"].save_pretrained(tmp_path / "whole")
    theirs["plain"].save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    whole, parts = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert whole.weight_hashes["unet"] == hashlib.sha256((tmp_path / "whole" / UNET).read_bytes()).hexdigest()
    shards = sorted((tmp_path / "parts" / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert parts.weight_hashes["unet"] == hashlib.sha256(b"".join(s.read_bytes() for s in shards)).hexdigest()


def test_an_autoencoder_of_another_folder(vae_config, tiny, tmp_path):
    other = AutoencoderKL(**vae_config | {"scaling_factor": 0.25})
    other.save_pretrained(tmp_path / "vae")
    model = formats.load_checkpoint(tiny, CPU, torch.float32, LoadOptions(vae=tmp_path / "vae"))
    assert all(torch.equal(a, other.state_dict()[n]) for n, a in model.vae.state_dict().items())
    assert model.vae.config.scaling_factor == 0.25
    AutoencoderKL(**vae_config | {"latent_channels": 8}).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="wide: its latents have 8 channels"):
        formats.load_checkpoint(tiny, CPU, torch.float32, LoadOptions(vae=tmp_path / "wide"))


def test_load_options_override_the_schedule(tiny):
    model = formats.load_checkpoint(tiny, CPU, torch.float32, LoadOptions(prediction="x0", zero_snr=True))
    assert model.prediction is PREDICTIONS["x0"] and model.sde.level(1.0).alpha == 0
    assert load(tiny).prediction is PREDICTIONS["v"] and load(tiny).sde.level(1.0).alpha > 0


def test_generation_config_overrides_the_defaults(tiny, copy):
    assert load(tiny).generation_defaults == {
        "num_inference_steps": 6,
        "guidance_scale": 3.0,
        "sampler": "ddim",
        "spacing": "trailing",
    }
    (copy / "generation_config.json").write_text('{"sampler": "heun", "spacing": "karras"}')
    defaults = {"num_inference_steps": 50, "guidance_scale": 7.5, "sampler": "heun", "spacing": "karras"}
    assert load(copy).generation_defaults == defaults


def test_picto_recommends_its_sampler_and_spacing():
    picto = formats.load_checkpoint(PICTO_PATH, CPU, torch.float32)
    assert (picto.generation_defaults["sampler"], picto.generation_defaults["spacing"]) == ("dpmpp_2m", "trailing")
