"""Measurements of an image under a model: its log-likelihood, and the noise it is generated from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldm.analysis.inversion import INVERSION_SCHEMES, measure_round_trip
from ldm.analysis.likelihood import (
    Elbo,
    LikelihoodEstimate,
    estimate_elbo,
    freeze_noise,
    gaussian_entropy,
    hutchinson_trace,
    log_likelihood,
    log_likelihood_adaptive,
    sigma_vae_log_prob,
)
from ldm.diffusion.denoiser import Denoise, NFECounter
from ldm.diffusion.timesteps import log_snr
from ldm.errors import choose
from ldm.files import atomic_write
from ldm.hardware import float64_device
from ldm.image_io import from_uint8, to_pil
from ldm.nn.vae import Posterior, decode_latents, vae_scale_factor
from ldm.pipeline.pipeline import Pipeline
from ldm.rng import Noise


def measure_likelihood(
    pipe: Pipeline,
    image: Image.Image,
    posterior: Posterior,
    prompt: str | None = None,
    method: str = "both",
    steps: int = 16,
    tolerance: float | None = None,
    probes: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """log p(z | prompt), log p(z) and their difference, z ~ q(z | image): JSON values, nats and bits per dimension.

    `method` is ode, elbo or both. The prompt and the empty prompt share the latent, probes and noise. The
    autoencoder's part is separate, under "vae". `posterior` is `pipe.encode_images([image])`.
    """
    posterior = to_host(posterior, pipe)
    texts = {"log p(z)": ""} if prompt is None else {"log p(z | prompt)": prompt, "log p(z)": ""}
    record: dict[str, Any] = {"latent": list(posterior.mean.shape[1:])}
    if method in ("ode", "both"):
        flows = {
            name: ode_log_likelihood(pipe, posterior, text, steps, tolerance, probes, seed)
            for name, text in texts.items()
        }
        record["ode"] = compare_estimates(flows)
    if method in ("elbo", "both"):
        bounds = {name: prompt_elbo(pipe, posterior, text, steps, probes, seed) for name, text in texts.items()}
        record["elbo"] = compare_estimates({name: part.bound for name, part in bounds.items()})
        record["elbo_terms"] = {name: part.to_records()[0] for name, part in bounds.items()}
    record["vae"] = vae_likelihood(pipe, image, posterior, seed)
    return record


def to_host(posterior: Posterior, pipe: Pipeline) -> Posterior:
    """A posterior where its numbers can be float64."""
    device = float64_device(pipe.device)
    return Posterior(posterior.mean.to(device), posterior.std.to(device))


def ode_log_likelihood(
    pipe: Pipeline, posterior: Posterior, prompt: str, steps: int, tolerance: float | None, probes: int, seed: int
) -> LikelihoodEstimate:
    """log p(z | text) by the probability-flow ODE, with fixed steps or to a tolerance."""
    sde, denoise, noise = pipe.model.sde, prompt_denoiser(pipe, prompt, posterior.mean), Noise([seed])
    z = posterior.sample(noise(posterior.mean))
    if tolerance is None:
        return log_likelihood(denoise, z, log_snr(sde, steps), hutchinson_trace(noise, probes))
    return log_likelihood_adaptive(denoise, z, sde, hutchinson_trace(freeze_noise(noise), probes), tolerance=tolerance)


def prompt_denoiser(pipe: Pipeline, prompt: str, z: Tensor, guidance: float = 1.0) -> Denoise:
    """The denoiser of latents like z [1, C, h, w], conditioned on a prompt.

    Where the pipeline's device has no float64, latents are on the host, and float32 copies of them on the device.
    """
    height, width = (n * vae_scale_factor(pipe.model.vae) for n in z.shape[-2:])
    denoise = pipe.cfg_denoiser([prompt], [""], guidance, size=(height, width))
    if float64_device(pipe.device) == pipe.device:
        return denoise
    return lambda x, levels: denoise(x.to(pipe.device, torch.float32), levels).to(x.device)


def prompt_elbo(pipe: Pipeline, posterior: Posterior, prompt: str, steps: int, num_samples: int, seed: int) -> Elbo:
    """The continuous ELBO of log p(z | text), of the same z as the flow's."""
    noise = Noise([seed])
    z = posterior.sample(noise(posterior.mean))
    return estimate_elbo(prompt_denoiser(pipe, prompt, z), z, log_snr(pipe.model.sde, steps + 1), noise, num_samples)


