"""Inverse problems: exact on Gaussian data, each row by itself, in whatever gradient mode they are asked."""

import pytest
import torch

from ldm.analysis.inverse_problems import LUMA_WEIGHTS, OPERATORS, conjugate_gradients, tmpd
from ldm.diffusion.guidance import classifier_free_guidance, inpaint
from ldm.diffusion.samplers import SAMPLERS, sample
from ldm.diffusion.sde import VPSDE
from ldm.diffusion.timesteps import SPACINGS
from tests.diffusion.gaussian import GAUSSIAN, MU, Gaussian, S

SDE = VPSDE.linear()
A = torch.tensor([[0.8, -1.3]], dtype=torch.float64)
Y = torch.tensor([[0.9]], dtype=torch.float64)
STD = 0.3
GAIN = S @ A.T / (A @ S @ A.T + STD**2)
POSTERIOR = Gaussian(MU + (GAIN @ (Y[0] - A @ MU)), S - GAIN @ A @ S)  # of x_0 given y, in closed form
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measure(x0):
    return x0 @ A.T


def known(denoise=GAUSSIAN.denoise, y=Y):
    return tmpd(denoise, measure, y, STD, iterations=2, min_log_snr=-12)


@pytest.mark.parametrize("t", [0.001, 0.1, 0.5, 0.9])
def test_the_answer_is_the_gaussian_posterior_s(t):
    """E[x_0 | x, y] is the denoiser of the data's posterior given y, for a covariance that is no multiple of I."""
    torch.testing.assert_close(known()(X, SDE.level(t)), POSTERIOR.denoise(X, SDE.level(t)), rtol=1e-9, atol=1e-9)


def test_sampling_gives_the_posterior_s_mean_and_covariance():
    """The sampler is affine in x, so three rows tell its moments, with no Monte Carlo."""
    grid = SPACINGS["log_snr"](SDE, 400)
    basis = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()
    origin, *images = sample(SAMPLERS["dpmpp_2m"].function, known(), basis, grid, None)
    slope = torch.stack(images, 1) - origin[:, None]
    torch.testing.assert_close(origin, POSTERIOR.mu, rtol=0, atol=4e-3)
    torch.testing.assert_close(slope @ slope.T, POSTERIOR.cov, rtol=0, atol=4e-3)


def test_a_whole_precise_measurement_is_the_answer():
    x0 = randn(4, 2, seed=1)
    answer = tmpd(GAUSSIAN.denoise, lambda x: x, x0, 1e-6, iterations=2)(X, SDE.level(0.5))
    torch.testing.assert_close(answer, x0, rtol=0, atol=1e-6)


def test_a_measurement_of_no_precision_changes_nothing():
    answer = tmpd(GAUSSIAN.denoise, measure, Y, 1e8)(X, SDE.level(0.5))
    torch.testing.assert_close(answer, GAUSSIAN.denoise(X, SDE.level(0.5)))


def test_below_the_least_snr_the_answer_is_the_denoiser_s_own_row_by_row():
    levels = [SDE.level(t) for t in (0.2, 0.99, 0.4, 1.0)]
    answer, plain = tmpd(curved, measure, Y, STD)(X, levels), curved(X, levels)
    assert [torch.equal(a, b) for a, b in zip(answer, plain, strict=True)] == [False, True, False, True]


def test_pure_noise_gives_the_denoiser_s_own_answer():
    sde = VPSDE.cosine()
    for point in (sde.level(1.0), sde.level(0.999)):  # alpha = 0, and log-SNR = -13
        assert torch.equal(known(lambda x, levels: x.sin())(X, point), X.sin())


@pytest.mark.parametrize("noise_std", [0, -1.0, float("nan")])
def test_a_measurement_without_noise_is_refused(noise_std):
    with pytest.raises(ValueError, match="noise_std"):
        tmpd(GAUSSIAN.denoise, measure, Y, noise_std)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_answer_is_the_same_in_every_gradient_mode(mode):
    expected = known()(X, SDE.level(0.5))
    with mode():
        answer = known()(X.clone(), SDE.level(0.5))
    assert torch.equal(answer, expected) and not answer.requires_grad


def curved(x, levels):
    """A denoiser that is no Gaussian's."""
    return torch.tanh(x) + 0.3 * torch.sin(x.flip(1))


