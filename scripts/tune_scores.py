"""What a fine-tuned model has learned and forgotten: scores before and after, with 95 % intervals.

    python scripts/tune_scores.py configs/tune-lora.yaml [--draws 4] [--keep "a banana" ...]

Held out are the images of the recipe's `validation_data_dir`. Before and after use the same noise.

* Likelihood: the ELBO of log p(z | caption) of the held-out images, and of images that the base model generates.
* Retrieval, by the model's own CLIP image encoder: the nearest neighbour of an image generated from a held-out caption,
  among the held-out images and those that the base model generates from the same captions with other seeds. Correct is
  a held-out image of the same caption. For prompts that are to stay the same, correct is an image of the base model.

Intervals are Student's, over images and over captions.
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
GALLERY_SEED, QUERY_SEED = 1000, 2000  # first seeds of the images that are searched, and of the queries


class Captioned(NamedTuple):
    """Images and their captions."""

    images: list[Image.Image]
    captions: list[str]


def generate(pipe: Pipeline, prompts: Sequence[str], count: int, seed: int, guidance: float) -> Captioned:
    """`count` images of each prompt."""
    captions = [prompt for prompt in prompts for _ in range(count)]
    requests = [Request(p, seed=seed + k, guidance_scale=guidance) for k, p in enumerate(captions)]
    return Captioned(pipe.generate(requests), captions)


def compute_elbo(pipe: Pipeline, z: Tensor, captions: Sequence[str], strata: int = 12, draws: int = 4) -> np.ndarray:
    """The ELBO of log p(z | caption) of each row in nats, noise seeded by the row."""
    nats = []
    for rows in torch.arange(len(z)).split(16):
        denoise = pipe.cfg_denoiser([captions[row] for row in rows], [""] * len(rows))
        noise = Noise(rows.tolist())
        with torch.no_grad():
            nats.append(estimate_elbo(denoise, z[rows], log_snr(pipe.model.sde, strata), noise, draws).bound.nats)
    return torch.cat(nats).double().numpy()


def report_gain(name: str, form: str, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """The mean difference of pairs and its interval, printed in a format."""
    difference = after - before
    half = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
    found = {"before": before.mean(), "after": after.mean(), "gain": difference.mean()}
    found = {**found, "low": found["gain"] - half, "high": found["gain"] + half}
    print("{}: {} to {}, {} ({} to {})".format(name, *(format(value, form) for value in found.values())), flush=True)
    return found


class ImageEncoder:
    """The image encoder of a model, as a measure of similarity."""

    def __init__(self, folder: Path) -> None:
        self.encode = load_image_encoder(folder)

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [B, D]."""
        return self.encode(from_uint8(np.stack([np.array(image) for image in images])))

    def recall(self, queries: Captioned, right: Captioned, wrong: Captioned) -> np.ndarray:
        """For each caption, the fraction of queries whose nearest neighbour is a right one of the same caption."""
        found = self.embed([*right.images, *wrong.images])
        nearest = (self.embed(queries.images) @ found.T).argmax(1).tolist()
        captions = [*right.captions, *[None] * len(wrong.captions)]
        hits = np.array([captions[n] == caption for n, caption in zip(nearest, queries.captions, strict=True)])
        captions_of = np.array(queries.captions)
        return np.array([hits[captions_of == caption].mean() for caption in dict.fromkeys(queries.captions)])


def load_images(data: ImageDataConfig) -> Captioned:
    samples = open_image_sources(data).samples
    return Captioned(
        [decode_image(sample.read_image()).rgb for sample in samples], [sample.caption for sample in samples]
    )


def likelihoods(pipes: Sequence[Pipeline], new: Captioned, old: Captioned) -> dict[str, dict[str, float]]:
    """The bounds of held-out images and of those of the base model."""
    found = {}
    for name, shown in (("held out", new), ("of the base model", old)):
        posterior = pipes[0].encode_images(shown.images)
        z = posterior.sample(Noise(range(len(shown.images)))(posterior.mean))
        before, after = (compute_elbo(pipe, z, shown.captions) for pipe in pipes)
        found[name] = report_gain(f"nats of {len(z)} images {name}", ",.1f", before, after)
    return found


def retrievals(
    pipes: Sequence[Pipeline], encoder: ImageEncoder, new: Captioned, old: Captioned, count: int, guidance: float
) -> dict[str, dict[str, float]]:
    """The recall of images from held-out captions and from old prompts."""
    fresh, kept = (list(dict.fromkeys(shown.captions)) for shown in (new, old))
    rivals = generate(pipes[0], fresh, count, GALLERY_SEED, guidance)
    found = {}
    for name, prompts, right, wrong in (("new", fresh, new, rivals), ("old", kept, old, new)):
        queries = (generate(pipe, prompts, count, QUERY_SEED, guidance) for pipe in pipes)
        before, after = (encoder.recall(images, right, wrong) for images in queries)
        label = f"recall of {count} images each of {len(prompts)} {name} captions"
        found[name] = report_gain(label, ".1%", before, after)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--draws", type=int, default=4, help="images of a prompt")
    parser.add_argument("--keep", nargs="+", default=list(KEEP), help="prompts whose images are to stay the same")
    parser.add_argument("--scores", nargs="+", choices=["likelihood", "retrieval"], default=["likelihood", "retrieval"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    objective, guidance, data = recipe.objective, recipe.validation_guidance, validation_data_config(recipe)
    if not isinstance(objective, FinetuneObjective) or data is None:
        parser.error(f"{args.recipe}: no fine-tuning with validation_data_dir")
    tuned = FINETUNE_METHODS[objective.method].load_pipeline(objective, recipe.output_dir / "export")
    pipes = load_base_pipeline(objective), tuned
    new, old = load_images(data), generate(pipes[0], args.keep, args.draws, GALLERY_SEED, guidance)
    figures = {}
    if "likelihood" in args.scores:
        figures["likelihood"] = likelihoods(pipes, new, old)
    if "retrieval" in args.scores:
        encoder = ImageEncoder(locate_weights(base_model_path(objective)) / "image_encoder")
        figures["retrieval"] = retrievals(pipes, encoder, new, old, args.draws, guidance)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
