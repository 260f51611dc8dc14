"""Likelihood equals the Gaussian's closed form, is a density whatever the denoiser, and bounds the ELBO from above."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from ldm.analysis.likelihood import (
    TRACE_PROBES,
    LikelihoodEstimate,
    continuous_elbo_times,
    discrete_elbo_times,
    estimate_elbo,
    freeze_noise,
    gaussian_entropy,
    hutchinson_trace,
    log_likelihood,
    log_likelihood_adaptive,
    sigma_vae_log_prob,
)
from ldm.diffusion.denoiser import as_level_list
from ldm.diffusion.sde import CLEAN_LEVEL, VPSDE, linear_alphas_cumprod, scaled_linear_alphas_cumprod
from ldm.diffusion.timesteps import TimeGrid, linspace, log_snr
from ldm.rng import Noise
from tests.diffusion.gaussian import GAUSSIAN, GAUSSIAN_MIXTURE, MU, S

COSINE = VPSDE.cosine()
SDES = {
    "linear": VPSDE.linear(),
    "table linear": VPSDE.tabulated(linear_alphas_cumprod(1e-4, 0.02, 1000)),
    "table scaled_linear": VPSDE.tabulated(scaled_linear_alphas_cumprod(0.00085, 0.012, 1000)),
    "cosine": COSINE,
}
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
DATA = MultivariateNormal(MU, S)
X = torch.tensor([[0.3, -1.1], [1.4, 0.2], [0.0, 0.0], [0.7, -0.4]], dtype=torch.float64)


def denoise(x, levels):
    """The exact answer on the Gaussian, with a level per row."""
    rows = as_level_list(levels) * (len(x) if len(as_level_list(levels)) == 1 else 1)
    return torch.cat([GAUSSIAN.denoise(row[None], point) for row, point in zip(x, rows, strict=True)])


def crooked(x, levels):
    """A denoiser that no data have: v = tanh(2 x) + .3 sin(3 (y, x) + phi), smooth and far from linear."""
    (level,) = as_level_list(levels)
    v = torch.tanh(2 * x) + 0.3 * torch.sin(3 * x.flip(1) + level.sigma)
    return level.alpha * x - level.sigma * v


@every_sde
def test_log_likelihood_is_the_gaussian_s_to_one_in_ten_thousand(sde):
    first = sde.level(1.0)
    marginal = MultivariateNormal(first.alpha * MU, GAUSSIAN.marginal_cov(first))
    answer = log_likelihood(GAUSSIAN.denoise, X, linspace(sde, 40), prior=marginal.log_prob)
    torch.testing.assert_close(answer.nats, DATA.log_prob(X), rtol=1e-4, atol=0)
    assert answer.nfe == 160
    torch.testing.assert_close(answer.bits_per_dim, -answer.nats / 2 / math.log(2))


@every_sde
def test_from_standard_noise_it_is_the_density_of_what_the_flow_generates(sde):
    start, origin, axes = sde.level(1.0), torch.zeros(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    mean = GAUSSIAN.probability_flow(origin, start, CLEAN_LEVEL)[0]
    map_ = (GAUSSIAN.probability_flow(axes, start, CLEAN_LEVEL) - mean).T  # the flow is affine
    answer = log_likelihood(GAUSSIAN.denoise, X, linspace(sde, 40))
    torch.testing.assert_close(answer.nats, MultivariateNormal(mean, map_ @ map_.T).log_prob(X), rtol=1e-4, atol=0)
    if start.alpha == 0:
        torch.testing.assert_close(answer.nats, DATA.log_prob(X), rtol=1e-4, atol=0)


def test_log_likelihood_of_a_mixture_is_its_closed_form():
    data = MixtureSameFamily(
        Categorical(GAUSSIAN_MIXTURE.weights), MultivariateNormal(GAUSSIAN_MIXTURE.mu, GAUSSIAN_MIXTURE.cov)
    )
    answer = log_likelihood(GAUSSIAN_MIXTURE.denoise, X, linspace(COSINE, 80))
    torch.testing.assert_close(answer.nats, data.log_prob(X), rtol=1e-4, atol=1e-4)


def test_steps_are_of_order_four():
    def in_angle(n):
        angles = torch.arange(n, 0, -1, dtype=torch.float64) / n * math.pi / 2 * (1 - 1e-7)
        return TimeGrid(
            COSINE, (*map(COSINE.level, COSINE.time_at_log_snr(-2 * angles.tan().log()).tolist()), CLEAN_LEVEL)
        )

    errors = [(log_likelihood(GAUSSIAN.denoise, X, in_angle(n)).nats - DATA.log_prob(X)).norm() for n in (8, 16, 32)]
    slopes = -torch.stack(errors).log2().diff()
    torch.testing.assert_close(slopes, torch.full_like(slopes, 4), rtol=0, atol=0.15)


def test_it_is_a_density_whatever_the_denoiser():
    line = torch.linspace(-6, 6, 241, dtype=torch.float64)
    plane = torch.cartesian_prod(line, line)
    answer = log_likelihood(crooked, plane, linspace(COSINE, 40))
    mass = answer.nats.exp().sum() * (line[1] - line[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-4)


def gaussian_denoise(x, levels):
    return torch.cat([GAUSSIAN.denoise(row, level) for row, level in zip(x.split(1), levels, strict=True)])


def test_adaptive_steps_keep_their_tolerance():
    exact, errors, evaluations = DATA.log_prob(X[:1]), [], []
    for tolerance in (1e-3, 1e-6, 1e-9):
        answer = log_likelihood_adaptive(gaussian_denoise, X[:1], COSINE, tolerance=tolerance)
        errors.append((answer.nats - exact).abs().item())
        evaluations.append(answer.nfe)
        assert errors[-1] < 10 * tolerance
    assert errors[2] < errors[0] and evaluations[0] <= evaluations[1] < evaluations[2]


def test_adaptive_steps_are_each_image_s_own():
    together = log_likelihood_adaptive(gaussian_denoise, X, COSINE).nats
    for row, nats in zip(X.split(1), together, strict=True):
        torch.testing.assert_close(
            log_likelihood_adaptive(gaussian_denoise, row, COSINE).nats[0], nats, rtol=1e-12, atol=0
        )


def test_adaptive_steps_agree_with_fixed_ones_probe_by_probe():
    trace = lambda: hutchinson_trace(freeze_noise(Noise([3])), 4)
    fixed = log_likelihood(crooked, X[:1], linspace(COSINE, 80), trace())
    adaptive = log_likelihood_adaptive(crooked, X[:1], COSINE, trace(), tolerance=1e-7)
    torch.testing.assert_close(adaptive.samples, fixed.samples, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probe", TRACE_PROBES.values(), ids=TRACE_PROBES.keys())
@pytest.mark.parametrize("still", [False, True], ids=["fresh", "frozen"])
def test_hutchinson_is_unbiased_and_knows_its_error(probe, still):
    count = 400
    noise = freeze_noise(Noise(range(count))) if still else Noise(range(count))
    grid = linspace(COSINE, 12)
    answer = log_likelihood(GAUSSIAN.denoise, X[:1].expand(count, 2), grid, hutchinson_trace(noise, 16, probe))
    exact = log_likelihood(GAUSSIAN.denoise, X[:1], grid).nats
    claimed = answer.standard_error.square().mean().sqrt()
    assert (answer.nats.mean() - exact).abs() < 3 * claimed / math.sqrt(count)
    assert (answer.nats.std() / claimed).item() == pytest.approx(1, rel=0.1)


def test_fresh_probes_err_less_than_frozen_ones():
    x, grid = X[:1].expand(64, 2), linspace(COSINE, 12)
    fresh, still = (
        log_likelihood(GAUSSIAN.denoise, x, grid, hutchinson_trace(noise, 8)).standard_error.mean()
        for noise in (Noise(range(64)), freeze_noise(Noise(range(64))))
    )
    assert fresh < 0.6 * still


def test_an_image_s_numbers_do_not_depend_on_its_batch_or_on_the_gradients_mode():
    together = log_likelihood(crooked, X, linspace(COSINE, 6), hutchinson_trace(Noise([5, 6, 7, 8]), 3))
    bound = estimate_elbo(denoise, X, log_snr(COSINE, 9), Noise([5, 6, 7, 8]), 2).bound
    for i in range(4):
        row = slice(i, i + 1)
        with torch.inference_mode() if i % 2 else torch.no_grad():
            alone = log_likelihood(crooked, X[row].clone(), linspace(COSINE, 6), hutchinson_trace(Noise([5 + i]), 3))
        torch.testing.assert_close(alone.samples, together.samples[row])
        alone = estimate_elbo(denoise, X[row], log_snr(COSINE, 9), Noise([5 + i]), 2).bound
        torch.testing.assert_close(alone.samples, bound.samples[row])


def test_a_difference_cancels_what_both_estimates_share():
    shared, own = (torch.randn(2, 50, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (0, 1))
    a, b = LikelihoodEstimate(100 * shared + own + 1, 2, 10), LikelihoodEstimate(100 * shared, 2, 10)
    torch.testing.assert_close((a - b).samples, own + 1)
    assert (a - b).standard_error.max() < 0.25 < a.standard_error.min() and (a - b).nfe == 20


class Expectation:
    """Noise for four rows whose mean is the expectation of any quadratic: +-sqrt(2) along the axes; times' u = 1/2."""

    def __call__(self, like):
        if like.shape[1:] != (2,):
            return torch.zeros_like(like)
        axes = math.sqrt(2) * torch.eye(2, dtype=like.dtype)
        return torch.cat([axes, -axes])


