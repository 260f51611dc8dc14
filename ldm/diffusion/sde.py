"""The variance-preserving SDE and the noise schedules that define it.

    dx = -1/2 beta(t) x dt + sqrt(beta(t)) dw,      x_t | x_0 ~ N(alpha x_0, sigma^2 I),     t in [0, 1],
    alpha = exp(-1/2 int_0^t beta),                 alpha^2 + sigma^2 = 1

(Song et al. 2021, eqs. 11 and 29). A schedule is one function, log alpha(t); everything else follows from it.
Times and levels are float64 and live on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)


class NoiseLevel(NamedTuple):
    """One noise level: time, signal and noise scale."""

    t: float
    alpha: float
    sigma: float

    @property
    def angle(self) -> float:
        """phi with alpha = cos phi and sigma = sin phi: 0 is the clean image, pi/2 zero SNR."""
        return math.atan2(self.sigma, self.alpha)

    @property
    def sigma_over_alpha(self) -> float:
        """sigma / alpha, infinite at zero SNR: k-diffusion's and EDM's sigma."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf


NoiseLevels = NoiseLevel | Sequence[NoiseLevel]  # one for all rows, or one per row
CLEAN_LEVEL = NoiseLevel(0.0, 1.0, 0.0)


def as_level_list(levels: NoiseLevels) -> Sequence[NoiseLevel]:
    """Levels as a list: one for all rows, or one per row."""
    return [levels] if isinstance(levels, NoiseLevel) else levels


def append_dims(values: Tensor | Sequence[float], like: Tensor) -> Tensor:
    """Scalars, one per image [B] or one for all [1], shaped and cast to multiply `like` [B, ...]."""
    column = torch.as_tensor(values, dtype=torch.float64).to(like.dtype)
    return column.reshape(-1, *[1] * (like.ndim - 1)).to(like.device, non_blocking=like.is_cuda)


def clamp_levels(levels: NoiseLevels, lowest: NoiseLevel) -> NoiseLevels:
    """Levels, none of less noise than the lowest."""
    if isinstance(levels, NoiseLevel):
        return max(levels, lowest)  # tuples compare by t, their first field
    return [max(level, lowest) for level in levels]


