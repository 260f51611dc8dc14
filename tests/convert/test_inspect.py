"""`ldm inspect` accounts for every tensor, says what it knows and why, and knows nothing that it was not told."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.formats import PICTO_PATH
from ldm.checkpoints.keys import build_meta_state_dicts, convert_to_original
from ldm.convert.inspect import format_report, inspect_model

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def write(monkeypatch, tmp_path):
    """A single file of a family, narrow, with other tensors beside its own."""

    def build(name, others, lacking=(), **metadata):
        family = FAMILIES[name]
        unet = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "attention_head_dim": 2}
        vae = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}
        towers = {folder: replace(tower, config=tower.config | SIZES) for folder, tower in family.text_encoders.items()}
        for twin in {name, "sd2-v" if name == "sd2-base" else name}:
            fields = FAMILIES[twin].unet | unet | {"cross_attention_dim": 16}
            monkeypatch.setitem(
                FAMILIES, twin, replace(FAMILIES[twin], unet=fields, vae=vae | family.vae | vae, text_encoders=towers)
            )
        shapes = build_meta_state_dicts(FAMILIES[name])
        zeros = {folder: {n: torch.zeros(a.shape) for n, a in tensors.items()} for folder, tensors in shapes.items()}
        tensors = {
            n: a.clone()
            for n, a in convert_to_original(zeros, FAMILIES[name]).items()
            if not n.startswith(tuple(lacking))
        }
        save_file(tensors | others, tmp_path / "model.safetensors", metadata)
        return tmp_path / "model.safetensors"

    return build


@pytest.fixture(scope="module")
def picto():
    return inspect_model(PICTO_PATH)


def test_a_folder_is_measured_and_counted(picto):
    assert (picto["prediction"], picto["zero_snr"], picto["family"]) == ("v", False, None)
    assert any(line.startswith("prediction v: measured") for line in picto["evidence"])
    for folder, file in zip(picto["components"], picto["files"], strict=True):
        tensors = load_file(PICTO_PATH / file)
        part = picto["components"][folder]
        assert part["tensors"] == len(tensors) == part["dtypes"]["float16"]
        assert part["parameters"] == sum(a.numel() for a in tensors.values()) == part["bytes"] // 2
        assert picto["sha256"][file] == hashlib.sha256((PICTO_PATH / file).read_bytes()).hexdigest()
    assert picto["defaults"]["num_inference_steps"] == 30 and picto["classes"]["vae"] == "AutoencoderKL"


def test_a_folder_that_says_the_wrong_thing_is_found_out(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(PICTO_PATH, folder, copy_function=lambda src, dst: (folder / dst).symlink_to(src))
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"prediction_type": "epsilon"}
    path.unlink()
    path.write_text(json.dumps(config))
    found = inspect_model(folder)
    assert found["prediction"] == "eps"
    assert "measured" in found["evidence"][-1] and found["evidence"][-1].endswith("contrary to the configuration")


OTHERS = {
    "betas": torch.zeros(3),
    "model_ema.decay": torch.zeros(()),
    "model_ema.num_updates": torch.zeros((), dtype=torch.int32),
    "cond_stage_model.model.logit_scale": torch.zeros(()),
    "cond_stage_model.model.what.is.this": torch.zeros(2),
}


def test_every_tensor_of_a_single_file_is_accounted_for(write):
    path = write("sd2-base", OTHERS, ["first_stage_model.", "model.diffusion_model.out.2.bias"])
    found = inspect_model(path, probe=False)
    assert list(found["components"]) == ["unet", "text_encoder"]  # in this order, as in a folder
    assert found["ema"] and sorted(found["ignored"].values()) == [1, 1, 2]
    assert found["unknown"] == ["cond_stage_model.model.what.is.this"]
    assert found["missing"] == ["vae", "model.diffusion_model.out.2.bias"]
    assert found["faults"] and found["faults"][0].startswith("missing model.diffusion_model.out.2.bias, ")
    known = sum(part["tensors"] for part in found["components"].values()) + sum(found["ignored"].values())
    assert known + len(found["unknown"]) == len(load_file(path))
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_tensor_of_another_shape_is_a_fault(write):
    bias = "model.diffusion_model.out.2.bias"
    found = inspect_model(write("sd1", {bias: torch.zeros(5)}), probe=False)
    assert found["faults"] == [f"{bias} has shape [5], expected [4]"]
    assert inspect_model(write("sd1", {}), probe=False)["faults"] == []


def test_what_nothing_states_is_not_known(write):
    found = inspect_model(write("sd2-base", {}), probe=False)
    assert found["prediction"] is None and found["family"] == "sd2-base or sd2-v"
    assert "prediction     not known" in format_report(found)


def test_what_the_header_states_is_known_without_a_probe(write):
    found = inspect_model(write("sd2-base", {}, **{"modelspec.prediction_type": "v"}), probe=False)
    assert (found["family"], found["prediction"]) == ("sd2-v", "v")
    assert "prediction v: modelspec.prediction_type = v" in found["evidence"]


def test_a_unet_that_predicts_nothing_leaves_the_prediction_unknown(write):
    found = inspect_model(write("sd1", {}))
    assert found["prediction"] is None
    assert found["evidence"][-1].startswith("prediction not measured: cannot tell what the U-Net predicts")


def test_a_contradiction_names_the_file(write):
    path = write("sd1", {"v_pred": torch.zeros(0)}, **{"modelspec.prediction_type": "epsilon"})
    with pytest.raises(ValueError, match=r"model\.safetensors: marker tensor v_pred says v, but"):
        inspect_model(path, probe=False)


def test_a_lora_is_described(tmp_path):
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {
        f"{module}.lora_down.weight": torch.zeros(4, 768),
        f"{module}.lora_up.weight": torch.zeros(320, 4),
        f"{text}.lora_down.weight": torch.zeros(8, 768),
        f"{text}.lora_up.weight": torch.zeros(3072, 8),
        "left.over": torch.zeros(1),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = inspect_model(tmp_path / "a.safetensors")
    assert found["kind"] == "a LoRA file: --lora" and found["dialect"] == "kohya" and found["family"] == "sd1"
    assert found["rank"] == ["4 (1 modules)", "8 (1 modules)"] and found["kinds"] == ["LoRA"]
    assert found["targets"] == {"text_encoder": 1, "unet": 1} and found["unknown"] == ["left.over"]


@pytest.mark.parametrize(
    "name, shape, kind",
    [("emb_params", (2, 768), "an embedding"), ("decoder.conv_in.weight", (8, 4, 3, 3), "a VAE: --vae")],
)
def test_another_file_is_described_by_its_kind(tmp_path, name, shape, kind):
    save_file({name: torch.zeros(shape)}, tmp_path / "a.safetensors")
    found = inspect_model(tmp_path / "a.safetensors")
    assert found["kind"].startswith(kind) and found["content"]["parameters"] == torch.Size(shape).numel()


def test_a_broken_file_is_one_clear_error(tmp_path):
    (tmp_path / "a.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"a\.safetensors: not a whole safetensors file"):
        inspect_model(tmp_path / "a.safetensors")


def test_the_table_leaves_nothing_out(picto):
    lines = format_report(picto)
    assert json.loads(json.dumps(picto)) == picto
    for word in [*picto["evidence"], *picto["components"], *picto["files"], *picto["sha256"].values(), "19,306,884"]:
        assert word in lines
