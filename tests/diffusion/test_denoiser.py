"""Predictions change variables and back, and Tweedie's score is exact."""

from itertools import product

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import PREDICTIONS, convert_prediction
from ldm.diffusion.sde import VPSDE
from tests.diffusion.gaussian import GAUSSIAN, NOTHING

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


PAIRS = list(product(PREDICTIONS, PREDICTIONS))
ENDS = {  # where alpha or sigma is 0: which predictions say what x0 is, and which follow from it
    "alpha": (VPSDE.cosine().level(1.0), {"v", "x0"}, set(PREDICTIONS)),
    "sigma": (VPSDE.cosine().level(0.0), set(PREDICTIONS), {"x0"}),
}


def scales(point):
    return (torch.tensor([value], dtype=torch.float64) for value in point[1:])


@pytest.mark.parametrize("source, to", PAIRS)
def test_conversions_are_the_targets_of_the_same_noise_and_invert_exactly(source, to):
    x0, noise = randn(5, 4, seed=1).double(), randn(5, 4, seed=2).double()
    alpha, sigma = SDE.marginal(torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64))
    column = alpha[:, None], sigma[:, None]
    x = column[0] * x0 + column[1] * noise
    output, expected = (PREDICTIONS[name].target(x0, noise, *column) for name in (source, to))
    there = convert_prediction(output, x, alpha, sigma, source, to)
    torch.testing.assert_close(there, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(convert_prediction(there, x, alpha, sigma, to, source), output, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("small", [1e-2, 1e-5])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("source, to", PAIRS)
def test_near_the_ends_conversions_lose_no_more_digits_than_the_question_has(source, to, end, small):
    """x / alpha and the like round x0 by 1e-16 / alpha, which is 1 / jacobian times as much of the output."""
    small, large = torch.tensor([small], dtype=torch.float64), torch.tensor([1 - small**2], dtype=torch.float64).sqrt()
    alpha, sigma = (small, large) if end == "alpha" else (large, small)
    x0, noise = randn(1, 64, seed=1).double(), randn(1, 64, seed=2).double()
    x = alpha * x0 + sigma * noise
    output = PREDICTIONS[source].target(x0, noise, alpha, sigma)
    back = convert_prediction(convert_prediction(output, x, alpha, sigma, source, to), x, alpha, sigma, to, source)
    rounding = 1e-15 / (alpha * PREDICTIONS[source].jacobian(alpha, sigma).abs()).item()
    torch.testing.assert_close(back, output, rtol=1e-12, atol=max(1e-12, rounding))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("source, to", PAIRS)
def test_at_the_ends_conversions_are_exact_or_say_that_there_is_none(source, to, end):
    point, telling, following = ENDS[end]
    alpha, sigma = scales(point)
    x0, noise = randn(1, 4, seed=1).double(), randn(1, 4, seed=2).double()
    x = alpha * x0 + sigma * noise
    if source in telling and to in following:
        output, expected = (
            x0 if name == "x0" else PREDICTIONS[name].target(x0, noise, alpha, sigma) for name in (source, to)
        )
        if end == "sigma" and source == "score":
            output = -noise  # the target is infinite in a clean image, where x0 is x whatever the score
        torch.testing.assert_close(
            convert_prediction(output, x, alpha, sigma, source, to), expected, rtol=1e-12, atol=1e-12
        )
    else:
        with pytest.raises(ValueError, match=f"prediction '{source if source not in telling else to}'"):
            convert_prediction(x, x, alpha, sigma, source, to)


def test_an_unknown_prediction_lists_the_choices():
    alpha, sigma = scales(SDE.level(0.5))
    with pytest.raises(ValueError, match="prediction 'epsilon': choose from eps, v, x0, score"):
        convert_prediction(NOTHING.context, NOTHING.context, alpha, sigma, "epsilon", "v")


def exact_network(prediction):
    """The network that is right about the Gaussian: its output is the target's expectation given x."""

    def network(x, timesteps, cond):
        rows = []
        for row, k in zip(x.double(), timesteps.tolist(), strict=True):
            point = SDE.level_at_timestep(k)
            x0 = GAUSSIAN.denoise(row[None], point)[0]
            rows.append(prediction.target(x0, (row - point.alpha * x0) / point.sigma, point.alpha, point.sigma))
        return torch.stack(rows)

    return network


@every_prediction
def test_score_by_tweedie_is_the_gaussian_s_score_with_a_level_per_row(prediction):
    denoiser = Denoiser(exact_network(prediction), SDE, prediction)
    x, levels = randn(3, 2), [SDE.level(t) for t in (0.05, 0.4, 0.8)]
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

    answer = Denoiser(network, SDE, PREDICTIONS["v"], torch.bfloat16)(randn(1, 4), SDE.level(0.5), NOTHING)
    assert seen == [(torch.bfloat16, torch.float32)] and answer.dtype == torch.float32


def test_eps_and_score_at_zero_snr_are_refused_and_v_is_not():
    cosine, x = VPSDE.cosine(), randn(1, 4)
    for name in ("eps", "score"):
        with pytest.raises(ValueError, match="cannot start at zero terminal SNR"):
            Denoiser(lambda x, t, cond: x, cosine, PREDICTIONS[name])(x, cosine.level(1.0), NOTHING)
    torch.testing.assert_close(
        Denoiser(lambda x, t, cond: x, cosine, PREDICTIONS["v"])(x, cosine.level(1.0), NOTHING), -x
    )


def test_a_network_that_predicts_the_score_gives_it_back():
    """Denoiser.score undoes PREDICTIONS["score"].to_x0: Tweedie's formula told twice."""
    x, levels = randn(3, 2), [SDE.level(t) for t in (0.3, 0.5, 0.8)]
    output = randn(3, 2, seed=1)
    score = Denoiser(lambda x, t, cond: output, SDE, PREDICTIONS["score"]).score(x, levels, NOTHING)
    torch.testing.assert_close(score, output, rtol=1e-4, atol=1e-4)
