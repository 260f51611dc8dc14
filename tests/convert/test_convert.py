"""Converted models are the same models: bit for bit there and back, and as diffusers loads them."""

import json
import shutil
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.checkpoints import formats, saving, single_file
from ldm.checkpoints.detect import ProbeResult
from ldm.checkpoints.families import FAMILIES, LoadOptions
from ldm.checkpoints.keys import build_meta_state_dicts, convert_to_diffusers, convert_to_original, diffusers_key
from ldm.checkpoints.tensors import SafetensorsFile
from ldm.convert import convert, family_match, unpickle
from ldm.convert.convert import convert_checkpoint
from ldm.nn.text_encoders import tokenize_captions
from ldm.nn.tokenizer import build_clip_tokenizer

CPU = torch.device("cpu")
NAMES = ["sd1", "sd1-inpainting", "sd2-v", "sdxl"]
every_family = pytest.mark.parametrize("name", NAMES)
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def small(name):
    """The family with its own structure, layout and vocabulary, and narrow layers."""
    family = FAMILIES[name]
    levels, xl = len(family.unet["block_out_channels"]), "text_encoder_2" in family.text_encoders
    sizes = {"hidden_size": 16, "intermediate_size": 24, "projection_dim": 12, "num_hidden_layers": 2}
    towers = {
        folder: replace(tower, config=tower.config | sizes | {"num_attention_heads": 2})
        for folder, tower in family.text_encoders.items()
    }
    unet = {
        "block_out_channels": [16, 16, 32, 32][:levels],
        "norm_num_groups": 8,
        "cross_attention_dim": 16 * len(towers),
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
    }
    pooled = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60} if xl else {}
    vae = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}
    return replace(family, unet=family.unet | unet | pooled, vae=family.vae | vae, text_encoders=towers)


SMALL = {name: small(name) for name in FAMILIES}
clip_tokenizer = cache(build_clip_tokenizer)


@pytest.fixture(autouse=True, scope="module")
def families():
    with pytest.MonkeyPatch.context() as patch:
        for name, family in SMALL.items():
            patch.setitem(FAMILIES, name, family)
        for module in (single_file, saving, family_match):
            patch.setattr(module, "build_clip_tokenizer", clip_tokenizer)
        yield


@cache
def components(name):
    """Random weights of a directory."""
    g = torch.Generator().manual_seed(0)
    shapes = build_meta_state_dicts(SMALL[name])
    return {f: {n: torch.randn(a.shape, generator=g) for n, a in tensors.items()} for f, tensors in shapes.items()}


@cache
def wholes(name):
    """The same as a single file."""
    return convert_to_original(components(name), SMALL[name])


@pytest.fixture
def single(tmp_path):
    """Writes a single file of a family, and returns its path and tensors."""

    def write(name, path="model.safetensors", metadata=None, change=lambda tensors: None, **more):
        tensors = wholes(name) | more
        change(tensors)
        save_file(tensors, tmp_path / path, metadata)
        return tmp_path / path, tensors

    return write


def usual(name):
    return "v" if name == "sd2-v" else "eps"


@pytest.fixture(scope="module")
def folders(families, tmp_path_factory):
    """The folder that a family's single file becomes, made once, and not to be changed."""

    @cache
    def made(name):
        path = tmp_path_factory.mktemp(name)
        save_file(wholes(name), path / "model.safetensors")
        report = convert_checkpoint(path / "model.safetensors", path / "folder", LoadOptions(prediction=usual(name)))
        assert report["family"] == name and report["ignored"] == {}
        return path / "folder"

    return made


@pytest.fixture
def folder(folders, tmp_path):
    """One of Stable Diffusion 1, to spoil."""
    return shutil.copytree(folders("sd1"), tmp_path / "folder")


def same(found, expected):
    return found.keys() == expected.keys() and all(
        a.dtype == expected[name].dtype and torch.equal(a, expected[name]) for name, a in found.items()
    )


def contents(folder):
    """All files of a folder by name: tensors, or bytes."""
    files = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}
    return {n: load_file(path) if n.endswith(".safetensors") else path.read_bytes() for n, path in files.items()}


@every_family
def test_there_and_back_is_the_same_bit_for_bit(name, folders, tmp_path):
    report = convert_checkpoint(folders(name), tmp_path / "back.safetensors")
    assert (report["family"], report["prediction"], report["zero_snr"]) == (name, usual(name), False)
    assert same(load_file(tmp_path / "back.safetensors"), wholes(name))
    convert_checkpoint(tmp_path / "back.safetensors", tmp_path / "again")  # which says itself what it predicts
    found, expected = contents(tmp_path / "again"), contents(folders(name))
    assert found.keys() == expected.keys()
    assert all(same(a, expected[n]) if isinstance(a, dict) else a == expected[n] for n, a in found.items())


