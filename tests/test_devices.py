"""Devices: which one `auto` is; nothing is float64 on one that has none, nor mixed with what is on the host."""

import os

import numpy as np
import pytest
import torch
from foreign_device import ForeignTensor, SimulatedDevice
from PIL import Image

from ldm import hardware
from ldm.analysis import measure
from ldm.checkpoints.formats import probe_unet
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Request

HERE = {
    "cuda": "torch.cuda.is_available",
    "mps": "torch.backends.mps.is_available",
    "xpu": "torch.xpu.is_available",
}


@pytest.mark.parametrize("present", [(), ("xpu",), ("mps",), ("mps", "xpu"), ("cuda",), ("cuda", "xpu")])
def test_auto_is_the_first_accelerator_of_the_machine(present, monkeypatch):
    for name, function in HERE.items():
        monkeypatch.setattr(function, lambda name=name: name in present)
    device = hardware.best_device()
    assert device.type == (*present, "cpu")[0]
    has_float64 = device.type in ("cuda", "cpu")
    assert hardware.float64_device(device) == (device if has_float64 else torch.device("cpu"))


def test_memory_and_precision_are_asked_of_the_device(monkeypatch):
    class Properties:
        total_memory = 7

    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 5)
    sizes = [hardware.memory_bytes(torch.device(name)) for name in ("xpu", "mps", "cpu")]
    assert sizes == [7, 5, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda supported=supported: supported)
        assert hardware.preferred_dtype(torch.device("xpu")) == dtype
    assert hardware.preferred_dtype(torch.device("mps")) == torch.float32


@pytest.fixture
def there(monkeypatch):
    """A device without float64: by the one name that torch's CPU build can simulate.

    Inference mode, which knows no simulated tensors, is a mode without gradients meanwhile.
    """
    enter = lambda self: setattr(self, "guard", torch.set_grad_enabled(not self.mode))
    monkeypatch.setattr(torch.inference_mode, "__enter__", enter)
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda self, *_: self.guard.__exit__(None, None, None))
    device = SimulatedDevice("meta")
    on_host = lambda place: torch.device("cpu") if place.type == "meta" else place
    monkeypatch.setattr(measure, "float64_device", on_host)
    return device


@pytest.fixture
def twins(tiny, there):
    """A pipeline on the CPU, and the same one on the device."""
    load = lambda: Pipeline.from_pretrained(tiny, device="cpu", dtype="float32")
    here, away = load(), load()
    for pipe in (here, away):
        pipe.model.unet.attention = "math"
    for network in away.model.networks.values():
        there.to(network)
    return here, away


def pixels(image):
    return np.asarray(image, np.int16)


def test_the_simulated_device_has_no_float64_and_does_not_mix(there):
    with there:
        x = torch.ones(3).to("meta")
        assert type(x) is ForeignTensor and (2 * x).cpu().tolist() == [2, 2, 2]
        for wrong in (lambda: x.double(), lambda: torch.zeros(2, dtype=torch.float64, device="meta")):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        with pytest.raises(AssertionError, match="two devices"):
            x + torch.ones(3)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm_2_ancestral", "dpmpp_2m_sde", "unipc", "lcm"])
def test_a_sampler_makes_the_same_image_there(sampler, twins, there):
    request = Request("a red apple", seed=3, sampler=sampler, num_inference_steps=2, guidance_scale=2.0)
    here, away = twins
    expected = here.generate([request])[0]
    with there:
        image = away.generate([request])[0]
    assert there.operations > 300 and np.abs(pixels(image) - pixels(expected)).max() <= 1


def test_likelihood_and_inversion_are_the_same_there(twins, there):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    results = []
    for pipe, context in zip(twins, (torch.no_grad(), there), strict=True):
        with context:
            posterior = pipe.encode_images([image])
            record = measure.measure_likelihood(pipe, image, posterior, steps=2, probes=2)
            trip = measure.invert_image(pipe, image, posterior.mean, "a", "exact", 2, 1.5)
        assert trip.metrics["latent_max_error"] < 1e-11 and trip.state[0].dtype == torch.float64
        nats = [record[method]["log p(z)"]["nats"] for method in ("ode", "elbo")]
        results.append([*nats, record["vae"]["log p(picture | z)"]["nats"], trip.metrics["noise_std"]])
    assert results[1] == pytest.approx(results[0], rel=1e-3)


def test_a_network_is_probed_there(twins, there):
    here, away = twins
    expected = probe_unet(here.model.unet, here.model.text_encoders, here.model.sde)
    with there:
        found = probe_unet(away.model.unet, away.model.text_encoders, away.model.sde)
    assert found == pytest.approx(expected, abs=1e-4)