def vae_likelihood(pipe: Pipeline, image: Image.Image, posterior: Posterior, seed: int) -> dict[str, dict[str, float]]:
    """The autoencoder's part: the entropy of q(z | image), and log p(image | z), of pixels in [-1, 1]."""
    x = from_uint8(np.array(image)[None]).to(posterior.mean.device)
    z = posterior.sample(Noise([seed])(posterior.mean))
    decoded = decode_latents(pipe.model.vae, z.to(pipe.device)).to(x.device)
    nats = LikelihoodEstimate(sigma_vae_log_prob(x, decoded)[:, None], x.numel(), 1)
    error = (x - decoded).double().square().mean().sqrt().item()
    pixels = {"nats": nats.nats.item(), "bits_per_dim": nats.bits_per_dim.item(), "sigma": error}
    return {"log p(picture | z)": pixels, "entropy of q(z | picture)": {"nats": gaussian_entropy(posterior.std).item()}}


def compare_estimates(estimates: dict[str, LikelihoodEstimate]) -> dict[str, dict[str, float]]:
    """Records by name and, of two estimates with common noise, their difference."""
    if len(estimates) == 2:
        first, second = estimates.values()
        estimates = {**estimates, "difference": first - second}
    return {name: estimate.to_records()[0] for name, estimate in estimates.items()}


@dataclass(frozen=True)
class InversionResult:
    """The state that an inversion ends in, the image decoded from it, and metrics of the round trip."""

    state: tuple[Tensor, ...]
    image: Image.Image
    metrics: dict[str, float]


@torch.inference_mode()
def invert_image(
    pipe: Pipeline,
    image: Image.Image,
    z: Tensor,
    prompt: str,
    scheme: str,
    steps: int,
    guidance: float,
    **options: float,
) -> InversionResult:
    """An image's latent z to its noise and back by a row of `INVERSION_SCHEMES`; errors of z, and in levels of 255."""
    chosen, grid = choose(INVERSION_SCHEMES, scheme, "scheme"), log_snr(pipe.model.sde, steps)
    z = z.to(float64_device(pipe.device))
    denoise = NFECounter(prompt_denoiser(pipe, prompt, z, guidance))
    trip = measure_round_trip(chosen, denoise, z, grid, **options)
    through_vae, back = to_pil(decode_latents(pipe.model.vae, torch.cat([z, trip.x0.to(z)]).to(pipe.device)))
    noise = trip.state[0]
    metrics = {
        "latent_max_error": trip.max_error.item(),
        "latent_rms_error": trip.rms_error.item(),
        "noise_mean": noise.mean().item(),
        "noise_std": noise.std().item(),
        "evaluations": denoise.nfe,
        "picture_rms_error": rms_pixel_error(image, back),
        "picture_rms_error_of_vae": rms_pixel_error(image, through_vae),
    }
    return InversionResult(trip.state, back, metrics)


def save_inversion_state(state: Sequence[Tensor], path: Path, settings: Mapping[str, object]) -> None:
    """Write the state of an inversion, float64 safetensors: the noise, and what else decoding needs."""
    names = ("noise", "below")
    with atomic_write(path) as draft:
        tensors = {name: part.contiguous().cpu() for name, part in zip(names, state, strict=False)}
        save_file(tensors, draft, {name: str(value) for name, value in settings.items()})


def rms_pixel_error(a: Image.Image, b: Image.Image) -> float:
    """The root mean square difference of two images of one size, in levels of 255."""
    return float(np.sqrt(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)))