@every_family
def test_diffusers_and_we_load_a_written_folder(name, folders):
    family, expected = FAMILIES[name], convert_to_diffusers(wholes(name), FAMILIES[name])
    theirs = getattr(diffusers, family.pipeline_class).from_pretrained(folders(name), local_files_only=True)
    ours = formats.load_checkpoint(folders(name), CPU, torch.float32)
    direct = formats.load_checkpoint(
        folders(name).with_name("model.safetensors"), CPU, torch.float32, LoadOptions(prediction=usual(name))
    )
    assert ours.networks.keys() == expected.keys()
    for folder, network in ours.networks.items():
        other = {diffusers_key(folder, n): a for n, a in getattr(theirs, folder).state_dict().items()}
        assert same(dict(network.state_dict()), {n: other[n] for n in network.state_dict()})
        assert same(dict(network.state_dict()), dict(direct.networks[folder].state_dict()))
        assert sum(a.numel() for a in other.values()) == sum(a.numel() for a in expected[folder].values())
    assert theirs.scheduler.config.prediction_type == {"v": "v_prediction", "eps": "epsilon"}[usual(name)]
    assert ours.family == name and ours.force_zeros_for_empty_prompt == family.force_zeros_for_empty_prompt
    words = "a red apple on a table"  # no "!", which transformers cuts out of texts where it pads
    for tower, tokenizer in zip(ours.text_encoders, ("tokenizer", "tokenizer_2"), strict=False):
        own = getattr(theirs, tokenizer)
        assert own(words, padding="max_length").input_ids == tokenize_captions(tower.tokenizer, [words])[0].tolist()
    if name == "sdxl":
        assert theirs.config.force_zeros_for_empty_prompt is True


def test_what_is_not_needed_is_listed_with_the_reason(single, tmp_path):
    extra = {
        "cond_stage_model.model.logit_scale": torch.ones(()),
        "cond_stage_model.model.transformer.resblocks.2.ln_1.weight": torch.ones(16),
        "alphas_cumprod": torch.ones(1000),
    }
    path, _ = single("sd2-base", **extra)
    report = convert_checkpoint(path, tmp_path / "folder", LoadOptions(prediction="eps"))
    listed = {name: reason for reason, names in report["ignored"].items() for name in names}
    assert (
        listed.keys() == extra.keys()
        and "last layer" in listed["cond_stage_model.model.transformer.resblocks.2.ln_1.weight"]
    )
    (tmp_path / "folder" / "generation_config.json").write_text('{"num_inference_steps": 9}')
    back = convert_checkpoint(tmp_path / "folder", tmp_path / "back.safetensors")
    assert back["left_out"].keys() == {"generation_config.json", "cond_stage_model.model.transformer.resblocks.2.*"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_dtype_is_rounded_to_once(single, tmp_path, dtype):
    path, tensors = single("sd1", change=lambda t: t.update({n: a.double() for n, a in t.items()}))
    convert_checkpoint(path, tmp_path / "folder", LoadOptions(prediction="eps"), dtype=dtype)
    convert_checkpoint(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), {n: a.to(dtype) for n, a in tensors.items()})
    convert_checkpoint(path, tmp_path / "same.safetensors", dtype=dtype)
    assert same(load_file(tmp_path / "same.safetensors"), {n: a.to(dtype) for n, a in tensors.items()})


def test_each_tensor_keeps_its_dtype(single, tmp_path):
    """Where queries, keys and values of one map differ, as they can in no single file, the wider one is all theirs."""
    halves = {"model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_out.weight"}
    path, tensors = single("sdxl", change=lambda t: t.update({n: t[n].half() for n in halves}))
    convert_checkpoint(path, tmp_path / "folder", LoadOptions(prediction="eps"))
    convert_checkpoint(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), tensors)


