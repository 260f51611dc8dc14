"""Print how much less the maximum-likelihood loss varies with importance-sampled times than with uniform ones.

    python scripts/objective_variance.py

The model is the exact one of data N(0, I), whose error on eps is alpha^2; both times cover the same range.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.objective import TIME_SAMPLERS, WEIGHTINGS, loss_mean_and_variance
from ldm.diffusion.sde import VPSDE, linear_alphas_cumprod, scaled_linear_alphas_cumprod

SDES = {
    "linear": VPSDE.linear(),
    "discrete linear": VPSDE.tabulated(linear_alphas_cumprod(1e-4, 0.02, 1000)),
    "scaled_linear": VPSDE.tabulated(scaled_linear_alphas_cumprod(0.00085, 0.012, 1000)),
    "cosine": VPSDE.cosine(),
}


def exact_error(sde: VPSDE) -> Callable[[Tensor], Tensor]:
    return lambda t: sde.marginal(t)[0] ** 2


def main() -> None:
    print("| schedule | mean loss | variance, uniform t | variance, importance | ratio |\n|---|---|---|---|---|")
    for name, sde in SDES.items():
        (_, uniform), (mean, importance) = (
            loss_mean_and_variance(TIME_SAMPLERS[times], WEIGHTINGS["likelihood"], sde, exact_error(sde))
            for times in ("truncated", "importance")
        )
        print(f"| {name} | {mean:.3f} | {uniform:.4g} | {importance:.4g} | {uniform / importance:.1f} |")


if __name__ == "__main__":
    main()
