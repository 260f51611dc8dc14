"""The laws of the pipeline: an image is a function of its request, and equals diffusers' on the same weights."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from ldm.checkpoints.formats import PICTO_PATH
from ldm.conditioning import Conditioning
from ldm.diffusion.samplers import SAMPLERS
from ldm.pipeline.pipeline import Pipeline, choose_dtype
from ldm.pipeline.request import Request

MIXED = [
    Request("a red apple", seed=1),
    Request("two stars", "a dog", seed=2, guidance_scale=1.0),
    Request("a cat", seed=3, sampler="heun", num_inference_steps=4),
    Request("a cat", seed=4, sampler="ddpm", spacing="log_snr", height=48),
    Request("a dog on a blue background", seed=5, guidance_scale=7.5),
    Request("", seed=6, sampler="ddim", eta=0.5, num_inference_steps=9),
    Request("a red apple", seed=7, guidance_scale=5.0, guidance_rescale=0.7, guidance_interval=(0.3, None)),
    Request("a cat", seed=8, sampler="rk45", num_inference_steps=3),
    Request("two stars", seed=9, sampler="rk45", num_inference_steps=3),
    Request("a dog", seed=10, sampler="dpmpp_2m_sde", spacing="beta", num_inference_steps=5),
]

LONG = "a red apple on a blue background, two stars, a cat to the left of a dog, two red stars on a blue background"
TEXTS = [
    ("a cat", "", 3.0),
    (LONG, "", 3.0),
    ("a (red:1.4) apple", LONG, 3.0),
    (LONG, "a dog", 1.0),
    ("two stars", LONG, 1.0),
    ("a [cat] BREAK a (dog)", "two stars", 5.0),
    (LONG, LONG, 2.0),
]


def test_negative_prompts_may_be_one_per_prompt(pipe):
    both = pipe(["a cat", "two stars"], negative_prompt=["a dog", None], num_inference_steps=2, seed=np.int64(3))
    one = pipe.generate(
        [Request("a cat", "a dog", 3, num_inference_steps=2), Request("two stars", None, 3, num_inference_steps=2)]
    )
    assert [a.tobytes() for a in both.images] == [a.tobytes() for a in one]
    with pytest.raises(ValueError, match="negative_prompt: 1 given for 2 prompts"):
        pipe(["a cat", "two stars"], negative_prompt=["a dog"])


def test_numbers_of_numpy_are_numbers_and_what_is_none_is_named(pipe):
    theirs = Request("a", height=np.int64(32), guidance_scale=np.float32(2.5), num_inference_steps=np.int32(2))
    ours = Request("a", height=32, guidance_scale=2.5, num_inference_steps=2)
    assert pipe.resolve(theirs) == pipe.resolve(ours)
    json.dumps(pipe.resolve(theirs).to_record())
    for name, value in (("height", 32.0), ("num_inference_steps", "2"), ("image", "a.png"), ("guidance_scale", "x")):
        with pytest.raises(ValueError, match=f"{name} .*must be a"):
            pipe.resolve(Request("a", **{name: value}))


def difference(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_an_image_is_the_same_in_any_batch_and_any_order(tiny, pipe, batch_size):
    alone = [pipe.generate([request])[0] for request in MIXED]
    other = Pipeline(pipe.model, batch_size)
    for order in (range(len(MIXED)), [5, 2, 8, 6, 0, 9, 3, 1, 4, 7]):
        pictures = other.generate([MIXED[k] for k in order])
        assert max(difference(alone[k], picture) for k, picture in zip(order, pictures, strict=True)) <= 1


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_an_image_heeds_no_neighbour_s_length_of_text(pipe, batch_size):
    requests = [Request(p, n, seed=k, guidance_scale=s) for k, (p, n, s) in enumerate(TEXTS)]
    alone = [pipe.generate([request])[0] for request in requests]
    other = Pipeline(pipe.model, batch_size)
    for order in (range(len(TEXTS)), [4, 1, 6, 0, 5, 2, 3]):
        pictures = other.generate([requests[k] for k in order])
        assert max(difference(alone[k], picture) for k, picture in zip(order, pictures, strict=True)) <= 1


def test_nothing_of_a_long_prompt_is_cut_and_a_weight_of_one_is_none(pipe):
    plain, tail = (pipe(prompt, seed=1).images[0] for prompt in (LONG, f"{LONG}, a dog"))
    assert difference(plain, tail) > 1
    assert difference(plain, pipe(LONG.replace("blue", "(blue:1.0)"), seed=1).images[0]) == 0
    assert difference(plain, pipe(LONG.replace("blue", "(blue:1.5)"), seed=1).images[0]) > 1


def test_the_shorter_of_prompt_and_negative_is_filled_up_with_empty_chunks(pipe):
    filled = pipe.prompt_encoder("a cat", 3)
    by_hand = Conditioning(torch.cat([pipe.prompt_encoder(text).context for text in ("a cat", "", "")], dim=1))
    assert torch.equal(filled.context, by_hand.context)
    torch.testing.assert_close(filled.kv_cache, pipe.model.unet.compute_kv_cache(by_hand).kv_cache)
    longer = pipe("a cat BREAK BREAK", "BREAK BREAK a dog", seed=1).images[0]
    assert difference(pipe("a cat", "BREAK BREAK a dog", seed=1).images[0], longer) == 0


def test_one_call_refuses_texts_of_two_lengths(pipe):
    with pytest.raises(ValueError, match="prompts have 1 and 3 chunks"):
        pipe.cfg_denoiser(["a cat", LONG], ["", ""])


def test_image_k_of_a_prompt_is_the_image_of_its_own_seed(pipe):
    output = pipe(["a cat", "a dog"], num_images_per_prompt=3, seed=[10, 20])
    assert output.seeds == [10, 11, 12, 20, 21, 22]
    assert difference(output.images[4], pipe("a dog", seed=21).images[0]) <= 1
    assert difference(output.images[4], output.images[3]) > 1


def test_guidance_scale_one_is_no_guidance(pipe):
    plain, negative = (pipe("a cat", text, guidance_scale=1.0).images[0] for text in ("", "a dog"))
    guided, other = (pipe("a cat", text, guidance_scale=4.0).images[0] for text in ("", "a dog"))
    assert difference(plain, negative) == 0
    assert difference(plain, pipe("a cat", LONG, guidance_scale=1.0).images[0]) == 0
    assert difference(guided, other) > 0 and difference(plain, guided) > 0


def test_guidance_outside_every_level_s_interval_is_none(pipe):
    plain = pipe("a cat", guidance_scale=1.0).images[0]
    within, without = (
        pipe("a cat", guidance_scale=4.0, guidance_interval=bounds).images[0] for bounds in [(0, None), (1e6, 1e7)]
    )
    assert difference(plain, without) == 0
    assert difference(within, pipe("a cat", guidance_scale=4.0).images[0]) == 0 and difference(plain, within) > 0


def test_a_text_that_has_been_drawn_still_lets_gradients_through(pipe):
    pipe("a cat", num_inference_steps=2)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pipe.cfg_denoiser(["a cat"], [""])(x, pipe.model.sde.level(0.5)).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_generates(pipe, sampler):
    """With progress that adds up to one image, also where questions lie between the grid's points."""
    shares = []
    steps = max(4, SAMPLERS[sampler].min_steps)
    request = Request("a cat", sampler=sampler, num_inference_steps=steps)
    (picture,) = pipe.generate([request], shares.append)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert np.asarray(picture).std() > 0
    if steps > 4:
        with pytest.raises(ValueError, match=f"steps 4: sampler {sampler} needs {steps} or more"):
            pipe("a cat", sampler=sampler, num_inference_steps=4)


