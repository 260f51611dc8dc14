"""Adapter files as people have them: each kind is the change that its own tool makes, each name finds its module."""

import json
import random
import re

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from peft import BOFTConfig, IA3Config, OFTConfig, get_peft_model
from peft.tuners.boft import layer as peft_boft
from safetensors.torch import load_file, save_file

from ldm.adapters.lora import AdapterMerger
from ldm.adapters.lora_keys import LORA_KEY_SUFFIXES
from ldm.adapters.lora_loading import build_adaptable_networks, load_adapter
from ldm.adapters.lora_saving import save_adapter
from ldm.adapters.textual_inversion import read_placeholder_tokens
from ldm.convert.inspect import inspect_model
from ldm.nn.text_encoders import build_text_encoder
from ldm.nn.unet import UNet, UNetConfig
from ldm.pipeline.pipeline import Pipeline

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 9,
    "projection_dim": 12,
    "bos_token_id": 38,
    "eos_token_id": 39,
}
BLOCK = "down_blocks.0.attentions.0"
ATTENTION = f"{BLOCK}.transformer_blocks.0.attn1"
LAYERS = (  # a linear layer with and without a bias, a wide one, a 1x1 and a 3x3 convolution, one with a stride
    f"{ATTENTION}.to_q",
    f"{ATTENTION}.to_out.0",
    f"{BLOCK}.transformer_blocks.0.ff.net.2",
    f"{BLOCK}.proj_in",
    "down_blocks.1.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    config = {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 768,
    }
    networks = {"unet": UNet(UNetConfig.from_dict(config)), "text_encoder": build_text_encoder(TEXT)}
    return {name: network.eval().requires_grad_(False) for name, network in networks.items()}


def merged(networks, path, weight=1.0):
    """The U-Net's weights with the adapter in a file, and the adapter."""
    adapters, adapter = AdapterMerger(networks), load_adapter(path, networks, "sd1")
    adapters.load(adapter, weight)
    state = {name: a.clone() for name, a in networks["unet"].state_dict().items()}
    adapters.unload()
    return state, adapter


