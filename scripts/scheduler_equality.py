"""How far our images are from diffusers' for the same scheduler_config.json, as a Markdown table.

    python scripts/scheduler_equality.py [--steps 8,10,20,30] [--model weights/picto]

Timesteps: the largest difference. Images: the largest of all pixels, of 255, from the same noise and network.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from ldm import Pipeline
from ldm.checkpoints.formats import PICTO_PATH
from ldm.checkpoints.schedule import DIFFUSERS_PREDICTION_TYPES, parse_scheduler_config
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.samplers import SAMPLERS, sample
from ldm.diffusion.sde import VPSDE
from ldm.diffusion.timesteps import SPACINGS, end_at_lowest
from ldm.files import read_json
from ldm.image_io import to_pil
from ldm.nn.vae import decode_latents, latent_shape
from ldm.rng import Noise

PROMPT = "a red apple on a blue background"
# Stable Diffusion's noise levels (picto's begin in a step that ours take by Euler's), and the fields of 1.x' folders
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": False}
SD1 = {**SD, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "prediction_type": "epsilon"}
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC-1": ("UniPCMultistepScheduler", {"solver_order": 1}),
    "UniPC-2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "UniPC-3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "UniPC-2, sigma_min": ("UniPCMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "sigma_min"}),
    "DPM++ 2M, sigma_min": ("DPMSolverMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "sigma_min"}),
    "DEIS-2": ("DEISMultistepScheduler", {**SD, "solver_order": 2}),
    "DEIS-3": ("DEISMultistepScheduler", {**SD, "solver_order": 3}),
    "KDPM2": ("KDPM2DiscreteScheduler", SD),
    "singlestep 2": ("DPMSolverSinglestepScheduler", {**SD, "solver_order": 2}),
    "singlestep 3": ("DPMSolverSinglestepScheduler", {**SD, "solver_order": 3}),
    "DDIM of SD 1.x": ("DDIMScheduler", SD1),
    "PNDM of SD 1.x": ("PNDMScheduler", {**SD1, "skip_prk_steps": True}),
    "PNDM": ("PNDMScheduler", {**SD1, "skip_prk_steps": False}),
}
STRIDED = "DDIMScheduler", "PNDMScheduler"  # step by N // n on any grid, which `leading` alone is meant for


def sample_with_diffusers(name: str, config: dict[str, Any], denoise: Denoise, sde: VPSDE, x: torch.Tensor, n: int):
    """The timesteps and the sample of a scheduler of diffusers whose network is a denoiser."""
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(n)
    types = {theirs: ours for ours, theirs in DIFFUSERS_PREDICTION_TYPES.items()}
    prediction = PREDICTIONS[types[config["prediction_type"]]]
    in_units_of_alpha = name.startswith("KDPM2")
    x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5 if in_units_of_alpha else x
    for t in scheduler.timesteps:
        level = sde.level_at_timestep(float(t))
        alpha, sigma = torch.tensor(level.alpha), torch.tensor(level.sigma)
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(prediction.to_output(denoise(scaled, level), scaled, alpha, sigma), t, x).prev_sample
    return scheduler.timesteps.tolist(), x


@torch.no_grad()
def measure_difference(pipe: Pipeline, folder_config: dict[str, Any], solver: str, n: int) -> tuple[float, float]:
    """The largest differences of timesteps and of pixels, for one solver in place of the folder's own class."""
    name, fields = SOLVERS[solver]
    config = {**folder_config, **fields, "_class_name": name}
    settings = parse_scheduler_config(config)
    denoise = pipe.cfg_denoiser([PROMPT], [""])
    x = Noise([0])(torch.empty(1, *latent_shape(pipe.model.vae, 64, 64)))
    grid = SPACINGS[settings.spacing](settings.sde, n)
    grid = end_at_lowest(grid) if settings.final_sigmas_type == "sigma_min" else grid
    ours = sample(SAMPLERS[settings.sampler].function, denoise, x, grid, Noise([0]))
    timesteps, theirs = sample_with_diffusers(name, config, denoise, settings.sde, x, n)
    images = [np.asarray(to_pil(decode_latents(pipe.model.vae, z))[0], float) for z in (ours, theirs)]
    gaps = [min(abs(settings.sde.timestep(level.t) - t) for t in timesteps) for level in grid[:-1]]
    return max(gaps), float(abs(images[0] - images[1]).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PICTO_PATH)
    parser.add_argument("--steps", default="8,10,20,30")
    args = parser.parse_args()
    pipe, steps = Pipeline.from_pretrained(args.model), [int(n) for n in args.steps.split(",")]
    config = read_json(args.model / "scheduler" / "scheduler_config.json")
    print(f"| solver | spacing | {' | '.join(f'{n} steps' for n in steps)} |\n|{'---|' * (len(steps) + 2)}")
    for solver in SOLVERS:
        for spacing in ("leading",) if SOLVERS[solver][0] in STRIDED else ("linspace", "leading", "trailing"):
            cells = (measure_difference(pipe, {**config, "timestep_spacing": spacing}, solver, n) for n in steps)
            print(
                f"| {solver} | {spacing} | {' | '.join(f'{gap:.0f}, {most:.0f}' for gap, most in cells)} |", flush=True
            )


if __name__ == "__main__":
    main()
