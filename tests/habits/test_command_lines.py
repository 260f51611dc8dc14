"""The command lines that users of A1111, kohya's scripts, dgenerate, CompVis' scripts and sd.cpp type most."""

import json

import pytest

from ldm import cli
from ldm.commands.foreign_options import FOREIGN_OPTIONS, translate_words
from ldm.commands.options import OPTION_ALIASES

# The words after `ldm`; what of the image's record they give, or what the error says to write.
WORKS = {
    # A1111: its launcher's options, and the fields of its page, API and prompt files
    "generate 'a cat' --negative_prompt blurry --steps 3 --cfg_scale 7": {
        "negative_prompt": "blurry",
        "num_inference_steps": 3,
        "guidance_scale": 7.0,
    },
    "txt2img 'a cat' --sampler_name 'DPM++ 2M Karras' --steps 3": {"sampler": "dpmpp_2m", "spacing": "karras"},
    "txt2img --prompt 'a cat' --sampler 'Euler a' --scheduler 'SGM Uniform'": {
        "sampler": "euler_ancestral",
        "spacing": "sgm_uniform",
    },
    "txt2img 'a cat' --sampler 'DPM++ 2M SDE' --schedule_type Exponential": {"spacing": "exponential"},
    "txt2img 'a cat' --seed 5 --batch_count 2": {"seed": 5},
    "txt2img 'a cat' --n_iter 2 --batch_size 2": {"seed": 0},
    "txt2img '(a cat:1.2) [dog], BREAK x'": {"prompt": "(a cat:1.2) [dog], BREAK x"},
    "txt2img 'a cat' --clip_skip 2": {"clip_skip": 1},
    "txt2img 'a cat' --enable_hr --hr_scale 1.5 --denoising 0.4 --image photo.png": None,
    "txt2img 'a cat' --hires_upscale 2 --hires_denoising_strength 0.4": {"upscale": 2.0, "upscale_strength": 0.4},
    "img2img 'a cat' --init_image photo.png --denoising_strength 0.5": {"strength": 0.5},
    "img2img 'a cat' --image photo.png --mask_image photo.png": {"strength": 1.0},
    "txt2img 'a cat' --xformers --medvram --no-half-vae --opt-sdp-attention": {"prompt": "a cat"},
    "txt2img 'a cat' --no-half --use-cpu": {"prompt": "a cat"},
    "txt2img 'a <lora:ink:0.8> cat' --lora-dir loras": {"prompt": "a  cat"},
    "txt2img 'a cat' --vae-path MODEL/vae": {"prompt": "a cat"},
    "txt2img 'a {cat|cat}' --width 48 --height 32": {"prompt": "a cat", "width": 48},
    # kohya's gen_img.py
    "generate --from_file prompts.txt --outdir images --W 48 --H 40": {"prompt": "two stars", "width": 48, "seed": 7},
    "generate --prompt 'a cat' --images_per_prompt 2 --scale 7.5 --sampler euler_a": {"sampler": "euler_ancestral"},
    "generate 'a cat' --sampler k_dpm_2 --steps 4 --seed 3": {"sampler": "dpm_2", "seed": 3},
    "generate 'a cat' --sampler dpmsolver++ --max_embeddings_multiples 3": {"sampler": "dpmpp_2m"},
    "generate 'a cat' --network_module networks.lora --network_weights loras/ink.safetensors": {"prompt": "a cat"},
    "generate 'a cat' --highres_fix_scale 2 --highres_fix_strength 0.5": {"upscale": 2.0},
    "generate 'a cat' --image_path photo.png --strength 0.5": {"strength": 0.5},
    "generate 'a cat' --no_preview --sequential_file_name --diffusers_xformers": {"prompt": "a cat"},
    "generate 'a cat' --v2 --v_parameterization": {"prompt": "a cat"},
    # CompVis' txt2img.py and stable-diffusion.cpp
    "generate 'a cat' --plms --ddim_steps 5 --scale 5 --n_samples 1 --skip_grid": {"sampler": "plms"},
    "generate 'a cat' --init-img photo.png --strength 0.5 --outdir images": {"strength": 0.5},
    "generate -p 'a cat' -n blurry -W 48 -H 32 --sampling-method euler_a -o x.png": {"negative_prompt": "blurry"},
    "generate -p 'a cat' -i photo.png --strength 0.4 --schedule karras -o x.jpg": {"strength": 0.4},
    # dgenerate and diffusers' scripts
    "generate --prompts 'a cat' --inference-steps 3 --guidance-scale 5 --output-path images": {"guidance_scale": 5.0},
    "generate 'a cat' --scheduler EulerAncestralDiscreteScheduler": {"sampler": "euler_ancestral", "spacing": None},
    "generate 'a cat' --image-seeds photo.png --image-seed-strengths 0.5 --loras loras/ink.safetensors:0.5": {
        "strength": 0.5
    },
    "generate 'a cat' --num_inference_steps 3 --num_images_per_prompt 2 --torch_dtype float32": {
        "num_inference_steps": 3
    },
    "generate 'a cat' --model-type torch-sd --safety-checker": {"prompt": "a cat"},
    # ComfyUI's and InvokeAI's names
    "generate 'a cat' --sampler dpmpp_2m_sde_gpu --scheduler karras": {"sampler": "dpmpp_2m_sde", "spacing": "karras"},
    "generate 'a cat' --scheduler euler_a --cfg 4 --denoise 0.5 --image photo.png": {"sampler": "euler_ancestral"},
}
REFUSED = {
    "generate 'a cat' --network_mul 0.8": "--lora FILE:WEIGHT",
    "generate 'a cat' --gen-seeds 5": "--seed -1 --count N",
    "generate 'a cat' --output-size 512x512": "--width W --height H",
    "generate 'a cat' --hires_steps 10": "--upscale-strength",
    "generate 'a cat' --subseed 3": "another --seed",
    "generate 'a cat' --controlnet canny": "--image FILE --strength S",
    "generate 'a cat' --api": "starts no server",
    "generate 'a cat' --embeddings-dir x": "--embedding FILE",
    "generate 'a cat' --restore_faces": "faces are not restored",
    "generate 'a cat' --cfgscale 7": "--cfg",
    "generate 'a cat' --sampler dpm_adaptive": "choose from ddpm, ddim",
}


