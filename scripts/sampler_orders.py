"""The measured order of every sampler on problems with a known answer, as Markdown tables.

    python scripts/sampler_orders.py [--json]

Deterministic solvers: the distance from the exact flow of a Gaussian and of a mixture of three. Stochastic ones: mean
and covariance of a Gaussian, computed exactly, and the strong order of Euler and Maruyama on one Brownian path. Each
order is the mean over five doublings of the steps, from log-SNR 0 to 2.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch

from ldm.diffusion.denoiser import NFECounter
from ldm.diffusion.samplers import SAMPLERS, sample
from ldm.diffusion.sde import VPSDE, linear_alphas_cumprod, scaled_linear_alphas_cumprod
from ldm.diffusion.singlestep import rk45
from ldm.diffusion.stochastic import predictor_corrector
from ldm.diffusion.timesteps import SPACINGS, TimeGrid
from ldm.rng import Noise
from tests.diffusion.oracle import (
    GAUSSIAN,
    GAUSSIAN_MIXTURE,
    AnalyticData,
    convergence_order,
    measure_step_overhead,
    mid_snr_grid,
    ode_errors,
    strong_errors,
    weak_errors,
)

SCHEDULES = {
    "linear": VPSDE.linear(),
    "linear table": VPSDE.tabulated(linear_alphas_cumprod(1e-4, 0.02, 1000)),
    "scaled linear table": VPSDE.tabulated(scaled_linear_alphas_cumprod(0.00085, 0.012, 1000)),
    "cosine": VPSDE.cosine(),
}
X = torch.tensor([[0.3, -1.1], [1.4, 0.2]], dtype=torch.float64)
FIXED = {name: solver for name, solver in SAMPLERS.items() if not solver.adaptive}
PROBLEMS: dict[str, AnalyticData] = {"Gaussian": GAUSSIAN, "mixture": GAUSSIAN_MIXTURE}
WITHOUT_CORRECTOR = {"predictor_corrector": partial(predictor_corrector, r=0.0)}  # else no step is affine in x


def grids(sde: VPSDE, first: int) -> list[TimeGrid]:
    return [mid_snr_grid(sde, first * 2**k) for k in range(6)]


def of_the_flow() -> list[dict[str, Any]]:
    """Measured order of the deterministic solvers: one row each."""
    rows = []
    for name, solver in FIXED.items():
        if not solver.stochastic:
            row: dict[str, Any] = {"solver": name, "claimed": solver.order}
            for schedule, sde in SCHEDULES.items():
                for kind, problem in PROBLEMS.items():
                    errors = ode_errors(solver.function, problem, X, grids(sde, 36))
                    row[f"{schedule}, {kind}"] = convergence_order(errors)
            rows.append(row)
    return rows


def in_law() -> list[dict[str, Any]]:
    """Measured order in law of the stochastic solvers; a mean that is exact has none."""
    rows = []
    for name, solver in FIXED.items():
        if solver.stochastic and solver.order:
            row: dict[str, Any] = {"solver": name, "claimed": solver.order}
            for schedule, sde in SCHEDULES.items():
                function = WITHOUT_CORRECTOR.get(name, solver.function)
                of_mean, of_cov = weak_errors(function, GAUSSIAN, grids(sde, 16))
                row[f"{schedule}, mean"] = "exact" if of_mean.max() < 1e-12 else convergence_order(of_mean)
                row[f"{schedule}, covariance"] = convergence_order(of_cov)
            rows.append(row)
    return rows


def strong() -> list[dict[str, Any]]:
    """Strong order of Euler and Maruyama."""
    function = SAMPLERS["euler_maruyama"].function
    measured = {
        schedule: convergence_order(strong_errors(function, GAUSSIAN, [*grids(sde, 8), mid_snr_grid(sde, 512)]))
        for schedule, sde in SCHEDULES.items()
    }
    return [{"solver": "euler_maruyama", "claimed": 1, **measured}]


def adaptive() -> list[dict[str, Any]]:
    """Error and questions of rk45 at each tolerance, over the schedule of Stable Diffusion."""
    grid = SPACINGS["log_snr"](SCHEDULES["scaled linear table"], 20)
    noisy = TimeGrid(grid.sde, grid[:-1])
    exact, rows = GAUSSIAN_MIXTURE.probability_flow(X, grid[0], grid[-2]), []
    for tolerance in [1e-3, 1e-4, 1e-5, 1e-6, 1e-8, 1e-10]:
        denoise = NFECounter(GAUSSIAN_MIXTURE.denoise)
        end = sample(partial(rk45, atol=tolerance, rtol=tolerance), denoise, X, noisy, Noise([0, 1]))
        error = (end - exact).abs().max().item()
        rows.append({"atol = rtol": f"{tolerance:g}", "questions": denoise.nfe, "error": f"{error:.1e}"})
    return rows


def overhead() -> list[dict[str, Any]]:
    """Questions and milliseconds of Python per step of fifty, and the source."""
    grid, rows = SPACINGS["trailing"](SCHEDULES["scaled linear table"], 50), []
    for name, solver in FIXED.items():
        denoise = NFECounter(GAUSSIAN.denoise)
        sample(solver.function, denoise, X, grid, Noise([0, 1]))
        per_step = {
            "questions per step": denoise.nfe / 50,
            "ms per step": 1000 * measure_step_overhead(solver.function, grid),
        }
        rows.append({"solver": name, **per_step, "source": solver.source})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with a column for each key."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {
    "Deterministic solvers: order": of_the_flow,
    "Stochastic solvers: order in law": in_law,
    "Strong order on one Brownian path": strong,
    "rk45": adaptive,
    "Cost": overhead,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.json:
        print(json.dumps({title: table() for title, table in TABLES.items()}, indent=2))
        return
    for title, table in TABLES.items():
        print(f"\n**{title}**\n\n{markdown(table())}", flush=True)


if __name__ == "__main__":
    main()