@pytest.mark.parametrize(
    "name, kind, zero, marks",
    [
        ("sd1", "v", True, {"v_pred", "ztsnr"}),
        ("sd2-v", "v", False, set()),
        ("sdxl", "v", False, {"v_pred"}),
    ],
)
def test_a_written_single_file_says_what_it_predicts(name, kind, zero, marks, single, tmp_path, monkeypatch):
    path, tensors = single(name)
    convert_checkpoint(path, tmp_path / "folder", LoadOptions(prediction=kind, zero_snr=zero))
    convert_checkpoint(tmp_path / "folder", tmp_path / "apple.safetensors")
    assert load_file(tmp_path / "apple.safetensors").keys() - tensors.keys() == marks
    with safe_open(tmp_path / "apple.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.title"] == "apple" and header["modelspec.sai_model_spec"] == "1.0.0"
    assert header["modelspec.prediction_type"] == {"eps": "epsilon", "v": "v"}[kind]
    assert header["modelspec.resolution"] == f"{FAMILIES[name].resolution}x{FAMILIES[name].resolution}"
    monkeypatch.setattr(formats, "probe_unet", lambda *_: pytest.fail("the U-Net was probed"))
    report = convert_checkpoint(tmp_path / "apple.safetensors", tmp_path / "again")
    assert (report["family"], report["prediction"], report["zero_snr"]) == (name, kind, zero)
    assert contents(tmp_path / "again").keys() == contents(tmp_path / "folder").keys()
    scheduler = "scheduler/scheduler_config.json"
    assert (tmp_path / "again" / scheduler).read_text() == (tmp_path / "folder" / scheduler).read_text()


@pytest.mark.parametrize(
    "reply, found", [(ProbeResult(1, 0), "eps"), (ProbeResult(0.34, -0.94), "v"), (ProbeResult(0, 0), None)]
)
def test_the_unet_of_a_file_that_states_nothing_is_probed(reply, found, single, tmp_path, monkeypatch):
    path, tensors = single("sd1")
    weight = "model.diffusion_model.input_blocks.0.0.weight"

    def probe(unet, encoders, sde):
        assert torch.equal(unet.conv_in.weight.float(), tensors[weight].bfloat16().float()) and len(encoders) == 1
        return reply

    monkeypatch.setattr(formats, "probe_unet", probe)
    if found is None:
        with pytest.raises(ValueError, match=rf"{path}: cannot tell what the U-Net predicts"):
            convert_checkpoint(path, tmp_path / "folder")
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        return
    report = convert_checkpoint(path, tmp_path / "folder")
    assert report["prediction"] == found and any("measured" in line for line in report["evidence"])


def test_the_moving_average_takes_the_place_of_the_last_weights(single, tmp_path):
    def flat(name):
        return "model_ema." + name.removeprefix("model.").replace(".", "")

    unet = {n: a for n, a in wholes("sd1").items() if n.startswith("model.diffusion")}
    path, _ = single("sd1", **{flat(name): a + 1 for name, a in unet.items()})
    plain = convert_checkpoint(path, tmp_path / "plain", LoadOptions(prediction="eps"))
    averaged = convert_checkpoint(path, tmp_path / "averaged", LoadOptions(prediction="eps", ema=True))
    weights = "unet/diffusion_pytorch_model.safetensors"
    found, expected = load_file(tmp_path / "averaged" / weights), load_file(tmp_path / "plain" / weights)
    assert same(found, {n: a + 1 for n, a in expected.items()})
    assert sum(map(len, plain["ignored"].values())) == sum(map(len, averaged["ignored"].values())) == len(unet)


def test_few_tensors_are_in_memory_at_a_time(single, tmp_path, monkeypatch):
    path, tensors = single("sd2-base")
    living, most = weakref.WeakSet(), [0]

    def iter_tensors(self, hasher=None, plain=SafetensorsFile.iter_tensors):
        for name, tensor in plain(self, hasher):
            living.add(tensor)
            most[0] = max(most[0], len(living))
            yield name, tensor

    monkeypatch.setattr(SafetensorsFile, "iter_tensors", iter_tensors)
    convert_checkpoint(path, tmp_path / "folder", LoadOptions(prediction="eps"))
    convert_checkpoint(tmp_path / "folder", tmp_path / "back.safetensors")
    convert_checkpoint(path, tmp_path / "half.safetensors", dtype=torch.float16)
    assert 0 < most[0] <= 12 < len(tensors) / 10


