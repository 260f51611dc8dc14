"""The laws of editing: what is not redrawn is the input's own, and an image is a function of its own request."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoints.formats import Checkpoint
from ldm.diffusion.samplers import SAMPLERS, sample
from ldm.diffusion.timesteps import SPACINGS, truncate_grid
from ldm.image_io import image_digest, to_pil
from ldm.nn.unet import UNet
from ldm.nn.vae import decode_latents
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request
from ldm.rng import Noise

RNG = np.random.default_rng(0)


def picture(height=32, width=32):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def white(*box, height=32, width=32, level=255):
    mask = Image.new("L", (width, height))
    mask.paste(level, box)
    return mask


IMAGE, OTHER, TALL = picture(), picture(), picture(48, 35)
MIXED = [
    Request("a red apple", seed=1),
    Request("a cat", seed=2, image=IMAGE, strength=0.7),
    Request("a cat", seed=4, image=IMAGE, strength=0.7, guidance_scale=1.0, clip_skip=1),
    Request("two stars", "a dog", seed=3, image=OTHER, mask=white(4, 4, 20, 20), guidance_scale=5.0),
    Request("a dog", seed=5, image=TALL, mask=white(0, 0, 9, 9, height=48, width=35), sampler="ddpm", strength=0.8),
    Request("a cat", seed=6, clip_skip=1),
    Request("a dog", seed=7, image=IMAGE, mask=white(3, 0, 30, 5, level=120), sampler="heun"),
    Request("a cat", seed=8, image=OTHER, strength=0.4, sampler="rk45"),
    Request("a cat", seed=9, upscale=1.5),
    Request("two stars", seed=10, image=IMAGE, mask=white(0, 8, 32, 32), upscale=2.0, upscale_strength=0.4),
    Request("a dog", seed=11, image=IMAGE, strength=0.0),
]


def difference(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()


@pytest.fixture(scope="module")
def nine(pipe):
    """A pipeline whose U-Net has nine channels, its first four those of `pipe`."""
    torch.manual_seed(1)
    unet = UNet(dataclasses.replace(pipe.model.unet.config, in_channels=9)).eval().requires_grad_(False)
    model: Checkpoint = dataclasses.replace(pipe.model, unet=unet)
    return Pipeline(model)


@pytest.fixture(scope="module")
def alone(pipe):
    return [pipe.generate([request])[0] for request in MIXED]


@pytest.mark.parametrize("batch_size", [3, 8])
def test_an_edited_image_is_the_same_in_any_batch_and_any_order(pipe, alone, batch_size):
    other = Pipeline(pipe.model, batch_size)
    for order in (range(len(MIXED)), [5, 10, 2, 8, 6, 0, 9, 3, 1, 4, 7]):
        pictures = other.generate([MIXED[k] for k in order])
        assert max(difference(alone[k], drawn) for k, drawn in zip(order, pictures, strict=True)) <= 1


def test_requests_that_differ_in_one_field_of_editing_differ(pipe):
    """Else the laws above would hold for a pipeline that ignores the field."""
    base = Request("a cat", seed=2, image=IMAGE, mask=white(0, 0, 32, 32), strength=0.7)
    changes = [
        {"image": OTHER},
        {"mask": white(8, 8, 24, 24)},
        {"strength": 0.9},
        {"clip_skip": 1},
        {"upscale": 1.5},
        {"upscale": 1.5, "upscale_strength": 0.9},
    ]
    pictures = pipe.generate([base, *(dataclasses.replace(base, **change) for change in changes)])
    assert all(a.size != b.size or difference(a, b) > 1 for k, a in enumerate(pictures) for b in pictures[:k])


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm", "predictor_corrector"])
def test_a_black_mask_and_strength_zero_give_the_input_back(pipe, nine, sampler):
    for model in (pipe, nine):
        black, none = model.generate(
            [
                Request("a cat", image=IMAGE, mask=white(0, 0, 0, 0), sampler=sampler),
                Request("a cat", image=IMAGE, strength=0.0, sampler=sampler),
            ]
        )
        assert black.tobytes() == none.tobytes() == IMAGE.tobytes()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_not_under_the_mask_is_the_input_s_own_bit_for_bit(pipe, sampler):
    mask = white(5, 6, 17, 30)
    steps = max(6, SAMPLERS[sampler].min_steps)
    image = pipe("a cat", image=IMAGE, mask=mask, sampler=sampler, seed=3, num_inference_steps=steps).images[0]
    drawn = np.asarray(image)
    inside = np.asarray(mask) > 0
    assert (drawn[~inside] == np.asarray(IMAGE)[~inside]).all()
    assert difference(drawn[inside], np.asarray(IMAGE)[inside]) > 1


def test_a_soft_mask_blends_what_is_drawn_with_the_input(pipe):
    hard, soft = (pipe("a cat", image=IMAGE, mask=white(0, 0, 32, 32, level=n)).images[0] for n in (255, 128))
    half = (127 * np.asarray(IMAGE, dtype=float) + 128 * np.asarray(hard, dtype=float)) / 255
    assert difference(soft, half) <= 1


def test_what_the_mask_keeps_steers_what_it_redraws(pipe):
    """The redrawn half differs where the kept half of the input does, though nothing of the input lies in it."""
    mask, other = white(0, 0, 16, 32), IMAGE.copy()
    other.paste(OTHER.crop((16, 0, 32, 32)), (16, 0))
    drawn = [pipe("a cat", image=image, mask=mask).images[0].crop((0, 0, 16, 32)) for image in (IMAGE, other)]
    assert difference(*drawn) > 1


def test_image_to_image_is_the_sampler_on_the_noised_posterior_mean(pipe):
    """Of the last int(strength n) steps."""
    drawn = pipe("a cat", image=IMAGE, strength=0.5, num_inference_steps=7, sampler="heun", seed=4, guidance_scale=1.0)
    grid, noise = truncate_grid(SPACINGS["trailing"](pipe.model.sde, 7), 0.5), Noise([4])
    assert len(grid) == 4
    with torch.inference_mode():
        z = pipe.encode_images([IMAGE]).mean
        x = grid[0].alpha * z + grid[0].sigma * noise(z)
        z = sample(SAMPLERS["heun"].function, pipe.cfg_denoiser(["a cat"], [""]), x, grid, noise)
        (wanted,) = to_pil(decode_latents(pipe.model.vae, z))
    assert difference(drawn.images[0], wanted) == 0


def test_a_second_pass_is_image_to_image_of_the_larger_first(pipe):
    first = pipe("a cat", seed=5, num_inference_steps=8).images[0]
    larger = first.resize((48, 48), Image.Resampling.LANCZOS)
    second = pipe("a cat", seed=5, num_inference_steps=8, image=larger, strength=0.5).images[0]
    both = pipe("a cat", seed=5, num_inference_steps=8, upscale=1.51).images[0]
    assert both.size == (48, 48) and difference(both, second) <= 1


@pytest.mark.parametrize("request_", MIXED)
def test_progress_adds_up_to_one_image(pipe, request_):
    shares = []
    pipe.generate([request_], shares.append)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0


def test_an_image_gives_the_size_unless_one_is_said(pipe):
    assert pipe("a cat", image=TALL).images[0].size == (32, 48)
    assert pipe("a cat", image=TALL, width=40, height=36).images[0].size == (40, 36)
    scaled = TALL.resize((40, 36), Image.Resampling.LANCZOS)
    assert difference(*(pipe("a", image=i, width=40, height=36, seed=2).images[0] for i in (TALL, scaled))) == 0


def test_a_network_of_nine_channels_sees_the_mask_and_the_image_without_what_is_redrawn(nine):
    asked = []
    hook = nine.model.unet.register_forward_pre_hook(lambda module, args: asked.append(args[2].concat))
    try:
        mask = white(5, 8, 12, 16)  # 5 begins within a latent, which is redrawn as a whole
        nine("a cat", image=IMAGE, mask=mask, guidance_scale=3.0, num_inference_steps=1)
    finally:
        hook.remove()
    (shown,) = asked
    assert shown.shape == (2, 5, 8, 8) and torch.equal(shown[0], shown[1])  # with text and without
    wanted = torch.zeros(8, 8)
    wanted[2:4, 1:3] = 1
    assert torch.equal(shown[0, 0], wanted)
    grey = IMAGE.copy()
    grey.paste((127, 127, 127), (5, 8, 12, 16))
    near, far = ((shown[0, 1:] - nine.encode_images([image]).mean[0]).abs().max() for image in (grey, IMAGE))
    assert near < 3e-3 and far > 10 * near


def test_rows_of_nine_channels_share_calls(nine):
    requests = [r for r in MIXED if r.image is not None and r.sampler != "rk45"]
    apart = [nine.generate([request])[0] for request in requests]
    together = Pipeline(nine.model, 3).generate(requests)
    assert max(difference(a, b) for a, b in zip(apart, together, strict=True)) <= 1


def test_threads_on_one_pipeline_draw_what_each_generates_alone(pipe):
    """While a third one encodes; several rounds, each with texts that nobody has read yet."""
    halves = MIXED[:2], MIXED[2:5]
    wanted = [pipe.generate(half) for half in halves]
    mean = pipe.encode_images([IMAGE]).mean
    for _ in range(4):
        pipe.prompt_encoder.clear()
        with ThreadPoolExecutor(3) as threads:
            drawn = [threads.submit(pipe.generate, half) for half in halves]
            encoded = [threads.submit(pipe.encode_images, [IMAGE]) for _ in range(10)]
        assert all(torch.equal(z.result().mean, mean) for z in encoded)
        for half, pictures in zip(drawn, wanted, strict=True):
            assert max(difference(a, b) for a, b in zip(half.result(), pictures, strict=True)) == 0


def test_four_threads_share_prompts_of_several_chunks(pipe):
    """All ask for the same long prompts at the same time, in orders of their own, and nobody has read them yet."""
    long = "a (red apple:1.3) to the left of a dog, two stars, " * 3
    texts = [long, "a cat", f"{long} BREAK a cat", "two stars"]
    requests = [Request(t, long[k:], k, num_inference_steps=2) for k, t in enumerate(texts)]
    wanted = [pipe.generate([request])[0] for request in requests]
    assert len(set(map(pipe.prompt_encoder.num_chunks, requests))) > 1

    def draw(first):
        order = [*range(first, 4), *range(first)]
        return [(k, pipe.generate([requests[k]])[0]) for k in order]

    for _ in range(5):
        pipe.prompt_encoder.clear()
        with ThreadPoolExecutor(4) as threads:
            drawn = [pair for pairs in threads.map(draw, range(4)) for pair in pairs]
        assert len(drawn) == 16 and all(difference(picture, wanted[k]) == 0 for k, picture in drawn)


def test_a_record_tells_images_by_their_pixels(pipe):
    records = [
        Request("a", image=i, mask=m).to_record() for i, m in ((IMAGE, None), (IMAGE.copy(), OTHER), (OTHER, None))
    ]
    assert records[0]["image"] == records[1]["image"] != records[2]["image"] != records[1]["mask"]
    assert records[0]["mask"] is None and records[1]["mask"] == image_digest(OTHER.convert("L"))
    turned = [Request("a", image=Image.new("RGB", size)).to_record()["image"] for size in ((2, 3), (3, 2))]
    assert turned[0] != turned[1]


@pytest.mark.parametrize("change", [{"strength": 0.1}, {"upscale": 2.0, "upscale_strength": 0.1}])
def test_a_strength_that_leaves_no_step_runs_one_and_says_so(pipe, change):
    """As a tenth of ten steps."""
    request = Request("a", image=IMAGE, num_inference_steps=5, **change)
    with pytest.warns(UserWarning, match="strength 0.1 with 5 steps: one step is run"):
        grid = pipe.batch_scheduler.time_grid(pipe.resolve(request))
    if "strength" in change:
        assert len(grid) == 2 and difference(pipe.generate([request])[0], IMAGE) > 0


@pytest.mark.parametrize(
    "change, word",
    [
        ({"mask": white(0, 0, 9, 9)}, "mask: needs an image"),
        ({"strength": 0.5}, "strength: needs an image"),
        ({"image": IMAGE, "strength": 1.5}, "strength 1.5: must be from 0 to 1"),
        ({"image": IMAGE, "strength": float("nan")}, "strength nan"),
        ({"image": Image.new("RGB", (3, 40))}, "image of 3x40: width must be from 4 to 8192"),
        ({"image": Image.new("RGB", (8, 9000))}, "image of 8x9000: height must be from 4 to 8192"),
        ({"image": Image.new("RGB", (3, 40)), "width": 0}, "image of 3x40: width"),
        ({"image": Image.new("RGB", (3, 40)), "width": 3}, "image of 3x40: height|width"),
        ({"image": IMAGE, "mask": white(0, 0, 9, 9, width=28)}, "mask of 28x32: its image is 32x32"),
        ({"image": TALL, "mask": white(0, 0, 9, 9), "width": 40, "height": 36}, "mask of 32x32: its image is 35x48"),
        ({"upscale": 1.0}, "upscale 1.0: must be above 1"),
        ({"upscale": 1000.0}, "upscale 1000.0"),
        ({"upscale": 1.1}, "upscale 1.1 of 32x32: must add 4 pixels"),
        ({"upscale": 1.2, "width": 16}, "upscale 1.2 of 16x32"),
        ({"upscale": 2.0, "upscale_strength": -1.0}, "upscale strength -1.0"),
        ({"clip_skip": 9}, "clip skip 9"),
        ({"original_size": (1, -1)}, r"original_size \(1, -1\)"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_anything_is_drawn(pipe, change, word):
    with pytest.raises(ValueError, match=word):
        pipe.stream([Request("a cat"), dataclasses.replace(Request("a cat"), **change)])


def test_a_model_that_inpaints_asks_for_an_image(nine, pipe):
    with pytest.raises(ValueError, match="this is an inpainting model, which needs an image"):
        nine.stream([Request("a cat")])
    with pytest.raises(ValueError, match="takes 9 channels, got 4"):
        nine.cfg_denoiser(["a cat"], [""])(torch.zeros(1, 4, 8, 8), nine.model.sde.level(0.5))
    eight = UNet(dataclasses.replace(pipe.model.unet.config, in_channels=8))
    with pytest.raises(ValueError, match="U-Net of 8 channels: only 4 and 9 are known"):
        Pipeline(dataclasses.replace(pipe.model, unet=eight)).stream([Request("a cat", image=IMAGE)])
