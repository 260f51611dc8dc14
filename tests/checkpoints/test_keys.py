"""Single file and directory are one model: one to one both ways, bit for bit, and as diffusers converts."""

from dataclasses import replace
from functools import cache

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    infer_diffusers_model_type,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.keys import (
    build_key_mappings,
    build_meta_state_dicts,
    convert_to_diffusers,
    convert_to_original,
    ignored_reason,
    map_diffusers_keys,
    map_single_file_keys,
)
from ldm.checkpoints.tensors import save_tensors
from ldm.files import write_json

every_family = pytest.mark.parametrize("name", FAMILIES)
MODEL_TYPES = {  # ours: diffusers'
    "sd1": "v1",
    "sd1-inpainting": "inpainting",
    "sd2-base": "v2",
    "sd2-v": "v2",
    "sd2-inpainting": "inpainting_v2",
    "sdxl": "xl_base",
    "sdxl-inpainting": "xl_inpaint",
}
TENSORS = {"sd1": 686, "sd1-inpainting": 686, "sd2-base": 686, "sd2-v": 686, "sd2-inpainting": 686} | dict.fromkeys(
    ("sdxl", "sdxl-inpainting"), 1680
)
LANDMARKS = {  # names that every tool knows a file by
    "sd1": "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight",
    "sd2-v": "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight",
    "sdxl": "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
}


def small(tower):
    """A text encoder of 3 layers whose width is not its projection's."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "projection_dim": 12, "num_hidden_layers": 3}
    rest = {"num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 9}
    return replace(tower, config=tower.config | sizes | rest | {"bos_token_id": 38, "eos_token_id": 39})


@cache
def tiny(name):
    """The family with its own structure and narrow layers."""
    family = FAMILIES[name]
    levels = len(family.unet["block_out_channels"])
    unet = {
        "block_out_channels": [16, 16, 32, 32][:levels],
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "layers_per_block": 1 if name == "sd2-base" else 2,
        "transformer_layers_per_block": [1, 2, 3] if name.startswith("sdxl") else 1,
    }
    vae = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}
    towers = {folder: small(tower) for folder, tower in family.text_encoders.items()}
    return replace(family, unet=family.unet | unet, vae=family.vae | vae, text_encoders=towers)


def components(family):
    """Random weights of a directory."""
    g = torch.Generator().manual_seed(0)
    shapes = build_meta_state_dicts(family)
    return {f: {n: torch.randn(a.shape, generator=g) for n, a in tensors.items()} for f, tensors in shapes.items()}


def shapes(tensors):
    return {name: tuple(a.shape) for name, a in tensors.items()}


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], a) for name, a in expected.items())


def as_diffusers_converts(single, family):
    """The directory by diffusers' own converters."""
    found = {
        "unet": convert_ldm_unet_checkpoint(single, dict(family.unet)),
        "vae": convert_ldm_vae_checkpoint(single, dict(family.vae)),
    }
    for folder, tower in family.text_encoders.items():
        if tower.layout == "open_clip":
            with torch.device("meta"):
                model = CLIPTextModel(CLIPTextConfig(**tower.config))
            found[folder] = convert_open_clip_checkpoint(model, single, prefix=tower.prefix)
        else:
            found[folder] = convert_ldm_clip_checkpoint(single)
    return found


@every_family
def test_full_size_directories_are_the_state_dicts_of_their_classes(name):
    family = FAMILIES[name]
    with torch.device("meta"):
        theirs = {
            "unet": UNet2DConditionModel.from_config(family.unet).state_dict(),
            "vae": AutoencoderKL.from_config(family.vae).state_dict(),
        }
        for folder, tower in family.text_encoders.items():
            model = (CLIPTextModelWithProjection if tower.with_projection else CLIPTextModel)(
                CLIPTextConfig(**tower.config)
            )
            theirs[folder] = {
                n if tower.with_projection else f"text_model.{n}": tensor for n, tensor in model.state_dict().items()
            }
    found = convert_to_diffusers(
        {entry.original_key: entry.original_tensor for entry in build_key_mappings(family)}, family
    )
    assert {f: shapes(tensors) for f, tensors in found.items()} == {f: shapes(a) for f, a in theirs.items()}
    assert len(found["unet"]) == TENSORS[name]


@every_family
def test_full_size_single_files_come_back_from_their_directories(name):
    family = FAMILIES[name]
    single = {entry.original_key: entry.original_tensor for entry in build_key_mappings(family)}
    assert len(single) == len(build_key_mappings(family))
    assert shapes(convert_to_original(convert_to_diffusers(single, family), family)) == shapes(single)
    assert infer_diffusers_model_type(single) == MODEL_TYPES[name]
    assert LANDMARKS.get(name, "model.diffusion_model.input_blocks.0.0.weight") in single


@every_family
@pytest.mark.parametrize("full", [False, True], ids=["tiny", "full size"])
def test_a_single_file_is_converted_as_diffusers_does(name, full):
    family = FAMILIES[name] if full else tiny(name)
    single = convert_to_original(build_meta_state_dicts(family) if full else components(family), family)
    found, expected = convert_to_diffusers(single, family), as_diffusers_converts(single, family)
    assert found.keys() == expected.keys()
    for folder in found:
        assert shapes(found[folder]) == shapes(expected[folder])
        assert full or same(found[folder], expected[folder])


