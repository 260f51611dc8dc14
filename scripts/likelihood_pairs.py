"""Is a picture likelier under its own caption than under another's? Held-out scenes of picto's concepts.

    python scripts/likelihood_pairs.py [--model weights/picto] [--pairs 50] [--method elbo|ode|both] [--json FILE]

Both captions of a picture see the same noise. Prints the share of pictures with own > other for each method, its
95 % interval (Wilson), and the mean difference in nats.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from scipy.stats import binomtest
from torch import Tensor

from ldm import Pipeline
from ldm.analysis.likelihood import LikelihoodEstimate, estimate_elbo, hutchinson_trace, log_likelihood
from ldm.checkpoints.formats import PICTO_PATH
from ldm.config import SceneDataConfig
from ldm.diffusion.timesteps import log_snr
from ldm.picto.scenes import Scene, make_scene_dataset
from ldm.rng import Noise

ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PICTO_PATH)
    parser.add_argument("--sprites", type=Path, default=ROOT / "data" / "emoji")
    parser.add_argument("--concepts", type=Path, default=ROOT / "configs" / "picto" / "easy.txt")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--method", choices=["elbo", "ode", "both"], default="both")
    parser.add_argument("--steps", type=int, default=12, help="of the ODE, and strata of the ELBO")
    parser.add_argument("--probes", type=int, default=2, help="of the ODE, and twice as many draws of the ELBO")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def others(captions: Sequence[str]) -> list[str]:
    """For each picture the first caption after its own, round the circle, that differs."""
    twice = [*captions, *captions]
    return [next(c for c in twice[k + 1 :] if c != own) for k, own in enumerate(captions)]


def measure(
    pipe: Pipeline, x: Tensor, captions: Sequence[str], method: str, steps: int, probes: int
) -> LikelihoodEstimate:
    """log p(x | caption) of each picture, its noise from its own seed whatever the caption."""
    denoise, noise = pipe.cfg_denoiser(captions, [""] * len(captions)), Noise(range(1000, 1000 + len(captions)))
    grid = log_snr(pipe.model.sde, steps)
    if method == "ode":
        return log_likelihood(denoise, x, grid, hutchinson_trace(noise, probes))
    return estimate_elbo(denoise, x, grid, noise, 2 * probes).bound


def main() -> None:
    args = arguments()
    pipe = Pipeline.from_pretrained(args.model, dtype="float32")
    scenes = make_scene_dataset(SceneDataConfig(sprites=args.sprites, concepts=args.concepts, latents=0), 0, "held-out")
    pictures: list[Scene] = [scenes[k] for k in range(args.pairs)]
    posterior = pipe.encode_images([Image.fromarray(scene.image) for scene in pictures])
    x = posterior.sample(Noise(range(args.pairs))(posterior.mean))
    own = [scene.caption for scene in pictures]
    rows = {}
    for method in ("elbo", "ode") if args.method == "both" else (args.method,):
        gains = (
            measure(pipe, x, own, method, args.steps, args.probes)
            - measure(pipe, x, others(own), method, args.steps, args.probes)
        ).nats.tolist()
        test = binomtest(sum(gain > 0 for gain in gains), len(gains))
        interval = test.proportion_ci(method="wilson")
        rows[method] = {"share": test.statistic, "low": interval.low, "high": interval.high, "gains": gains}
        print(
            f"{method}: own caption likelier in {test.k} of {test.n}, {test.statistic:.1%} "
            f"(95 %: {interval.low:.1%} to {interval.high:.1%}), by {sum(gains) / len(gains):.1f} nats on average",
            flush=True,
        )
    if args.json:
        pairs = [{"own": a, "other": b} for a, b in zip(own, others(own), strict=True)]
        args.json.write_text(json.dumps({"pairs": pairs, "methods": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
