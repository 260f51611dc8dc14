"""How far every sampler, spacing and number of steps stays from the converged image of a model, as a Markdown table.

    python scripts/sampler_grid.py [--samplers heun,unipc] [--spacings trailing,karras] [--steps 5,10,20,30]

The distance is the root mean square over pixels, of 255. Converged is 3M with 200 steps of equal log-SNR for samplers
of the probability flow; for stochastic ones, on the seed's own Brownian path, 2M SDE with 400 steps. Samplers that draw
fresh noise (`FRESH_NOISE`) have no such image: theirs is a distance between two images of a prompt. A dash is refused.
The status is 1 if any cell is above its bound (`BOUNDS`).
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import numpy as np

from ldm import Pipeline, Request
from ldm.checkpoints.formats import PICTO_PATH
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.timesteps import SPACINGS

CONVERGED = {False: ("dpmpp_3m", "log_snr", 200), True: ("dpmpp_2m_sde", "log_snr", 400)}  # by `stochastic`
BOUNDS = {5: 60.0, 10: 35.0, 20: 25.0, 30: 15.0}  # by steps; two images of one prompt are 30 to 57 apart
FRESH_NOISE = {"lcm": 60.0, "tcd": 60.0, "predictor_corrector": 60.0, "langevin": 60.0}  # the bounds of these
Cell = tuple[str, str, int]
# leading with 5 steps begins at t = .8, and the flow itself ends 57 from the converged image; Runge-Kutta follows it
OWN_BOUNDS: dict[Cell, float] = {("pndm", "leading", 5): 65.0}


def measure_cells(pipe: Pipeline, cells: list[Cell], prompt: str, seed: int) -> dict[Cell, float]:
    """The distance of each cell's image from the converged one."""
    wanted = [*CONVERGED.values(), *cells]
    requests = [Request(prompt, seed=seed, sampler=a, spacing=b, num_inference_steps=n) for a, b, n in wanted]
    images = [np.asarray(image, np.float64) for image in pipe.generate(requests)]
    converged = dict(zip(CONVERGED, images, strict=False))
    pairs = zip(cells, images[len(CONVERGED) :], strict=True)
    return {cell: rms(image - converged[SAMPLERS[cell[0]].stochastic]) for cell, image in pairs}


def is_refused(pipe: Pipeline, cell: Cell) -> bool:
    """Whether a request with a cell's settings is an error."""
    sampler, spacing, n = cell
    try:
        SPACINGS[spacing](pipe.model.sde, n)
    except ValueError:
        return True
    return n < SAMPLERS[sampler].min_steps


def rms(difference: np.ndarray) -> float:
    return math.sqrt((difference**2).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PICTO_PATH)
    parser.add_argument("--prompt", default="a red apple on a blue background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--spacings", default=",".join(SPACINGS))
    parser.add_argument("--steps", default="5,10,20,30")
    args = parser.parse_args()
    steps, spacings = [int(n) for n in args.steps.split(",")], args.spacings.split(",")
    samplers = args.samplers.split(",")
    pipe = Pipeline.from_pretrained(args.model, batch_size=16)
    cells = [cell for cell in itertools.product(samplers, spacings, steps) if not is_refused(pipe, cell)]
    found = measure_cells(pipe, cells, args.prompt, args.seed)
    print(f"| sampler | {' | '.join(f'{b} {args.steps}' for b in spacings)} |\n|{'---|' * (len(spacings) + 1)}")
    for a in samplers:
        rows = (" ".join(f"{found[a, b, n]:.0f}" if (a, b, n) in found else "-" for n in steps) for b in spacings)
        print(f"| `{a}` | {' | '.join(rows)} |")
    bounds = {cell: FRESH_NOISE.get(cell[0], BOUNDS.get(cell[2], math.inf)) for cell in found} | OWN_BOUNDS
    return int(any(value > bounds[cell] for cell, value in found.items()))


if __name__ == "__main__":
    raise SystemExit(main())
