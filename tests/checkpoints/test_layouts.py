"""One file is the whole model: loaded as its directory is, each byte read once, whatever it lacks or holds besides."""

import hashlib
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.checkpoints import formats, keys
from ldm.checkpoints.families import FAMILIES, LoadOptions
from ldm.conditioning import Conditioning
from ldm.convert.convert import convert_checkpoint
from ldm.diffusion.prediction import PREDICTIONS
from ldm.nn import text_encoders
from ldm.nn.tokenizer import build_clip_tokenizer
from ldm.pipeline.pipeline import Pipeline
from tests.diffusers_models import transformers_tokenizer

CPU = torch.device("cpu")
WIDTHS = {"sd1": 16, "sd1-inpainting": 16, "sd2-base": 24, "sd2-v": 24, "sd2-inpainting": 24} | dict.fromkeys(
    ("sdxl", "sdxl-inpainting"), 40
)
every_family = pytest.mark.parametrize("name", FAMILIES)


def tiny(name):
    """The family with its own structure, narrow; text encoders know CLIP's whole vocabulary, for its own tokenizer."""
    family = FAMILIES[name]
    levels = len(family.unet["block_out_channels"])
    xl = family.force_zeros_for_empty_prompt
    unet = {
        "block_out_channels": [8, 8, 16, 16][:levels],
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTHS[name],
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        **({"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12 + 24} if xl else {}),
    }
    vae = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    widths = [16, 24] if xl else [WIDTHS[name]]
    towers = {
        folder: replace(tower, config=tower.config | sizes(width))
        for (folder, tower), width in zip(family.text_encoders.items(), widths, strict=True)
    }
    return replace(family, unet=family.unet | unet, vae=family.vae | vae, text_encoders=towers)


def sizes(width):
    return {
        "hidden_size": width,
        "intermediate_size": 24,
        "projection_dim": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }


@pytest.fixture(autouse=True)
def families(monkeypatch):
    narrow = {name: tiny(name) for name in FAMILIES}
    for name, family in narrow.items():
        monkeypatch.setitem(FAMILIES, name, family)
    return narrow


def components(family):
    """Random weights of a directory."""
    g = torch.Generator().manual_seed(0)
    shapes = keys.build_meta_state_dicts(family)
    return {
        f: {n: torch.randn(a.shape, generator=g, dtype=torch.float16) for n, a in tensors.items()}
        for f, tensors in shapes.items()
    }


@pytest.fixture
def write(families, tmp_path):
    """A single file of a family and the components in it."""

    def build(name, change=lambda tensors: tensors, **metadata):
        parts = components(families[name])
        path = tmp_path / "model.safetensors"
        save_file(
            change({n: a.contiguous().clone() for n, a in keys.convert_to_original(parts, families[name]).items()}),
            path,
            metadata,
        )
        return path, parts

    return build


def load(path, dtype=torch.float32, **options):
    return formats.load_checkpoint(path, CPU, dtype, LoadOptions(**options))


def arrived(model, parts, dtype=torch.float32):
    """Is every weight of the components in the model, and no other?"""
    found = {
        folder: {
            n if n.startswith("text_") or "text" not in folder else f"text_model.{n}": a
            for n, a in net.state_dict().items()
        }
        for folder, net in model.networks.items()
    }
    return found.keys() == parts.keys() and all(
        found[f].keys() == parts[f].keys() and all(torch.equal(found[f][n], a.to(dtype)) for n, a in parts[f].items())
        for f in parts
    )


@every_family
def test_every_weight_arrives(write, families, name):
    path, parts = write(name)
    prediction = "v" if name == "sd2-v" else "eps"
    model = load(path, prediction=prediction)
    assert arrived(model, parts) and model.family == name
    assert model.prediction is PREDICTIONS[prediction]
    assert model.unet.config.sample_size == families[name].unet["sample_size"]
    assert model.force_zeros_for_empty_prompt == families[name].force_zeros_for_empty_prompt
    assert set(model.weight_hashes.values()) == {hashlib.sha256(path.read_bytes()).hexdigest()}
    for tower, record in zip(model.text_encoders, families[name].text_encoders.values(), strict=True):
        ours = (
            tower.layer_idx,
            tower.final_norm,
            tower.with_projection,
            tower.num_dropped_layers,
            tower.tokenizer.pad_token_id,
        )
        assert ours == (
            record.layer_idx,
            record.final_norm,
            record.with_projection,
            record.num_dropped_layers,
            record.pad_token_id,
        )
    assert model.generation_defaults["guidance_scale"] == (5.0 if name.startswith("sdxl") else 7.5)


def test_networks_have_no_common_memory_and_are_ready_to_draw(write):
    model = load(write("sd2-base")[0], torch.float16, prediction="eps")  # the file's own, which needs no cast
    tensors = [a for net in model.networks.values() for a in (*net.parameters(), *net.buffers())]
    assert len({a.untyped_storage().data_ptr() for a in tensors}) == len(tensors)
    assert not any(a.is_meta or a.requires_grad for a in tensors)
    halves = model.unet, model.networks["text_encoder"]
    assert all(a.dtype == torch.float16 for net in halves for a in net.parameters())
    assert all(a.is_contiguous(memory_format=torch.channels_last) for a in tensors if a.ndim == 4)
    assert not any(net.training for net in model.networks.values())
    states, _ = model.text_encoders[0].encode(
        text_encoders.tokenize_prompt(model.text_encoders[0].tokenizer, "a red apple")[0]
    )
    assert states.shape == (1, 77, 24)


def test_loading_reads_the_header_alone_and_a_hash_each_byte_once(write, monkeypatch):
    path, read = write("sd1")[0], []
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, *size):
            data = self.file.read(*size)
            read.append(len(data))
            return data

    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: Counting(real(self, *a, **k)) if self == path else real(self, *a, **k)
    )
    model = load(path, prediction="eps")
    assert sum(read) == header + 32
    assert set(model.weight_hashes.values()) == {hashlib.sha256(content).hexdigest()}
    assert sum(read) == header + 32 + len(content)