def split(line, tiny):
    import shlex

    return [word.replace("MODEL", str(tiny)) for word in shlex.split(line)]


@pytest.fixture
def folder(pipe, tmp_path, monkeypatch):
    """A working directory with what the command lines name."""
    import torch
    from PIL import Image

    from ldm.adapters.factors import LoRA
    from ldm.adapters.lora import Adapter, ModuleDelta
    from ldm.adapters.lora_saving import save_adapter

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save("photo.png")
    (tmp_path / "prompts.txt").write_text("two stars --d 7\n")
    (tmp_path / "loras").mkdir()
    delta = ModuleDelta(LoRA(torch.ones(2, 32), torch.ones(32, 2)))
    target = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    save_adapter(Adapter("ink", {target: delta}), tmp_path / "loras/ink.safetensors", "kohya", pipe.model.networks)
    return tmp_path


def test_there_are_forty():
    assert len(WORKS) + len(REFUSED) >= 40


@pytest.mark.parametrize("line", WORKS)
def test_what_people_type_works(line, ldm_, tiny, folder):
    words = split(line, tiny)
    steps = [] if "steps" in line else ["--steps", "3"]
    status, out, err = ldm_(*words, "--ckpt", tiny, *steps, "--json")
    assert status == 0 and all(text.startswith(("note: ", "warning: ")) for text in err.splitlines()), err
    record = json.loads(out)["images"][0]
    for name, value in (WORKS[line] or {}).items():
        assert record[name] == value or value is None


@pytest.mark.parametrize("line", REFUSED)
def test_what_does_not_work_names_what_to_write(line, refused, tiny, folder):
    refused(*split(line, tiny), "--model", tiny, said=REFUSED[line])


def test_an_alias_hides_no_option_of_ours():
    import typer

    for command in typer.main.get_command(cli.app).commands.values():
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        own = {name.lstrip("-") for option in options for name in option.opts}
        assert not own & OPTION_ALIASES.keys() - {alias for alias, name in OPTION_ALIASES.items() if alias == name}
        if command.name in ("generate", "batch"):
            assert not own & FOREIGN_OPTIONS.keys() - {"W", "H"}  # -W is ours, --W kohya's


def test_words_after_a_double_dash_and_of_other_commands_stay():
    assert translate_words(["generate", "--W=48", "--", "--fp16"]) == ["generate", "--width", "48", "--", "--fp16"]
    assert translate_words(["info", "--size", "x"]) == ["info", "--size", "x"]
    assert translate_words([]) == []