def spoil(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


UNET = "unet/diffusion_pytorch_model.safetensors"
FILE_FAULTS = {
    "torn": (lambda p: p.write_bytes(p.read_bytes()[:-64]), {}, "not a whole safetensors file"),
    "missing": (lambda p: spoil(p, lambda t: t.pop("model.diffusion_model.out.2.bias")), {}, "missing model.diff"),
    "unknown": (
        lambda p: spoil(p, lambda t: t.update({"first_stage_model.x": torch.ones(2)})),
        {},
        "unknown first_stage_model.x",
    ),
    "no vae": (lambda p: spoil(p, lambda t: [t.pop(n) for n in [*t] if "first_stage" in n]), {}, "no vae in it"),
    "a pickle": (lambda p: torch.save({"a": torch.ones(1)}, p), {}, "ldm convert --trust"),
    "not there": (lambda p: p.unlink(), {}, "No such file"),
    "family": (lambda p: None, {"family": "sd3"}, "family 'sd3': choose from"),
    "prediction": (lambda p: None, {"prediction": "w"}, "prediction 'w': choose from"),
    "no average": (lambda p: None, {"ema": True}, "no moving average"),
    "a LoRA": (lambda p: save_file({"lora_unet_a.lora_down.weight": torch.ones(1, 1)}, p), {}, "LoRA"),
}
FOLDER_FAULTS = {
    "average": (lambda p: None, {"ema": True}, "ema does not apply to a folder"),
    "torn": (lambda p: (p / UNET).write_bytes((p / UNET).read_bytes()[:-64]), {}, "not a whole safetensors file"),
    "missing": (lambda p: spoil(p / UNET, lambda t: t.pop("conv_in.bias")), {}, "missing conv_in.bias"),
    "heads": (lambda p: edit(p / "unet/config.json", attention_head_dim=4), {}, "unet has attention_head_dim = 4"),
    "activation": (
        lambda p: edit(p / "text_encoder/config.json", hidden_act="gelu"),
        {},
        "text_encoder has hidden_act = gelu",
    ),
    "text heads": (
        lambda p: edit(p / "text_encoder/config.json", num_attention_heads=4),
        {},
        "text_encoder has num_attention_heads = 4",
    ),
    "epsilon": (
        lambda p: edit(p / "text_encoder/config.json", layer_norm_eps=1e-6),
        {},
        "text_encoder has layer_norm_eps = 1e-06",
    ),
    "scale": (lambda p: edit(p / "vae/config.json", scaling_factor=0.5), {}, "vae has scaling_factor = 0.5"),
    "betas": (lambda p: edit(p / "scheduler/scheduler_config.json", beta_end=0.013), {}, "another noise schedule"),
    "padding": (lambda p: edit(p / "tokenizer/tokenizer_config.json", pad_token="!"), {}, "another vocabulary or padd"),
    "family": (lambda p: None, {"family": "sdxl"}, "differences from sdxl: text encoders text_encoder"),
    "no family": (lambda p: None, {"family": "sd3"}, "family 'sd3': choose from"),
    "no index": (lambda p: (p / "model_index.json").unlink(), {}, "not a model"),
}


@pytest.fixture
def fault(single, tmp_path):
    """Runs a conversion of a spoilt source, which leaves no trace."""

    def check(source, dst, spoilt, options, match):
        spoilt(source)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=match) as error:
            convert_checkpoint(source, dst, LoadOptions(**options))
        assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before
        return str(error.value)

    return check


@pytest.mark.parametrize("case", FILE_FAULTS)
def test_a_fault_of_a_file_is_named_and_leaves_no_trace(case, fault, single, tmp_path):
    spoilt, options, match = FILE_FAULTS[case]
    path, _ = single("sd1")
    message = fault(path, tmp_path / "folder", spoilt, {"prediction": "eps"} | options, match)
    assert str(path) in message or case in ("family", "prediction")


@pytest.mark.parametrize("case", FOLDER_FAULTS)
def test_a_fault_of_a_folder_is_named_and_leaves_no_trace(case, fault, folder, tmp_path):
    spoilt, options, match = FOLDER_FAULTS[case]
    message = fault(folder, tmp_path / "out.safetensors", spoilt, options, match)
    assert str(folder) in message or case == "no family"


@pytest.mark.parametrize("name, unlike", [("sd1", "sd1"), ("sd2-v", "sd2-base"), ("sdxl", "sdxl")])
def test_a_spoilt_folder_is_compared_with_the_family_that_it_nearly_is(name, unlike, folders, tmp_path):
    shutil.copytree(folders(name), tmp_path / "folder")
    edit(tmp_path / "folder" / "scheduler/scheduler_config.json", beta_end=0.013)
    with pytest.raises(ValueError, match=f"; differences from {unlike}: another noise schedule$"):
        convert_checkpoint(tmp_path / "folder", tmp_path / "out.safetensors")


