"""Predictions change variables, Tweedie's score is exact, guidance is affine and absent at scale 1."""

from dataclasses import dataclass, field

import pytest
import torch
from gaussian import GAUSSIAN, NOTHING

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guide
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.sde import VPSDE

SDE = VPSDE.linear()
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_prediction
@pytest.mark.parametrize("t", [0.01, 0.3, 0.9])
def test_target_and_to_x0_are_inverses_and_jacobian_is_the_slope(prediction, t):
    x0, noise = randn(5, seed=1).double(), randn(5, seed=2).double()
    alpha, sigma = SDE.marginal(torch.tensor([t], dtype=torch.float64))
    x = alpha * x0 + sigma * noise
    target = prediction.target(x0, noise, alpha, sigma)
    torch.testing.assert_close(prediction.to_x0(target, x, alpha, sigma), x0)
    moved = prediction.to_x0(target + 1, x, alpha, sigma) - x0
    torch.testing.assert_close(moved, prediction.jacobian(alpha, sigma).expand(5))


def exact_network(prediction):
    """The network that is right about the Gaussian: its output is the target's expectation given x."""

    def network(x, timesteps, cond):
        rows = []
        for row, k in zip(x.double(), timesteps.tolist(), strict=True):
            point = SDE.step(k)
            x0 = GAUSSIAN.denoise(row[None], point)[0]
            rows.append(prediction.target(x0, (row - point.alpha * x0) / point.sigma, point.alpha, point.sigma))
        return torch.stack(rows)

    return network


@every_prediction
def test_score_by_tweedie_is_the_gaussian_s_score_with_a_level_per_row(prediction):
    denoiser = Denoiser(exact_network(prediction), SDE, prediction)
    x, levels = randn(3, 2), [SDE.at(t) for t in (0.05, 0.4, 0.8)]
    score = denoiser.score(x, levels, NOTHING)
    for i, point in enumerate(levels):
        torch.testing.assert_close(
            score[i : i + 1], GAUSSIAN.score(x[i : i + 1].double(), point).float(), rtol=1e-3, atol=1e-4
        )
        assert torch.equal(score[i : i + 1], denoiser.score(x[i : i + 1], point, NOTHING))


def test_network_runs_in_its_dtype_and_the_answer_is_float32():
    seen = []

    def network(x, timesteps, cond):
        seen.append((x.dtype, timesteps.dtype))
        return x

    answer = Denoiser(network, SDE, PREDICTIONS["v"], torch.bfloat16)(randn(1, 4), SDE.at(0.5), NOTHING)
    assert seen == [(torch.bfloat16, torch.float32)] and answer.dtype == torch.float32


def test_eps_at_zero_snr_is_refused_and_v_is_not():
    cosine, x = VPSDE.cosine(), randn(1, 4)
    with pytest.raises(ValueError, match="eps"):
        Denoiser(lambda x, t, cond: x, cosine, PREDICTIONS["eps"])(x, cosine.at(1.0), NOTHING)
    torch.testing.assert_close(Denoiser(lambda x, t, cond: x, cosine, PREDICTIONS["v"])(x, cosine.at(1.0), NOTHING), -x)


@dataclass
class Recorder:
    """A network whose output is x scaled by the text, and which notes the texts that it was asked about."""

    texts: list = field(default_factory=list)

    def __call__(self, x, timesteps, cond):
        text = cond.context[:, 0, 0]
        self.texts.append(text.tolist())
        return x * text[:, None] + timesteps[:, None] / 1000


COND, UNCOND = (
    Conditioning(torch.tensor([1.0, 2, 3]).view(3, 1, 1)),
    Conditioning(torch.full((3, 1, 1), -1.0)),
)


def test_scale_one_never_evaluates_the_unconditional_and_is_the_conditional():
    x, point = randn(3, 5), SDE.at(0.4)
    for scale in (1.0, torch.ones(3)):
        network = Recorder()
        denoiser = Denoiser(network, SDE, PREDICTIONS["eps"])
        assert torch.equal(guide(denoiser, COND, UNCOND, scale)(x, point), denoiser(x, point, COND))
        assert network.texts == [[1, 2, 3]] * 2


def test_only_guided_rows_are_asked_twice_and_in_one_call():
    network, scale = Recorder(), torch.tensor([2.0, 1.0, 5.0])
    denoiser = Denoiser(network, SDE, PREDICTIONS["v"])
    x, levels = randn(3, 5), [SDE.at(t) for t in (0.2, 0.5, 0.9)]
    guided = guide(denoiser, COND, UNCOND, scale)(x, levels)
    assert network.texts == [[1, 2, 3, -1, -1]]
    c, u = denoiser(x, levels, COND), denoiser(x, levels, UNCOND)
    torch.testing.assert_close(guided, u + scale[:, None] * (c - u))
    assert torch.equal(guided[1], c[1])


@every_prediction
def test_guiding_x0_is_guiding_the_network_s_own_output(prediction):
    network, scale = Recorder(), 3.5
    x, point = randn(3, 5), SDE.at(0.3)

    def guided_output(x, timesteps, cond):
        c, u = network(x, timesteps, COND), network(x, timesteps, UNCOND)
        return u + scale * (c - u)

    expected = Denoiser(guided_output, SDE, prediction)(x, point, NOTHING)
    answer = guide(Denoiser(network, SDE, prediction), COND, UNCOND, scale)(x, point)
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)