def test_an_average_takes_the_place_of_the_last_weights(write):
    def averaged(tensors):
        unet = [name for name in tensors if name.startswith(keys.UNET_PREFIX)]
        names = {n: keys.EMA_PREFIX + n.removeprefix("model.").replace(".", "") for n in unet}
        return {**tensors, **{names[n]: -tensors[n] for n in unet}}

    path, parts = write("sd1", averaged)
    assert arrived(load(path, prediction="eps"), parts)
    parts["unet"] = {name: -a for name, a in parts["unet"].items()}
    model = load(path, prediction="eps", ema=True)
    assert arrived(model, parts) and model.load_options == {"path": str(path), "prediction": "eps", "ema": True}
    with pytest.raises(ValueError, match="average"):
        load(write("sd1")[0], prediction="eps", ema=True)


def test_the_header_tells_the_prediction(write):
    path, _ = write("sd2-base", **{"modelspec.prediction_type": "v"})
    model = load(path)
    assert model.family == "sd2-v" and model.prediction is PREDICTIONS["v"] and model.unet.config.sample_size == 96
    assert load(path, prediction="eps").prediction is PREDICTIONS["eps"]


def test_zero_snr_is_heeded(write):
    path, _ = write("sd1", lambda t: {**t, "v_pred": torch.ones(1), "ztsnr": torch.ones(1)})
    model = load(path)
    assert model.prediction is PREDICTIONS["v"] and model.sde.level(1.0).alpha == 0
    assert model.generation_defaults["spacing"] == "trailing"
    assert load(path, zero_snr=False).sde.level(1.0).alpha > 0.06


@every_family
def test_random_weights_are_asked_and_say_nothing(write, name):
    with pytest.raises(ValueError, match=r"model.safetensors: cannot tell what the U-Net predicts.*--prediction"):
        load(write(name)[0])


def test_in_float16_an_autoencoder_that_cannot_bear_it_stays_in_float32(write):
    model = load(write("sdxl")[0], torch.float16, prediction="eps")
    assert model.unet.dtype == torch.float16 and model.vae.dtype == torch.float32


VAE_NAMES = {
    "of LDM": lambda single, parts: {n.removeprefix(keys.VAE_PREFIX): a for n, a in single.items()},
    "of LDM, with the prefix": lambda single, parts: single,
    "of LDM, with its loss": lambda single, parts: {
        **single,
        "loss.logvar": torch.zeros(1),
        "model_ema.decay": torch.zeros(1),
    },
    "of diffusers": lambda single, parts: parts,
}


@pytest.mark.parametrize("names", VAE_NAMES)
def test_an_autoencoder_is_replaced(write, families, tmp_path, names):
    path, parts = write("sd1")
    other = {name: -a for name, a in parts["vae"].items()}
    single = keys.convert_to_original({**parts, "vae": other}, families["sd1"])
    single = {n: a for n, a in single.items() if n.startswith(keys.VAE_PREFIX)}
    file = tmp_path / "vae.safetensors"
    save_file({n: a.contiguous().clone() for n, a in VAE_NAMES[names](single, other).items()}, file)
    model = load(path, prediction="eps", vae=file)
    assert arrived(model, {**parts, "vae": other})
    assert model.weight_hashes["vae"] == hashlib.sha256(file.read_bytes()).hexdigest() != model.weight_hashes["unet"]


def test_a_file_without_an_autoencoder_wants_one(write, tmp_path):
    path, parts = write("sd1", lambda t: {n: a for n, a in t.items() if not n.startswith(keys.VAE_PREFIX)})
    with pytest.raises(ValueError, match="no vae in it; give one by --vae"):
        load(path, prediction="eps")
    save_file(parts["vae"], tmp_path / "vae.safetensors")
    assert arrived(load(path, prediction="eps", vae=tmp_path / "vae.safetensors"), parts)


