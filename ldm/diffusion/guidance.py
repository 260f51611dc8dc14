"""Guidance: a denoiser that wraps a denoiser."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoise, Denoiser, Levels, points
from ldm.diffusion.sde import per_image


def guide(denoiser: Denoiser, cond: Conditioning, uncond: Conditioning, scale: float | Tensor) -> Denoise:
    """Classifier-free guidance: x0 = u + scale (c - u), without and with text (Ho & Salimans 2022, eq. 6).

    Guiding x0 is guiding eps, v or the score by the same scale: each is affine in x0 with coefficients of
    (x, t) alone, and the weights scale and 1 - scale sum to 1. `scale` is one number or one per row [B], on
    the host. Rows with scale 1 are conditional only: nothing unconditional is evaluated for them. All else
    shares one call of the network.
    """
    scales = torch.as_tensor(scale, dtype=torch.float32).expand(len(cond))
    rows = (scales != 1).nonzero().flatten().tolist()
    if not rows:
        return lambda x, levels: denoiser(x, levels, cond)
    extra = torch.tensor(rows, device=cond.context.device)
    both = Conditioning.cat([cond, uncond[extra]])

    def denoise(x: Tensor, levels: Levels) -> Tensor:
        level = points(levels)
        doubled = level if len(level) == 1 else [*level, *(level[i] for i in rows)]
        c, u = denoiser(torch.cat([x, x[extra]]), doubled, both).split([len(x), len(rows)])
        return c.index_copy(0, extra, u + per_image(scales[rows], u) * (c[extra] - u))

    return denoise