def test_rows_do_not_know_each_other_and_have_levels_of_their_own():
    y, levels = randn(4, 1, seed=2), [SDE.level(t) for t in (0.1, 0.3, 0.5, 0.9)]
    batch = known(curved, y)(X, levels)
    for i, point in enumerate(levels):
        torch.testing.assert_close(batch[i : i + 1], known(curved, y[i : i + 1])(X[i : i + 1], point))


def test_a_curved_operator_is_its_tangent():
    point, y = SDE.level(0.5), randn(4, 2, seed=3)
    m, bend = GAUSSIAN.denoise(X, point), lambda x: torch.sinh(x) + 0.2 * x.flip(1) ** 2
    answer = tmpd(GAUSSIAN.denoise, bend, y, STD)(X, point)
    c = torch.linalg.inv(torch.linalg.inv(S) + point.alpha**2 / point.sigma**2 * torch.eye(2))
    for i in range(4):
        j = torch.autograd.functional.jacobian(lambda x: bend(x[None])[0], m[i])
        gain = c @ j.T @ torch.linalg.inv(j @ c @ j.T + STD**2 * torch.eye(2))
        torch.testing.assert_close(answer[i], m[i] + gain @ (y[i] - bend(m)[i]), rtol=1e-8, atol=1e-8)


def test_conjugate_gradients_solve_each_row_in_as_many_steps_as_it_has_numbers():
    root, b = randn(3, 5, 5), randn(3, 5, seed=4)
    matrix = root @ root.mT + torch.eye(5)
    u = conjugate_gradients(lambda u: (matrix @ u[..., None])[..., 0], b, 5)
    torch.testing.assert_close(u, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)
    more = conjugate_gradients(lambda u: (matrix @ u[..., None])[..., 0], torch.cat([b[:2], 0 * b[2:]]), 40)
    torch.testing.assert_close(more[:2], u[:2], rtol=1e-8, atol=1e-8)
    assert not more[2].any()


def test_a_direction_that_is_not_stretched_ends_the_search():
    b = randn(2, 3)
    assert torch.equal(conjugate_gradients(lambda u: -u, b, 3), torch.zeros_like(b))


PICTURES = randn(2, 3, 8, 8)


def test_operators_measure_what_they_say():
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    left = OPERATORS["inpaint"](mask)(PICTURES)
    assert torch.equal(left[..., :4], PICTURES[..., :4]) and not left[..., 4:].any()
    boxes = PICTURES.view(2, 3, 2, 4, 2, 4).mean((3, 5))
    torch.testing.assert_close(OPERATORS["super_resolution"](4)(PICTURES), boxes)
    red, green, blue = PICTURES.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    torch.testing.assert_close(OPERATORS["colourise"]()(PICTURES)[:, 0], luma)
    assert sum(LUMA_WEIGHTS) == pytest.approx(1)


def test_keep_holds_the_known_part_and_leaves_the_rest():
    """A sampler ends in the known image where mask is 1, and mask 0 is the denoiser itself."""
    x0, grid = randn(4, 2, seed=5), SPACINGS["log_snr"](SDE, 10)
    mask = torch.tensor([1.0, 0.0], dtype=torch.float64)
    end = sample(SAMPLERS["ddim"].function, inpaint(GAUSSIAN.denoise, x0, mask), X, grid, None)
    torch.testing.assert_close(end[:, 0], x0[:, 0])
    assert torch.equal(inpaint(curved, x0, torch.zeros(2).double())(X, SDE.level(0.5)), curved(X, SDE.level(0.5)))


def test_a_latent_model_with_its_decoder_in_the_loop_comes_nearer_to_the_measurement(pipe):
    """A random U-Net and VAE: one conditioned answer at low noise fits the measurement better than the plain one."""
    from ldm.nn.vae import decode_latents

    operator = OPERATORS["super_resolution"](4)

    def seen(z):
        return operator(decode_latents(pipe.model.vae, z))

    z = randn(2, 4, 8, 8, seed=6).float()
    with torch.no_grad():
        y = seen(randn(2, 4, 8, 8, seed=7).float())
    denoise = classifier_free_guidance(
        pipe.denoiser,
        pipe.prompt_encoder("a cat")[torch.tensor([0, 0])],
        pipe.prompt_encoder("")[torch.tensor([0, 0])],
        2.0,
    )
    point = pipe.model.sde.level(0.3)
    with torch.inference_mode():
        plain, conditioned = denoise(z, point), tmpd(denoise, seen, y, 0.01)(z, point)
        residuals = [(seen(x) - y).square().flatten(1).mean(1) for x in (plain, conditioned)]
    assert (residuals[1] < residuals[0]).all()
