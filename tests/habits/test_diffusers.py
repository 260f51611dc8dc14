"""The lines that people paste from diffusers' documentation run, and give diffusers' images for the same generator.

The lines are those of `snippets.py`. Classes are imported from `ldm.compat`; hub ids are local folders with tiny random
models of diffusers' classes, "cuda" is the CPU, float16 is float32, and images are small and of few steps.
"""

import contextlib
import copy
import io
import re
import warnings
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.pipelines import pipeline_utils
from diffusers_models import SCHEDULE, pixels, plain, vae, xl
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from snippets import MISTAKES, PREAMBLES, SNIPPETS

from ldm.picto import clip
from ldm.pipeline import compat, pipeline

STEPS = 4
THEIRS = {}  # networks that diffusers has loaded
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (plain, 4, DDIMScheduler),
    "stable-diffusion-v1-5/stable-diffusion-inpainting": (plain, 9, DDIMScheduler),
    "stabilityai/stable-diffusion-xl-base-1.0": (xl, 4, EulerDiscreteScheduler),
}
ADAPTERS = {  # hub ids and the names of their files
    "artificialguybr/pixel": "pixel.safetensors",
    "CiroN2022/toy-face": "toy.safetensors",
    "sayakpaul/sd-model-finetuned-lora-t4": "pytorch_lora_weights.safetensors",
}
EMBEDDINGS = "sd-concepts-library/cat-toy", "EvilEngine/badhandv4"
REPLACEMENTS = [
    (r'"cuda(:0)?"', '"cpu"'),
    (r"'cuda'", "'cpu'"),
    (r"torch\.float16", "torch.float32"),
    (r"\b(height|width)=\d+", r"\1=40"),
    (r"num_inference_steps=\d\d+", f"num_inference_steps={STEPS}"),
    (r"resize\(\(\d+, \d+\)\)", "resize((48, 40))"),
]


def lora(unet, seed):
    """A LoRA of rank 2 of a U-Net's attention, as diffusers writes it."""
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    tensors = {f"unet.{key}": value.contiguous() for key, value in get_peft_model_state_dict(unet).items()}
    unet.delete_adapters("default")
    return tensors