def assert_close(found, expected):
    for name, a in expected.items():
        torch.testing.assert_close(found[name], a, atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


LYCORIS = {  # the kind that is found, LyCORIS' class, its options, the sizes of random numbers
    "diag-oft": ("OFT", DiagOFTModule, {"lora_dim": 4}, 0.3),
    "diag-oft, constrained and rescaled": (
        "OFT",
        DiagOFTModule,
        {"lora_dim": 8, "constraint": 0.02, "rescaled": True},
        0.3,
    ),
    "diag-oft, within its constraint": ("OFT", DiagOFTModule, {"lora_dim": 4, "constraint": 10}, 0.1),
    "boft": ("BOFT", ButterflyOFTModule, {"lora_dim": 4}, 0.3),
    "boft, constrained and rescaled": (
        "BOFT",
        ButterflyOFTModule,
        {"lora_dim": 8, "constraint": 0.02, "rescaled": True},
        0.3,
    ),
    "ia3 of outputs": ("IA3", IA3Module, {}, 0.3),
    "ia3 of inputs": ("IA3", IA3Module, {"train_on_input": True}, 0.3),
    "glora": ("GLoRA", GLoRAModule, {"lora_dim": 3, "alpha": 2}, 0.2),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_what_lycoris_saves_is_merged_as_it_does(name, networks, tmp_path):
    kind, module_class, options, size = LYCORIS[name]
    unet, tensors, expected = networks["unet"], {}, {}
    for path in LAYERS:
        layer = unet.get_submodule(path)
        module = module_class("a", layer, 1.0, **options)
        for parameter in module.parameters():
            parameter.data += size * torch.randn(parameter.shape)
        own = {name: a.detach().clone() for name, a in module.state_dict().items()}
        tensors |= {f"lycoris_{path.replace('.', '_')}.{name}": a for name, a in own.items()}
        expected[f"{path}.weight"] = module.get_merged_weight()[0].detach()
    save_file(tensors, tmp_path / "a.safetensors")
    found, adapter = merged(networks, tmp_path / "a.safetensors")
    assert_close(found, expected)
    assert all((found[name] - unet.state_dict()[name]).abs().max() > 0.01 for name in expected)
    report = inspect_model(tmp_path / "a.safetensors")
    assert (report["kinds"], report["dialect"], report["unknown"]) == ([kind], "kohya", [])
    save_adapter(adapter, tmp_path / "b.safetensors", "kohya", networks, "sd1")
    assert_close(merged(networks, tmp_path / "b.safetensors")[0], expected)


def butterfly_cuda(blocks):
    """What peft's CUDA extension computes: a block-diagonal matrix for each stage."""
    return [torch.stack([torch.block_diag(*stage) for stage in blocks])]


PEFT = {  # the kind that is found, and peft's configuration
    "oft": ("OFT", OFTConfig(oft_block_size=4, use_cayley_neumann=False)),
    "oft, of a series": ("OFT", OFTConfig(oft_block_size=8)),
    "oft, of a longer series": ("OFT", OFTConfig(oft_block_size=8, num_cayley_neumann_terms=8)),
    "oft, of two terms": ("OFT", OFTConfig(oft_block_size=8, num_cayley_neumann_terms=2)),
    "oft, constrained": ("OFT", OFTConfig(oft_block_size=4, coft=True, eps=0.5)),
    "oft, one block for all": ("OFT", OFTConfig(oft_block_size=4, block_share=True)),
    "oft, by number of blocks": ("OFT", OFTConfig(r=2, oft_block_size=0)),
    "boft": ("BOFT", BOFTConfig(boft_block_size=4)),
    "boft, a butterfly": ("BOFT", BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3)),
    "boft, by number of blocks": ("BOFT", BOFTConfig(boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2)),
    "ia3": ("IA3", IA3Config(feedforward_modules=["ff.net.2", "downsamplers.0.conv"])),
    "ia3, a pattern": ("IA3", IA3Config(feedforward_modules=r".*\.(to_q|proj_in|to_out\.0)")),
}


@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("adapter_name", ["default", "my-style"])
def test_what_peft_saves_is_merged_as_it_does(name, adapter_name, networks, tmp_path, monkeypatch):
    stub = type("FBD", (), {"forward": staticmethod(butterfly_cuda)})
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: stub)
    kind, config = PEFT[name]
    config.target_modules = list(LAYERS)
    base = {name: a.clone() for name, a in networks["unet"].state_dict().items()}
    model = get_peft_model(networks["unet"], config)
    for part, a in model.named_parameters():
        if any(mark in part for mark in ("oft_", "ia3_")):
            a.data = a.data + 0.3 * torch.randn(a.shape)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    expected = {name: a.clone() for name, a in model.merge_and_unload().state_dict().items()}
    if adapter_name != "default":  # as other tools save peft's layers, with the adapter's name in the keys
        ends = ("oft_R", "boft_R", "boft_s", "ia3_l")
        renamed = {
            next((n.replace(f".{end}", f".{end}.{adapter_name}") for end in ends if f".{end}" in n), n): a
            for n, a in load_file(file).items()
        }
        save_file(renamed, file)
    networks["unet"].load_state_dict(base)
    found, adapter = merged(networks, tmp_path)
    assert_close(found, expected)
    with pytest.raises(ValueError, match=f"an? .*{kind}.* of peft .*has no key in kohya's format"):
        save_adapter(adapter, tmp_path / "b.safetensors", "kohya", networks)
    assert sum((found[n] - base[n]).abs().max() > 0.01 for n in expected) >= len(LAYERS)
    report = inspect_model(tmp_path)
    assert (report["kinds"], report["dialect"], report["unknown"]) == ([kind], "peft", [])


