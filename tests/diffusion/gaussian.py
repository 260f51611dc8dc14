"""Problems with known answers in the plane: data N(mu, S), and a mixture of three Gaussians."""

import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.oracle import GAUSSIAN, MIXTURE, Gaussian, Mixture

__all__ = ["GAUSSIAN", "MIXTURE", "MU", "NOTHING", "Gaussian", "Mixture", "S"]

MU, S = GAUSSIAN.mu, GAUSSIAN.cov
NOTHING = Conditioning(torch.zeros(1, 1, 1))
