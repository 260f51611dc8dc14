"""A problem with a known answer, data N(mu, S) in the plane: denoiser, score and flow in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Levels
from ldm.diffusion.sde import Point

MU = torch.tensor([0.7, -0.4], dtype=torch.float64)
S = torch.tensor([[0.8, 0.3], [0.3, 0.25]], dtype=torch.float64)
NOTHING = Conditioning(torch.zeros(1, 1, 1))


@dataclass(frozen=True)
class Gaussian:
    mu: Tensor
    cov: Tensor

    def marginal_cov(self, point: Point) -> Tensor:
        return point.alpha**2 * self.cov + point.sigma**2 * torch.eye(len(self.mu), dtype=self.cov.dtype)

    def score(self, x: Tensor, point: Point) -> Tensor:
        return torch.linalg.solve(self.marginal_cov(point), (point.alpha * self.mu - x).T).T

    def denoise(self, x: Tensor, point: Levels) -> Tensor:
        """E[x_0 | x] = mu + alpha S C^-1 (x - alpha mu), C the covariance of x."""
        assert isinstance(point, Point)
        return self.mu - point.alpha * self.score(x, point) @ self.cov

    def flow(self, x: Tensor, start: Point, end: Point) -> Tensor:
        """The probability flow: along each axis of S, x stays as many deviations from the mean."""
        variance, axes = torch.linalg.eigh(self.cov)
        ratio = (end.alpha**2 * variance + end.sigma**2) / (start.alpha**2 * variance + start.sigma**2)
        return end.alpha * self.mu + ((x - start.alpha * self.mu) @ axes * ratio.sqrt()) @ axes.T


GAUSSIAN = Gaussian(MU, S)