def test_the_files_of_kohya_and_of_old_lycoris_are_the_same_rotation(networks, tmp_path):
    """kohya's prefix, and R itself under `oft_diag`, as LyCORIS 2.0 stored it without a constraint."""
    path = f"{ATTENTION}.to_q"
    module = DiagOFTModule("a", networks["unet"].get_submodule(path), 1.0, lora_dim=4, constraint=1e-2)
    module.oft_blocks.data = torch.randn(module.oft_blocks.shape)
    expected = {f"{path}.weight": module.get_merged_weight()[0].detach()}
    stem, own = path.replace(".", "_"), {name: a.detach() for name, a in module.state_dict().items()}
    for tensors in (
        {f"oft_unet_{stem}.{name}": a for name, a in own.items()},
        {f"lora_unet_{stem}.oft_diag": module.get_r().detach()},
        {f"diffusion_model.input_blocks.1.1.{path.split('.', 4)[4]}.{name}": a for name, a in own.items()},
    ):
        save_file(tensors, tmp_path / "a.safetensors")
        found, adapter = merged(networks, tmp_path / "a.safetensors")
        assert_close(found, expected)
        save_adapter(adapter, tmp_path / "b.safetensors", "kohya", networks)
        assert_close(merged(networks, tmp_path / "b.safetensors")[0], expected)


def test_old_glora_names_its_factors_the_other_way_round(networks, tmp_path):
    path = f"{ATTENTION}.to_q"
    module = GLoRAModule("a", networks["unet"].get_submodule(path), 1.0, lora_dim=3, alpha=2)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape)
    expected = {f"{path}.weight": module.get_merged_weight()[0].detach()}
    old = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    tensors = {f"lora_unet_{path.replace('.', '_')}.{old[n]}.weight": getattr(module, n).weight.detach() for n in old}
    tensors |= {f"lora_unet_{path.replace('.', '_')}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert_close(merged(networks, tmp_path / "a.safetensors")[0], expected)


UNET_BLOCK = "unet/down_blocks.1.attentions.0.transformer_blocks.0"
CLIP_L, CLIP_G = "text_encoder/text_model.encoder.layers.0", "text_encoder_2/text_model.encoder.layers.0"
NAMES = {  # by family: the names of B and A of one module as a tool writes them, and the module
    "sd1": {
        "lycoris_down_blocks_1_attentions_0_proj_in.lora_{up|down}.weight": "unet/down_blocks.1.attentions.0.proj_in",
        "lora_unet_mid_block_attentions_0_proj_in.lora_{up|down}.weight": "unet/mid_block.attentions.0.proj_in",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_{up|down}.weight": (
            f"{UNET_BLOCK}.attn1.to_q"
        ),
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.lora_{B|A}.default_0.weight": (
            f"{UNET_BLOCK}.attn1.to_k"
        ),
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_v_lora.{up|down}.weight": (
            f"{UNET_BLOCK}.attn1.to_v"
        ),
        "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_{B|A}.x-y.weight": (
            f"{UNET_BLOCK}.attn1.to_out.0"
        ),
        "unet.up_blocks.1.resnets.0.time_emb_proj.lora.{up|down}.weight": "unet/up_blocks.1.resnets.0.time_emb_proj",
        "diffusion_model.time_embed.0.lora_{B|A}.weight": "unet/time_embedding.linear_1",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{up|down}.weight": f"{CLIP_L}.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc2.lora_{up|down}.weight": (
            f"{CLIP_L}.mlp.fc2"
        ),
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.{up|down}.weight": (
            f"{CLIP_L}.self_attn.k_proj"
        ),
    },
    "sdxl": {
        "lycoris_down_blocks_1_attentions_0_proj_in.lora_{up|down}.weight": "unet/down_blocks.1.attentions.0.proj_in",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_{up|down}.weight": (
            "unet/down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
        ),
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k.lora_{up|down}.weight": (
            f"{UNET_BLOCK}.attn1.to_k"
        ),
        "diffusion_model.label_emb.0.2.lora_{up|down}.weight": "unet/add_embedding.linear_2",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{up|down}.weight": f"{CLIP_L}.mlp.fc1",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{up|down}.weight": f"{CLIP_G}.mlp.fc1",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc2.lora_{up|down}.weight": (
            f"{CLIP_G}.mlp.fc2"
        ),
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_{B|A}.weight": f"{CLIP_G}.self_attn.q_proj",
        "lora_te2_text_projection.lora_{up|down}.weight": "text_encoder_2/text_projection",
    },
}


