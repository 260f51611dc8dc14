"""Guidance and inpainting: denoisers that wrap denoisers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.sde import NoiseLevels, alpha_sigma, append_dims, as_level_list

FULL_INTERVAL = (0.0, math.inf)  # the interval that leaves no noise level out


def classifier_free_guidance(
    denoiser: Denoiser,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float | Tensor,
    rescale: float | Tensor = 0.0,
    interval: tuple[float, float] | Tensor = FULL_INTERVAL,
) -> Denoise:
    """Classifier-free guidance: x0 = u + scale (c - u), without and with text (Ho & Salimans 2022, eq. 6).

    Guiding x0 is guiding eps, v or the score by the same scale: each is affine in x0 with coefficients of (x, t) alone,
    and the weights scale and 1 - scale sum to 1. `rescale` is that of `rescale_cfg`; `interval` (low, high) guides only
    while low < sigma/alpha <= high (Kynkaanniemi et al. 2024). Each is one value or one per row ([B], [B], [B, 2]), on
    the host. A row with scale 1 or outside its interval is conditional only: its unconditional output is not evaluated.
    Everything else shares one call of the network. ValueError for a rescale outside [0, 1] and an interval that is not
    0 <= low < high.
    """
    scales, rescales = (torch.as_tensor(value, dtype=torch.float32).expand(len(cond)) for value in (scale, rescale))
    bounds = torch.as_tensor(interval, dtype=torch.float64).expand(len(cond), 2).tolist()
    _check_guidance(rescales.tolist(), bounds)
    eligible = (scales != 1).nonzero().flatten().tolist()

    @lru_cache(maxsize=4)
    def cat_cond_uncond(rows: tuple[int, ...]) -> tuple[Tensor, Conditioning]:
        with torch.inference_mode(False):  # kept for later calls, which may want gradients
            guided_rows = torch.tensor(rows).to(cond.context.device, non_blocking=cond.context.is_cuda)
            return guided_rows, Conditioning.cat([cond, uncond[guided_rows]])

    def denoise(x: Tensor, levels: NoiseLevels) -> Tensor:
        level = as_level_list(levels)
        row_levels = level if len(level) > 1 else [level[0]] * len(x)
        rows = [i for i in eligible if bounds[i][0] < row_levels[i].sigma_over_alpha <= bounds[i][1]]
        if not rows:
            return denoiser(x, levels, cond)
        guided_rows, both = cat_cond_uncond(tuple(rows))
        guided_levels = [row_levels[i] for i in rows]
        all_levels = level if len(level) == 1 else [*level, *guided_levels]
        c, u = denoiser(torch.cat([x, x[guided_rows]]), all_levels, both).split([len(x), len(rows)])
        c_guided, x_guided = c[guided_rows], x[guided_rows]
        guided = u + append_dims(scales[rows], u) * (c_guided - u)
        if rescales[rows].any():
            guided = rescale_cfg(guided, c_guided, x_guided, guided_levels, denoiser.prediction, rescales[rows])
        return c.index_copy(0, guided_rows, guided)

    return denoise


def rescale_cfg(
    x0: Tensor, x0_cond: Tensor, x: Tensor, levels: NoiseLevels, prediction: Prediction, rescale: Tensor
) -> Tensor:
    """Rescale the guided output o towards the standard deviation of the conditional c: phi std(c)/std(o) o + (1-phi) o.

    Lin et al. 2024 (arXiv 2305.08891), eqs. 15 and 16, on the network's own output, for each image separately.
    The output is (x0 - base) / jacobian, base the x0 of output 0, so that scaling it is scaling x0 - base. `x0` is
    guided; `x0`, `x0_cond` and `x` [B, ...]; phi = `rescale` [B], on the host.
    """
    base = prediction.to_x0(torch.zeros_like(x0), x.to(x0), *alpha_sigma(levels, x0))
    ratio = (x0_cond - base).flatten(1).std(1) / (x0 - base).flatten(1).std(1)
    factor = torch.lerp(torch.ones_like(ratio), ratio, append_dims(rescale, ratio))
    return torch.lerp(base, x0, factor.reshape(-1, *[1] * (x0.ndim - 1)))  # factor 1 leaves x0 bit for bit


def autoguidance(good: Denoise, bad: Denoise, scale: float | Tensor) -> Denoise:
    """Autoguidance by a worse model of the same data: x0 = bad + scale (good - bad) (Karras et al. 2024, eq. 3).

    `scale` is one number or one per row [B], on the host; where it is 1 the output is the good model's, bit for bit;
    where it is 1 for all rows, the bad model is not evaluated.
    """
    scales = torch.as_tensor(scale, dtype=torch.float32).reshape(-1)
    if (scales == 1).all():
        return good

    def denoise(x: Tensor, levels: NoiseLevels) -> Tensor:
        x0 = good(x, levels)
        return torch.lerp(bad(x, levels), x0, append_dims(scales, x0))

    return denoise


def _check_guidance(rescales: Sequence[float], intervals: Sequence[Sequence[float]]) -> None:
    for rescale in rescales:
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance rescale {rescale:g}: between 0 and 1 is needed")
    for low, high in intervals:
        if not 0 <= low < high:
            raise ValueError(f"guidance interval ({low:g}, {high:g}): 0 <= low < high is needed, in sigma/alpha")


def inpaint(denoise: Denoise, known: Tensor, keep_mask: Tensor) -> Denoise:
    """x_0 replaced by `known` where the mask is 1: inpainting of latents (Song et al. 2021, appendix I.2, on x_0).

    From x = alpha known + sigma z a deterministic solver, x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) known,
    keeps x' = alpha' known + sigma' z: what diffusers puts in x' after each step. A stochastic solver renews a share of
    z.
    """
    return lambda x, levels: torch.lerp(denoise(x, levels), known.to(x.device), keep_mask.to(x.device))
