"""Whether an image of the shipped model is the same, bit for bit, in batches of any size: a table for this CPU.

    python scripts/batch_equality.py [--threads 1 2] [--dtypes float32 bfloat16] [--sizes 64 80 96]

Eight prompts, 8 to 10 steps each so that groups mix, alone and in batches of 2, 3, 5 and 8.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from ldm import Pipeline, Request
from ldm.hardware import preferred_dtype

PROMPTS = [
    "a red apple",
    "a cat on yellow",
    "two stars",
    "a blue car",
    "a dog",
    "a tree",
    "a house and a sun",
    "three green frogs",
]
BATCHES = 2, 3, 5, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 80, 96])
    options = parser.parse_args()
    print("| dtype | threads | size | images that differ | largest difference of 255 |\n|---|---|---|---|---|")
    for name in options.dtypes:
        if name == "bfloat16" and preferred_dtype(torch.device("cpu")) != torch.bfloat16:
            print("| bfloat16 | | | this CPU does not multiply it | |")
            continue
        pipe = Pipeline.from_pretrained(device="cpu", dtype=name)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for size in options.sizes:
                requests = [
                    Request(prompt, seed=k, num_inference_steps=8 + k % 3, height=size, width=size)
                    for k, prompt in enumerate(PROMPTS)
                ]
                alone = [np.asarray(pipe.generate([request])[0], int) for request in requests]
                differences = [
                    int(np.abs(np.asarray(image, int) - expected).max())
                    for batch in BATCHES
                    for image, expected in zip(Pipeline(pipe.model, batch).generate(requests), alone, strict=True)
                ]
                print(
                    f"| {name} | {threads} | {size} | {np.count_nonzero(differences)} of {len(differences)} "
                    f"| {max(differences)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