def alpha_sigma(levels: NoiseLevels, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of levels, shaped and cast to multiply `like` [B, ...]."""
    _, alpha, sigma = torch.tensor(as_level_list(levels), dtype=torch.float64).unbind(1)
    return append_dims(alpha, like), append_dims(sigma, like)


@dataclass(frozen=True)
class VPSDE:
    """The SDE of a schedule: `log_alpha` maps float64 times to log alpha (-inf at t = 1: zero terminal SNR).

    Networks know times as 0-based indices of `num_train_timesteps` discrete steps: index k is t = (k + 1) /
    num_train_timesteps.
    """

    log_alpha: Callable[[Tensor], Tensor]
    num_train_timesteps: int = 1000

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma = sqrt(1 - alpha^2), float64, of the shape of t."""
        log_alpha = self.log_alpha(t.double())
        # expm1: 1 - alpha^2 loses its digits as t -> 0; abs: at t = 0 it is -0.0
        return log_alpha.exp(), torch.expm1(2 * log_alpha).abs().sqrt()

    def level(self, t: float) -> NoiseLevel:
        alpha, sigma = self.marginal(torch.tensor(t, dtype=torch.float64))
        return NoiseLevel(t, alpha.item(), sigma.item())

    def level_at_timestep(self, k: float) -> NoiseLevel:
        """The level of timestep k of the discrete schedule, which may be fractional."""
        return self.level((k + 1) / self.num_train_timesteps)

    def timestep(self, t: Time) -> Time:
        """The network's timestep of time t: the (fractional) index, whatever the schedule."""
        return self.num_train_timesteps * t - 1

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda = 2 log(alpha / sigma), float64; +inf at t = 0, falling with t."""
        log_alpha = self.log_alpha(t.double())
        return 2 * log_alpha - torch.expm1(2 * log_alpha).abs().log()

    def time_at_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`, by bisection; values out of range give the nearer end."""
        target = log_snr.double()
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = (low + high) / 2
            later = self.log_snr(middle) > target
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return high

    def levels_between(
        self, starts: Sequence[NoiseLevel], ends: Sequence[NoiseLevel], fraction: float = 0.5
    ) -> list[NoiseLevel]:
        """For each pair the level whose log-SNR lies that fraction of the way from start to end."""
        ends_t = torch.tensor([[p.t for p in starts], [p.t for p in ends]], dtype=torch.float64)
        start, end = self.log_snr(ends_t)
        return [self.level(t) for t in self.time_at_log_snr(torch.lerp(start, end, fraction)).tolist()]

    def levels_at_sigmas(self, sigmas: Sequence[float]) -> list[NoiseLevel]:
        """The levels at sigma/alpha, above 0; one bisection for all. One out of range gives the nearer end."""
        t = self.time_at_log_snr(-2 * torch.tensor(sigmas, dtype=torch.float64).log())
        return [self.level(value) for value in t.tolist()]

    def levels_at_angles(self, angles: Sequence[float]) -> list[NoiseLevel]:
        """The levels at angles phi, log-SNR = -2 log tan phi; one bisection for all."""
        phi = torch.as_tensor(angles, dtype=torch.float64)
        t = self.time_at_log_snr(-2 * phi.tan().log())
        return [NoiseLevel(*row) for row in torch.stack([t, phi.cos(), phi.sin()], 1).tolist()]

    def beta(self, t: Tensor) -> Tensor:
        """beta(t) = -2 d log alpha / dt per unit of time, float64, of the shape of t."""
        with torch.inference_mode(False):  # this also turns gradients on
            t = t.detach().clone().double().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_alpha(t).sum(), t)
        return -2 * slope

    def perturb(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma noise; x0 and noise [B, ...], t [B] or [1]."""
        alpha, sigma = self.marginal(t)
        return append_dims(alpha, x0) * x0 + append_dims(sigma, x0) * noise

    @classmethod
    def linear(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> VPSDE:
        """beta(t) = beta_min + t (beta_max - beta_min): Song et al. 2021, eqs. 32 and 33."""
        return cls(lambda t: -t * beta_min / 2 - t**2 * (beta_max - beta_min) / 4)

    @classmethod
    def cosine(cls, s: float = 0.008) -> VPSDE:
        """alpha = f(t) / f(0), f(t) = cos((t + s) / (1 + s) pi/2): Nichol & Dhariwal 2021, eq. 17.

        Written as the sine of the complement, which is exactly 0 at t = 1 and loses no digits near it.
        """
        quarter = math.pi / 2 / (1 + s)
        whole = torch.tensor(quarter, dtype=torch.float64).sin().log()  # not math's: log alpha(0) is 0 to the bit
        return cls(lambda t: torch.log(torch.sin((1 - t) * quarter)) - whole)

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000
    ) -> VPSDE:
        """sqrt(beta(t) / N) linear in t: the closed form of the discrete schedule of Rombach et al. 2022, of N steps.

        log alpha(t) = -N/2 (b^2 t + b d t^2 + d^2 t^3 / 3), b = sqrt(beta_start), d = sqrt(beta_end) - b.
        """
        b, d = math.sqrt(beta_start), math.sqrt(beta_end) - math.sqrt(beta_start)
        return cls(lambda t: -num_train_timesteps / 2 * t * (b**2 + b * d * t + d**2 * t**2 / 3), num_train_timesteps)

    @classmethod
    def tabulated(cls, alphas_cumprod: Tensor) -> VPSDE:
        """`alphas_cumprod`[k] = alpha^2((k + 1) / N), k < N, joined smoothly and monotonically, from alpha(0) = 1.

        Interpolated is log alpha = -1/2 int beta: nearly a parabola, regular at t = 0 (log-SNR has a pole).
        Where they end in 0 (zero terminal SNR), alpha falls linearly over the last step.
        Raises ValueError unless 1 > alphas_cumprod[0] > alphas_cumprod[1] > ... >= 0.
        """
        table = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()])
        if len(table) < 4 or not (table.diff() < 0).all() or table[-1] < 0:
            raise ValueError("alphas_cumprod: needs three or more falling numbers, below 1 and not below 0")
        steps, ends_in_zero = len(table) - 1, table[-1] == 0
        curve = _monotone_cubic(-table.log()[: steps if ends_in_zero else None] / 2)

        def log_alpha(t: Tensor) -> Tensor:
            tail = torch.log((steps * (1 - t)).clamp(max=1)) if ends_in_zero else 0.0
            return tail - curve(steps * t)

        return cls(log_alpha, steps)


def _monotone_cubic(knots: Tensor) -> Callable[[Tensor], Tensor]:
    """The rising piecewise cubic through knots[k] at u = k, constant outside (Fritsch & Carlson 1980).

    Slopes are those of the parabola through three neighbours, at most thrice the flatter chord beside them.
    """
    chord = knots.diff()
    ends = 2 * chord[[0, -1]] - chord[[1, -2]]  # continue the parabola: one chord more on either side
    padded = torch.cat([ends[:1], chord, ends[1:]]).clamp(min=0)
    left, right = padded[:-1], padded[1:]
    slope = torch.minimum((left + right) / 2, 3 * torch.minimum(left, right))

    def curve(u: Tensor) -> Tensor:
        u = u.clamp(0, len(chord))
        k = u.detach().long().clamp(max=len(chord) - 1)
        s, y, m0, m1, c = u - k, knots[k], slope[k], slope[k + 1], chord[k]
        return y + s * (m0 + s * (3 * c - 2 * m0 - m1 + s * (m0 + m1 - 2 * c)))

    return curve


def linear_alphas_cumprod(beta_start: float, beta_end: float, n: int) -> Tensor:
    """alphas_cumprod [n] of beta_k equally spaced (Ho et al. 2020, section 4)."""
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, n, dtype=torch.float64), 0)


def scaled_linear_alphas_cumprod(beta_start: float, beta_end: float, n: int) -> Tensor:
    """alphas_cumprod [n] of sqrt(beta_k) equally spaced (Rombach et al. 2022, Stable Diffusion)."""
    roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), n, dtype=torch.float64)
    return torch.cumprod(1 - roots**2, 0)


def cosine_alphas_cumprod(beta_start: float, beta_end: float, n: int) -> Tensor:
    """alphas_cumprod [n] of the cosine schedule with beta_k <= .999 (Nichol & Dhariwal 2021, section 3.2)."""
    log_alpha = VPSDE.cosine().log_alpha(torch.linspace(0, 1, n + 1, dtype=torch.float64))
    return torch.cumprod(1 - (-torch.expm1(2 * log_alpha.diff())).clamp(max=0.999), 0)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The table with alpha shifted and scaled to end in 0 (Lin et al. 2024, algorithm 1)."""
    alpha = alphas_cumprod.double().sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


def betas_from_alphas_cumprod(alphas_cumprod: Tensor) -> Tensor:
    """beta_i = 1 - alpha_i^2 / alpha_{i-1}^2 [n], float64: what the chain of a table adds at each step."""
    table = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()])
    return 1 - table[1:] / table[:-1]


def forward_markov_chain(x0: Tensor, alphas_cumprod: Tensor, noise: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """x_1, ..., x_n of the Markov chain x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z_i.

    Ho et al. 2020, eq. 2. With beta_i = beta(i/n) / n it is the SDE as n grows (Song et al. 2021, appendix B), and at
    each i its law is that of `VPSDE.tabulated(alphas_cumprod)` at t = i/n exactly. x0 [B, ...]; `noise` as randn_like.
    """
    x = x0
    for beta in betas_from_alphas_cumprod(alphas_cumprod).tolist():
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * noise(x)
        yield x


AlphasCumprodFn = Callable[[float, float, int], Tensor]  # (beta_start, beta_end, n) -> alphas_cumprod [n], float64
BETA_SCHEDULES: dict[str, AlphasCumprodFn] = {  # by the names of diffusers' scheduler configurations
    "linear": linear_alphas_cumprod,
    "scaled_linear": scaled_linear_alphas_cumprod,
    "squaredcos_cap_v2": cosine_alphas_cumprod,
}