@every_family
def test_there_and_back_changes_no_bit(name):
    family = tiny(name)
    directory = components(family)
    single = convert_to_original(directory, family)
    found = convert_to_diffusers(single, family)
    assert found.keys() == directory.keys() and all(same(found[folder], directory[folder]) for folder in directory)
    assert same(convert_to_original(found, family), single)


@pytest.mark.parametrize("name, model", [("sd2-v", "ViT-H-14"), ("sdxl", "ViT-bigG-14")])
def test_every_tensor_of_open_clip_s_text_encoder_is_mapped_or_ignored(name, model):
    family = FAMILIES[name]
    tower = [*family.text_encoders.values()][-1]
    with torch.device("meta"):
        theirs = open_clip.CLIP(**open_clip.get_model_config(model)).state_dict()
    theirs = {tower.prefix + n: a for n, a in theirs.items() if not n.startswith("visual.")}
    mapped = {
        e.original_key: e.original_tensor for e in build_key_mappings(family) if e.original_key.startswith(tower.prefix)
    }
    assert shapes({n: a for n, a in theirs.items() if not ignored_reason(n, family)}) == shapes(mapped)
    dropped = {n.removeprefix(tower.prefix) for n in theirs if ignored_reason(n, family)}
    last = {n for n in dropped if n.startswith("transformer.resblocks.23.")}
    assert dropped - last == {"logit_scale"} | ({"text_projection"} if name == "sd2-v" else set())
    assert len(last) == (12 if name == "sd2-v" else 0)


