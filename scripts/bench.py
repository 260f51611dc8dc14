"""How long a part takes, ours beside diffusers' on the same weights and inputs, which must agree before it is timed.

    python scripts/bench.py unet|vae|text|pipeline [--dtype bfloat16] [--size 512] [--batch 1] [--rounds 7] [--best]

`unet` is a step of SD 1.5 with guidance, `vae` its decoder and `text` its text encoder, each with random weights;
`pipeline` is the shipped model from prompt to pixels. D is diffusers as its documentation makes it; `--best` adds the
same in channels_last. Contestants run in turn, on one thread unless `--threads` says more, by the process's CPU time
unless `--clock wall`. What is printed is the median of the rounds' ratios, and its 90 % interval.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _bench import alternate, clock, report
from torch import Tensor, nn

import ldm.nn  # noqa: F401  before diffusers
from ldm import Pipeline, Request
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.formats import PICTO_PATH
from ldm.checkpoints.keys import diffusers_key
from ldm.conditioning import Conditioning
from ldm.hardware import to_device
from ldm.nn.text_encoders import build_text_encoder
from ldm.nn.unet import UNet, UNetConfig
from ldm.nn.vae import build_vae, decode_latents, latent_shape

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # isort: skip
from transformers import CLIPTextConfig, CLIPTextModel  # isort: skip

FAMILY, CPU = FAMILIES["sd1"], torch.device("cpu")
PROMPTS = ["a red apple", "a cat on a yellow background", "two stars", "a blue car"]
MAX_RELATIVE = 1e-4  # of float32 outputs, by their largest value; of a whole picture, 2 of 255
MAX_BFLOAT16_RATIO = 1.15  # of our distance from float32 to diffusers'
COMPONENTS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
OURS, D, BEST = "ldm", "diffusers", "diffusers, channels_last"

Run = Callable[[], Any]


class Match(NamedTuple):
    """Contestants by name, ours in float32 where they are not, and an output as a tensor."""

    runs: Mapping[str, Run]
    exact: Run
    tolerance: float = MAX_RELATIVE
    to_tensor: Callable[[Any], Tensor] = Tensor.float


def module_match(
    args: argparse.Namespace,
    ours: nn.Module,
    theirs: nn.Module,
    run_ours: Callable[[Any], Run],
    run_theirs: Callable[[Any], Run],
) -> Match:
    """Of one network: `run_ours` and `run_theirs` give, for a network of that side, what is timed."""
    dtype = getattr(torch, args.dtype)
    component = COMPONENTS[args.part]
    names = {diffusers_key(component, name): name for name in ours.state_dict()}
    ours.load_state_dict({names[diffusers_key(component, name)]: a for name, a in theirs.state_dict().items()})
    theirs, ours = theirs.to(dtype).eval(), to_device(ours.eval(), CPU, dtype)
    exact = to_device(copy.deepcopy(ours), CPU, torch.float32) if dtype != torch.float32 else ours
    runs = {OURS: run_ours(ours), D: run_theirs(theirs)}
    if args.best:
        tuned = copy.deepcopy(theirs).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        runs[BEST] = run_theirs(tuned)
    return Match(runs, run_ours(exact))


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def unet(args: argparse.Namespace) -> Match:
    """A step of SD 1.5 with guidance; our keys and values are those of the prompt, projected before."""
    side, rows, t = args.size // 8, 2 * args.batch, torch.tensor(500)
    x, context = random_input(rows, 4, side, side), random_input(rows, 77, 768)

    def run_ours(network: Any) -> Run:
        cond = network.compute_kv_cache(Conditioning(context))
        return torch.inference_mode()(partial(network, x, t.float().expand(rows), cond))

    def run_theirs(network: Any) -> Run:
        inputs = x.to(network.dtype), t, context.to(network.dtype)
        return torch.no_grad()(lambda: network(*inputs, return_dict=False)[0])

    with torch.random.fork_rng():
        theirs = UNet2DConditionModel.from_config(dict(FAMILY.unet))
    ours = UNet(UNetConfig.from_dict(FAMILY.unet))
    with torch.no_grad():
        return module_match(args, ours, theirs, run_ours, run_theirs)


def vae(args: argparse.Namespace) -> Match:
    """SD 1.5's decoder."""
    z = random_input(args.batch, 4, args.size // 8, args.size // 8)

    def run_ours(network: Any) -> Run:
        return torch.inference_mode()(partial(decode_latents, network, z))

    def run_theirs(network: Any) -> Run:
        latents = (z / network.config.scaling_factor).to(network.dtype)
        return torch.no_grad()(lambda: network.decode(latents, return_dict=False)[0])

    return module_match(args, build_vae(FAMILY.vae), AutoencoderKL.from_config(dict(FAMILY.vae)), run_ours, run_theirs)


def text(args: argparse.Namespace) -> Match:
    """SD 1.5's text encoder on one prompt."""
    config = FAMILY.text_encoders["text_encoder"].config
    ids = torch.randint(0, 40_000, (args.batch, 77), generator=torch.Generator().manual_seed(0))

    def run_ours(network: Any) -> Run:
        return torch.inference_mode()(lambda: network(ids).last_hidden_state)

    def run_theirs(network: Any) -> Run:
        return torch.no_grad()(lambda: network(ids)[0])

    return module_match(args, build_text_encoder(config), CLIPTextModel(CLIPTextConfig(**config)), run_ours, run_theirs)


def pipeline(args: argparse.Namespace) -> Match:
    """picto from prompt to pixels, DDIM with guidance."""
    prompts, dtype = (PROMPTS * args.batch)[: args.batch], getattr(torch, args.dtype)
    load = partial(Pipeline.from_pretrained, PICTO_PATH, device="cpu", batch_size=args.batch)
    ours = load(dtype=dtype)
    native = ours.resolve(Request(prompts[0]))
    size = {"height": native.height, "width": native.width}
    noise = random_input(args.batch, *latent_shape(ours.model.vae, native.height or 0, native.width or 0))
    settings = {"num_inference_steps": args.steps, "guidance_scale": 3.0}

    def run_ours(pipe: Pipeline) -> Run:
        return lambda: pipe(prompts, latents=noise, sampler="ddim", **settings).images

    def run_theirs(**options: Any) -> Run:
        pipe = StableDiffusionPipeline.from_pretrained(PICTO_PATH, torch_dtype=dtype, local_files_only=True)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        for network in (pipe.unet, pipe.vae):
            network.to(**options)
        return lambda: pipe(prompts, latents=noise.to(dtype), **settings, **size).images

    runs = {OURS: run_ours(ours), D: run_theirs()}
    if args.best:
        runs[BEST] = run_theirs(memory_format=torch.channels_last)
    return Match(runs, run_ours(load(dtype="float32")), 2 / 255, pixels)


def pixels(images: list) -> Tensor:
    """PIL pictures as float32 levels 0 to 255."""
    return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]).float()