def test_a_folder_of_no_family_is_no_single_file(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=rf"{tiny}: matches no known family, which a single file needs; differences from "
    ):
        convert_checkpoint(tiny, tmp_path / "out.safetensors")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "dst, made, options, match",
    [
        ("out", lambda p: p.write_text("mine"), {}, "exists already"),
        ("out", lambda p: (p.mkdir(), (p / "mine").write_text("mine")), {}, "exists already"),
        ("out.safetensors", lambda p: p.write_text("mine"), {}, "exists already"),
        ("out.safetensors", lambda p: p.mkdir(), {}, "exists already"),
        ("out.ckpt", lambda p: None, {}, "written as .safetensors or as a folder"),
        ("out.safetensors", lambda p: None, {"family": "sd1"}, "the layout stays the same"),
    ],
)
def test_a_destination_is_not_written_over(dst, made, options, match, fault, single, tmp_path):
    path, _ = single("sd1")
    made(tmp_path / dst)
    fault(path, tmp_path / dst, lambda source: None, options, match)


def test_an_empty_folder_is_filled(single, tmp_path):
    (tmp_path / "out").mkdir()
    convert_checkpoint(single("sd1")[0], tmp_path / "out", LoadOptions(prediction="eps"))
    assert (tmp_path / "out" / "model_index.json").is_file() and len([*tmp_path.iterdir()]) == 2


def test_a_link_to_an_empty_folder_stays_one(single, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    convert_checkpoint(single("sd1")[0], tmp_path / "link", LoadOptions(prediction="eps"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "out" / "model_index.json").is_file()


def test_a_pickled_model_becomes_a_file_and_a_folder(folders, tmp_path, monkeypatch):
    """A Lightning checkpoint of 2022: weights under state_dict, a step and optimizer states beside them."""
    tensors, ckpt = wholes("sd1"), tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors, "global_step": 5, "optimizer_states": [{"m": torch.ones(2)}]}, ckpt)
    report = convert_checkpoint(ckpt, tmp_path / "plain.safetensors", trust=True, dtype=torch.float16)
    assert same(load_file(tmp_path / "plain.safetensors"), {n: a.half() for n, a in tensors.items()})
    assert report["dropped"] == {"model.ckpt": ["global_step", "optimizer_states"]}
    monkeypatch.setattr(convert, "unpickle_weights", lambda src, dst, dtype: unpickle.unpickle_in_process(src, dst))
    convert_checkpoint(ckpt, tmp_path / "one", LoadOptions(prediction="eps"), trust=True)
    found, expected = contents(tmp_path / "one"), contents(folders("sd1"))
    assert found.keys() == expected.keys() and all(same(found[n], a) for n, a in expected.items() if type(a) is dict)
    with pytest.raises(ValueError, match=rf"{ckpt}: no moving average"):
        convert_checkpoint(ckpt, tmp_path / "two", LoadOptions(prediction="eps", ema=True), trust=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt", "plain.safetensors", "one"}


def test_a_folder_of_pickles_becomes_one_of_safetensors(folder, tmp_path, monkeypatch):
    """With a network in shards, and a component that is there in both forms; read in this process, to save time."""
    monkeypatch.setattr(convert, "unpickle_weights", lambda src, dst, dtype: unpickle.unpickle_in_process(src, dst))
    expected = contents(folder)
    for name in ("unet", "text_encoder"):
        file = folder / name / f"{WEIGHTS[name]}.safetensors"
        tensors, stem = load_file(file), {"unet": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}[name]
        file.unlink()
        if name == "unet":
            torch.save(tensors, file.with_name(f"{stem}.bin"))
            continue
        names = [*tensors]
        parts = {f"{stem}-{k + 1:05}-of-00002.bin": names[k::2] for k in range(2)}
        for part, held in parts.items():
            torch.save({n: tensors[n] for n in held}, file.with_name(part))
        weight_map = {n: part for part, held in parts.items() for n in held}
        file.with_name(f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"a": torch.ones(1)}, folder / "vae" / "diffusion_pytorch_model.bin")
    (folder / "remote.py").write_text("print()")
    with pytest.raises(ValueError, match=r"\.bin.*ldm convert --trust"):
        convert_checkpoint(folder, tmp_path / "new")
    report = convert_checkpoint(folder, tmp_path / "new", trust=True)
    assert report["left_out"].keys() == {"remote.py", "vae/diffusion_pytorch_model.bin"}
    model = formats.load_checkpoint(tmp_path / "new", CPU, torch.float32)
    assert same(dict(model.unet.state_dict()), expected["unet/diffusion_pytorch_model.safetensors"])
    assert same(dict(model.text_encoders[0].model.state_dict()), expected["text_encoder/model.safetensors"])
    convert_checkpoint(folder, tmp_path / "one.safetensors", trust=True)
    assert same(load_file(tmp_path / "one.safetensors"), wholes("sd1"))
