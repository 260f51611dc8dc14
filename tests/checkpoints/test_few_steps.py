"""Distilled models and adapters are told by their names, and have their makers' settings unless others are given."""

import shutil
from pathlib import Path

import pytest
import torch

from ldm.checkpoints.few_steps import few_step_defaults, list_names
from ldm.compat import StableDiffusionPipeline
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request

HUB = Path("/c/hub/models--latent-consistency--lcm-lora-sdv1-5/snapshots/0a/pytorch_lora_weights.safetensors")
ADAPTERS = {  # (sampler, spacing, steps, guidance) by files as they are published
    HUB: ("lcm", "lcm", 4, 1.0),
    Path("/m/lcm-lora-sdxl/pytorch_lora_weights.safetensors"): ("lcm", "lcm", 4, 1.0),
    Path("sdxl_lightning_8step_lora.safetensors"): ("euler", "trailing", 8, 1.0),
    Path("Hyper-SD15-4steps-lora.safetensors"): ("ddim", "trailing", 4, 1.0),
    Path("Hyper-SDXL-1step-lora.safetensors"): ("tcd", "lcm", 1, 1.0),
    Path("Hyper-SDXL-12steps-CFG-lora.safetensors"): ("ddim", "trailing", 12, None),
    Path("TCD-SD15-LoRA.safetensors"): ("tcd", "lcm", 4, 1.0),
    Path("sd_xl_turbo_lora_v1.safetensors"): ("euler_ancestral", "trailing", 4, 1.0),
    Path("dmd2_sdxl_4step_lora.safetensors"): ("lcm", "lcm", 4, 1.0),
}
SUBJECTS = "lightning_bolts_v2", "porsche-911-turbo", "hyperrealism", "hyper detailed", "calcmap", "my_style_20steps"
MODELS = {
    Path("sd_xl_turbo_1.0_fp16.safetensors"): ("euler_ancestral", "trailing", 4, 1.0),
    Path("sdxl_lightning_2step.safetensors"): ("euler", "trailing", 2, 1.0),
    Path("realvisxlV40_v40LightningBakedvae.safetensors"): ("euler", "trailing", 4, 1.0),
    Path("/m/LCM_Dreamshaper_v7"): ("lcm", "lcm", 4, 1.0),
}


@pytest.mark.parametrize("what, files", [("adapter", ADAPTERS), ("model", MODELS)])
def test_published_names_are_known(what, files, capsys):
    for path, expected in files.items():
        found = few_step_defaults(list_names(path), what)
        names = "sampler", "spacing", "num_inference_steps", "guidance_scale"
        assert tuple(found.get(name) for name in names) == expected
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("note: ") and f"sampler {expected[0]}" in line


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_adapter_of_a_subject_is_none(name, capsys):
    assert few_step_defaults([name], "adapter") == {} and capsys.readouterr().err == ""


def test_an_adapter_s_settings_last_while_it_is_active_and_yield_to_the_user_s(tiny):
    pipe = Pipeline.from_pretrained(tiny, device="cpu", dtype="float32")
    before = pipe.resolve(Request("a"))
    name = next(n for n, p in pipe.model.unet.named_parameters() if n.endswith("to_q.weight"))
    rows, columns = pipe.model.unet.get_parameter(name).shape
    key = f"unet.{name.removesuffix('.weight')}"
    tensors = {f"{key}.lora_A.weight": torch.ones(1, columns), f"{key}.lora_B.weight": torch.ones(rows, 1)}
    pipe.load_lora_weights(tensors, adapter_name="sdxl_lightning_4step_lora")
    request = pipe.resolve(Request("a"))
    assert (request.sampler, request.spacing, request.num_inference_steps) == ("euler", "trailing", 4)
    assert request.guidance_scale == 1 and request.final_sigmas_type is None
    request = pipe.resolve(Request("a", sampler="heun", num_inference_steps=9, guidance_scale=2.0))
    assert (request.sampler, request.num_inference_steps, request.guidance_scale) == ("heun", 9, 2.0)
    pipe.set_adapters(["sdxl_lightning_4step_lora"], [0.0])
    assert pipe.resolve(Request("a")) == before
    pipe.set_adapters("sdxl_lightning_4step_lora")
    assert pipe.resolve(Request("a")).num_inference_steps == 4
    pipe.unload_lora_weights()
    assert pipe.resolve(Request("a")) == before
    pipe = StableDiffusionPipeline.from_pretrained(tiny, device="cpu", dtype="float32")
    pipe.load_lora_weights(tensors, adapter_name="sdxl_lightning_4step_lora")
    assert pipe.resolve(Request("a")) == before


def test_a_folder_s_own_scheduler_and_settings_come_before_its_name(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "sd-turbo")

    def defaults(path):
        return Pipeline.from_pretrained(path, device="cpu", dtype="float32").model.generation_defaults

    before = defaults(tiny)
    assert defaults(folder) == before  # of its generation_config.json
    (folder / "generation_config.json").unlink()
    assert defaults(folder) == {**before, "num_inference_steps": 4, "guidance_scale": 1.0}
