"""Did a tuning learn what it was shown, and what did it forget? The model before and after it, with 95 % intervals.

    python scripts/tune_scores.py configs/tune-lora.yaml [--draws 4] [--keep "a banana" ...]

Held out are the pictures of the recipe's `validation_data_dir`. Before and after see the same noise.

* Likelihood: the ELBO of log p(z | caption) of the held-out pictures, and of pictures that the model drew before.
* Retrieval, by the model's own CLIP image tower: a picture drawn from a held-out caption looks for its nearest among
  the held-out pictures and what the model drew from the same captions before it was tuned, with other seeds. Right is
  a held-out picture of the same caption. For prompts that are to stay as they were, right is a drawing of before.

Intervals are Student's, over pictures and over captions.
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
from ldm.analysis.likelihood import estimate_elbo
from ldm.checkpoints.formats import locate_weights
from ldm.config import FinetuneObjective, ImageDataConfig, load_recipe
from ldm.data.folders import open_image_sources
from ldm.data.image_dataset import validation_data_config
from ldm.diffusion.timesteps import log_snr
from ldm.image_io import decode_image, from_uint8
from ldm.picto.clip import load_image_encoder
from ldm.rng import Noise
from ldm.train.methods import FINETUNE_METHODS, base_model_path, load_base_pipeline

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
        denoise = pipe.cfg_denoiser([captions[row] for row in rows], [""] * len(rows))
        noise = Noise(rows.tolist())
        with torch.no_grad():
            found.append(estimate_elbo(denoise, z[rows], log_snr(pipe.model.sde, strata), noise, draws).bound.nats)
    return torch.cat(found).double().numpy()


def gain(name: str, form: str, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """The mean difference of pairs and its interval, printed in a format."""
    more = after - before
    half = stats.t.ppf(0.975, len(more) - 1) * stats.sem(more)
    found = {"before": before.mean(), "after": after.mean(), "gain": more.mean()}
    found = {**found, "low": found["gain"] - half, "high": found["gain"] + half}
    print("{}: {} to {}, {} ({} to {})".format(name, *(format(value, form) for value in found.values())), flush=True)
    return found


class Judge:
    """The image tower of a model, as a measure of likeness."""

    def __init__(self, folder: Path) -> None:
        self.text_encoder = load_image_encoder(folder)

    def vectors(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [B, D]."""
        return self.text_encoder(from_uint8(np.stack([np.array(picture) for picture in pictures])))

    def retrieved(self, asking: Shown, right: Shown, wrong: Shown) -> np.ndarray:
        """Of each caption of pictures that ask, the share whose nearest of all is a right one of the same caption."""
        found = self.vectors([*right.pictures, *wrong.pictures])
        nearest = (self.vectors(asking.pictures) @ found.T).argmax(1).tolist()
        captions = [*right.captions, *[None] * len(wrong.captions)]
        hits = np.array([captions[n] == caption for n, caption in zip(nearest, asking.captions, strict=True)])
        asked = np.array(asking.captions)
        return np.array([hits[asked == caption].mean() for caption in dict.fromkeys(asking.captions)])


def pictures_of(data: ImageDataConfig) -> Shown:
    samples = open_image_sources(data).samples
    return Shown([decode_image(sample.read_image()).rgb for sample in samples], [sample.caption for sample in samples])


def likelihoods(pipes: Sequence[Pipeline], new: Shown, old: Shown) -> dict[str, dict[str, float]]:
    """The bounds of held-out pictures and of those drawn before."""
    found = {}
    for name, shown in (("held out", new), ("drawn before", old)):
        posterior = pipes[0].encode_images(shown.pictures)
        z = posterior.sample(Noise(range(len(shown.pictures)))(posterior.mean))
        before, after = (bounds(pipe, z, shown.captions) for pipe in pipes)
        found[name] = gain(f"nats of {len(z)} pictures {name}", ",.1f", before, after)
    return found


def retrievals(
    pipes: Sequence[Pipeline], judge: Judge, new: Shown, old: Shown, draws: int, guidance: float
) -> dict[str, dict[str, float]]:
    """The shares of drawings from held-out captions, and from old prompts, that find what they should."""
    fresh, kept = (list(dict.fromkeys(shown.captions)) for shown in (new, old))
    rivals = drawn(pipes[0], fresh, draws, BEFORE, guidance)
    found = {}
    for name, prompts, right, wrong in (("new", fresh, new, rivals), ("old", kept, old, new)):
        asking = (drawn(pipe, prompts, draws, SECOND, guidance) for pipe in pipes)
        before, after = (judge.retrieved(shown, right, wrong) for shown in asking)
        told = f"of {draws} drawings each of {len(prompts)} {name} captions find their own"
        found[name] = gain(told, ".1%", before, after)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--draws", type=int, default=4, help="pictures of a prompt")
    parser.add_argument("--keep", nargs="+", default=list(KEEP), help="prompts that are to stay as they were")
    parser.add_argument("--scores", nargs="+", choices=["likelihood", "retrieval"], default=["likelihood", "retrieval"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    objective, guidance, data = recipe.objective, recipe.validation_guidance, validation_data_config(recipe)
    if not isinstance(objective, FinetuneObjective) or data is None:
        parser.error(f"{args.recipe}: no tuning with validation_data_dir")
    tuned = FINETUNE_METHODS[objective.method].load_pipeline(objective, recipe.output_dir / "export")
    pipes = load_base_pipeline(objective), tuned
    new, old = pictures_of(data), drawn(pipes[0], args.keep, args.draws, BEFORE, guidance)
    figures = {}
    if "likelihood" in args.scores:
        figures["likelihood"] = likelihoods(pipes, new, old)
    if "retrieval" in args.scores:
        judge = Judge(locate_weights(base_model_path(objective)) / "image_encoder")
        figures["retrieval"] = retrievals(pipes, judge, new, old, args.draws, guidance)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