def test_latents_replace_the_initial_noise(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert difference(pipe("a cat", latents=noise).images[0], pipe("a cat", seed=5).images[0]) == 0


def test_a_record_is_the_request(pipe):
    for request in map(pipe.resolve, (MIXED[5], MIXED[6])):
        assert Request(**json.loads(json.dumps(request.to_record()))) == request


def diffusers_picture(folder, scheduler, texts, steps, guidance, noise, **options):
    theirs = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    theirs.scheduler = scheduler.from_config(theirs.scheduler.config, **options)
    theirs.set_progress_bar_config(disable=True)
    side = theirs.unet.config.sample_size * theirs.vae_scale_factor
    call = {"height": side, "width": side, "num_inference_steps": steps, "guidance_scale": guidance}
    return theirs(**texts, latents=noise, **call).images[0]


@pytest.mark.parametrize("model", ["tiny", "picto"])
@pytest.mark.parametrize(
    "sampler, scheduler, options",
    [
        ("ddim", DDIMScheduler, {}),
        ("dpmpp_2m", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}),
    ],
)
def test_diffusers_loads_our_files_and_generates_the_same_image(model, sampler, scheduler, options, tiny, pipe):
    folder = tiny if model == "tiny" else PICTO_PATH
    ours = pipe if model == "tiny" else Pipeline.from_pretrained(PICTO_PATH, device="cpu", dtype="float32")
    config = ours.model.unet.config
    shape = 1, config.in_channels, config.sample_size, config.sample_size
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    prompt = "a red apple on a blue background"
    picture = ours(prompt, "a dog", latents=noise, sampler=sampler, num_inference_steps=12, guidance_scale=3.0).images[
        0
    ]
    texts = {"prompt": prompt, "negative_prompt": "a dog"}
    assert difference(picture, diffusers_picture(folder, scheduler, texts, 12, 3.0, noise, **options)) <= 2