def expected_elbo(x, grid, times):
    rows = lambda x, levels: GAUSSIAN.denoise(x, as_level_list(levels)[0])
    return estimate_elbo(rows, x.expand(4, 2), grid, Expectation(), 1, times).bound.nats.mean().item()


def grid_from(sde, n):
    """Even in log-SNR from far below the data's to t = 1e-5, far above: what lies beyond is next to nothing."""
    ends = sde.log_snr(torch.tensor([1 - 1e-9, 1e-5], dtype=torch.float64)).clamp(min=-16)
    return TimeGrid(
        sde, (*map(sde.level, sde.time_at_log_snr(torch.linspace(*ends, n, dtype=torch.float64)).tolist()), CLEAN_LEVEL)
    )


@pytest.mark.parametrize("x", X.split(1))
def test_discrete_elbo_rises_to_the_log_likelihood_of_the_gaussian(x):
    exact = DATA.log_prob(x).item()
    gaps = torch.tensor(
        [exact - expected_elbo(x, grid_from(COSINE, n), discrete_elbo_times) for n in (100, 200, 400, 800, 1600)]
    )
    assert (gaps > 0).all()
    torch.testing.assert_close(-gaps.log2().diff(), torch.ones(4), rtol=0, atol=0.1)  # order 1 in the number of levels
    assert (2 * gaps[4] - gaps[3]).abs() < 0.01 * gaps[3]  # and so to 0


