"""One loss: the same gradient for every prediction, the published weights, times that cover (0, 1]."""

import math

import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import (
    TIME_SAMPLERS,
    WEIGHTINGS,
    diffusion_loss,
    edm_weighting,
    loss_mean_and_variance,
    min_snr_weighting,
    p2_weighting,
    soft_min_snr_weighting,
)
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.sde import VPSDE, cosine_alphas_cumprod, rescale_zero_terminal_snr
from ldm.diffusion.timesteps import log_snr_range

SDE = VPSDE.scaled_linear()
COND = Conditioning(torch.zeros(6, 1, 1))
T = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
ALPHA, SIGMA = SDE.marginal(T)
SNR = (ALPHA / SIGMA) ** 2


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X0, NOISE = randn(6, 3, 2, seed=1), randn(6, 3, 2, seed=2)


def loss_and_gradient(name, weight):
    """The loss of one and the same model of x_0, linear in theta, told as the network of any prediction."""
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    prediction = PREDICTIONS[name]
    alpha, sigma = ALPHA.view(-1, 1, 1), SIGMA.view(-1, 1, 1)

    def network(x, timesteps, cond):
        x0 = theta[0] * x + theta[1] * torch.tanh(x)
        return prediction.to_output(x0, x, alpha, sigma)

    loss = diffusion_loss(Denoiser(network, SDE, prediction), X0.double(), COND, T, NOISE.double(), weight)
    return loss, torch.autograd.grad(loss.sum(), theta)[0]


@pytest.mark.parametrize("weight", [name for name in WEIGHTINGS if name != "uniform"])
@pytest.mark.parametrize("name", ["v", "x0", "score"])
def test_loss_and_gradient_do_not_depend_on_what_is_predicted(name, weight):
    loss, gradient = loss_and_gradient(name, WEIGHTINGS[weight])
    expected_loss, expected_gradient = loss_and_gradient("eps", WEIGHTINGS[weight])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=0)


def test_uniform_is_the_mean_squared_error_of_each_image_s_own_target():
    output = randn(6, 3, 2, seed=3)
    for prediction in PREDICTIONS.values():
        loss = diffusion_loss(Denoiser(lambda x, t, cond: output, SDE, prediction), X0, COND, T, NOISE)
        for i in range(6):
            target = prediction.target(X0[i], NOISE[i], ALPHA[i], SIGMA[i])
            torch.testing.assert_close(loss[i], ((output[i] - target) ** 2).mean().float())


def test_network_sees_the_perturbed_image_and_the_table_s_timestep():
    def network(x, timesteps, cond):
        torch.testing.assert_close(x, SDE.perturb(X0, NOISE, T))
        torch.testing.assert_close(timesteps, (1000 * T - 1).float())
        return x

    diffusion_loss(Denoiser(network, SDE, PREDICTIONS["v"]), X0, COND, T, NOISE)


def test_a_perturbation_is_seen_and_not_predicted():
    more, output = 0.1 * randn(6, 3, 2, seed=4), randn(6, 3, 2, seed=3)

    def network(x, timesteps, cond):
        torch.testing.assert_close(x, SDE.perturb(X0, NOISE + more, T))
        return output

    for prediction in PREDICTIONS.values():
        loss = diffusion_loss(Denoiser(network, SDE, prediction), X0, COND, T, NOISE, perturbation=more)
        plain = diffusion_loss(Denoiser(lambda x, t, cond: output, SDE, prediction), X0, COND, T, NOISE)
        assert torch.equal(loss, plain)


BETA = SDE.beta(T)
CLIPPED, SOFT = SNR.clamp(max=5), SNR * 4 / (SNR + 4)
EDM = (1 / SNR + 1) / (1 / SNR)  # lambda of Karras et al. 2022, table 1, for sigma = 1 / sqrt(SNR), sigma_data = 1


@pytest.mark.parametrize(
    "name, prediction, expected",
    [
        ("snr", "eps", torch.ones_like(SNR)),
        ("snr", "score", SIGMA**2),
        ("likelihood", "score", BETA),
        ("likelihood", "eps", BETA / SIGMA**2),
        ("likelihood", "x0", BETA * ALPHA**2 / SIGMA**4),
        ("min_snr", "eps", CLIPPED / SNR),
        ("min_snr", "v", CLIPPED / (SNR + 1)),
        ("min_snr", "x0", CLIPPED),
        ("soft_min_snr", "eps", SOFT / SNR),
        ("soft_min_snr", "v", SOFT / (SNR + 1)),
        ("p2", "eps", 1 / (1 + SNR)),
        ("debiased", "eps", 1 / SNR.sqrt()),
        ("edm", "x0", EDM),
        ("edm", "v", torch.ones_like(SNR)),
    ],
)
def test_weights_are_the_papers(name, prediction, expected):
    torch.testing.assert_close(WEIGHTINGS[name](PREDICTIONS[prediction], SDE, T), expected, rtol=1e-9, atol=0)


