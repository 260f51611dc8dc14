"""Samplers that add noise: of the reverse SDE, Langevin dynamics, and those of distilled (consistency) networks."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.singlestep import ddim
from ldm.diffusion.steps import MAX_EULER_STEP, SamplerCoroutine, ddim_step, ode_step, score_at
from ldm.diffusion.timesteps import TimeGrid
from ldm.rng import Noise


def ddpm(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """Ancestral sampling, x' ~ q(x' | x, x0): Ho et al. 2020, algorithm 2, eqs. 6 and 7.

    The variance is that posterior's (beta-tilde): it lacks the spread of x_0 given x, to first order in the
    step. The last step adds no noise. This is DDIM with eta = 1.
    """
    return ddim(x, grid, noise, eta=1.0)


def euler_ancestral(
    x: Tensor, grid: TimeGrid, noise: Noise, eta: float = 1.0, s_noise: float = 1.0
) -> SamplerCoroutine:
    """Euler's step in u = sigma/alpha to u_down, then noise u_up z: k-diffusion's `sample_euler_ancestral`.

        u_up^2 = u'^2 (u^2 - u'^2) / u^2,      u_down^2 = u'^2 - u_up^2,      x'/alpha' = x0 + u_down e + u_up z

    u_down is rho u', and u_up = sqrt(1 - rho^2) u'. Times alpha' the step is DDPM's, exactly; with eta it is DDIM's.
    """
    return ddim(x, grid, noise, eta, s_noise)


def euler_maruyama(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """Euler and Maruyama's step of the reverse SDE in its own clock: x' = x + tau (x/2 + score) + sqrt(tau) z.

    Song et al. 2021, eq. 6 and section 4.1; tau = int beta dt = 2 log(alpha'/alpha). From zero SNR, where tau is
    infinite, and to the clean image the step is DDPM's.
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        tau = 2 * math.log(to.alpha / now.alpha) if now.alpha > 0 else math.inf
        if tau > MAX_EULER_STEP * now.sigma**2:
            x = ddim_step(x, x0, now, to, noise)
        else:
            z = noise.between(x, now.sigma, to.sigma)
            x = x + tau * (x / 2 + score_at(x, x0, now)) + math.sqrt(tau) * z
    return x


def predictor_corrector(x: Tensor, grid: TimeGrid, noise: Noise, r: float = 0.16) -> SamplerCoroutine:
    """A Langevin step at each level but the first, then the discretised reverse diffusion; two evaluations a step.

        x  <-  x + eps score + sqrt(2 eps) z,      eps = 2 (r |z| / |score|)^2        |.| of each image
        x' = (2 - sqrt(1 - b)) x + b score + sqrt(b) z,      1 - b = (alpha / alpha')^2

    Song et al. 2021, algorithms 3 and 5. Their factor 1 - b in eps, nearly 1 on their grid, is left out. The order is
    the predictor's; the corrector keeps each level's law up to r^2. The rule is for images of many dimensions: where
    |score| comes near 0 it is unbounded. From zero SNR and to the clean image the second step is DDPM's.
    """
    for k, (now, to) in enumerate(pairwise(grid)):
        x0 = yield x, now
        if k > 0:
            z, score = noise(x), score_at(x, x0, now)
            eps = 2 * (r * _image_norm(z) / _image_norm(score)) ** 2
            x = x + eps * score + (2 * eps).sqrt() * z
            x0 = yield x, now
        kept = now.alpha / to.alpha
        b = 1 - kept**2
        if b > MAX_EULER_STEP * now.sigma**2:
            x = ddim_step(x, x0, now, to, noise)
        else:
            z = noise.between(x, now.sigma, to.sigma)
            x = (2 - kept) * x + b * score_at(x, x0, now) + math.sqrt(b) * z
    return x


def _image_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))


def langevin(x: Tensor, grid: TimeGrid, noise: Noise, eps: float = 0.3, steps_per_level: int = 3) -> SamplerCoroutine:
    """Annealed Langevin dynamics: at each level after the first x <- x + eps sigma^2 score + sqrt(2 eps) sigma z.

    Song & Ermon 2019, algorithm 1, `steps_per_level` times a level; sigma^2 is the variance of x given x0, so eps is
    the share of it that one step renews. Returns the denoiser's output at the last level.
    """
    for now, to in pairwise(grid):
        if to.sigma == 0:
            return (yield x, now)
        for _ in range(steps_per_level):
            x0 = yield x, to
            x = x + eps * to.sigma**2 * score_at(x, x0, to) + math.sqrt(2 * eps) * to.sigma * noise(x)
    return x


def lcm(x: Tensor, grid: TimeGrid, noise: Noise) -> SamplerCoroutine:
    """x' = alpha' x0 + sigma' z: multistep consistency sampling.

    Song et al. 2023 (consistency models), algorithm 1; Luo et al. 2023 (LCM). For networks that were distilled to give
    the end of the flow for x0: others, whose x0 is a mean, lose detail with every step.
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        x = to.alpha * x0 + to.sigma * noise(x) if to.sigma > 0 else x0
    return x


def tcd(x: Tensor, grid: TimeGrid, noise: Noise, eta: float = 0.3) -> SamplerCoroutine:
    """DDIM's step to timestep s = floor((1 - eta) k'), then noise up to the next one, k'.

    Zheng et al. 2024 (TCD), algorithm 4 (strategic stochastic sampling), for networks distilled so; eta is their
    gamma. The step to the clean image is DDIM's.
    """
    for now, to in pairwise(grid):
        x0 = yield x, now
        if to.sigma == 0:
            return x0
        s = grid.sde.level_at_timestep(math.floor((1 - eta) * grid.sde.timestep(to.t) + 1e-6))
        kept = to.alpha / s.alpha
        x = kept * ode_step(x, x0, now, s)
        if (fresh := to.sigma**2 - (kept * s.sigma) ** 2) > 0:
            x = x + math.sqrt(fresh) * noise(x)
    return x
