"""One loss: the same gradient for every prediction, the published weights, times that cover (0, 1]."""

import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import TIMES, WEIGHTS, diffusion_loss
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.sde import VPSDE, per_image

SDE = VPSDE.scaled_linear()
COND = Conditioning(torch.zeros(6, 1, 1))
T = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
ALPHA, SIGMA = SDE.marginal(T)
SNR = (ALPHA / SIGMA) ** 2


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X0, NOISE = randn(6, 3, 2, seed=1), randn(6, 3, 2, seed=2)


def loss_and_gradient(name, weight):
    """The loss of one and the same model of x_0, linear in theta, told as an eps-, v- or x0-network."""
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    prediction = PREDICTIONS[name]

    def network(x, timesteps, cond):
        alpha, sigma = (per_image(a, theta) for a in SDE.marginal((timesteps.double() + 1) / 1000))
        alpha, sigma, x = alpha.view(-1, 1, 1), sigma.view(-1, 1, 1), x.double()
        x0 = theta[0] * x + theta[1] * torch.tanh(x)
        return prediction.target(x0, (x - alpha * x0) / sigma, alpha, sigma)

    loss = diffusion_loss(Denoiser(network, SDE, prediction), X0, COND, T, NOISE, weight)
    return loss, torch.autograd.grad(loss.sum(), theta)[0]


@pytest.mark.parametrize("weight", ["snr", "min_snr"])
@pytest.mark.parametrize("name", ["v", "x0"])
def test_loss_and_gradient_do_not_depend_on_what_is_predicted(name, weight):
    loss, gradient = loss_and_gradient(name, WEIGHTS[weight])
    expected_loss, expected_gradient = loss_and_gradient("eps", WEIGHTS[weight])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_uniform_is_the_mean_squared_error_of_each_image_s_own_target():
    output = randn(6, 3, 2, seed=3)
    for prediction in PREDICTIONS.values():
        loss = diffusion_loss(Denoiser(lambda x, t, cond: output, SDE, prediction), X0, COND, T, NOISE)
        for i in range(6):
            target = prediction.target(X0[i], NOISE[i], ALPHA[i], SIGMA[i])
            torch.testing.assert_close(loss[i], ((output[i] - target) ** 2).mean().float())


def test_network_sees_the_perturbed_picture_and_the_table_s_timestep():
    def network(x, timesteps, cond):
        torch.testing.assert_close(x, SDE.perturb(X0, NOISE, T))
        torch.testing.assert_close(timesteps, (1000 * T - 1).float())
        return x

    diffusion_loss(Denoiser(network, SDE, PREDICTIONS["v"]), X0, COND, T, NOISE)


def test_min_snr_is_hang_et_al_for_every_prediction():
    clipped = SNR.clamp(max=5)
    formulas = {"eps": clipped / SNR, "v": clipped / (SNR + 1), "x0": clipped}
    for name, expected in formulas.items():
        torch.testing.assert_close(WEIGHTS["min_snr"](PREDICTIONS[name], ALPHA, SIGMA), expected)


def test_snr_is_uniform_on_eps():
    torch.testing.assert_close(WEIGHTS["snr"](PREDICTIONS["eps"], ALPHA, SIGMA), torch.ones_like(ALPHA))


def test_weights_have_their_limits_at_zero_snr():
    alpha, sigma = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for name, limit in {"eps": 1.0, "v": 0.0, "x0": 0.0}.items():
        assert WEIGHTS["min_snr"](PREDICTIONS[name], alpha, sigma).item() == pytest.approx(limit, abs=1e-12)


U = torch.rand(4096, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["uniform", "stratified", "discrete"])
def test_uniform_times_are_uniform_on_the_half_open_interval(name):
    t = TIMES[name](U)
    edges = TIMES[name](torch.tensor([0.0, 1 - 2**-24]))
    assert t.min() > 0 and t.max() <= 1 and edges.min() > 0 and edges.max() <= 1
    distance = (t.sort().values - torch.arange(1, 4097) / 4096).abs().max()  # Kolmogorov and Smirnov's
    assert distance < 1.63 / 64  # 1 %


def test_stratified_puts_one_time_in_each_stratum():
    t = TIMES["stratified"](U)
    assert torch.equal((t * 4096).ceil().long(), torch.arange(1, 4097))


def test_discrete_times_are_the_table_s():
    k = TIMES["discrete"](U) * 1000 - 1
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-9)
    assert k.min() >= 0 and k.max() <= 999 + 1e-9 and len(k.round().unique()) > 950


def test_log_normal_has_a_standard_normal_logit():
    logit = TIMES["log_normal"](U).logit().sort().values
    normal = torch.special.ndtr(logit)
    assert (normal - torch.arange(1, 4097) / 4096).abs().max() < 1.63 / 64
    edges = TIMES["log_normal"](torch.tensor([0.0, 1 - 2**-24]))
    assert edges.min() > 0 and edges.max() <= 1