@pytest.mark.parametrize("family", NAMES)
def test_every_tool_s_name_is_a_module_of_the_full_size_model(family, tmp_path):
    networks, tensors = build_adaptable_networks(family), {}
    for name, target in NAMES[family].items():
        component, path = target.split("/")
        weight = networks[component].get_submodule(path).weight
        start, up, down, end = re.split("[{|}]", name)
        tensors[start + down + end] = torch.ones(1, *weight.shape[1:])
        tensors[start + up + end] = torch.ones(len(weight), 1, *(weight.ndim - 2) * [1])
    save_file(tensors, tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors", networks, family).deltas.keys() == set(NAMES[family].values())
    report = inspect_model(tmp_path / "a.safetensors")
    assert (report["kinds"], report["unknown"]) == (["LoRA"], [])


@pytest.mark.parametrize("prefix", ["lycoris_", "base_model.model."])
def test_a_text_encoder_alone_is_known_by_its_modules(prefix, networks, tmp_path):
    name = "text_model.encoder.layers.0.mlp.fc1"
    name = prefix + (name.replace(".", "_") if "_" in prefix[-1] else name)
    ends = ("lora_down", "lora_up") if prefix == "lycoris_" else ("lora_A", "lora_B")
    tensors = {f"{name}.{ends[0]}.weight": torch.ones(1, 16), f"{name}.{ends[1]}.weight": torch.ones(24, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert [*load_adapter(tmp_path / "a.safetensors", networks, "sd1").deltas] == [
        "text_encoder/text_model.encoder.layers.0.mlp.fc1"
    ]


def test_two_adapters_of_one_stem_have_the_names_of_their_folders(tiny, tmp_path):
    pipe = Pipeline.from_pretrained(tiny, device="cpu", dtype="float32")
    path = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for k, folder in enumerate("abc"):
        (tmp_path / folder).mkdir()
        down, up = torch.full((1, 32), k + 1.0), torch.ones(32, 1)
        file = tmp_path / folder / "style.safetensors"
        save_file({f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up}, file)
        pipe.load_lora_weights(file)
    assert [*pipe.adapters.loaded] == ["style", "b/style", "c/style"]
    with pytest.raises(ValueError, match="adapter 'style': an adapter of that name is loaded already: give NAME=FILE"):
        pipe.load_lora_weights(tmp_path / "a" / "style.safetensors")


def test_numbered_modules_of_lora_diffusion_are_those_of_diffusers_in_2023(networks, tmp_path):
    """cloneofsimo's files have no names; the order is that of a real one's shapes, embeddings lie beside."""
    unet, tensors = networks["unet"], {"<s1>": torch.ones(16), "<s2>": torch.ones(16)}
    blocks = (
        "down_blocks.0.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
        "mid_block.attentions.0",
    )
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [*(f"attn1.{x}" for x in attention), "ff.net.0.proj", *(f"attn2.{x}" for x in attention)]
    paths = [f"{block}.transformer_blocks.0.{layer}" for block in blocks for layer in layers]
    expected = {}
    for k, path in enumerate(paths):
        w = unet.get_submodule(path).weight
        down, up = torch.randn(2, w.shape[1]), torch.randn(len(w), 2)
        tensors |= {f"unet:{k}:down": down, f"unet:{k}:up": up}
        expected[f"{path}.weight"] = w + up @ down
    for k in range(4):
        tensors |= {f"text_encoder:{k}:down": torch.ones(1, 16), f"text_encoder:{k}:up": torch.ones(16, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    found, adapter = merged(networks, tmp_path / "a.safetensors")
    assert_close(found, expected)
    assert sum(target.startswith("text_encoder/") for target in adapter.deltas) == 4
    report = inspect_model(tmp_path / "a.safetensors")
    assert (report["kind"], report["dialect"], report["family"]) == ("a LoRA file: --lora", "lora_diffusion", "sd1")
    assert report["unknown"] == []
    assert report["embeddings"] == ["<s1>", "<s2>"] == [*read_placeholder_tokens(tmp_path / "a.safetensors")]
    save_file({name: a for name, a in tensors.items() if not name.startswith("unet:3:")}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="numbers 35 modules of the unet, expected 36"):
        load_adapter(tmp_path / "b.safetensors", networks, "sd1")


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"feedforward_modules": "("}, "feedforward_modules '\\(': missing"),
        ({"feedforward_modules": [5]}, r"feedforward_modules \[5\]: "),
        ({"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms 1000000000: must be at most 100"),
        ({"coft": True, "eps": -1}, "eps -1: must be a positive number"),
    ],
)
def test_settings_of_peft_that_mean_nothing_are_named(settings, match, networks, tmp_path):
    name = f"base_model.model.{ATTENTION}.to_q"
    tensors = {f"{name}.oft_R.weight": torch.ones(4, 6)}
    if "feedforward_modules" in settings:
        tensors = {f"base_model.model.{BLOCK}.proj_in.ia3_l": torch.ones(1, 16, 1, 1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=match):
        load_adapter(tmp_path, networks, "sd1")


def test_a_lora_of_unknown_names_is_said_to_be_one(networks, tmp_path):
    name = "lora_unet_unet_down_blocks_0_attentions_0_proj_in_lora_down.weight"
    save_file({name: torch.ones(2, 16)}, tmp_path / "a.safetensors")
    assert inspect_model(tmp_path / "a.safetensors")["kind"] == f"a LoRA whose names are no known tool's, as {name}"
    with pytest.raises(ValueError, match="not an adapter: no tensor has a LoRA key"):
        load_adapter(tmp_path / "a.safetensors", networks, "sd1")


@pytest.mark.parametrize(
    "name",
    [  # of Flux, SD 3, Qwen, Wan, Anima, Z-Image
        "transformer.single_transformer_blocks.1.attn.to_q.lora_A.weight",
        "lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight",
        "transformer_blocks.1.attn.add_k_proj.lora_A.weight",
        "lora_unet_transformer_blocks_1_attn_to_k.lokr_w1",
        "diffusion_model.blocks.0.cross_attn.k_proj.lora_A.weight",
        "lora_unet_blocks_0_attn_gate.lora_down.weight",
        "diffusion_model.layers.0.attention.to_q.lora_A.weight",
    ],
)
def test_an_adapter_of_a_transformer_is_said_to_be_one(name, networks, tmp_path):
    save_file({name: torch.ones(2, 16)}, tmp_path / "a.safetensors")
    why = "made for a transformer (SD 3, Flux, ...), which is not supported"
    report = inspect_model(tmp_path / "a.safetensors")
    assert (report["kind"], report["family"]) == (f"a LoRA file, {why}", None)
    with pytest.raises(ValueError, match=re.escape(why)):
        load_adapter(tmp_path / "a.safetensors", networks, "sd1")


@pytest.mark.filterwarnings("ignore:.*rank 0")
def test_tensors_of_any_shape_are_an_adapter_or_one_line(networks, tmp_path):
    """Suffixes of every kind with random shapes and dtypes: no error but the file's own."""
    rng, g = random.Random(0), torch.Generator().manual_seed(0)
    modules = [f"lora_unet_{path.replace('.', '_')}" for path in LAYERS] + ["unet:3"]
    dtypes = torch.float32, torch.float16, torch.int64, torch.bool
    path = tmp_path / "a.safetensors"
    for _ in range(150):
        names = [m + s for m in rng.sample(modules, 2) for s in rng.sample(list(LORA_KEY_SUFFIXES), 2)]
        shapes = [[rng.choice((0, 1, 2, 3, 4, 16)) for _ in range(rng.randint(0, 5))] for _ in names]
        tensors = {n: torch.rand(s, generator=g).to(rng.choice(dtypes)) for n, s in zip(names, shapes, strict=True)}
        save_file(tensors, path)
        inspect_model(path)
        try:
            load_adapter(path, networks, "sd1")
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