def test_a_file_without_text_says_so(write):
    path, _ = write("sd1", lambda t: {n: a for n, a in t.items() if not n.startswith("cond_stage_model.")})
    with pytest.raises(ValueError, match="no text_encoder in it"):
        load(path, prediction="eps")


@pytest.mark.parametrize(
    "options", [{"variant": "fp16"}, {"family": "sdxl"}, {"prediction": "flow"}, {"family": "sd9"}]
)
def test_what_cannot_be_said_of_a_file_is_refused(write, options):
    with pytest.raises(ValueError, match=f"model.safetensors: .*{next(iter(options))}"):
        load(write("sd1")[0], **options)


def theirs(family, folder):
    """A tiny pipeline of diffusers' and transformers' own classes, as `save_pretrained` writes it, and nothing more."""
    torch.manual_seed(0)
    steps = {"timestep_spacing": "trailing", "set_alpha_to_one": True}  # as ours, which end without noise
    networks = {
        "unet": diffusers.UNet2DConditionModel.from_config(family.unet),
        "vae": diffusers.AutoencoderKL.from_config(family.vae),
        "scheduler": diffusers.DDIMScheduler.from_config({**family.scheduler, **steps}),
    }
    for name, tower in family.text_encoders.items():
        kind = CLIPTextModelWithProjection if tower.with_projection else CLIPTextModel
        networks[name] = kind(CLIPTextConfig(**tower.config))
        networks[name.replace("text_encoder", "tokenizer")] = transformers_tokenizer(
            build_clip_tokenizer(tower.pad_token_id)
        )
    with torch.no_grad():
        networks["vae"].decoder.conv_out.weight *= 3  # else the pictures are grey
    getattr(diffusers, family.pipeline_class)(**networks, **unchecked(family)).save_pretrained(folder)
    return networks


def unchecked(family):
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {} if family.force_zeros_for_empty_prompt else none


def spoken(name):
    return "v" if name == "sd2-v" else "eps"


@every_family
def test_the_unet_that_diffusers_saved_is_the_same_function(families, tmp_path, name):
    """From its directory and from a single file: outputs and gradients in the input to 1e-5 of the largest."""
    family, folder, file = families[name], tmp_path / "folder", tmp_path / "model.safetensors"
    unet = theirs(family, folder)["unet"]
    convert_checkpoint(folder, file)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, unet.config.in_channels, 16, 24, generator=g)
    t, context = torch.tensor([17.0, 803.5]), torch.randn(2, 5, WIDTHS[name], generator=g)
    pooled, ids = torch.randn(2, 12, generator=g), torch.tensor([[64.0, 48, 0, 8, 64, 48]] * 2)
    more = (
        {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}} if family.force_zeros_for_empty_prompt else {}
    )
    wanted = differentiated(lambda x: unet(x, t, context, **more).sample, x)
    for path in (folder, file):
        ours = load(path, prediction=spoken(name)).unet
        added = ours.make_vector(pooled, ids) if family.force_zeros_for_empty_prompt else None
        found = differentiated(lambda x, ours=ours, added=added: shown(ours, x, t, context, added), x)
        for a, b in zip(found, wanted, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max() and b.std() > 0


def shown(unet, x, t, context, added):
    """Our U-Net on all its input channels, of which those beside the latents are conditioning."""
    x, channels = x.split([4, x.shape[1] - 4], dim=1)
    return unet(x, t, Conditioning(context, vector=added, concat=channels if channels.shape[1] else None))


def differentiated(function, x):
    """The output, and the gradient of its mean square."""
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().mean().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl"])
def test_a_single_file_generates_what_diffusers_draws_from_it_and_from_its_directory(families, tmp_path, name):
    family, folder, file = families[name], tmp_path / "folder", tmp_path / "model.safetensors"
    theirs(family, folder)
    convert_checkpoint(folder, file)
    kind, options = getattr(diffusers, family.pipeline_class), {"local_files_only": True, **unchecked(family)}
    options.pop("requires_safety_checker", None)
    pipes = kind.from_single_file(str(file), config=str(folder), **options), kind.from_pretrained(folder, **options)
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 96}
    prompt = "a red apple, two stars on a blue background"  # no "!", which transformers takes for SD 2's padding
    wanted = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        g = torch.Generator().manual_seed(5)
        wanted.append(pipe(prompt, negative_prompt="a dog", generator=g, **call).images[0])
    for path in (file, folder):
        ours = Pipeline.from_pretrained(path, device="cpu", dtype="float32", prediction=spoken(name))
        given = {"sampler": "ddim", "spacing": "trailing", "final_sigmas_type": "zero"}  # as in the folder's scheduler
        drawn = ours(prompt, "a dog", seed=5, **given, **call).images[0]
        for picture in wanted:
            assert np.abs(np.asarray(drawn, int) - np.asarray(picture, int)).max() <= 1
    assert np.asarray(wanted[0], int).std() > 8
