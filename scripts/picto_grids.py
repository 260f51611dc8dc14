"""Generate the README's grids: forty simple prompts, two seeds each, and 24 with colours, styles, counts and pairs.

    python scripts/picto_grids.py [--model weights/picto] [--out weights/picto]

Nothing is cherry-picked: the seeds are 0 and 1, and 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm import Pipeline, Request
from ldm.checkpoints.formats import PICTO_PATH
from ldm.image_io import contact_sheet

EASY = """
apple, banana, lemon, strawberry, pizza, hamburger, doughnut, ice cream, carrot, mushroom, cat face, dog face,
rabbit face, panda, penguin, owl, fish, whale, butterfly, bee, car, bus, bicycle, rocket, airplane, sailboat, house,
tree, sunflower, cactus, star, red heart, sun, moon, umbrella, guitar, crown, key, book, smiling face
"""
COMPOSED = [
    "a red apple on a blue background",
    "a banana on a pink background",
    "a lemon on a black background",
    "a cat face on a yellow background",
    "a dog face on a light blue background",
    "a panda on an orange background",
    "a penguin on a red background",
    "a house on a purple background",
    "a blue car",
    "a green car on a pink background",
    "a purple butterfly",
    "a red umbrella on a gray background",
    "a blue star on a yellow background",
    "a green heart on a white background",
    "twemoji style, a strawberry on a green background",
    "3d style, a mushroom on a blue background",
    "noto style, a sunflower on a brown background",
    "flat style, a rocket on a black background",
    "two stars on a blue background",
    "three lemons",
    "four red hearts on a yellow background",
    "a cat face to the left of a dog face",
    "a star above a moon on a black background",
    "an apple to the right of a banana on a green background",
]


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PICTO_PATH)
    parser.add_argument("--out", type=Path, default=PICTO_PATH)
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.model, batch_size=20)
    easy = [Request(article(" ".join(name.split())), seed=seed) for name in EASY.split(",") for seed in (0, 1)]
    for file, requests in (("easy.png", easy), ("composed.png", [Request(prompt) for prompt in COMPOSED])):
        captions = [f"{request.prompt} [{request.seed}]" for request in requests]
        contact_sheet(pipe.generate(requests), captions, 10 if requests is easy else 8).save(args.out / file)


if __name__ == "__main__":
    main()