def agree(match: Match, dtype: str) -> dict[str, float]:
    """float32: the largest relative difference. Else: root mean square distances from float32, ours and theirs."""
    a, b = (match.to_tensor(match.runs[name]()) for name in (OURS, D))
    if dtype == "float32":
        worst = ((a - b).abs().max() / b.abs().max()).item()
        print(f"agreement: {worst:.1e} of the largest value")
        sound, figures = worst <= match.tolerance, {"max_relative_difference": worst}
    else:
        exact = match.to_tensor(match.exact())
        errors = [((x - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item() for x in (a, b)]
        print(f"distance from float32: ldm {errors[0]:.2e}, diffusers {errors[1]:.2e}")
        sound, figures = errors[0] <= MAX_BFLOAT16_RATIO * errors[1], {"error": errors[0], "their_error": errors[1]}
    if not sound:
        raise SystemExit("error: the outputs differ, nothing was timed")
    return figures


PARTS = {"unet": unet, "vae": vae, "text": text, "pipeline": pipeline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", type=int, default=256, help="in pixels, of unet and vae")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="of pipeline")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="cpu", choices=["cpu", "wall"])
    parser.add_argument("--best", action="store_true", help="diffusers in channels_last as well")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    match = PARTS[args.part](args)
    about = {name: value for name, value in vars(args).items() if name != "out"}
    about["agreement"] = agree(match, args.dtype)
    report(OURS, alternate(match.runs, args.rounds, clock(args.clock)), about, args.out)


if __name__ == "__main__":
    main()