def test_the_likelihood_weight_is_the_rate_at_which_snr_falls():
    h = 1e-6
    snr_rate = (SDE.log_snr(T - h).exp() - SDE.log_snr(T + h).exp()) / (2 * h)
    torch.testing.assert_close(WEIGHTINGS["likelihood"](PREDICTIONS["x0"], SDE, T), snr_rate, rtol=1e-6, atol=0)


def test_families_of_weights_take_their_parameters():
    x0, eps = PREDICTIONS["x0"], PREDICTIONS["eps"]
    torch.testing.assert_close(min_snr_weighting(1)(x0, SDE, T), SNR.clamp(max=1))
    torch.testing.assert_close(soft_min_snr_weighting(2)(x0, SDE, T), 1 / (1 / SNR + 1 / 2))
    torch.testing.assert_close(p2_weighting(0.5, 2.0)(eps, SDE, T), (2 + SNR) ** -0.5)
    sigma = SNR**-0.5
    torch.testing.assert_close(edm_weighting(0.5)(x0, SDE, T), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)


def test_weights_have_their_limits_at_zero_snr():
    cosine, t = VPSDE.cosine(), torch.ones(1, dtype=torch.float64)
    for name, limit in {"eps": 1.0, "v": 0.0, "x0": 0.0, "score": 1.0}.items():
        assert WEIGHTINGS["min_snr"](PREDICTIONS[name], cosine, t).item() == pytest.approx(limit, abs=1e-12)
    assert WEIGHTINGS["edm"](PREDICTIONS["v"], cosine, t).item() == pytest.approx(1)


