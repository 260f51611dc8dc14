"""picto from prompt to pixels: ours and diffusers' StableDiffusionPipeline on the same files, steps and precision.

    python scripts/bench_generate.py [--dtype bfloat16] [--batch 1] [--steps 20] [--clock cpu|wall] [--threads 1]

The pictures must agree before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from _bench import alternate, clock, report

import ldm.nn  # noqa: F401  before diffusers
from ldm import Pipeline, Request
from ldm.checkpoints.formats import PICTO_PATH
from ldm.nn.vae import latent_shape

from diffusers import DDIMScheduler, StableDiffusionPipeline  # isort: skip

PROMPTS = ["a red apple", "a cat on a yellow background", "two stars", "a blue car"]
GUIDANCE = 3.0


def diffusers_pipeline(dtype: torch.dtype, channels_last: bool) -> StableDiffusionPipeline:
    """Their pipeline as its documentation makes it; channels_last is the documented tuning for CPUs."""
    pipe = StableDiffusionPipeline.from_pretrained(PICTO_PATH, dtype=dtype, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="cpu", choices=["cpu", "wall"])
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    prompts = (PROMPTS * args.batch)[: args.batch]
    ours = Pipeline.from_pretrained(PICTO_PATH, device="cpu", dtype=dtype, batch_size=args.batch)
    native = ours.resolve(Request(prompts[0]))
    shape = args.batch, *latent_shape(ours.model.vae, native.height or 0, native.width or 0)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def draw(pipe: Pipeline) -> list:
        settings = {"num_inference_steps": args.steps, "guidance_scale": GUIDANCE, "sampler": "ddim"}
        return pipe(prompts, latents=noise, **settings).images

    def draw_theirs(pipe: StableDiffusionPipeline) -> list:
        size = {"height": native.height, "width": native.width}
        settings = {"num_inference_steps": args.steps, "guidance_scale": GUIDANCE, **size}
        return pipe(prompts, latents=noise.to(dtype), **settings).images

    plain, tuned = diffusers_pipeline(dtype, False), diffusers_pipeline(dtype, True)
    agree(draw, draw_theirs, ours, plain, dtype)
    contestants = {
        "ldm": functools.partial(draw, ours),
        "diffusers": functools.partial(draw_theirs, plain),
        "diffusers, channels_last": functools.partial(draw_theirs, tuned),
    }
    about = {"dtype": args.dtype, "batch": args.batch, "steps": args.steps, "clock": args.clock}
    report("ldm", alternate(contestants, args.rounds, clock(args.clock)), about, args.out)


def agree(draw, draw_theirs, ours: Pipeline, theirs: StableDiffusionPipeline, dtype: torch.dtype) -> None:
    """float32: within 2 of 255. bfloat16: no further than 1.15 times diffusers' distance from the float32 picture."""
    size = ours.batch_scheduler.batch_size
    exact = pixels(draw(Pipeline.from_pretrained(PICTO_PATH, device="cpu", dtype="float32", batch_size=size)))
    a, b = (pixels(images) for images in (draw(ours), draw_theirs(theirs)))
    if dtype == torch.float32:
        worst = (a - b).abs().max().item()
        print(f"agreement: {worst:.0f} of 255 at most")
        if worst > 2:
            raise SystemExit("error: the pictures differ, nothing was timed")
        return
    errors = [(x - exact).square().mean().sqrt().item() for x in (a, b)]
    print(f"root mean square distance from float32, of 255: ldm {errors[0]:.2f}, diffusers {errors[1]:.2f}")
    if errors[0] > 1.15 * errors[1]:
        raise SystemExit("error: further from float32 than diffusers, nothing was timed")


def pixels(images: list) -> torch.Tensor:
    """PIL pictures as float32 levels 0 to 255."""
    return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]).float()


if __name__ == "__main__":
    main()