def picture(kind):
    """A small image, or a mask of whole latents."""
    y, x = np.mgrid[:32, :32]
    if kind == "mask":
        return PIL.Image.fromarray(((x >= 8) & (y >= 12)).astype(np.uint8) * 255)
    return PIL.Image.fromarray(np.stack([x * 7, y * 7, 128 + 60 * np.sin(x * y / 40)], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The folder or file of each hub id and address."""
    root, places = tmp_path_factory.mktemp("hub"), {}
    tokenizer = clip.train_tokenizer(["a cat on a hill", "a dog"] * 10, 540, 77)
    for name, (build, channels, scheduler) in MODELS.items():
        torch.manual_seed(0)
        kind, networks = build(tokenizer.to_transformers(), channels)
        own = {"timestep_spacing": "leading"} if scheduler is EulerDiscreteScheduler else {"set_alpha_to_one": True}
        schedule = {
            name: value for name, value in SCHEDULE.items() if name != "clip_sample" or "set_alpha_to_one" in own
        }
        pipe = kind(vae=vae(), scheduler=scheduler(**schedule, **own), **networks)
        places[name] = root / name
        pipe.save_pretrained(root / name)
        pipe.save_pretrained(root / name, variant="fp16")
        if name.endswith("v1-5"):
            pipe.vae.save_pretrained(root / "stabilityai/sd-vae-ft-mse")
            for seed, (adapter, file) in enumerate(ADAPTERS.items()):
                (root / adapter).mkdir(parents=True)
                save_file(lora(pipe.unet, seed), root / adapter / file)
    for name in EMBEDDINGS:
        (root / name).mkdir(parents=True)
        torch.manual_seed(1)
        save_file({"<cat-toy>": torch.randn(1, 32)}, root / name / "learned_embeds.safetensors")
    for kind in ("cat", "inpaint", "mask"):
        picture(kind).save(root / f"{kind}.png")
    places |= {name: root / name for name in (*ADAPTERS, "stabilityai/sd-vae-ft-mse")}
    return (
        places
        | {name: root / name / "learned_embeds.safetensors" for name in EMBEDDINGS[:1]}
        | {
            EMBEDDINGS[1]: root / EMBEDDINGS[1],
            "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main": root,
        }
    )


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Both libraries take few steps where nobody says how many."""
    usual = []
    for name in dir(diffusers):
        if re.fullmatch(r"StableDiffusion(XL)?(Img2Img|Inpaint)?Pipeline", name):
            call = getattr(diffusers, name).__call__.__wrapped__
            usual.append((call, call.__defaults__))
            call.__defaults__ = tuple(STEPS if default == 50 else default for default in call.__defaults__)
    yield
    for call, defaults in usual:
        call.__defaults__ = defaults


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Networks are loaded once, and have their own weights again for each of our pipelines."""
    load, load_sub_model, models = pipeline.load_checkpoint, pipeline_utils.load_sub_model, {}

    def load_ours(path, *args):
        key = str(Path(path).resolve()), *args
        if key not in models:
            model = load(path, *args)
            weights = {name: copy.deepcopy(network.state_dict()) for name, network in model.networks.items()}
            defaults = {**model.generation_defaults, "num_inference_steps": STEPS}
            models[key] = replace(model, generation_defaults=defaults), weights
        model, weights = models[key]
        for encoder in model.text_encoders:
            encoder.set_placeholder_embeddings([])
        for name, network in model.networks.items():
            network.load_state_dict(weights[name])
        return model

    def load_theirs(**options):
        key = options["name"], str(Path(options["cached_folder"]).resolve())
        if options["name"] == "scheduler":
            return load_sub_model(**options)
        if key not in THEIRS:
            THEIRS[key] = load_sub_model(**options)
        return THEIRS[key]

    pipeline.load_checkpoint, pipeline_utils.load_sub_model = load_ours, load_theirs
    yield
    pipeline.load_checkpoint, pipeline_utils.load_sub_model = load, load_sub_model


@pytest.fixture
def paste(hub, tmp_path, monkeypatch):
    """Runs lines after their preamble, with `ldm.compat` or diffusers, in an empty folder; gives their names."""
    monkeypatch.chdir(tmp_path)
    compat.say_once.cache_clear()

    def run(where, lines, library="ldm.compat"):
        code = f"{PREAMBLES[where]}\n{lines}"
        code = re.sub(r"from diffusers(\.utils)? import", f"from {library}\\1 import", code)
        code = code.replace("ldm.compat.utils", "ldm.compat")
        for name, place in hub.items():
            code = code.replace(f'"{name}', f'"{place}')
        for pattern, replacement in REPLACEMENTS:
            code = re.sub(pattern, replacement, code)
        names = {
            "torch": torch,
            "np": np,
            "PIL": PIL,
            "LORA_FILE": str(hub["artificialguybr/pixel"] / "pixel.safetensors"),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, "pasted", "exec"), names)
        if re.search("lora|enable|fuse", lines):  # which change diffusers' networks
            THEIRS.clear()
        return names

    return run


def arrays(names):
    """The images that pasted lines end with, [B, H, W, 3] in 0 to 255."""
    images = names["images"] if "images" in names else [names["image"]]
    if isinstance(images, list) and isinstance(images[0], PIL.Image.Image):
        return pixels(images)
    return np.stack([np.asarray(image) for image in images]) * 255.0


@pytest.mark.parametrize("where, lines, outcome", [row for row in SNIPPETS if row[2] == "="])
def test_an_image_is_diffusers(paste, where, lines, outcome):
    ours = arrays(paste(where, lines))
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = arrays(paste(where, lines, "diffusers"))
    inside = np.asarray(picture("mask")) > 0 if where == "inpaint" else ...  # what is kept is kept by us bit for bit
    shown = slice(None) if inside is ... else (slice(None), inside)
    assert ours.shape == theirs.shape and np.abs(ours[shown] - theirs[shown]).max() <= 1.01
    assert ours.std() > 5


@pytest.mark.parametrize("where, lines, outcome", [row for row in SNIPPETS if row[2] == ""])
def test_it_runs(paste, where, lines, outcome):
    paste(where, lines)


@pytest.mark.parametrize("where, lines, outcome", [row for row in SNIPPETS + MISTAKES if row[2] not in ("", "=")])
def test_an_error_names_what_to_write_instead(paste, where, lines, outcome):
    with pytest.raises((ValueError, TypeError, AttributeError, ImportError)) as error:
        paste(where, lines)
    assert outcome in str(error.value)


def test_most_lines_run_unchanged():
    assert len(SNIPPETS) >= 143
    assert sum(outcome in ("", "=") for *_, outcome in SNIPPETS) >= 0.9 * len(SNIPPETS)
