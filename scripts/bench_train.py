"""One optimizer step of picto's U-Net: ours, a bare PyTorch loop of the same model, and diffusers' training script.

    python scripts/bench_train.py [--batch 8] [--rounds 9] [--precision no|bf16] [--clock cpu|wall] [--threads 1]
                                  [--pictures data/style] [--steps 10]

No data are loaded: latents and text states are there. Every contestant clips gradients, steps AdamW and an exponential
average of the weights; diffusers' (examples/text_to_image/train_text_to_image.py) uses its own classes and defaults.

Then whether loading keeps up: `configs/tune-lora.yaml` on pictures that are read, decoded, bucketed and cropped by the
worker process, latents cached and not, against the same steps on one batch that is there. Each round is so many steps
of one long loop, whose worker makes two batches ahead, in seconds of the wall clock.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from _bench import alternate, clock, ratio, report
from torch import Tensor, nn
from torch.nn import functional as F

import ldm.nn  # noqa: F401  before diffusers
from ldm.checkpoints.formats import PICTO_PATH
from ldm.commands.train import create_task
from ldm.conditioning import Conditioning
from ldm.config import Recipe, load_recipe
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import diffusion_loss
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.sde import BETA_SCHEDULES, VPSDE
from ldm.files import read_json
from ldm.hardware import best_device, resolve_mixed_precision, to_device
from ldm.nn.unet import UNet, UNetConfig
from ldm.train.task import Batch
from ldm.train.trainer import Trainer, create_accelerator, iterate_batches

from diffusers import DDPMScheduler, UNet2DConditionModel  # isort: skip
from diffusers.training_utils import EMAModel  # isort: skip

RATE, DECAY = 1e-4, 0.999
LORA = Path(__file__).resolve().parents[1] / "configs" / "tune-lora.yaml"


class Step:
    """A task whose batch is always the same."""

    supports_accumulation = True

    def __init__(self, model: UNet) -> None:
        self.model = model
        self.denoiser = VPSDE.tabulated(BETA_SCHEDULES["squaredcos_cap_v2"](0, 0, 1000)), PREDICTIONS["v"]

    def compute_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        cond = Conditioning(batch["text"])
        return diffusion_loss(Denoiser(model, *self.denoiser), batch["x0"], cond, batch["t"], batch["noise"]), {}


def ours(model: UNet, batch: Batch, precision: str) -> Callable[[], object]:
    recipe = Recipe.model_validate(
        {
            "objective": {"kind": "autoencoder", "model": {}},
            "data": {"sprites": "none"},
            "output_dir": "none",
            "max_train_steps": 1_000_000,
            "train_batch_size": len(batch["x0"]),
            "learning_rate": RATE,
            "mixed_precision": precision,
        }
    )
    trainer = Trainer(recipe, Step(model), create_accelerator(mixed_precision=precision))  # type: ignore[arg-type]
    trainer.prepare()
    return lambda: trainer.train_step([batch], False)


def bare(model: UNet, batch: Batch, precision: str) -> Callable[[], object]:
    """The same model, noise and schedule in the fewest lines of PyTorch."""
    average = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    table = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    x0, noise, cond = batch["x0"], batch["noise"], Conditioning(batch["text"])
    index = (1000 * batch["t"] - 1).round().long()

    def step() -> None:
        alpha, sigma = (a.sqrt().view(-1, 1, 1, 1) for a in (table[index], 1 - table[index]))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(alpha * x0 + sigma * noise, index.float(), cond)
        F.mse_loss(output.float(), alpha * noise - sigma * x0).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, list(model.parameters()), 1 - DECAY)

    return step


def diffusers_step(model: UNet2DConditionModel, batch: Batch, precision: str) -> Callable[[], object]:
    """The body of train_text_to_image.py's loop, from the latents on."""
    engine = create_accelerator(mixed_precision=precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    average = EMAModel(model.parameters(), decay=DECAY)
    unet, optimizer = engine.prepare(model, optimizer)
    x0, text = batch["x0"], batch["text"]

    def step() -> None:
        with engine.accumulate(unet):
            noise = torch.randn_like(x0)
            index = torch.randint(0, 1000, (len(x0),))
            noisy = scheduler.add_noise(x0, noise, index)
            output = unet(noisy, index, text, return_dict=False)[0]
            loss = F.mse_loss(output.float(), scheduler.get_velocity(x0, noise, index).float(), reduction="mean")
            engine.gather(loss.repeat(len(x0))).mean().item()
            engine.backward(loss)
            engine.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(unet.parameters())

    return step


def make_finetuning(
    args: argparse.Namespace, folder: Path, cached: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Some LoRA steps on one batch in memory, and as many of the whole loop; `folder` is for caches."""
    values = {
        "data.train_data_dir": args.pictures,
        "data.center_crop": cached,
        "objective.validation_data_dir": "null",
        "output_dir": folder / f"run-{cached}",
        "train_batch_size": args.batch,
        "mixed_precision": args.precision,
        "max_train_steps": 1_000_000,
        "lr_scheduler": "constant",
    }
    recipe = load_recipe(LORA, [f"{name}={value}" for name, value in values.items()])
    task = create_task(recipe)
    trainer = Trainer(recipe, task, create_accelerator(mixed_precision=args.precision))
    trainer.prepare()
    same = [task.make_batch(0, rows) for rows in trainer.row_ranges]
    stream = iterate_batches(task, 0, recipe, trainer.row_ranges)

    def alone() -> None:
        for _ in range(args.steps):
            trainer.train_step(same, False)

    def loop() -> None:
        for parts in islice(stream, args.steps):
            trainer.train_step(parts, False)

    return alone, loop


def loading(args: argparse.Namespace) -> None:
    """Print how much of the step's own speed is left with loading."""
    with TemporaryDirectory() as folder:
        kinds = {"latents cached": True, "latents not cached": False}
        pairs = {kind: make_finetuning(args, Path(folder), cached) for kind, cached in kinds.items()}
        contestants = {f"{kind}, {k}": run for kind, pair in pairs.items() for k, run in enumerate(pair)}
        seconds = alternate(contestants, args.rounds, clock("wall"))
    for kind in pairs:
        alone, loop = (seconds[f"{kind}, {k}"] for k in range(2))
        speeds = [args.steps * args.batch / median(s) for s in (loop, alone)]
        share = ratio(alone, loop)
        print(
            f"{kind}: loop {speeds[0]:.2f} images/s, step alone {speeds[1]:.2f}: {share['ratio']:.0%} "
            f"({share['low']:.0%} to {share['high']:.0%})"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default=resolve_mixed_precision("auto", best_device()), choices=["no", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="cpu", choices=["cpu", "wall"])
    parser.add_argument("--pictures", type=Path, default=Path("data/style"))
    parser.add_argument("--steps", type=int, default=10, help="of the loop, in a round")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = UNetConfig.from_dict(read_json(PICTO_PATH / "unet" / "config.json"))
    side = config.sample_size if isinstance(config.sample_size, int) else 16
    shape = args.batch, config.in_channels, side, side
    batch = {
        "x0": torch.randn(shape).to(memory_format=torch.channels_last),
        "noise": torch.randn(shape).to(memory_format=torch.channels_last),
        "text": torch.randn(args.batch, 32, config.cross_attention_dim),
        "t": (torch.arange(args.batch, dtype=torch.float64) * 997 % 1000 + 1) / 1000,
    }
    models = [to_device(UNet(config), torch.device("cpu")).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    theirs = UNet2DConditionModel.from_config(config.to_dict()).train()
    theirs.load_state_dict(models[0].state_dict())
    contestants = {
        "ldm": ours(models[0], batch, args.precision),
        "bare PyTorch": bare(models[1], batch, args.precision),
        "diffusers": diffusers_step(theirs, batch, args.precision),
    }
    seconds = alternate(contestants, args.rounds, clock(args.clock))
    about = {"batch": args.batch, "precision": args.precision, "clock": args.clock}
    report("ldm", seconds, about, args.out)
    for name, each in seconds.items():
        print(f"{name}: {args.batch / median(each):.2f} images/s")
    if args.pictures.is_dir():
        loading(args)
    else:
        print(f"loading: no {args.pictures}: python scripts/make_samples.py makes it")


if __name__ == "__main__":
    main()
