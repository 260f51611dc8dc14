"""The oracle of a tuning: diffusers' scripts have its losses, and diffusers' pipelines draw with what it writes."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers_models import NEGATIVE, PROMPT, SCHEDULE, UNCHECKED, pixels, plain, vae, xl
from PIL import Image
from safetensors.torch import load_file
from trainings import FULL, LORA, WORD, go
from transformers import CLIPTokenizer

from ldm.commands.train import create_task
from ldm.config import load_recipe
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request

CALL = {"height": 40, "width": 56, "num_inference_steps": 9, "guidance_scale": 3.0, "negative_prompt": NEGATIVE}
BRIEF = {
    "max_train_steps": 3,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "ema_decay": 0.0,
    "dataloader_num_workers": 0,
}


def in_order(tokenizer, channels):
    """A tiny SDXL whose blocks attend in SDXL's own order: diffusers reads kohya's names of no other."""
    kind, networks = xl(tokenizer, channels)
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel.from_config({**networks["unet"].config, **blocks})
    with torch.no_grad():
        unet.add_embedding.linear_2.weight *= 30  # so that sizes are seen in a loss
    return kind, networks | {"unet": unet}


@pytest.fixture(scope="module", params=[plain, in_order], ids=["sd", "sdxl"])
def model(request, tiny, tmp_path_factory):
    """A random model's folder, as diffusers saves it, and the pipeline that reads it."""
    torch.manual_seed(0)
    kind, networks = request.param(CLIPTokenizer.from_pretrained(tiny / "tokenizer"), 4)
    folder = tmp_path_factory.mktemp("model")
    kind(vae=vae(), scheduler=DDIMScheduler(**SCHEDULE), **networks).save_pretrained(folder)
    return kind, folder


def read_by_diffusers(kind, folder):
    pipe = kind.from_pretrained(folder, local_files_only=True, **({} if "XL" in kind.__name__ else UNCHECKED))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading", set_alpha_to_one=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_by_us(folder):
    return Pipeline.from_pretrained(folder, device="cpu", dtype="float32")


def theirs(pipe, prompt=PROMPT):
    return pixels(pipe(prompt, generator=torch.Generator().manual_seed(3), **CALL).images)


def ours(pipe, prompt=PROMPT):
    return pixels(pipe.generate([Request(prompt, seed=3, sampler="ddim", spacing="leading", **CALL)]))


def assert_same(drawn, expected, before):
    """Within 1 of 255, and another image than before the tuning."""
    assert abs(drawn - expected).max() <= 1
    assert abs(drawn - before).max() > 5


@pytest.fixture
def tuned(model, tuning):
    """Tunes the model in a few long steps; the folder of what is written."""

    def tune(rate=1e-2, **objective):
        changes = {**BRIEF, "learning_rate": rate}
        source = {"pretrained_model_name_or_path": str(model[1]), "frozen_dtype": "float32"}
        return go(tuning(changes=changes, **source, **objective))

    return tune


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet and text"])
def test_diffusers_draws_with_an_adapter_what_we_do(model, tuned, text):
    kind, folder = model
    targets = ["attention", "feed-forward", "convolutions"]
    export = tuned(**{**LORA, "targets": targets, "train_text_encoder": text, "alpha": 3})
    pipe, twin = read_by_us(folder), read_by_diffusers(kind, folder)
    before, drawn = ours(pipe), []
    for file in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        pipe.load_lora_weights(export / file)
        twin.load_lora_weights(export, weight_name=file)
        assert ("text_encoder" in twin.get_list_adapters()) == text
        drawn.append(ours(pipe))
        assert_same(drawn[-1], theirs(twin), before)
        pipe.unload_lora_weights()
        twin.unload_lora_weights()
    assert abs(drawn[0] - drawn[1]).max() <= 1  # one holds alpha, the other its product


def test_diffusers_draws_with_a_whole_model_what_we_do(model, tuned):
    kind, folder = model
    export = tuned(**FULL, train_text_encoder=True)
    assert_same(ours(read_by_us(export)), theirs(read_by_diffusers(kind, export)), ours(read_by_us(folder)))


def test_diffusers_draws_with_a_word_what_we_do(model, tuned):
    kind, folder = model
    file = tuned(**WORD, rate=1.0) / "learned_embeds.safetensors"
    pipe, twin, prompt = read_by_us(folder), read_by_diffusers(kind, folder), "a zorb on a blue background"
    before = ours(pipe, prompt)
    pipe.load_textual_inversion(file, "zorb")
    load_word(twin, file)
    assert_same(ours(pipe, prompt), theirs(twin, prompt), before)