@pytest.mark.parametrize("x", X.split(1))
def test_continuous_elbo_is_the_log_likelihood_of_the_gaussian(x):
    exact = DATA.log_prob(x).item()
    assert expected_elbo(x, grid_from(COSINE, 400), continuous_elbo_times) == pytest.approx(exact, rel=1e-6)


@every_sde
@pytest.mark.parametrize("times", [discrete_elbo_times, continuous_elbo_times])
def test_elbo_of_a_wrong_denoiser_stays_below_on_average_over_the_data(sde, times):
    wrong = lambda x, levels: 0.9 * GAUSSIAN.denoise(x, as_level_list(levels)[0]) + 0.1
    half = math.sqrt(2) * torch.linalg.cholesky(S).T  # mean and covariance of the data, in four points
    data = torch.cat([MU + half, MU - half])
    bounds = [
        estimate_elbo(wrong, x.expand(4, 2), log_snr(sde, 100), Expectation(), 1, times).bound.nats.mean()
        for x in data.split(1)
    ]
    assert torch.stack(bounds).mean() < -DATA.entropy() - 0.02


def test_elbo_s_draws_have_its_expectation_and_its_terms_add_up_to_it():
    count, grid = 100, log_snr(COSINE, 12)
    answer = estimate_elbo(denoise, X[:1].expand(count, 2), grid, Noise(range(count)), 8, continuous_elbo_times)
    exact = expected_elbo(X[:1], grid_from_ends(grid, 400), continuous_elbo_times)
    error = answer.bound.nats.std() / math.sqrt(count)
    assert (answer.bound.nats.mean() - exact).abs() < 3.5 * error and error < 0.1 * abs(exact)
    torch.testing.assert_close(answer.bound.nats, -(answer.prior + answer.diffusion.sum(1) + answer.reconstruction))
    assert answer.diffusion.shape == (count, 11) and len(answer.log_snr) == 12
    assert answer.bound.nfe == 8 * 12
    spread = answer.bound.standard_error.square().mean().sqrt() / answer.bound.nats.std()
    assert spread.item() == pytest.approx(1, rel=0.2)


def grid_from_ends(grid, n):
    ends = grid.sde.log_snr(torch.tensor([grid[0].t, grid[-2].t], dtype=torch.float64))
    t = grid.sde.time_at_log_snr(torch.linspace(*ends, n, dtype=torch.float64))
    return TimeGrid(grid.sde, (*map(grid.sde.level, t.tolist()), CLEAN_LEVEL))


def test_prior_term_is_the_divergence_from_standard_noise():
    grid = linspace(SDES["table scaled_linear"], 5)
    q = Normal(grid[0].alpha * X, grid[0].sigma)
    expected = torch.distributions.kl_divergence(q, Normal(torch.zeros_like(X), 1.0)).sum(1)
    torch.testing.assert_close(estimate_elbo(denoise, X, grid, Noise(range(4))).prior, expected)


def test_discrete_elbo_may_start_at_zero_snr_and_the_continuous_one_may_not():
    grid = linspace(COSINE, 30)
    assert (
        grid[0].alpha == 0
        and estimate_elbo(denoise, X, grid, Noise(range(4)), 1, discrete_elbo_times).prior.abs().max() == 0
    )
    with pytest.raises(ValueError, match="choose spacing karras or log_snr"):
        estimate_elbo(denoise, X, grid, Noise(range(4)))
    with pytest.raises(ValueError, match="2 steps"):
        estimate_elbo(denoise, X, linspace(COSINE, 1), Noise(range(4)))


def test_entropy_and_reconstruction_are_the_normal_s():
    x, mean = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    std = mean.exp()
    torch.testing.assert_close(gaussian_entropy(std), Normal(mean, std).entropy().flatten(1).sum(1))
    spread = (x - mean).square().flatten(1).mean(1).sqrt()
    at = lambda scale: Normal(mean, (scale * spread).view(-1, 1, 1)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(sigma_vae_log_prob(x, mean), at(1))
    assert (at(0.99) < at(1)).all() and (at(1.01) < at(1)).all()
