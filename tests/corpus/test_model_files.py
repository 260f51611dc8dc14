"""Model files and folders as people have them: what loads, with which weights and notice, or the error line."""

import json
import shutil
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints import formats, keys, single_file
from ldm.checkpoints.families import FAMILIES, LoadOptions
from ldm.convert.convert import convert_checkpoint
from ldm.convert.inspect import inspect_model
from ldm.nn import unet
from ldm.nn.unet import UNetConfig

CPU = torch.device("cpu")
FULL_SDXL = FAMILIES["sdxl"]
UNET, VAE = keys.UNET_PREFIX, keys.VAE_PREFIX
STRUCTURES = {  # the structures of published pruned models; KOALA's and BK-SDM's have one residual block a resolution
    "SSD-1B": {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "Vega": {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1, 2]},
    "KOALA-700M": {"mid_block_type": None, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5]},
    "KOALA-1B": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
    "nested": {
        "transformer_layers_per_block": [1, [2, 1], [3, 4]],
        "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": [[4, 4, 3], 2, 1],
    },
    "distilled": {"time_cond_proj_dim": 256},
}


def narrow(name, **unet):
    """The family with its own structure and few channels."""
    family, xl = FAMILIES[name], name.startswith("sdxl")
    levels, width = len(family.unet["block_out_channels"]), {"sd1": 16, "sd2": 24, "sdxl": 40}[name.split("-")[0]]
    unet = {
        "block_out_channels": [8, 8, 16, 16][:levels],
        "norm_num_groups": 4,
        "cross_attention_dim": width,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        **({"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12 + 24} if xl else {}),
        **unet,
    }
    sizes = {"intermediate_size": 24, "projection_dim": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoders = {
        key: replace(spec, config={**spec.config, **sizes, "hidden_size": hidden})
        for (key, spec), hidden in zip(family.text_encoders.items(), [16, 24] if xl else [width], strict=True)
    }
    vae = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    return replace(family, unet=family.unet | unet, vae=family.vae | vae, text_encoders=encoders)


@pytest.fixture(scope="module", autouse=True)
def families():
    """Narrow families, and one tokenizer for all tests: it takes a second to build."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sd1", "sdxl"):
            patch.setitem(FAMILIES, name, narrow(name))
        patch.setattr(single_file, "build_clip_tokenizer", cache(single_file.build_clip_tokenizer))
        yield


def tensors(family, seed=0):
    """A single file's tensors with random values."""
    g = torch.Generator().manual_seed(seed)
    return {m.original_key: torch.randn(m.original_tensor.shape, generator=g) for m in keys.build_key_mappings(family)}


def load(path, **options):
    return formats.load_checkpoint(path, CPU, torch.float32, LoadOptions(prediction="eps", **options))


def weights(model):
    return {f"{part}.{name}": a for part, net in model.networks.items() for name, a in net.state_dict().items()}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def renamed(change):
    return lambda t: {change(name): a for name, a in t.items()}


def with_extra(**extra):
    return lambda t: {**t, **{name.replace("__", "."): torch.zeros(2, 3) for name in extra}}


def unet_renamed(change):
    return renamed(lambda name: change(name.removeprefix(UNET)) if name.startswith(UNET) else name)


def average_alone(t):
    ema = {keys.ema_key(name): a for name, a in t.items() if name.startswith(UNET)}
    return {n: a for n, a in t.items() if not n.startswith(UNET)} | ema | {"model_ema.decay": torch.zeros(())}


SAME_MODEL = {  # changes of a single file that leave the model as it is, and the notice
    "state_dict": (renamed("state_dict.{}".format), None),
    "DistributedDataParallel": (renamed("module.{}".format), None),
    "DistributedDataParallel inside": (unet_renamed(f"{UNET}module.{{}}".format), None),
    "torch.compile": (renamed("_orig_mod.{}".format), None),
    "torch.compile inside": (unet_renamed("model._orig_mod.diffusion_model.{}".format), None),
    "all of them": (renamed("state_dict.module._orig_mod.{}".format), None),
    "U-Net's prefix doubled": (unet_renamed(f"{UNET}{UNET}{{}}".format), None),
    "U-Net's prefix half": (unet_renamed("diffusion_model.{}".format), None),
    "U-Net's prefix missing": (unet_renamed("{}".format), None),
    "VAE's prefix doubled": (renamed(lambda n: n.replace(VAE, VAE + VAE)), None),
    "EMA alone": (average_alone, "holds no U-Net but its moving average, which is read"),
    "position ids, loss": (
        lambda t: (
            {**t, "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
            | {"first_stage_model.loss.logvar": torch.zeros(1), "first_stage_model.loss.d.weight": torch.zeros(2, 2)}
        ),
        None,
    ),
    "of training": (
        lambda t: (
            {**t, "embedding_manager.string_to_param_dict.*": torch.zeros(2, 3), "global_step": torch.tensor(5)}
            | {"epoch": torch.tensor(1), "optimizer_states.0.exp_avg": torch.zeros(9)}
        ),
        r"4 tensors not read, left over from training, or of another tool: ",
    ),
    "of another encoder": (
        lambda t: {**t, "cond_stage_model.model.ln_final.bias": torch.zeros(1024)},
        "1 tensors not read, of a text encoder that this U-Net does not read: cond_stage_model.model.ln_final.bias",
    ),
    "a stray number": (lambda t: {**t, f"{UNET}count": torch.tensor(3.0)}, None),
}


@pytest.fixture
def write(tmp_path):
    def build(change, family=None, name="model"):
        path = tmp_path / f"{name}.safetensors"
        save_file({n: a.contiguous() for n, a in change(tensors(family or FAMILIES["sd1"])).items()}, path)
        return path

    return build


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model.safetensors"
    save_file({name: a.contiguous() for name, a in tensors(FAMILIES["sd1"]).items()}, path)
    return weights(load(path))


@pytest.mark.parametrize("case", SAME_MODEL)
def test_the_same_model_under_other_names_and_with_left_overs(write, plain, case):
    change, notice = SAME_MODEL[case]
    path = write(change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert equal(weights(load(path)), plain)
    lines = [str(w.message) for w in caught]
    assert len(lines) == (notice is not None) and all(notice in line for line in lines)
    report = inspect_model(path, probe=False)
    assert report["family"] == "sd1" and not (report["unknown"] or report["missing"] or report["faults"])


def test_two_tensors_of_one_name_are_an_error(write):
    path = write(lambda t: {**t, f"module.{UNET}out.2.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"model.safetensors: model.diffusion_model.out.2.bias is given twice"):
        load(path)


@pytest.mark.parametrize("change", [dict, renamed("state_dict.{}".format), with_extra(global_step=0)], ids=range(3))
def test_the_autoencoder_of_a_whole_model(write, plain, change):
    whole = write(lambda t: change({n: -a if n.startswith(VAE) else a for n, a in t.items()}), name="whole")
    expected = {n: -a if n.startswith("vae.") else a for n, a in plain.items()}
    assert equal(weights(load(write(dict), vae=whole)), expected)


@pytest.mark.parametrize("rows", [False, True], ids=["one scale", "a scale a row"])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_fp8_weights_are_multiplied_by_their_scales(write, suffix, rows):
    expected = {}

    def quantize(t):
        out = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
        for name, a in t.items():
            if name.startswith(UNET) and name.endswith(".weight") and a.ndim > 1:
                scale = a.flatten(1).abs().amax(1) / 448 if rows else a.abs().max() / 448
                q = (a / scale.reshape(-1, *[1] * (a.ndim - 1))).to(torch.float8_e4m3fn)
                module = name.removesuffix(".weight")
                out |= {name: q, f"{module}.{suffix}": scale, f"{module}.scale_input": torch.ones(())}
                expected[name] = q.float() * scale.reshape(-1, *[1] * (a.ndim - 1))
            else:
                out[name] = expected[name] = a
        return out

    model = weights(load(write(quantize, name="fp8")))
    assert equal(model, weights(load(write(lambda _: expected))))


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_single_file_tells_the_structure_of_its_unet(name):
    """At full size, on the meta device: the configuration is found again, and no tensor is left."""
    config = {**FULL_SDXL.unet, **STRUCTURES[name]}
    whole = keys.original_unet_tensors(config)
    changes = single_file.find_structure_changes(FULL_SDXL.unet, whole)
    found = UNetConfig.from_dict({**FULL_SDXL.unet, **changes})
    assert changes.keys() == STRUCTURES[name].keys()
    with torch.device("meta"):
        networks = [unet.UNet(config).state_dict() for config in (found, UNetConfig.from_dict(config))]
    assert {n: a.shape for n, a in networks[0].items()} == {n: a.shape for n, a in networks[1].items()}
    spoilt = {n: a for n, a in whole.items() if ".attn1.to_q" not in n}
    assert single_file.find_structure_changes(FULL_SDXL.unet, spoilt) == changes  # what lacks is an error, not a shape
    assert single_file.find_structure_changes(FULL_SDXL.unet, keys.original_unet_tensors(FULL_SDXL.unet)) == {}


@pytest.mark.parametrize("name", ["SSD-1B", "distilled"])
def test_a_pruned_model_goes_to_a_folder_and_back(write, tmp_path, name):
    fields = {field: value if field != "time_cond_proj_dim" else 6 for field, value in STRUCTURES[name].items()}
    family = narrow("sdxl", **{"layers_per_block": 2, **fields})
    path, folder, again = write(dict, family), tmp_path / "folder", tmp_path / "again.safetensors"
    expected = weights(load(path))
    convert_checkpoint(path, folder, LoadOptions(prediction="eps"))
    report = convert_checkpoint(folder, again)
    assert report["family"] == "sdxl" and equal(load_file(again), load_file(path))
    assert equal(weights(load(folder)), expected)
    assert json.loads((folder / "unet" / "config.json").read_text()).items() >= fields.items()
    shown = inspect_model(path, probe=False)
    assert shown["family"] == "sdxl" and not shown["faults"]
    assert any(line.startswith("U-Net of another structure: ") for line in shown["evidence"])


UNET_FILE, TEXT_FILE = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def fields(name, **changes):
    """A change of a folder: other values in a configuration."""

    def change(folder):
        config = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**config, **changes}))

    return change


def extra(name, **more):
    """A change of a folder: further tensors in a file."""
    return lambda folder: save_file(load_file(folder / name) | more, folder / name)


def variant(*names):
    """A change of a folder: these files are of variant fp16."""
    return lambda folder: [(folder / n).rename((folder / n).with_suffix(".fp16.safetensors")) for n in names]


VAE_CONFIG, TEXT_CONFIG = "vae/config.json", "text_encoder/config.json"
SAME_FOLDERS = {  # changes of a folder that leave the model as it is, options, and the notice
    "a number beside a text encoder": (extra(TEXT_FILE, temperature=torch.tensor(1.0)), {}, None),
    "parts of CLIP": (
        extra(TEXT_FILE, logit_scale=torch.tensor(1.0), **{"vision_model.x": torch.ones(3, 3)}),
        {},
        None,
    ),
    "a number in a U-Net": (extra(UNET_FILE, iteration=torch.tensor(7)), {}, None),
    "fp16 of one part": (
        variant(UNET_FILE),
        {"variant": "fp16"},
        "no variant fp16 of vae, text_encoder: read as they are",
    ),
    "DiffusionPipeline": (fields("model_index.json", _class_name="DiffusionPipeline"), {}, None),
    **{
        name: (fields("model_index.json", _class_name=f"StableDiffusion{name}Pipeline"), {}, None)
        for name in ("PAG", "ControlNetImg2Img", "Inpaint")
    },
    "ControlNet": (
        fields(
            "model_index.json",
            _class_name="StableDiffusionControlNetPipeline",
            controlnet=["diffusers", "ControlNetModel"],
        ),
        {},
        "its ControlNet is not read",
    ),
}


@pytest.mark.parametrize("case", SAME_FOLDERS)
def test_the_same_folder_with_more_or_less(tiny, tmp_path, case):
    change, options, notice = SAME_FOLDERS[case]
    folder = shutil.copytree(tiny, tmp_path / "model")
    change(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = formats.load_checkpoint(folder, CPU, torch.float32, LoadOptions(**options))
    lines = [str(w.message) for w in caught]
    assert len(lines) == (notice is not None) and all(notice in line for line in lines)
    assert equal(weights(model), weights(formats.load_checkpoint(tiny, CPU, torch.float32)))
    report = inspect_model(folder, probe=False, options=LoadOptions(**options))
    assert sum(report["ignored"].values()) == ("number" in case) + 2 * (case == "parts of CLIP")


def test_a_consistency_model_has_its_own_defaults(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    fields("model_index.json", _class_name="LatentConsistencyModelPipeline")(folder)
    defaults = formats.load_checkpoint(folder, CPU, torch.float32).generation_defaults
    assert (defaults["num_inference_steps"], defaults["guidance_scale"]) == (4, 8.5)


def vocabulary(folder):
    path = folder / "tokenizer" / "vocab.json"
    vocab = json.loads(path.read_text())
    vocab[next(iter(vocab))] = 60_000
    path.write_text(json.dumps(vocab))


BROKEN_FOLDERS = {  # what would fail in use, and is refused when it is read or inspected
    "scaling_factor": (fields(VAE_CONFIG, scaling_factor="x"), "vae/config.json: scaling_factor 'x': a number above 0"),
    "scaling_factor 0": (fields(VAE_CONFIG, scaling_factor=0), "scaling_factor 0: a number above 0 is needed"),
    "no scaling_factor": (fields(VAE_CONFIG, scaling_factor=None), "scaling_factor None: a number above 0 is needed"),
    "force_upcast": (fields(VAE_CONFIG, force_upcast="no"), "force_upcast 'no': true or false is needed"),
    "norm_eps": (fields("unet/config.json", norm_eps="x"), "unet/config.json: norm_eps 'x': a number above 0"),
    "freq_shift": (fields("unet/config.json", freq_shift=[]), "freq_shift []: a number is needed"),
    "sample_size": (fields("unet/config.json", sample_size="64"), "sample_size '64': a whole number from 1 to 8192"),
    "flip": (fields("unet/config.json", flip_sin_to_cos=2), "flip_sin_to_cos 2: true or false is needed"),
    "layer_norm_eps": (fields(TEXT_CONFIG, layer_norm_eps="x"), "layer_norm_eps 'x': a number above 0 is needed"),
    "heads": (fields(TEXT_CONFIG, num_attention_heads=0), "num_attention_heads 0: a whole number, at least 1"),
    "model_max_length 1": (
        fields("tokenizer/tokenizer_config.json", model_max_length=1),
        "tokenizer: model_max_length 1 with max_position_embeddings 16: a number, at least 3, is needed",
    ),
    "model_max_length of text": (fields("tokenizer/tokenizer_config.json", model_max_length="long"), "tokenizer: "),
    "a token beyond the table": (vocabulary, "has id 60000, and the text encoder knows"),
    "no part of the variant": (lambda folder: None, "no weights of variant 'fp16'"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_a_folder_that_would_fail_in_use_is_refused(tiny, tmp_path, case):
    change, message = BROKEN_FOLDERS[case]
    folder = shutil.copytree(tiny, tmp_path / "model")
    change(folder)
    options = LoadOptions(variant="fp16" if "variant" in case else None)
    for read in (formats.read_model_spec, lambda path, options: inspect_model(path, False, options)):
        with pytest.raises(ValueError) as error:
            read(folder, options)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("separator", [":", " :"])
def test_a_header_of_a_million_keys_is_refused_before_it_is_parsed(tmp_path, separator):
    path = tmp_path / "x.safetensors"
    slot = separator.join(['"dtype"', '"F32","shape"', '[0],"data_offsets"', "[0,0]"])
    header = ("{" + ",".join(f'"{k}"{separator}{{{slot}}}' for k in range(250_000)) + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="a header of 1250000 strings, 500000 at most"):
        inspect_model(path, probe=False)
