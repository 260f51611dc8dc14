"""Denoiser: network + SDE + prediction -> E[x_0 | x], the one function that samplers evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.sde import VPSDE, NoiseLevels, alpha_sigma, append_dims, as_level_list

Denoise = Callable[[Tensor, NoiseLevels], Tensor]  # (x, levels) -> E[x_0 | x], float32
Network = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (x, timesteps [B] float32, cond) -> output


@dataclass
class NFECounter:
    """A denoiser that counts its evaluations."""

    denoise: Denoise
    nfe: int = 0

    def __call__(self, x: Tensor, levels: NoiseLevels) -> Tensor:
        self.nfe += 1
        return self.denoise(x, levels)


@dataclass(frozen=True)
class Denoiser:
    """E[x_0 | x] from a network that runs in `dtype` and outputs `prediction` at the times of `sde`."""

    network: Network
    sde: VPSDE
    prediction: Prediction
    dtype: torch.dtype = torch.float32

    def __call__(self, x: Tensor, levels: NoiseLevels, cond: Conditioning) -> Tensor:
        """E[x_0 | x] [B, ...], float32. ValueError where the output does not determine it: eps at SNR 0."""
        t, alpha, sigma = torch.tensor(as_level_list(levels), dtype=torch.float64).unbind(1)
        if not self.prediction.jacobian(alpha, sigma).isfinite().all():
            network = "a network that predicts eps or the score"
            raise ValueError(f"{network} cannot start at zero terminal SNR: choose spacing karras or log_snr")
        x, output = x.float(), self.network_output(x, t, cond)
        return self.prediction.to_x0(output, x, append_dims(alpha, x), append_dims(sigma, x))

    def network_output(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's own output, float32; x [B, ...], t [B] or [1] on the host."""
        timesteps = self.sde.timestep(t).float().to(x.device, non_blocking=x.is_cuda)
        return self.network(x.to(self.dtype), timesteps.expand(len(x)), cond).float()

    def score(self, x: Tensor, levels: NoiseLevels, cond: Conditioning) -> Tensor:
        """grad log p_t(x) = (alpha E[x_0 | x] - x) / sigma^2: Tweedie's formula (Efron 2011, eq. 1.4)."""
        x0 = self(x, levels, cond)
        alpha, sigma = alpha_sigma(levels, x0)
        return (alpha * x0 - x) / sigma**2
