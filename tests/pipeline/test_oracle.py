"""The whole pipeline generates diffusers' images: tiny random models of its own classes, saved by it and loaded by us.

Its pipelines get our noise by a generator for each image, and take the mean of the VAE's posterior as we do, where
they would draw a sample of it.
"""

import functools
import json
import shutil
from dataclasses import replace
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers_models import NEGATIVE, PROMPT, SCHEDULE, UNCHECKED, distilled, pixels, plain, pruned, second, vae, xl
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from ldm import compat
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request

SOLVERS = {  # ours: diffusers' scheduler, and the spacing with which both count the same steps
    "ddim": (DDIMScheduler, {"timestep_spacing": "leading", "set_alpha_to_one": True}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}),
}


class Case(NamedTuple):
    """What all pipelines are asked: size is (height, width)."""

    sampler: str
    size: tuple[int, int]
    seeds: list[int]
    guidance: float
    prediction: str

    @property
    def call(self):
        return {"num_inference_steps": 9, "guidance_scale": self.guidance}


CASES = [
    Case("ddim", (40, 56), [3], 3.0, "epsilon"),
    Case("ddim", (64, 48), [3, 4, 5], 7.5, "v_prediction"),
    Case("euler", (48, 72), [3, 9], 5.0, "epsilon"),
    Case("euler", (32, 32), [1, 2], 1.0, "v_prediction"),
    Case("dpmpp_2m", (40, 88), [7, 8], 4.0, "v_prediction"),
    Case("dpmpp_2m", (56, 40), [7], 2.0, "epsilon"),
]


@pytest.fixture(scope="module")
def painter(tiny, tmp_path_factory):
    """(prediction, channels of the U-Net, model) -> our pipeline, and the folder as `save_pretrained` writes it."""

    @functools.cache
    def build(prediction, channels=4, model=plain, **schedule):
        torch.manual_seed(0)
        kind, networks = model(CLIPTokenizer.from_pretrained(tiny / "tokenizer"), channels)
        folder = tmp_path_factory.mktemp("oracle")
        scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction, **schedule)
        kind(vae=vae(), scheduler=scheduler, **networks).save_pretrained(folder)
        assert not list(folder.rglob("vocab.json"))  # transformers 5 writes tokenizer.json alone
        return Pipeline.from_pretrained(folder, device="cpu", dtype="float32"), folder

    return build