def test_a_converted_text_encoder_is_open_clip_s_function():
    """Queries, keys, values and the projection end in their places: one pooled vector by two libraries."""
    family = tiny("sdxl")
    tower = family.text_encoders["text_encoder_2"]
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16}
    words = {"context_length": 9, "vocab_size": 40, "width": 16, "heads": 2, "layers": 3, "mlp_ratio": 1.5}
    theirs = open_clip.CLIP(12, vision, words).eval()
    single = convert_to_original(components(family), family)
    single |= {tower.prefix + n: a for n, a in theirs.state_dict().items() if not n.startswith("visual.")}
    ours = CLIPTextModelWithProjection(CLIPTextConfig(**tower.config)).eval()
    ours.load_state_dict(convert_to_diffusers(single, family)["text_encoder_2"], strict=True)
    ids = torch.tensor([[38, 5, 7, 39, 0, 0, 0, 0, 0], [38, 1, 2, 3, 4, 5, 6, 7, 39]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).text_embeds, theirs.encode_text(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name, superfluous",
    [
        ("sd1", "betas"),
        ("sd1", "sqrt_one_minus_alphas_cumprod"),
        ("sd1", "posterior_log_variance_clipped"),
        ("sd1", "model_ema.decay"),
        ("sd1", "model_ema.diffusion_modelinput_blocks00weight"),
        ("sd1", "cond_stage_model.transformer.text_model.embeddings.position_ids"),
        ("sd2-v", "cond_stage_model.model.transformer.resblocks.3.ln_1.weight"),
        ("sd2-v", "cond_stage_model.model.text_projection"),
        ("sd2-v", "v_pred"),
        ("sdxl", "conditioner.embedders.1.model.logit_scale"),
        ("sdxl", "conditioner.embedders.0.transformer.text_projection.weight"),
        ("sdxl", "denoiser.sigmas"),
    ],
)
def test_what_is_superfluous_is_known_and_changes_nothing(name, superfluous):
    family = tiny(name)
    single = convert_to_original(components(family), family)
    assert superfluous not in single and ignored_reason(superfluous, family)
    found = convert_to_diffusers(single | {superfluous: torch.ones(1)}, family)
    assert all(same(found[folder], tensors) for folder, tensors in components(family).items())


@every_family
def test_no_tensor_that_is_needed_is_ignored(name):
    family = FAMILIES[name]
    assert not [e.original_key for e in build_key_mappings(family) if ignored_reason(e.original_key, family)]
    assert not [
        f"{e.component}/{part}"
        for e in build_key_mappings(family)
        for part in e.parts
        if ignored_reason(f"{e.component}/{part}", family)
    ]


def test_older_and_newer_names_are_the_same_model():
    family = tiny("sd1")
    directory = components(family)
    single = convert_to_original(directory, family)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {n: next((n.replace(a, b) for a, b in older.items() if a in n), n) for n in directory["vae"]}
    other = {
        "unet": directory["unet"],
        "vae": {renamed[n]: a for n, a in directory["vae"].items()},
        "text_encoder": {n.removeprefix("text_model."): a for n, a in directory["text_encoder"].items()},
    }
    assert sum(n != m for n, m in renamed.items()) == 16
    assert same(convert_to_original(other, family), single)
    bare = {n.replace(".transformer.text_model.", ".transformer."): a for n, a in single.items()}
    assert bare.keys() != single.keys()
    found = convert_to_diffusers(bare, family)
    assert all(same(found[folder], directory[folder]) for folder in directory)
    assert map_single_file_keys(bare, family).keys() == bare.keys()  # a plan has the file's own names
    assert map_diffusers_keys(other, family).keys() == {f"{folder}/{n}" for folder in other for n in other[folder]}


@pytest.mark.parametrize("name", ["sd1", "sd2-v"])
def test_a_1x1_convolution_and_a_linear_map_are_the_same_numbers(name):
    """Tools have written either: a projection of a transformer, a map of the autoencoder's attention."""
    family = tiny(name)
    directory = components(family)
    single = convert_to_original(directory, family)
    maps = [n for n in directory["unet"] if n.endswith(("proj_in.weight", "proj_out.weight"))]
    assert {directory["unet"][n].ndim for n in maps} == ({4} if name == "sd1" else {2})
    other = {n: a.flatten(1) if a.ndim == 4 else a[..., None, None] for n, a in directory["unet"].items() if n in maps}
    assert same(convert_to_original(directory | {"unet": directory["unet"] | other}, family), single)
    attention = {n: a.flatten(1) for n, a in single.items() if ".attn_1." in n and a.ndim == 4}
    assert len(attention) == 8
    assert same(convert_to_diffusers(single | attention, family)["vae"], directory["vae"])


def test_the_moving_average_takes_the_place_of_the_last_weights():
    family = tiny("sd1")
    single = convert_to_original(components(family), family)
    prefix = "model.diffusion_model."
    average = {n: a + 1 for n, a in single.items() if n.startswith(prefix)}
    # LDM's LitEma leaves out the dots
    flat = {"model_ema." + n.removeprefix("model.").replace(".", ""): a for n, a in average.items()}
    expected = convert_to_diffusers(single | average, family)
    found = {folder: {} for folder in expected}
    for name, entry in map_single_file_keys(single | flat, family, ema=True).items():
        found[entry.component] |= entry.to_diffusers((single | flat)[name])
    assert all(same(found[folder], expected[folder]) for folder in expected)
    with pytest.raises(ValueError, match=r"no moving average of model\.diffusion_model\."):
        map_single_file_keys(single, family, ema=True)


@pytest.mark.parametrize(
    "name, folder", [("sd1", "text_encoder"), ("sd2-v", "text_encoder"), ("sdxl", "text_encoder_2")]
)
def test_transformers_reads_a_converted_text_encoder(name, folder, tmp_path):
    """By the published names; safetensors, too, takes the parts of fused tensors, which are views."""
    family = tiny(name)
    tower, tensors = (
        family.text_encoders[folder],
        convert_to_diffusers(convert_to_original(components(family), family), family)[folder],
    )
    save_tensors(tensors, tmp_path / "model.safetensors", torch.float32)
    write_json({**tower.config, "model_type": "clip_text_model"}, tmp_path / "config.json")
    kind = CLIPTextModelWithProjection if tower.with_projection else CLIPTextModel
    model, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
    prefix = "" if tower.with_projection else "text_model."
    assert same({prefix + n: a for n, a in model.state_dict().items()}, tensors)


BIAS = "model.diffusion_model.out.2.bias"
FUSED = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
SPOILT = {
    "missing": (lambda t: t.pop(BIAS), "missing model.diffusion_model.out.2.bias"),
    "unknown": (lambda t: t.update({f"{BIAS}2": torch.ones(2)}), "unknown model.diffusion_model.out.2.bias2"),
    "shape": (lambda t: t.update({BIAS: torch.ones(3)}), r"out.2.bias has shape \[3\], expected \[4\]"),
    "fused": (lambda t: t.update({FUSED: torch.ones(47, 16)}), r"has shape \[47, 16\], expected \[48, 16\]"),
    "many": (
        lambda t: [t.pop(n) for n in [*t] if n.startswith("first_stage_model.")],
        r"missing first_stage_model\.\S+, missing first_stage_model\.\S+, missing first_stage_model\.\S+ and \d+ more",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_fault_of_a_single_file_is_named(fault):
    family = tiny("sd2-v")
    spoil, said = SPOILT[fault]
    single = convert_to_original(components(family), family)
    spoil(single)
    with pytest.raises(ValueError, match=said):
        convert_to_diffusers(single, family)


def test_a_fault_of_a_directory_is_named():
    family = tiny("sd1")
    directory = components(family)
    bias = directory["unet"].pop("conv_out.bias")
    with pytest.raises(ValueError, match=r"missing unet/conv_out\.bias"):
        convert_to_original(directory, family)
    directory["unet"]["conv_out.bias"] = bias
    with pytest.raises(ValueError, match=r"unknown safety_checker/logits"):
        convert_to_original(directory | {"safety_checker": {"logits": bias}}, family)
    directory["text_encoder"]["final_layer_norm.bias"] = directory["text_encoder"]["text_model.final_layer_norm.bias"]
    with pytest.raises(ValueError, match=r"text_model\.final_layer_norm\.bias is given twice"):
        convert_to_original(directory, family)
