"""Did a tuning learn what it was shown, and what did it forget? The model before and after it, with 95 % intervals.

    python scripts/tune_scores.py configs/tune-lora.yaml [--draws 4] [--keep "a banana" ...] [--json FILE]

Held out are the pictures of the recipe's `validation_data_dir`. Before and after see the same noise.

* Likelihood: the ELBO of log p(z | caption) of the held-out pictures, and of pictures that the model drew before.
* Retrieval, by the model's own CLIP image tower: a picture drawn from a held-out caption looks for its nearest among
  the held-out pictures and what the model drew from the same captions before it was tuned, with other seeds. Right is
  a held-out picture of the same caption. For prompts that are to stay as they were, right is a drawing of before.

Intervals are of means over pictures, by Student's t, and of shares by Clopper and Pearson.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from ldm import Pipeline, Request
from ldm.checkpoints.formats import locate
from ldm.config import TuneObjective, load_recipe
from ldm.data.folders import open_source
from ldm.decode import decode
from ldm.diffusion.likelihood import elbo
from ldm.diffusion.spacing import log_snr
from ldm.images import from_uint8
from ldm.nn.clip import image_tower
from ldm.rng import Noise
from ldm.train.methods import METHODS, source, untuned

KEEP = ("a banana", "an owl", "a pizza", "a red heart", "a penguin", "a car", "a star", "a cat face")
BEFORE, SECOND = 1000, 2000  # first seeds of the drawings that are looked among, and of those that look


class Shown(NamedTuple):
    """Pictures and their captions."""

    pictures: list[Image.Image]
    captions: list[str]


def drawn(pipe: Pipeline, prompts: Sequence[str], draws: int, seed: int, guidance: float) -> Shown:
    """`draws` pictures of each prompt."""
    captions = [prompt for prompt in prompts for _ in range(draws)]
    asked = [Request(p, seed=seed + k, guidance_scale=guidance) for k, p in enumerate(captions)]
    return Shown(pipe.generate(asked), captions)


def bounds(pipe: Pipeline, z: Tensor, captions: Sequence[str], strata: int = 12, draws: int = 4) -> np.ndarray:
    """The ELBO of log p(z | caption) of each row in nats, noise by the row's number."""
    found = []
    for rows in torch.arange(len(z)).split(16):
        denoise = pipe.guided([captions[row] for row in rows], [""] * len(rows))
        noise = Noise(rows.tolist())
        with torch.no_grad():
            found.append(elbo(denoise, z[rows], log_snr(pipe.model.sde, strata), noise, draws).bound.nats)
    return torch.cat(found).double().numpy()


def gain(name: str, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """The mean difference in nats and its interval; printed."""
    more = after - before
    half = stats.t.ppf(0.975, len(more) - 1) * stats.sem(more)
    low, high = more.mean() - half, more.mean() + half
    print(f"{name}: {before.mean():.1f} to {after.mean():.1f} nats, {more.mean():+.1f} ({low:+.1f} to {high:+.1f})")
    return {"before": before.mean(), "after": after.mean(), "gain": more.mean(), "low": low, "high": high}


def share(name: str, right: np.ndarray) -> dict[str, float]:
    """How many are right and the interval of their share; printed."""
    test = stats.binomtest(int(right.sum()), len(right))
    interval = test.proportion_ci()
    print(f"{name}: {test.k} of {test.n}, {test.statistic:.0%} ({interval.low:.0%} to {interval.high:.0%})")
    return {"right": test.k, "of": test.n, "share": test.statistic, "low": interval.low, "high": interval.high}


class Judge:
    """The image tower of a model, as a measure of likeness."""

    def __init__(self, folder: Path) -> None:
        self.tower = image_tower(folder)

    def vectors(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [B, D]."""
        return self.tower(from_uint8(np.stack([np.array(picture) for picture in pictures])))

    def retrieved(self, asking: Shown, right: Shown, wrong: Shown) -> np.ndarray:
        """Whether the nearest of all is among the right ones, and has the caption of the picture that asks."""
        found = self.vectors([*right.pictures, *wrong.pictures])
        nearest = (self.vectors(asking.pictures) @ found.T).argmax(1).tolist()
        captions = [*right.captions, *[None] * len(wrong.captions)]
        return np.array([captions[n] == caption for n, caption in zip(nearest, asking.captions, strict=True)])


def held_out(objective: TuneObjective) -> Shown:
    assert objective.validation_data_dir, "validation_data_dir: no pictures are held out"
    samples = open_source([objective.validation_data_dir]).samples
    return Shown([decode(sample.open()).rgb for sample in samples], [sample.caption for sample in samples])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--draws", type=int, default=4, help="pictures of a prompt")
    parser.add_argument("--keep", nargs="+", default=list(KEEP), help="prompts that are to stay as they were")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    objective, guidance = recipe.objective, recipe.validation_guidance
    assert isinstance(objective, TuneObjective)
    before = untuned(objective)
    after = METHODS[objective.method].reopen(objective, recipe.output_dir / "export")
    new = held_out(objective)
    old = drawn(before, args.keep, args.draws, BEFORE, guidance)
    figures = {}
    for name, shown in (("held out", new), ("drawn before", old)):
        posterior = before.encode(shown.pictures)
        z = posterior.sample(Noise(range(len(shown.pictures)))(posterior.mean))
        values = [bounds(pipe, z, shown.captions) for pipe in (before, after)]
        figures[f"elbo, {name}"] = gain(f"log p(z | caption) of {len(z)} pictures {name}", *values)
    judge, captions = Judge(locate(source(objective)) / "image_encoder"), list(dict.fromkeys(new.captions))
    rivals = drawn(before, captions, args.draws, BEFORE, guidance)
    for when, pipe in (("before", before), ("after", after)):
        for name, prompts, right, wrong in (("new", captions, new, rivals), ("old", args.keep, old, new)):
            found = judge.retrieved(drawn(pipe, prompts, args.draws, SECOND, guidance), right, wrong)
            figures[f"retrieval, {name}, {when}"] = share(f"{name} prompts find their pictures, {when}", found)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
