"""What a request may hold in Python alone: embeddings, explicit grids, latents; and what is told of its steps."""

import json

import numpy as np
import pytest
import torch

from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request, complete_record

STEPS = {"sampler": "ddim", "guidance_scale": 3.0, "seed": 4}
TRAILING = (999, 749, 499, 249)


def difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


def embeds(pipe, prompt):
    return pipe.prompt_encoder(prompt).context[0]


@pytest.fixture(scope="module")
def plain(pipe):
    return pipe("a cat", num_inference_steps=4, spacing="trailing", **STEPS).images[0]


def requests(pipe):
    """Requests that all give the image of `plain`."""
    levels = pipe.batch_scheduler.time_grid(pipe.resolve(Request("", timesteps=TRAILING)))
    sigmas = tuple(level.sigma_over_alpha for level in levels)
    usual = {"num_inference_steps": 4, "spacing": "trailing", **STEPS}
    return [
        Request("a cat", timesteps=TRAILING, **STEPS),
        Request("a cat", sigmas=sigmas, **STEPS),
        Request("a cat", sigmas=sigmas[:-1], **STEPS),
        Request("", prompt_embeds=embeds(pipe, "a cat"), **usual),
        Request("a cat", negative_prompt_embeds=embeds(pipe, ""), **usual),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_they_are_generated_in_any_batch(pipe, plain, batch_size):
    images = Pipeline(pipe.model, batch_size).generate(requests(pipe))
    assert max(difference(image, plain) for image in images) <= 1


def test_the_steps_may_be_divided_at_any_share(pipe, plain):
    usual = {"num_inference_steps": 4, "spacing": "trailing", **STEPS}
    (half,) = pipe.generate([Request("a cat", denoising_end=0.5, output_type="latent", **usual)])
    assert half.shape == (4, 8, 8)
    (whole,) = pipe.generate([Request("a cat", denoising_start=0.5, latents=half, **usual)])
    assert difference(whole, plain) <= 1


def test_latents_are_what_the_image_is_decoded_from(pipe, plain):
    (latents,) = pipe.generate(
        [Request("a cat", output_type="latent", num_inference_steps=4, spacing="trailing", **STEPS)]
    )
    again = pipe.generate([Request("", image=plain, image_latents=latents, strength=0.01, num_inference_steps=100)])
    assert difference(again[0], plain) < 30


def test_each_evaluation_is_told_and_may_be_the_last(pipe):
    request = pipe.resolve(Request("a cat", timesteps=TRAILING, output_type="latent", **STEPS))
    told = []
    for stop, count in ((None, 4), (1, 2)):
        told.clear()
        ((_, latents),) = pipe.batch_scheduler.run(
            [request], lambda delta: None, lambda end, stop=stop: told.append(end) or end.nfe == stop
        )
        assert [end.timestep for end in told] == list(TRAILING[:count])
        assert [end.nfe for end in told] == [*range(count)]
        assert torch.equal(told[-1].latents[0], latents)


def test_a_record_holds_what_is_given(pipe):
    request = pipe.resolve(Request("a cat", timesteps=TRAILING, denoising_end=0.5, **STEPS))
    record = complete_record(json.loads(json.dumps(request.to_record())))
    assert Request(**record) == request and "sigmas" not in record


def test_metadata_names_the_tensors_that_it_lacks(pipe):
    request = pipe.resolve(Request("a cat", prompt_embeds=embeds(pipe, "a cat"), **STEPS))
    assert json.loads(pipe.metadata(request, "tiny")["ldm"])["tensors"] == ["prompt_embeds"]
    assert "tensors" not in json.loads(pipe.metadata(pipe.resolve(Request("a cat")), "tiny")["ldm"])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"timesteps": (1, 2)}, "timesteps 1, 2: must fall"),
        ({"timesteps": (1000,)}, "from 999 or less"),
        ({"sigmas": (0.5, 1.0)}, "sigmas 0.5, 1.0: must fall"),
        ({"timesteps": (2, 1), "sigmas": (2, 1)}, "one of them"),
        ({"denoising_start": 0.5, "denoising_end": 0.5}, "must be 0 <= start < end <= 1"),
        ({"output_type": "gif"}, "output_type 'gif'"),
        ({"prompt_embeds": torch.zeros(5, 32)}, "shape .5, 32., expected"),
        ({"prompt_embeds": torch.zeros(16, 31)}, "shape .16, 31., expected"),
        ({"image_latents": torch.zeros(4, 9, 9)}, "image_latents: shape"),
    ],
)
def test_others_are_refused(pipe, fields, said):
    with pytest.raises(ValueError, match=said):
        pipe.resolve(Request("a", **fields))