@pytest.mark.parametrize(
    "name, prediction",
    [("likelihood", "v"), ("debiased", "eps"), ("debiased", "score"), ("edm", "eps"), ("edm", "score")],
)
def test_weights_that_have_no_limit_at_zero_snr_are_refused(name, prediction):
    t = torch.tensor([0.5, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{name!r} is infinite at zero SNR: choose times truncated or importance"):
        WEIGHTINGS[name](PREDICTIONS[prediction], VPSDE.cosine(), t)


U = torch.rand(4096, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["uniform", "stratified", "discrete"])
def test_uniform_times_are_uniform_on_the_half_open_interval(name):
    t, weight = TIME_SAMPLERS[name](SDE, U)
    edges, _ = TIME_SAMPLERS[name](SDE, torch.tensor([0.0, 1 - 2**-24]))
    assert (weight == 1).all()
    assert t.min() > 0 and t.max() <= 1 and edges.min() > 0 and edges.max() <= 1
    distance = (t.sort().values - torch.arange(1, 4097) / 4096).abs().max()  # Kolmogorov and Smirnov's
    assert distance < 1.63 / 64  # 1 %


def test_stratified_puts_one_time_in_each_stratum():
    t, _ = TIME_SAMPLERS["stratified"](SDE, U)
    assert torch.equal((t * 4096).ceil().long(), torch.arange(1, 4097))


def test_discrete_times_are_the_table_s():
    k = TIME_SAMPLERS["discrete"](SDE, U)[0] * 1000 - 1
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-9)
    assert k.min() >= 0 and k.max() <= 999 + 1e-9 and len(k.round().unique()) > 950


def test_logit_normal_has_a_standard_normal_logit():
    t, weight = TIME_SAMPLERS["logit_normal"](SDE, U)
    assert TIME_SAMPLERS["log_normal"] is TIME_SAMPLERS["logit_normal"]  # the former name
    assert (weight == 1).all()
    logit = t.logit().sort().values
    normal = torch.special.ndtr(logit)
    assert (normal - torch.arange(1, 4097) / 4096).abs().max() < 1.63 / 64
    edges, _ = TIME_SAMPLERS["logit_normal"](SDE, torch.tensor([0.0, 1 - 2**-24]))
    assert edges.min() > 0 and edges.max() <= 1


SDES = {
    "linear": VPSDE.linear(),
    "scaled_linear": SDE,
    "cosine": VPSDE.cosine(),
    "table": VPSDE.tabulated(cosine_alphas_cumprod(0, 0, 1000)),
    "table zero SNR": VPSDE.tabulated(rescale_zero_terminal_snr(cosine_alphas_cumprod(0, 0, 1000))),
}
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


@every_sde
def test_importance_times_are_uniform_in_log_snr_and_weigh_one_over_their_density(sde):
    u = torch.linspace(0, 1, 8001, dtype=torch.float64)
    t, weight = TIME_SAMPLERS["importance"](sde, u)
    start, end = log_snr_range(sde)
    torch.testing.assert_close(sde.log_snr(t), start + u * (end - start), rtol=1e-9, atol=1e-9)
    assert (t > 0).all() and (t <= 1).all()
    slope = -(t[2:] - t[:-2]) / (u[2:] - u[:-2])  # dt/du = 1/p, but for the corners of a table
    assert ((slope / weight[1:-1] - 1).abs() < 0.01).double().mean() > 0.99


def polynomial(t):
    return 1 - 2 * t + 3 * t**2


@every_sde
@pytest.mark.parametrize("name", ["truncated", "importance"])
def test_importance_sampling_is_unbiased(sde, name):
    """Its expectation, by quadrature in u, is the integral over t, in closed form."""
    t, weight = TIME_SAMPLERS[name](sde, (torch.arange(1 << 17, dtype=torch.float64) + 0.5) / (1 << 17))
    low, high = sde.time_at_log_snr(log_snr_range(sde)).flip(0).tolist()
    integral = (high - high**2 + high**3) - (low - low**2 + low**3)
    assert (weight * polynomial(t)).mean().item() == pytest.approx(integral, rel=1e-4)


def test_importance_makes_the_likelihood_weight_constant_on_eps():
    for sde in SDES.values():
        t, importance = TIME_SAMPLERS["importance"](sde, U.double())
        weight = importance * WEIGHTINGS["likelihood"](PREDICTIONS["eps"], sde, t)
        start, end = log_snr_range(sde)
        torch.testing.assert_close(weight, (end - start).expand_as(weight), rtol=1e-9, atol=0)


def error_of_the_exact_model(sde):
    """E|eps - E[eps | x]|^2 = alpha^2 of each number, for data N(0, I)."""
    return lambda t: sde.marginal(t)[0] ** 2


@every_sde
def test_importance_keeps_the_mean_of_the_likelihood_loss_and_lowers_its_variance(sde):
    error, weight = error_of_the_exact_model(sde), WEIGHTINGS["likelihood"]
    mean, variance = loss_mean_and_variance(TIME_SAMPLERS["truncated"], weight, sde, error)
    mean_by_importance, variance_by_importance = loss_mean_and_variance(TIME_SAMPLERS["importance"], weight, sde, error)
    assert mean_by_importance == pytest.approx(mean, rel=2e-3)
    assert variance_by_importance < variance / 4


def test_the_likelihood_loss_of_the_exact_model_is_its_closed_form():
    """int alpha^2 dlog-SNR = log (sigma_1^2 / sigma_0^2): with S = alpha^2, dlog-SNR = dS / (S (1 - S))."""
    for sde in SDES.values():
        start, end = (sde.level(t) for t in sde.time_at_log_snr(log_snr_range(sde)).tolist())
        mean, _ = loss_mean_and_variance(
            TIME_SAMPLERS["importance"], WEIGHTINGS["likelihood"], sde, error_of_the_exact_model(sde)
        )
        assert mean == pytest.approx(2 * math.log(start.sigma / end.sigma), rel=1e-6)


def test_diffusion_loss_with_importance_times_estimates_that_closed_form():
    """The whole path, network to mean loss: 4,096 generates on N(0, I), within four of their standard errors."""
    x0, noise = randn(4096, 16, seed=3), randn(4096, 16, seed=4)
    exact = Denoiser(lambda x, k, cond: SDE.marginal((k.double() + 1) / 1000)[1][:, None] * x, SDE, PREDICTIONS["eps"])
    t, share = TIME_SAMPLERS["importance"](SDE, U)
    drawn = diffusion_loss(exact, x0, COND, t, noise, WEIGHTINGS["likelihood"]).double() * share
    expected, _ = loss_mean_and_variance(
        TIME_SAMPLERS["importance"], WEIGHTINGS["likelihood"], SDE, error_of_the_exact_model(SDE)
    )
    assert abs(drawn.mean().item() - expected) < 4 * drawn.std().item() / 64
