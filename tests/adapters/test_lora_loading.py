"""Adapter files: each format is read as its own tool reads it, and is the same change in every other."""

import hashlib
import json
import pickle
from collections import Counter

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.adapters.factors import Full, LoHa, LoKr, LoRA
from ldm.adapters.lora import Adapter, AdapterMerger, ModuleDelta
from ldm.adapters.lora_keys import _module_aliases, build_module_aliases
from ldm.adapters.lora_loading import build_adaptable_networks, convert_adapter, detect_adapter_family, load_adapter
from ldm.adapters.lora_saving import LORA_FORMATS, save_adapter
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.keys import diffusers_key
from ldm.conditioning import Conditioning
from ldm.nn.text_encoders import build_text_encoder
from ldm.nn.unet import UNet, UNetConfig

UNETS = {
    "sd1": {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 768,
    },
    "sdxl": {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 9,
    "projection_dim": 12,
    "bos_token_id": 38,
    "eos_token_id": 39,
}
both = pytest.mark.parametrize("family", UNETS)


def unet_config(family):
    sizes = {"block_out_channels": [16, 32], "layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 8}
    return {"in_channels": 4, "out_channels": 4, **sizes, **UNETS[family]}


def tiny(family):
    """Narrow networks of the family's structure."""
    torch.manual_seed(0)
    networks = {"unet": UNet(UNetConfig.from_dict(unet_config(family))), "text_encoder": build_text_encoder(TEXT)}
    if family == "sdxl":
        networks["text_encoder_2"] = build_text_encoder(TEXT, True)
    return {folder: network.eval().requires_grad_(False) for folder, network in networks.items()}


def layers(networks, kinds=(nn.Linear, nn.Conv2d), ends=("",)):
    return {
        f"{folder}/{path}": m
        for folder, network in networks.items()
        for path, m in network.named_modules()
        if isinstance(m, kinds) and path.endswith(ends)
    }


def thin(m, g, rank=2, mid=False):
    """Random LoRA of a layer, as kohya shapes it."""
    shape, ones = m.weight.shape, (m.weight.ndim - 2) * (1,)
    kernel = ones if mid else shape[2:]
    down, up = 0.1 * torch.randn(rank, shape[1], *kernel, generator=g), torch.randn(shape[0], rank, *ones, generator=g)
    return LoRA(down, up, torch.randn(rank, rank, *shape[2:], generator=g) if mid else None)


def magnitude(m, g):
    return torch.rand(len(m.weight), *(m.weight.ndim - 1) * [1], generator=g) + 0.5


def kron(m, g):
    n, c = m.weight.shape[:2]
    return LoKr(
        w1=torch.randn(2, 2, generator=g),
        w2_a=0.1 * torch.randn(n // 2, 2, generator=g),
        w2_b=torch.randn(2, c // 2 * m.weight[0, 0].numel(), generator=g),
    )


def hadamard(m, g):
    n, c = len(m.weight), m.weight[0].numel()
    a, b, c, d = (0.3 * torch.randn(*shape, generator=g) for shape in ((n, 2), (2, c), (n, 2), (2, c)))
    return LoHa(a, b, c, d)


KINDS = {  # a random change of a layer
    "lora": lambda m, g: ModuleDelta(thin(m, g, 3), 1.0),
    "lora, no alpha": lambda m, g: ModuleDelta(thin(m, g)),
    "locon": lambda m, g: ModuleDelta(thin(m, g, mid=m.weight.ndim == 4), 0.7),
    "dora": lambda m, g: ModuleDelta(thin(m, g), 3.0, magnitude(m, g)),
    "loha": lambda m, g: ModuleDelta(hadamard(m, g), 0.7),
    "lokr": lambda m, g: ModuleDelta(kron(m, g), 0.7),
    "lokr, whole": lambda m, g: ModuleDelta(LoKr(w1=torch.randn(2, 2, generator=g), w2=m.weight[::2, ::2].clone())),
    "full": lambda m, g: ModuleDelta(Full(torch.randn(m.weight.shape, generator=g)), bias=m.bias),
}
THIN = "lora", "lora, no alpha", "locon", "dora"
EVEN = ("to_q", "to_k", "q_proj", "fc1", "conv1", "proj_in", "conv_shortcut")  # layers of even sizes, of every shape


def adapter(networks, kind, ends=EVEN):
    g = torch.Generator().manual_seed(1)
    return Adapter("random", {target: KINDS[kind](m, g) for target, m in layers(networks, ends=ends).items()})


def merged(networks, adapter, weight=1.0):
    """The weights with an adapter, which is then taken out."""
    adapters = AdapterMerger(networks)
    adapters.load(adapter, weight)
    found = {f"{folder}/{name}": a.clone() for folder, n in networks.items() for name, a in n.state_dict().items()}
    adapters.unload()
    return found


def close(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        torch.testing.assert_close(found[name], a, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


LANDMARKS = {  # names that real files have, and our modules
    "sd1": {
        "lora_unet_down_blocks_0_attentions_0_proj_in": "unet/down_blocks.0.attentions.0.proj_in",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0": (
            "unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
        ),
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj": (
            "unet/up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj"
        ),
        "lora_te_text_model_encoder_layers_11_mlp_fc2": "text_encoder/text_model.encoder.layers.11.mlp.fc2",
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "unet/down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "lora_unet_input_blocks_8_1_proj_in": "unet/down_blocks.2.attentions.1.proj_in",
        "lora_unet_input_blocks_3_0_op": "unet/down_blocks.0.downsamplers.0.conv",
        "lora_unet_input_blocks_5_0_in_layers_2": "unet/down_blocks.1.resnets.1.conv1",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
            "unet/mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"
        ),
        "lora_unet_output_blocks_2_1_proj_out": "unet/up_blocks.0.attentions.2.proj_out",
        "lora_unet_output_blocks_5_2_conv": "unet/up_blocks.1.upsamplers.0.conv",
        "lora_unet_output_blocks_8_0_skip_connection": "unet/up_blocks.2.resnets.2.conv_shortcut",
        "lora_unet_time_embed_2": "unet/time_embedding.linear_2",
        "lora_unet_label_emb_0_0": "unet/add_embedding.linear_1",
        "lora_unet_out_2": "unet/conv_out",
        "lora_te1_text_model_encoder_layers_11_self_attn_q_proj": (
            "text_encoder/text_model.encoder.layers.11.self_attn.q_proj"
        ),
        "lora_te2_text_model_encoder_layers_31_mlp_fc1": "text_encoder_2/text_model.encoder.layers.31.mlp.fc1",
        "lora_te2_text_projection": "text_encoder_2/text_projection",
    },
}


@both
def test_names_of_real_files_are_modules_of_full_size_models(family, tmp_path):
    networks = build_adaptable_networks(family)
    marks = LANDMARKS[family]
    tensors = {}
    for name, target in marks.items():
        weight = networks[target.split("/")[0]].get_submodule(target.split("/")[1]).weight
        ones = (weight.ndim - 2) * (1,)
        tensors[f"{name}.lora_down.weight"] = torch.ones(1, *weight.shape[1:])
        tensors[f"{name}.lora_up.weight"] = torch.ones(len(weight), 1, *ones)
    save_file(tensors, tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors", networks).deltas.keys() == set(marks.values())
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", family)
    assert {name.split(".")[0] for name in load_file(tmp_path / "b.safetensors")} == marks.keys()


@pytest.mark.parametrize("family", ["sd1", "sd2-base", "sdxl"])
def test_no_two_modules_have_one_spelling(family):
    for folder, network in build_adaptable_networks(family).items():
        known = [path for path, m in network.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
        owners = Counter()
        for path in known:
            owners.update(
                {s for name in _module_aliases(folder, path, network) for s in (name, name.replace(".", "_"))}
            )
        assert max(owners.values()) == 1 and set(build_module_aliases(folder, network).values()) == set(known)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_the_same_change(family, kind, tmp_path):
    networks = tiny(family)
    random = adapter(networks, kind)
    expected = merged(networks, random)
    for to in LORA_FORMATS if kind in THIN else ["kohya"]:
        save_adapter(random, tmp_path / to, to, networks, family)
        found = load_adapter(tmp_path / to, networks, family)
        assert found.lora_format == to
        close(merged(networks, found), expected)


@both
@pytest.mark.parametrize("kind", THIN)
def test_a_chain_of_conversions_changes_nothing(family, kind, tmp_path, monkeypatch):
    networks = tiny(family)
    monkeypatch.setattr(
        "ldm.adapters.lora_loading.build_adaptable_networks", lambda name: {"sd1": networks, "sdxl": networks}[name]
    )
    random = adapter(networks, kind)
    save_adapter(random, tmp_path / "0", "kohya", networks, family)
    for k, to in enumerate(["diffusers", "peft", "kohya", "peft", "diffusers", "kohya"]):
        convert_adapter(tmp_path / f"{k}", tmp_path / f"{k + 1}", to, family)
    close(merged(networks, load_adapter(tmp_path / "6", networks)), merged(networks, random))


def theirs(family, networks):
    """diffusers' own pipeline with the same weights."""
    config = CLIPTextConfig(**TEXT)
    twins = {"unet": UNet2DConditionModel.from_config(unet_config(family)), "text_encoder": CLIPTextModel(config)}
    if family == "sdxl":
        twins["text_encoder_2"] = CLIPTextModelWithProjection(config)
    for folder, network in networks.items():
        names = {diffusers_key(folder, name): name for name in twins[folder].state_dict()}
        twins[folder].load_state_dict({names[key]: a for key, a in network.state_dict().items()})
        twins[folder].eval()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    rest = {"tokenizer": None, "scheduler": DDIMScheduler(), "vae": vae}
    if family == "sdxl":
        return StableDiffusionXLPipeline(**twins, **rest, tokenizer_2=None)
    return StableDiffusionPipeline(
        **twins, **rest, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def fused(pipe):
    """The weights of a pipeline with its adapters merged."""
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    folders = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]
    return {f"{f}/{diffusers_key(f, n)}": a for f in folders for n, a in getattr(pipe, f).state_dict().items()}


TOWER = "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"  # diffusers knows no other layer of a text tower
ALL = ("unet/", *(f"text_encoder{n}/" for n in ("", "_2")))
READ = [  # family, format, kind, the networks of which diffusers reads it
    ("sd1", "kohya", "lora", ALL),
    ("sdxl", "kohya", "lora", ALL),
    ("sd1", "diffusers", "lora", ALL),
    ("sdxl", "diffusers", "lora", ALL),
    ("sd1", "diffusers", "dora", "unet/"),
    ("sdxl", "diffusers", "dora", "unet/"),
]


@pytest.mark.parametrize("family, to, kind, folders", READ)
def test_diffusers_reads_what_we_write_as_we_do(family, to, kind, folders, tmp_path):
    networks = tiny(family)
    every = adapter(networks, kind, ("",)).deltas
    known = [t for t in every if t.startswith("unet/") or t.endswith(TOWER)]
    random = Adapter("a", {target: every[target] for target in known if target.startswith(folders)})
    save_adapter(random, tmp_path / "a.safetensors", to, networks, family)
    pipe = theirs(family, networks)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    close(fused(pipe), merged(networks, random), 1e-5)
    adapters = AdapterMerger(networks)
    adapters.load(load_adapter(tmp_path / "a.safetensors", networks, family))
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([10.0, 500.0])
    context = torch.randn(2, 9, unet_config(family)["cross_attention_dim"], generator=g)
    cond, more = Conditioning(context), {}
    if family == "sdxl":
        pooled, ids = torch.randn(2, 16, generator=g), torch.rand(2, 6, generator=g)
        cond = Conditioning(context, vector=networks["unet"].make_vector(pooled, ids))
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    with torch.no_grad():
        ours, expected = networks["unet"](x, t, cond), pipe.unet(x, t, context, **more).sample
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@both
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_reads_what_we_write_as_we_do(family, kind, tmp_path):
    networks = tiny(family)
    random = adapter(networks, kind)
    save_adapter(random, tmp_path / "a", "peft", networks)
    expected = merged(networks, random)
    for folder, network in networks.items():
        found = PeftModel.from_pretrained(network, tmp_path / "a" / folder).merge_and_unload()
        close(
            {f"{folder}/{n}": a for n, a in found.state_dict().items()},
            {n: a for n, a in expected.items() if n.startswith(f"{folder}/")},
        )


SOME = [".*attn1.to_q", ".*attn2.to_k", ".*proj_in", ".*conv1"]
TRAINED = {
    "lora": LoraConfig(r=3, lora_alpha=5, rank_pattern={"to_q": 2}, alpha_pattern={"attn1.to_q": 7, "proj_in": 1}),
    "rslora": LoraConfig(r=3, lora_alpha=5, use_rslora=True, rank_pattern={"to_q": 2}),
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True),
    "bias": LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules="(?!.*to_k).*(proj_in|conv1)"),
    "loha": LoHaConfig(r=2, alpha=3, alpha_pattern={"to_q": 7}),
    "loha, tucker": LoHaConfig(r=2, alpha=3, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=2, alpha=3),
    "lokr, whole": LoKrConfig(r=32, alpha=3),
    "lokr, both": LoKrConfig(r=1, alpha=3, decompose_both=True),
    "lokr, tucker": LoKrConfig(r=1, alpha=3, use_effective_conv2d=True),
}


@pytest.mark.parametrize("kind", TRAINED)
def test_what_peft_saves_is_read_as_peft_does(kind, tmp_path):
    networks = {"unet": tiny("sd1")["unet"]}
    config = TRAINED[kind]
    config.target_modules = config.target_modules or "|".join(SOME)
    model = get_peft_model(tiny("sd1")["unet"], config)
    g = torch.Generator().manual_seed(0)
    for name, a in model.named_parameters():
        if "lora_" in name or "hada_" in name or "lokr_" in name:
            a.data = 0.3 * torch.randn(a.shape, generator=g)
    model.save_pretrained(tmp_path / "a")
    found = merged(networks, load_adapter(tmp_path / "a", networks))
    expected = {f"unet/{n}": a for n, a in model.merge_and_unload().state_dict().items()}
    close(found, expected)
    assert sum(not a.equal(networks["unet"].state_dict()[n[5:]]) for n, a in found.items()) >= 5


def test_what_diffusers_trainers_save_is_read_with_its_alpha(tmp_path):
    """Of today, whose header holds peft's configuration; without it diffusers, too, would take alpha to be the rank."""
    networks = tiny("sd1")
    pipe = theirs("sd1", networks)
    config = LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "conv1", "q_proj"])
    pipe.unet.add_adapter(config)
    inject_adapter_in_model(config, pipe.text_encoder)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder)),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=config.to_dict(),
    )
    assert any(".lora_linear_layer." in name for name in load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    again = theirs("sd1", networks)
    again.load_lora_weights(tmp_path)
    close(merged(networks, load_adapter(tmp_path, networks)), fused(again), 1e-5)


OLD = {  # what diffusers of 2023 wrote, and the modules
    "{}down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{}.weight": (
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "{}mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.{}.weight": (
        "unet/mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    ),
    "{}up_blocks.1.attentions.0.proj_in.lora.{}.weight": "unet/up_blocks.1.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_v_lora.{}.weight": (
        "text_encoder/text_model.encoder.layers.0.self_attn.v_proj"
    ),
    "text_encoder.text_model.encoder.layers.1.self_attn.out_proj.lora_linear_layer.{}.weight": (
        "text_encoder/text_model.encoder.layers.1.self_attn.out_proj"
    ),
}


@pytest.mark.parametrize("prefix", ["unet.", ""], ids=["pipeline", "attention processors alone"])
def test_old_files_of_diffusers_are_read(prefix, tmp_path):
    networks, g = tiny("sd1"), torch.Generator().manual_seed(0)
    tensors, targets = {}, {}
    for name, target in OLD.items():
        if target.startswith("text") and not prefix:
            continue
        lora = thin(layers(networks)[target], g)
        targets[target] = ModuleDelta(lora)
        words = [prefix] if name.startswith("{}") else []
        tensors |= {name.format(*words, "down"): lora.down, name.format(*words, "up"): lora.up}
    save_file(tensors, tmp_path / "a.safetensors")
    found = load_adapter(tmp_path / "a.safetensors", networks)
    assert found.lora_format == "diffusers"
    close(merged(networks, found), merged(networks, Adapter("a", targets)))


def test_a_convolution_1x1_and_a_linear_map_are_the_same_numbers(tmp_path):
    """SD 1's projections are convolutions and SDXL's are linear: tools have written either form for either."""
    for family in UNETS:
        networks = tiny(family)
        random = adapter(networks, "lora", ("proj_in", "conv_shortcut", "to_q"))
        save_adapter(random, tmp_path / family, "kohya", networks)
        file = load_file(tmp_path / family)
        other = {n: a.flatten(1) if a.ndim == 4 else a[..., None, None] for n, a in file.items() if a.ndim > 1}
        assert {a.ndim for a in file.values() if a.ndim > 1} == {2, 4}
        save_file(file | other, tmp_path / f"{family} other")
        close(merged(networks, load_adapter(tmp_path / f"{family} other", networks)), merged(networks, random))


def test_what_lycoris_writes_beside_factors(tmp_path):
    """Norms, biases, and DoRA over the outputs, of before its own was over the inputs."""
    networks, g = tiny("sd1"), torch.Generator().manual_seed(0)
    unet = networks["unet"]
    q = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    lora, m = thin(q, g), torch.rand(1, 16, generator=g)
    w_norm, b_norm, b = (torch.randn(n, generator=g) for n in (16, 16, 4))
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    tensors = {
        f"{block}_attn1_to_q.lora_down.weight": lora.down,
        f"{block}_attn1_to_q.lora_up.weight": lora.up,
        f"{block}_attn1_to_q.dora_scale": m,
        f"{block}_norm1.w_norm": w_norm,
        f"{block}_norm1.b_norm": b_norm,
        "lora_unet_conv_out.diff_b": b,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = merged(networks, load_adapter(tmp_path / "a.safetensors", networks))
    path = "unet/down_blocks.0.attentions.0.transformer_blocks.0"
    torch.testing.assert_close(found[f"{path}.attn1.to_q.weight"].norm(dim=0), m[0])
    torch.testing.assert_close(found[f"{path}.norm1.weight"], 1 + w_norm)
    torch.testing.assert_close(found[f"{path}.norm1.bias"], b_norm)
    torch.testing.assert_close(found["unet/conv_out.bias"], unet.conv_out.bias + b)


def test_a_file_is_known_by_its_hash_and_what_it_says(tmp_path):
    networks = tiny("sdxl")
    random = Adapter("a", adapter(networks, "lora").deltas, metadata={"ss_tag_frequency": "{}"})
    save_adapter(random, tmp_path / "style.safetensors", "kohya", networks, "sdxl")
    found = load_adapter(tmp_path / "style.safetensors", networks)
    assert found.name == "style"
    assert found.sha256 == hashlib.sha256((tmp_path / "style.safetensors").read_bytes()).hexdigest()
    metadata = {name: found.metadata[name] for name in found.metadata if name.startswith("ss_")}
    assert metadata == {
        "ss_tag_frequency": "{}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "1",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_that_rounds_is_kept_in_float32(dtype, tmp_path):
    """alpha / rank is multiplied into B for diffusers: exactly in half precision, or not in half precision."""
    networks = tiny("sd1")
    for alpha, kept in ((4.0, dtype), (0.3, torch.float32)):
        random = Adapter(
            "a",
            {
                target: ModuleDelta(LoRA(d.factors.down.to(dtype), d.factors.up.to(dtype)), alpha)
                for target, d in adapter(networks, "lora, no alpha").deltas.items()
            },
        )
        save_adapter(random, tmp_path / f"{alpha}", "diffusers", networks)
        assert {a.dtype for n, a in load_file(tmp_path / f"{alpha}").items() if "lora_B" in n} == {kept}
        close(merged(networks, load_adapter(tmp_path / f"{alpha}", networks)), merged(networks, random))


@pytest.mark.parametrize("kind", ["loha", "lokr", "full"])
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_what_a_format_cannot_hold_is_refused_and_nothing_written(kind, to, tmp_path):
    networks = tiny("sd1")
    with pytest.raises(ValueError, match=r"^unet/\S+: \w+ has no key in"):
        save_adapter(adapter(networks, kind), tmp_path / "a", to, networks)
    mixed = adapter(networks, "dora", ("to_q",)).deltas | adapter(networks, "lora", ("to_k",)).deltas
    with pytest.raises(ValueError, match="cannot mix DoRA and LoRA modules"):
        save_adapter(Adapter("a", mixed), tmp_path / "a", to, networks)
    assert not list(tmp_path.iterdir())


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
A, B, K = f"{Q}.lora_down.weight", f"{Q}.lora_up.weight", Q.replace("attn1_to_q", "attn2_to_k")
GOOD = {A: torch.ones(2, 16), B: torch.ones(16, 2), f"{Q}.alpha": torch.tensor(1.0)}
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
BARE = "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_{}.weight"
FAULTS = {  # the family of the model, the tensors, the metadata, the error
    "nothing": ("sd1", {}, {"format": "pt"}, "not an adapter"),
    "a checkpoint": ("sd1", {"model.diffusion_model.out.2.bias": torch.ones(4)}, {}, "not an adapter"),
    "no down": ("sd1", {B: GOOD[B]}, {}, r"attn1\.to_q lacks lora_down\.weight"),
    "no up": ("sd1", {A: GOOD[A]}, {}, r"attn1\.to_q lacks lora_up\.weight"),
    "half of LoHa": ("sd1", {f"{Q}.hada_w1_a": torch.ones(16, 2)}, {}, "lacks hada_w1_b and hada_w2_a and hada_w2_b"),
    "half of LoKr": (
        "sd1",
        {f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.lokr_w2_a": torch.ones(4, 2)},
        {},
        "to_q lacks lokr_w2_b",
    ),
    "alpha alone": ("sd1", {f"{Q}.alpha": torch.tensor(1.0)}, {}, "has no factors"),
    "two kinds": ("sd1", GOOD | {f"{Q}.diff": torch.ones(16, 16)}, {}, "is given as Full and LoRA"),
    "twice": (
        "sd1",
        GOOD | {f"{Q}.lora_A.weight": torch.ones(2, 16)},
        {},
        "are the same tensor",
    ),
    "unknown end": ("sd1", GOOD | {f"{Q}.lora_sideways": torch.ones(1)}, {}, "unknown lora_unet_.*lora_sideways"),
    "unknown module": (
        "sd1",
        GOOD | {n.replace("attn1_to_q", "attn7_to_q"): a.clone() for n, a in GOOD.items()},
        {},
        "no module for lora_unet_.*attn7_to_q.*, no module for .*, no module for ",
    ),
    "many": ("sd1", GOOD | {f"odd{k}": torch.ones(1) for k in range(9)}, {}, "unknown odd0, .*unknown odd2 and 6 more"),
    "width": ("sd1", GOOD | {A: torch.ones(2, 17)}, {}, r"factors of shape \[2, 17\] and \[16, 2\], .* \[16, 16\]"),
    "ranks": ("sd1", GOOD | {A: torch.ones(3, 16)}, {}, r"to_q has factors of shape"),
    "OFT's blocks": ("sd1", {f"{Q}.oft_blocks": torch.ones(2, 3, 3)}, {}, r"has factors of shape \[2, 3, 3\]"),
    "BOFT's blocks": ("sd1", {f"{Q}.oft_blocks": torch.ones(3, 2, 6, 6)}, {}, r"shape \[3, 2, 6, 6\]"),
    "OFT and LoRA": ("sd1", GOOD | {f"{Q}.oft_blocks": torch.ones(2, 8, 8)}, {}, "is given as LoRA and OFT"),
    "OFT of peft": (
        "sd1",
        {f"base_model.model.{PATH}.oft_R.weight": torch.ones(4, 5)},
        {},
        r"oft_R of shape \[4, 5\], expected \[k, n \(n - 1\) / 2\]",
    ),
    "BOFT of peft": (
        "sd1",
        {f"base_model.model.{PATH}.boft_R": torch.ones(2, 3), f"base_model.model.{PATH}.boft_s": torch.ones(16, 1)},
        {},
        r"to_q has tensors of shape \[2, 3\] and \[16, 1\], which are no BOFT",
    ),
    "R of one dimension": ("sd1", {f"{Q}.oft_diag": torch.ones(4)}, {}, r"shape \[4\], which are no OFT"),
    "GLoRA of one dimension": (
        "sd1",
        {f"{Q}.{name}.weight": torch.ones(4) for name in ("a1", "a2", "b1", "b2")},
        {},
        "which are no GLoRA",
    ),
    "IA3's size": (
        "sd1",
        {f"{Q}.weight": torch.ones(7), f"{Q}.on_input": torch.tensor(1)},
        {},
        r"has factors of shape \[7\]",
    ),
    "a weight without on_input": ("sd1", GOOD | {f"{Q}.weight": torch.ones(16)}, {}, "unknown lora_unet_.*weight"),
    "half of GLoRA": ("sd1", {f"{Q}.a1.weight": torch.ones(16, 2)}, {}, "lacks a2.weight and b1.weight and b2.weight"),
    "a scalar of OFT": (
        "sd1",
        {f"{Q}.oft_blocks": torch.ones(2, 8, 8), f"{Q}.scalar": torch.tensor(1.0)},
        {},
        "has a scalar, which OFT does not take",
    ),
    "T-LoRA": (
        "sd1",
        {f"{Q}.lambda_layer": torch.ones(1, 2)},
        {},
        "an adapter of kind T-LoRA, which is not supported",
    ),
    "alpha's shape": ("sd1", GOOD | {f"{Q}.alpha": torch.ones(2)}, {}, r"alpha has shape \[2\], expected one number"),
    "NaN": ("sd1", GOOD | {B: torch.full((16, 2), float("nan"))}, {}, "lora_up.weight is not finite"),
    "infinite alpha": ("sd1", GOOD | {f"{Q}.alpha": torch.tensor(float("inf"))}, {}, "alpha is not finite"),
    "integers": ("sd1", GOOD | {B: torch.ones(16, 2, dtype=torch.int8)}, {}, "dtype torch.int8, expected floating"),
    "dora": ("sd1", GOOD | {f"{Q}.dora_scale": torch.ones(7, 1)}, {}, r"dora_scale of shape \[7, 1\]"),
    "bias": ("sd1", GOOD | {f"{Q}.diff_b": torch.ones(16)}, {}, r"a bias of shape \[16\], expected none"),
    "an XL file, by its width": (
        "sd1",
        {f"{K}.lora_down.weight": torch.ones(2, 2048), f"{K}.lora_up.weight": torch.ones(16, 2)},
        {},
        "made for SDXL: this model is SD 1.x$",
    ),
    "an XL file, by its names": (
        "sd1",
        {"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)},
        {},
        "made for SDXL: this model is SD 1.x$",
    ),
    "an SD 2 file, by its metadata": (
        "sd1",
        {f"{Q}_x.alpha": torch.ones(1)},
        {"ss_base_model_version": "sd_v2"},
        "made for SD 2.x: this model is SD 1.x$",
    ),
    "an SD 1 file in XL": (
        "sdxl",
        {f"{K}.lora_down.weight": torch.ones(2, 768), f"{K}.lora_up.weight": torch.ones(16, 2)},
        {},
        "made for SD 1.x: this model is SDXL$",
    ),
    "an XL file, by its depth": (
        "sd1",
        {"lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q.oft_blocks": torch.ones(4, 8, 8)},
        {},
        "made for SDXL: this model is SD 1.x$",
    ),
    "a file for a model of our own": (
        "sd1",
        {f"{K}.lora_down.weight": torch.ones(2, 256), f"{K}.lora_up.weight": torch.ones(16, 2)},
        {},
        "made for a model whose text is 256 wide: this model is SD 1.x$",
    ),
    "a whole difference for another family": (
        "sd1",
        {f"{K}.diff": torch.ones(16, 1024)},
        {},
        "made for SD 2.x: this model is SD 1.x$",
    ),
    "a file for another architecture": (
        "sd1",
        {f"{Q}_x.alpha": torch.ones(1)},
        {"modelspec.architecture": "lumina-2/lora"},
        "made for lumina-2/lora: this model is SD 1.x$",
    ),
    "an unknown word for the architecture": (
        "sd1",
        {f"{Q}_x.alpha": torch.ones(1)},
        {"ss_base_model_version": "my model"},
        "no module for",
    ),
    "Flux": (
        "sd1",
        {"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.ones(1)},
        {},
        r"made for a transformer \(SD 3, Flux, ...\), which is not supported",
    ),
    "either text encoder": (
        "sdxl",
        {BARE.format("A"): torch.ones(2, 16), BARE.format("B"): torch.ones(24, 2)},
        {},
        "fit text_encoder and text_encoder_2",
    ),
    "header": ("sd1", GOOD, {"lora_adapter_metadata": "[1]"}, "lora_adapter_metadata of its header: not a JSON object"),
    "header of brackets": (
        "sd1",
        GOOD,
        {"lora_adapter_metadata": "[" * 100_000},
        "lora_adapter_metadata of its header",
    ),
    "header's JSON": ("sd1", GOOD, {"lora_adapter_metadata": "{"}, "Expecting property name"),
    "header's alpha": (
        "sd1",
        {A: GOOD[A], B: GOOD[B]},
        {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": "much"})},
        "lora_alpha 'much': must be a positive number",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_in_one_line_with_its_file(fault, tmp_path):
    family, tensors, metadata, match = FAULTS[fault]
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(ValueError, match=match) as error:
        load_adapter(tmp_path / "bad.safetensors", tiny(family), family)
    assert str(error.value).startswith(f"{tmp_path / 'bad.safetensors'}: ") and "\n" not in str(error.value)


def test_the_good_file_of_the_faults_is_good(tmp_path):
    save_file(GOOD, tmp_path / "good.safetensors")
    assert len(load_adapter(tmp_path / "good.safetensors", tiny("sd1"), "sd1").deltas) == 1


def test_what_is_no_file_of_tensors_is_refused(tmp_path):
    networks = tiny("sd1")
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"a\.safetensors: a pickle"):
        load_adapter(tmp_path / "a.safetensors", networks)
    with pytest.raises(ValueError, match=r"none\.safetensors: No such file"):
        load_adapter(tmp_path / "none.safetensors", networks)
    with pytest.raises(ValueError, match="no adapter in this folder"):
        load_adapter(tmp_path, networks)
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        save_file(GOOD, tmp_path / name)
    with pytest.raises(ValueError, match="more than one adapter"):
        load_adapter(tmp_path, networks)


def test_the_family_is_told_by_the_file_or_asked_for(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file(GOOD, source)
    with pytest.raises(ValueError, match="does not say which base model it is for: choose a family from sd1, "):
        convert_adapter(source, tmp_path / "b", "peft")
    for line, width in (("sd1", 768), ("sd2-base", 1024), ("sdxl", 2048)):
        save_file({f"{K}.lora_down.weight": torch.ones(2, width)}, source)
        assert detect_adapter_family(source) == line and line in FAMILIES
    save_file(GOOD, source, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    assert detect_adapter_family(source) == "sdxl"
    save_file(GOOD, source)
    with pytest.raises(ValueError, match="b: exists already"):
        (tmp_path / "b").touch()
        convert_adapter(source, tmp_path / "b", "kohya", "sd1")
    with pytest.raises(ValueError, match="LoRA format 'a1111': choose from kohya, diffusers, peft"):
        save_adapter(Adapter("a", {}), tmp_path / "c", "a1111", {})
    with pytest.raises(ValueError, match="family 'sd9': choose from sd1"):
        convert_adapter(source, tmp_path / "c", "kohya", "sd9")


SGM = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
SPELLINGS = {  # of the same LoRA of one module
    "LyCORIS' own prefix": ("lycoris_" + PATH.replace(".", "_"), "lora_down.weight", "lora_up.weight"),
    "ComfyUI": (f"diffusion_model.{SGM}", "lora_up.weight", "lora_down.weight"),
    "ComfyUI, peft's ends": (f"diffusion_model.{SGM}", "lora_B.weight", "lora_A.weight"),
    "an adapter's name": (f"unet.{PATH}", "lora_A.my-style_2.weight", "lora_B.my-style_2.weight"),
    "a name in peft": (f"base_model.model.{PATH}", "lora_A.weight2.weight", "lora_B.weight2.weight"),
    "old diffusers": (f"unet.{PATH}", "lora.down.weight", "lora.up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_module_is_found_under_every_tool_s_name(spelling, tmp_path):
    module, *ends = SPELLINGS[spelling]
    save_file(
        {f"{module}.{end}": GOOD[A if "down" in end or "_A" in end else B] for end in ends}, tmp_path / "a.safetensors"
    )
    save_file({A: GOOD[A], B: GOOD[B]}, tmp_path / "b.safetensors")
    networks = tiny("sd1")
    found, expected = (load_adapter(tmp_path / name, networks).deltas for name in ("a.safetensors", "b.safetensors"))
    assert list(found) == list(expected) == [f"unet/{PATH}"]
    w = networks["unet"].get_submodule(PATH).weight
    assert torch.equal(found[f"unet/{PATH}"].delta_weight(w), expected[f"unet/{PATH}"].delta_weight(w))


def test_text_encoders_are_found_under_comfyui_s_names(tmp_path):
    layer, ends = "text_model.encoder.layers.0.mlp.fc1", {"lora_down.weight": (2, 16), "lora_up.weight": (24, 2)}
    for prefix, component in (
        ("text_encoders.clip_l.transformer.", "text_encoder"),
        ("text_encoders.clip_g.transformer.", "text_encoder_2"),
        ("text_encoders.clip_g.", "text_encoder_2"),
    ):
        save_file(
            {f"{prefix}{layer}.{end}": torch.ones(shape) for end, shape in ends.items()}, tmp_path / "a.safetensors"
        )
        (target,) = load_adapter(tmp_path / "a.safetensors", tiny("sdxl"), "sdxl").deltas
        assert target.startswith(f"{component}/")


def test_a_scalar_scales_and_a_bias_of_up_is_a_bias(tmp_path):
    networks = tiny("sd1")
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    down, up, bias = torch.ones(2, 16, 1, 1), torch.ones(16, 2, 1, 1), torch.arange(16.0)
    own = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.lora_up.bias": bias}
    save_file(
        own | {f"{name}.alpha": torch.tensor(1.0), f"{name}.scalar": torch.tensor(3.0)}, tmp_path / "a.safetensors"
    )
    (delta,) = load_adapter(tmp_path / "a.safetensors", networks).deltas.values()
    w = networks["unet"].down_blocks[0].attentions[0].proj_in.weight
    torch.testing.assert_close(delta.delta_weight(w), torch.full_like(w, 3.0))  # alpha / rank * 2 * scalar
    torch.testing.assert_close(delta.bias, bias / 2)


@pytest.mark.parametrize(
    "family, others, match",
    [
        ("sd1", {Q.replace("to_q", "to_k") + ".lora_down.weight": torch.ones(0, 16)}, "1 modules have rank 0"),
        (
            "sdxl",
            {"lora_te1_text_projection.lora_down.weight": torch.ones(2, 16)},
            "1 tensors not used.*text_projection",
        ),
    ],
)
def test_what_changes_nothing_is_counted(family, others, match, tmp_path):
    up = {n.replace("lora_down", "lora_up"): a.T.contiguous() for n, a in others.items() if "rank 0" in match}
    good = (
        GOOD
        if family == "sd1"
        else {
            f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{end}": torch.ones(shape)
            for end, shape in {"lora_down.weight": (2, 16), "lora_up.weight": (24, 2)}.items()
        }
    )
    save_file(good | others | up, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=match):
        assert len(load_adapter(tmp_path / "a.safetensors", tiny(family), family).deltas) == 1


def test_embeddings_in_the_file_of_a_lora_are_no_fault(tmp_path):
    save_file(GOOD | {"bundle_emb.zorb.clip_l": torch.ones(2, 16)}, tmp_path / "a.safetensors")
    assert len(load_adapter(tmp_path / "a.safetensors", tiny("sd1"), "sd1").deltas) == 1


def test_equal_adapters_are_equal_bytes(tmp_path):
    """safetensors' own writer has its metadata in a random order."""
    networks = tiny("sd1")
    target = next(f"unet/{name}" for name, m in networks["unet"].named_modules() if name.endswith("attn1.to_q"))
    width = networks["unet"].get_submodule(target.removeprefix("unet/")).in_features
    delta = ModuleDelta(LoRA(torch.ones(2, width), torch.ones(width, 2)), 2.0)
    notes = {f"ss_note_{k}": str(k) for k in range(12)}
    for k in range(4):
        save_adapter(Adapter("a", {target: delta}, metadata=notes), tmp_path / f"{k}.safetensors", "kohya", networks)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