def load_word(pipe, file):
    """As diffusers' documentation does it: of SDXL, into each text encoder its own vectors."""
    vectors = load_file(file)
    if "clip_l" not in vectors:
        pipe.load_textual_inversion(file.parent, weight_name=file.name, token="zorb")
        return
    for name, number in (("clip_l", ""), ("clip_g", "_2")):
        own = {"text_encoder": getattr(pipe, f"text_encoder{number}"), "tokenizer": getattr(pipe, f"tokenizer{number}")}
        pipe.load_textual_inversion(vectors[name], token="zorb", **own)


CROPS, MASKS = {"center_crop": False}, {"masks": "file"}
EXTRAS = {"noise_offset": 0.3, "input_perturbation": 0.2}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("data, objective, schedule", [
    ({}, {}, {}),
    (CROPS, EXTRAS, {}),
    ({**CROPS, **MASKS}, {}, ZERO_SNR),
    (MASKS, EXTRAS, {}),
], ids=["cached", "random crops, offset noise", "random crops, masks, zero SNR", "masks, offset noise"])  # fmt: skip
def test_the_loss_is_that_of_diffusers_scripts(model, data, objective, schedule, tuning, tmp_path):
    kind, folder = model[0], shutil.copytree(model[1], tmp_path / "model")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **schedule}))
    cover(tmp_path / "pictures")
    source = {"pretrained_model_name_or_path": str(folder), "frozen_dtype": "float32", "times": "discrete"}
    task = create_task(load_recipe(tuning(data=data, caption_dropout=0, **source, **LORA, **objective)))
    twin = read_by_diffusers(kind, folder)
    images = task.dataset.images
    for k in range(4):
        batch = task.make_batch(k, range(4))
        batch["t"][0] = 1.0
        visits = images.batch_sampler[k]
        wanted = script_losses(twin, batch, [images.samples[v.sample_id] for v in visits], shown(task, visits))
        torch.testing.assert_close(task.compute_loss(task.model, batch)[0], wanted, rtol=2e-4, atol=0)
    visits = [visit for k in range(20) for visit in images.batch_sampler[k]]
    corners = {images.choose_augmentation(visit).crop_corner for visit in visits}
    assert (len(corners) > 2) == ("center_crop" in data)


def cover(folder):
    """Masks for all images: what is right of a third counts, and half of it by a half."""
    for path in sorted(folder.glob("*.png")):
        width, height = Image.open(path).size
        mask = np.zeros((height, width), np.uint8)
        mask[:, width // 3 :] = 255
        mask[height // 2 :, width // 3 :] = 128
        Image.fromarray(mask).save(path.with_suffix(".mask.png"))


def shown(task, visits):
    """The pixels of some visits from their files, and what SDXL is told of them: original size, corner, target."""
    pictures, ids = [], []
    for visit in visits:
        data, view = task.dataset.images, task.dataset.images.choose_augmentation(visit)
        (width, height), resized = data.image_infos[visit.sample_id].placement
        picture = Image.open(io.BytesIO(data.samples[visit.sample_id].read_image()))
        whole = picture.resize(resized, Image.Resampling.LANCZOS)
        if view.flip:
            whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = view.crop_corner
        pictures.append(np.asarray(whole.crop((left, top, left + width, top + height))))
        ids.append([picture.height, picture.width, top, left, height, width])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(ids, dtype=torch.float32)


@torch.no_grad()
def script_losses(pipe, batch, samples, seen):
    """train_text_to_image.py's and train_text_to_image_sdxl.py's loss of each row, with the batch's noise and times."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    index = (batch["t"] * 1000 - 1).round().long()
    posterior = pipe.vae.encode(seen[0]).latent_dist
    x0 = (posterior.mean + posterior.std * batch["posterior"]) * pipe.vae.config.scaling_factor
    states, _, *pooled = pipe.encode_prompt(
        [sample.caption for sample in samples], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = {"text_embeds": pooled[0], "time_ids": seen[1]} if pooled else None
    noisy = scheduler.add_noise(x0, batch["noise"] + batch["perturbation"], index)
    output = pipe.unet(noisy, index, states, added_cond_kwargs=added).sample
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x0, batch["noise"], index) if v else batch["noise"]
    return (batch["masks"] * (output - target) ** 2).mean((1, 2, 3))


def test_what_a_mask_leaves_out_has_no_gradient(tuning, tmp_path):
    cover(tmp_path / "pictures")
    task = create_task(load_recipe(tuning(data=MASKS, **LORA)))
    batch = task.make_batch(0, range(4))
    outputs = []

    def network(*words):
        outputs.append(task.model(*words))
        outputs[0].retain_grad()
        return outputs[0]

    task.compute_loss(network, batch)[0].sum().backward()
    outside = (batch["masks"] == 0).expand_as(outputs[0])
    assert 0.2 < outside.float().mean() < 0.5
    assert (outputs[0].grad[outside] == 0).all() and (outputs[0].grad[~outside] != 0).all()