def test_diffusers_draws_the_same_image_from_a_long_prompt_s_states(tiny, pipe):
    """Of two chunks with weights, against a negative prompt that an empty chunk fills up."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    prompt = "a (red:1.4) apple BREAK two [stars]"
    picture = pipe(prompt, "a dog", latents=noise, sampler="ddim", num_inference_steps=6, guidance_scale=3.0).images[0]
    empty, dog = (pipe.prompt_encoder(text).context for text in ("", "a dog"))
    texts = {
        "prompt_embeds": pipe.prompt_encoder(prompt).context,
        "negative_prompt_embeds": torch.cat([dog, empty], dim=1),
    }
    assert difference(picture, diffusers_picture(tiny, DDIMScheduler, texts, 6, 3.0, noise)) <= 2


def test_what_other_tools_take_is_taken(pipe):
    """Seeds to 2**64 - 1 and -1, empty prompts, sizes that do not divide, prompts of over 64 chunks."""
    with pytest.warns(UserWarning, match="height 30: rounded to 28, a multiple of 4"):
        output = pipe("", height=30, width=32, seed=2**64 - 1, num_inference_steps=1)
    assert output.images[0].size == (32, 28) and output.seeds == [2**64 - 1]
    drawn = [pipe("", num_inference_steps=1, seed=-1, num_images_per_prompt=2).seeds for _ in range(2)]
    assert drawn[0] != drawn[1] and all(b == a + 1 and 0 <= a < 2**32 for a, b in drawn)
    assert pipe.resolve(Request("a", seed=-1)).seed >= 0
    long = Request("a cat, " * 330, num_inference_steps=1)
    assert pipe.prompt_encoder.num_chunks(long) > 64 and pipe.generate([long])


@pytest.mark.parametrize(
    "change, word",
    [
        ({"height": 3}, "height 3: must be a multiple of 4"),
        ({"width": 10**9}, "width 1000000000"),
        ({"width": 0}, "width 0"),
        ({"num_inference_steps": 0}, "steps 0"),
        ({"num_inference_steps": 1001, "spacing": "trailing"}, "1001 steps"),
        ({"guidance_scale": float("nan")}, "guidance nan"),
        ({"seed": -2}, "seed -2"),
        ({"seed": 2**64}, "seed 18446744073709551616: must be from 0 to"),
        ({"guidance_rescale": 1.5}, "guidance rescale 1.5"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance interval 2 to 1"),
        ({"sampler": "dpm"}, "sampler 'dpm': choose from ddpm"),
        ({"spacing": "even"}, "spacing 'even': choose from linspace"),
        ({"eta": 0.5, "sampler": "euler"}, "eta 0.5"),
        ({"latents": torch.zeros(4, 8, 9)}, "latents: shape"),
        ({"prompt": "a cat, " * 2000}, "chunks of 14 tokens, at most 256"),
        ({"negative_prompt": "(a cat:1000)"}, "prompt weight 1000"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(pipe, change, word):
    good, bad = Request("a cat"), dataclasses.replace(Request("a cat"), **change)
    with pytest.raises(ValueError, match=word):
        pipe.stream([good, bad])


def test_float16_on_a_cpu_is_refused_by_name_and_replaced_where_pasted(recwarn):
    with pytest.raises(ValueError, match="float16: a CPU takes 88 times as long"):
        Pipeline.from_pretrained(device="cpu", dtype="float16")
    assert Pipeline.from_pretrained(device="cpu", torch_dtype=torch.float16).model.unet.dtype == torch.float32


@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_the_dtype_of_a_gpu_is_one_that_it_multiplies(monkeypatch, is_native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: is_native)
    assert choose_dtype("auto", torch.device("cuda")) == dtype
