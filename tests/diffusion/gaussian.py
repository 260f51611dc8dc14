"""Problems with known answers in the plane: data N(mu, S), and a mixture of three Gaussians."""

import torch

from ldm.conditioning import Conditioning
from tests.diffusion.oracle import GAUSSIAN, GAUSSIAN_MIXTURE, Gaussian, GaussianMixture

__all__ = ["GAUSSIAN", "GAUSSIAN_MIXTURE", "MU", "NOTHING", "Gaussian", "GaussianMixture", "S"]

MU, S = GAUSSIAN.mu, GAUSSIAN.cov
NOTHING = Conditioning(torch.zeros(1, 1, 1))