@functools.cache
def opened(kind, folder):
    pipe = kind.from_pretrained(folder, local_files_only=True, **({} if "XL" in kind.__name__ else UNCHECKED))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def theirs(monkeypatch):
    """diffusers' images of a case, uint8 [B, H, W, 3]."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def draw(kind, folder, case, **call):
        pipe = opened(kind, folder)
        scheduler, options = SOLVERS[case.sampler]
        pipe.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler", **options)
        generators = [torch.Generator().manual_seed(seed) for seed in case.seeds]
        texts = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_images_per_prompt": len(generators)}
        return pixels(pipe(generator=generators, **{**texts, **case.call, **call}).images)

    return draw


def ours(pipe, case, **settings):
    options = {"sampler": case.sampler, "spacing": SOLVERS[case.sampler][1]["timestep_spacing"]}
    request = Request(PROMPT, **{"negative_prompt": NEGATIVE, **options, **case.call, **settings})
    return pixels(pipe.generate([replace(request, seed=seed) for seed in case.seeds]))


def same(a, b):
    """Within 1 of 255, in images that differ from row to row, have contrast, and are not saturated."""
    assert a.shape == b.shape and np.abs(a - b).max() <= 1
    assert a.std() > 15 and np.isin(a, (0, 255)).mean() < 0.05
    assert len(a) == 1 or np.abs(a[0] - a[1]).max() > 5


def picture(height, width):
    """Smooth colours with an edge."""
    y, x = np.mgrid[:height, :width] / 8
    levels = np.stack([np.sin(x), np.cos(y), np.sin(x * y / 5)], -1) * 60 + 128
    levels[:, width // 2 :] += 40
    return Image.fromarray(levels.astype(np.uint8))


def mask(height, width):
    """White in a block of whole latents: diffusers reads the first pixel of each."""
    levels = np.zeros((height, width), np.uint8)
    levels[8 : height // 8 * 4, 12 : width // 8 * 4 + 8] = 255
    return Image.fromarray(levels)


@pytest.mark.parametrize("case", CASES)
def test_text_to_image(painter, theirs, case):
    pipe, folder = painter(case.prediction)
    call = dict(zip(("height", "width"), case.size, strict=True))
    same(ours(pipe, case, **call), theirs(diffusers.StableDiffusionPipeline, folder, case, **call))


SD1 = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}  # of every folder of Stable Diffusion 1.x
SD1_SCHEDULERS = {
    "PNDM": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **SD1},
    "PNDM, Runge-Kutta": {"_class_name": "PNDMScheduler", "skip_prk_steps": False, **SD1},
    "DDIM": {"_class_name": "DDIMScheduler", **SD1},
    "Euler": {
        "_class_name": "EulerDiscreteScheduler",
        "final_sigmas_type": "sigma_min",
        "timestep_spacing": "trailing",
    },
    "DEIS": {"_class_name": "DEISMultistepScheduler"},
    "KDPM2": {"_class_name": "KDPM2DiscreteScheduler", "timestep_spacing": "trailing"},
    "singlestep": {"_class_name": "DPMSolverSinglestepScheduler"},
    "LCM": {"_class_name": "LCMScheduler"},
    "TCD": {"_class_name": "TCDScheduler"},
}


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("name", SD1_SCHEDULERS)
def test_a_folder_of_stable_diffusion_1_gives_diffusers_images_by_its_own_scheduler(painter, tmp_path, name, n):
    """The three lines of diffusers' documentation, with the class imported from `ldm.compat`."""
    _, folder = painter("epsilon")
    own = shutil.copytree(folder, tmp_path / "model")
    config = {**json.loads((own / "scheduler/scheduler_config.json").read_text()), **SD1_SCHEDULERS[name]}
    (own / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((own / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (own / "model_index.json").write_text(json.dumps(index))
    images = []
    for kind, options in ((compat.StableDiffusionPipeline, {}), (diffusers.StableDiffusionPipeline, UNCHECKED)):
        pipe = kind.from_pretrained(own, **options)
        pipe.set_progress_bar_config(disable=True)
        call = {"generator": torch.Generator().manual_seed(3), "num_inference_steps": n}
        images.append(pixels(pipe(PROMPT, negative_prompt=NEGATIVE, height=40, width=56, **call).images))
    same(*images)


@pytest.mark.parametrize("model, skip", [(plain, 1), (plain, 2), (xl, 1)])
def test_clip_skip(painter, theirs, monkeypatch, model, skip):
    """Without guidance: diffusers skips no layer for a negative prompt, where we skip them as A1111 does.

    It skips them by an attribute that transformers 5 has no more.
    """
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    pipe, folder = painter("epsilon", model=model)
    kind = diffusers.StableDiffusionPipeline if model is plain else diffusers.StableDiffusionXLPipeline
    call, case = {"height": 40, "width": 56, "guidance_scale": 1.0}, CASES[0]
    drawn = ours(pipe, case, clip_skip=skip, **call)
    same(drawn, theirs(kind, folder, case, clip_skip=skip, **call))
    assert np.abs(drawn - ours(pipe, case, **call)).max() > 5


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_image_to_image(painter, theirs, case, strength):
    pipe, folder = painter(case.prediction)
    edit = {"image": picture(*case.size), "strength": strength}
    same(ours(pipe, case, **edit), theirs(diffusers.StableDiffusionImg2ImgPipeline, folder, case, **edit))


@pytest.mark.parametrize("channels, strength", [(4, 0.5), (4, 0.9), (9, 0.6), (9, 1.0)])
@pytest.mark.parametrize("case", CASES)
def test_inpainting(painter, theirs, case, channels, strength):
    pipe, folder = painter(case.prediction, channels)
    inpainted(diffusers.StableDiffusionInpaintPipeline, pipe, folder, theirs, case, strength)


def test_inpainting_with_strength_one(painter, theirs):
    """From zero SNR. Elsewhere diffusers begins from noise alone in what is kept, too, and the first step differs."""
    pipe, folder = painter("v_prediction", rescale_betas_zero_snr=True)
    inpainted(diffusers.StableDiffusionInpaintPipeline, pipe, folder, theirs, CASES[4], 1.0)


def inpainted(kind, pipe, folder, theirs, case, strength):
    image, white, (height, width) = picture(*case.size), mask(*case.size), case.size
    call = {"image": image, "mask_image": white, "height": height, "width": width, "strength": strength}
    wanted = theirs(kind, folder, case, **call)
    drawn = ours(pipe, case, image=image, mask=white, strength=strength)
    inside = np.asarray(white) > 0
    same(drawn[:, inside], wanted[:, inside])
    assert (drawn[:, ~inside] == np.asarray(image)[~inside]).all()


V_CASES = [case for case in CASES if case.prediction == "v_prediction"]


@pytest.mark.parametrize("case", [Case("ddim", (48, 48), [3, 4], 7.5, "v_prediction"), *V_CASES])
def test_2_text_to_image(painter, theirs, case):
    """Of native size where it is 48x48: nobody says it."""
    pipe, folder = painter(case.prediction, model=second)
    assert pipe.model.text_encoders[0].tokenizer.pad_token_id == 0
    call = {} if case.size == (48, 48) else dict(zip(("height", "width"), case.size, strict=True))
    same(ours(pipe, case, **call), theirs(diffusers.StableDiffusionPipeline, folder, case, **call))


@pytest.mark.parametrize("case", V_CASES)
def test_2_image_to_image(painter, theirs, case):
    pipe, folder = painter(case.prediction, model=second)
    edit = {"image": picture(*case.size), "strength": 0.7}
    same(ours(pipe, case, **edit), theirs(diffusers.StableDiffusionImg2ImgPipeline, folder, case, **edit))


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("case", V_CASES)
def test_2_inpainting(painter, theirs, case, channels):
    pipe, folder = painter(case.prediction, channels, second)
    inpainted(diffusers.StableDiffusionInpaintPipeline, pipe, folder, theirs, case, 0.8)


XL_SIZES = {"original_size": (100, 200), "crops_coords_top_left": (8, 16), "target_size": (64, 32)}


@pytest.mark.parametrize("settings", [{"negative_prompt": None}, {"negative_prompt": ""}, XL_SIZES])
@pytest.mark.parametrize("case", CASES[1:3])
def test_xl_text_to_image(painter, theirs, case, settings):
    """No negative prompt is zeros, and "" is its embedding, as in diffusers."""
    pipe, folder = painter(case.prediction, model=xl)
    call = {**dict(zip(("height", "width"), case.size, strict=True)), **settings}
    drawn = ours(pipe, case, **call)
    same(drawn, theirs(diffusers.StableDiffusionXLPipeline, folder, case, **call))
    without = {name: value for name, value in call.items() if name not in settings}
    assert np.abs(drawn - ours(pipe, case, **without)).max() > 5


@pytest.mark.parametrize("case", CASES[::2])
def test_xl_image_to_image(painter, theirs, case):
    pipe, folder = painter(case.prediction, model=xl)
    edit = {"image": picture(*case.size), "strength": 0.75}
    same(ours(pipe, case, **edit), theirs(diffusers.StableDiffusionXLImg2ImgPipeline, folder, case, **edit))


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("case", CASES[:5:2])
def test_xl_inpainting(painter, theirs, case, channels):
    pipe, folder = painter(case.prediction, channels, xl)
    inpainted(diffusers.StableDiffusionXLInpaintPipeline, pipe, folder, theirs, case, 0.8)


@pytest.mark.parametrize("guidance", [1.5, 8.5])
def test_distilled_text_to_image(painter, theirs, guidance):
    """One evaluation a step, whatever the scale, which the network reads; it reads no negative prompt."""
    pipe, folder = painter("epsilon", model=distilled)
    case, call = CASES[0]._replace(guidance=guidance, seeds=[3, 4]), {"height": 40, "width": 56}
    with pytest.warns(UserWarning, match="negative_prompt: not read"):
        drawn = ours(pipe, case, **call)
    same(drawn, theirs(diffusers.StableDiffusionPipeline, folder, case, **call))
    assert np.abs(drawn - ours(pipe, case._replace(guidance=4.0), negative_prompt=None, **call)).max() > 5


def test_rows_of_a_distilled_model_have_scales_of_their_own(painter):
    pipe, _ = painter("epsilon", model=distilled)
    requests = [Request(PROMPT, seed=3, height=32, width=32, guidance_scale=scale) for scale in (1.0, 3.0, 8.5)]
    alone = [pipe.generate([request])[0] for request in requests]
    assert np.abs(pixels(alone) - pixels(pipe.generate(requests))).max() <= 1
    assert np.abs(pixels(alone)[0] - pixels(alone)[2]).max() > 5


@pytest.mark.parametrize("case", CASES[1:3])
def test_pruned_xl_text_to_image(painter, theirs, case):
    pipe, folder = painter(case.prediction, model=pruned)
    call = dict(zip(("height", "width"), case.size, strict=True))
    same(ours(pipe, case, **call), theirs(diffusers.StableDiffusionXLPipeline, folder, case, **call))
