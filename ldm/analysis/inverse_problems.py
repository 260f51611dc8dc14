"""Inverse problems without retraining: a denoiser conditioned on a measurement, which wraps a denoiser.

y = A(x_0) + noise_std n, n ~ N(0, I). An operator A is any differentiable function of images or latents, row by row;
its adjoint is autograd's. `tmpd(denoise, lambda z: operator(decode_latents(vae, z)), y, noise_std)` works on latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.sde import NoiseLevels, append_dims, as_level_list

Operator = Callable[[Tensor], Tensor]  # A: [B, ...] -> [B, ...], row by row
LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # of R, G, B: ITU-R BT.601


def tmpd(
    denoise: Denoise,
    operator: Operator,
    measurement: Tensor,
    noise_std: float,
    iterations: int = 2,
    min_log_snr: float = -4.0,
) -> Denoise:
    """E[x_0 | x, y], with x_0 given x taken for N(m, C), and A for its tangent J at m = E[x_0 | x].

        m + C J^T u,      (J C J^T + noise_std^2 I) u = y - A(m),      C = Cov[x_0 | x] = sigma^2 / alpha dm/dx

    Boys et al. 2023 (TMPD, arXiv 2310.06721), with `iterations` of conjugate gradients in place of its diagonal; exact
    for Gaussian data and a linear A once they are as many as the measurement's numbers. Each costs a backward pass
    through the network. `measurement` [B, ...] or [1, ...] is in A's units. Below `min_log_snr` the output is
    `denoise`'s: there C would be the error of the network's Jacobian over alpha. ValueError unless noise_std > 0.
    """
    if not noise_std > 0:
        raise ValueError(f"noise_std {noise_std}: must be above 0")

    def conditioned(x: Tensor, levels: NoiseLevels) -> Tensor:
        _, alpha, sigma = torch.tensor(as_level_list(levels), dtype=torch.float64).unbind(1)
        gain = torch.where(2 * (alpha / sigma).log() < min_log_snr, 0, sigma**2 / alpha)
        if not gain.any():
            return denoise(x, levels)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            mean = denoise(x, levels)
            m = mean.detach().requires_grad_()
            residual, forward, adjoint = linearize_operator(operator, m, measurement)

            def covariance(w: Tensor) -> Tensor:
                (slope,) = torch.autograd.grad(mean, x, w, retain_graph=True)
                return append_dims(gain, w) * slope

            def normal(u: Tensor) -> Tensor:
                return forward(covariance(adjoint(u))) + noise_std**2 * u

            return m.detach() + covariance(adjoint(conjugate_gradients(normal, residual, iterations)))

    return conditioned


def linearize_operator(operator: Operator, m: Tensor, measurement: Tensor) -> tuple[Tensor, Operator, Operator]:
    """measurement - A(m), and A's tangent at m: w -> J w and u -> J^T u. J w is the derivative by u of <J^T u, w>."""
    with sdpa_kernel(SDPBackend.MATH):  # the attention kernel that can be differentiated twice
        output = operator(m)
    u = torch.zeros_like(output, requires_grad=True)
    (pulled,) = torch.autograd.grad(output, m, u, create_graph=True)
    return (
        (measurement - output).detach(),
        lambda w: torch.autograd.grad(pulled, u, w, retain_graph=True)[0],
        lambda u: torch.autograd.grad(output, m, u, retain_graph=True)[0],
    )


def conjugate_gradients(matvec: Operator, b: Tensor, iterations: int) -> Tensor:
    """u [B, ...] with matvec(u) = b, row by row (Hestenes & Stiefel 1952), from u = 0.

    A row stops at a direction of no positive curvature, which a network's Jacobian allows, and when it has converged.
    """

    def dot(a: Tensor, c: Tensor) -> Tensor:
        return (a * c).flatten(1).sum(1).view(-1, *[1] * (b.ndim - 1))

    u, r, p = torch.zeros_like(b), b, b
    size = dot(r, r)
    for _ in range(iterations):
        q = matvec(p)
        curvature = dot(p, q)
        step = torch.where(curvature > 0, size / curvature, 0)
        u, r = u + step * p, r - step * q
        before, size = size, dot(r, r)
        p = torch.where(step > 0, r + size / before * p, 0)
    return u


def mask_operator(mask: Tensor) -> Operator:
    """The image where mask [..., H, W] is 1; 0 elsewhere."""
    return lambda images: images * mask.to(images)


def downsample_operator(factor: int) -> Operator:
    """Means of factor x factor boxes: [B, C, H, W] to [B, C, H / factor, W / factor]."""
    return lambda images: F.avg_pool2d(images, factor)


def grayscale_operator() -> Operator:
    """Luma, [B, 3, H, W] to [B, 1, H, W]."""
    return lambda images: (images * images.new_tensor(LUMA_WEIGHTS).view(3, 1, 1)).sum(1, keepdim=True)


OPERATORS: dict[str, Callable[..., Operator]] = {  # by the name of the inverse problem
    "inpaint": mask_operator,
    "super_resolution": downsample_operator,
    "colourise": grayscale_operator,
}
