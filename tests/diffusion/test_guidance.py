"""Guidance is affine, absent at scale 1 and outside its interval, rescaled as diffusers does, and a row's own."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser, NFECounter
from ldm.diffusion.guidance import autoguidance, classifier_free_guidance
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.sde import VPSDE
from tests.diffusion.gaussian import GAUSSIAN, NOTHING
from tests.diffusion.oracle import Gaussian

SDE = VPSDE.linear()
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    x, point = randn(3, 5), SDE.level(0.4)
    for scale in (1.0, torch.ones(3)):
        network = Recorder()
        denoiser = Denoiser(network, SDE, PREDICTIONS["eps"])
        assert torch.equal(classifier_free_guidance(denoiser, COND, UNCOND, scale)(x, point), denoiser(x, point, COND))
        assert network.texts == [[1, 2, 3]] * 2


def test_only_guided_rows_are_asked_twice_and_in_one_call():
    network, scale = Recorder(), torch.tensor([2.0, 1.0, 5.0])
    denoiser = Denoiser(network, SDE, PREDICTIONS["v"])
    x, levels = randn(3, 5), [SDE.level(t) for t in (0.2, 0.5, 0.9)]
    guided = classifier_free_guidance(denoiser, COND, UNCOND, scale)(x, levels)
    assert network.texts == [[1, 2, 3, -1, -1]]
    c, u = denoiser(x, levels, COND), denoiser(x, levels, UNCOND)
    torch.testing.assert_close(guided, u + scale[:, None] * (c - u))
    assert torch.equal(guided[1], c[1])


@every_prediction
def test_guiding_x0_is_guiding_the_network_s_own_output(prediction):
    network, scale = Recorder(), 3.5
    x, point = randn(3, 5), SDE.level(0.3)

    def guided_output(x, timesteps, cond):
        c, u = network(x, timesteps, COND), network(x, timesteps, UNCOND)
        return u + scale * (c - u)

    expected = Denoiser(guided_output, SDE, prediction)(x, point, NOTHING)
    answer = classifier_free_guidance(Denoiser(network, SDE, prediction), COND, UNCOND, scale)(x, point)
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def rescaled_network(network, scale, share):
    """A network whose own output is guided and rescaled by diffusers."""

    def output(x, timesteps, cond):
        c, u = network(x, timesteps, COND), network(x, timesteps, UNCOND)
        return rescale_noise_cfg(u + scale * (c - u), c, share)

    return output


@every_prediction
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_rescale_is_diffusers_rescaling_of_the_network_s_own_output(prediction, share):
    network, x, point = Recorder(), randn(3, 5), SDE.level(0.3)
    expected = Denoiser(rescaled_network(network, 3.5, share), SDE, prediction)(x, point, NOTHING)
    answer = classifier_free_guidance(Denoiser(network, SDE, prediction), COND, UNCOND, 3.5, rescale=share)(x, point)
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_rescale_is_finite_at_zero_snr_and_diffusers_there():
    cosine, network, x = VPSDE.cosine(), Recorder(), randn(3, 5)
    expected = Denoiser(rescaled_network(network, 3.5, 0.7), cosine, PREDICTIONS["v"])(x, cosine.level(1.0), NOTHING)
    guided = classifier_free_guidance(Denoiser(network, cosine, PREDICTIONS["v"]), COND, UNCOND, 3.5, rescale=0.7)
    torch.testing.assert_close(guided(x, cosine.level(1.0)), expected, rtol=1e-4, atol=1e-4)


def test_outside_its_interval_a_row_is_conditional_and_asks_nothing_unconditional():
    network = Recorder()
    denoiser = Denoiser(network, SDE, PREDICTIONS["v"])
    x, levels = randn(3, 5), [SDE.level(t) for t in (0.2, 0.5, 0.9)]
    ratio = [point.sigma / point.alpha for point in levels]
    c, full = denoiser(x, levels, COND), classifier_free_guidance(denoiser, COND, UNCOND, 3.0)(x, levels)
    for interval, rows in {
        (0.0, math.inf): [0, 1, 2],
        (ratio[0], ratio[1]): [1],  # open below, closed above
        (ratio[0] * 0.99, ratio[1] * 0.99): [0],
        (ratio[2], math.inf): [],
    }.items():
        network.texts.clear()
        answer = classifier_free_guidance(denoiser, COND, UNCOND, 3.0, interval=interval)(x, levels)
        assert network.texts == [[1, 2, 3] + [-1] * len(rows)]
        for i in range(3):
            torch.testing.assert_close(answer[i], (full if i in rows else c)[i])
            assert i in rows or torch.equal(answer[i], c[i])


def test_an_interval_that_ends_at_infinity_holds_zero_snr():
    cosine, network = VPSDE.cosine(), Recorder()
    denoiser = Denoiser(network, cosine, PREDICTIONS["v"])
    classifier_free_guidance(denoiser, COND, UNCOND, 3.0, interval=(5.0, math.inf))(randn(3, 5), cosine.level(1.0))
    classifier_free_guidance(denoiser, COND, UNCOND, 3.0, interval=(0.0, 5.0))(randn(3, 5), cosine.level(1.0))
    assert [len(texts) for texts in network.texts] == [6, 3]


def test_which_rows_are_asked_is_decided_without_the_device():
    """On the meta device every question to the device, of a value or of a mask's size, is an error."""
    cond, uncond = COND.to("meta"), UNCOND.to("meta")
    denoiser = Denoiser(lambda x, t, cond: x * cond.context[:, 0], SDE, PREDICTIONS["v"])
    guided = classifier_free_guidance(denoiser, cond, uncond, SCALES, SHARES, INTERVALS)
    for times in [(0.1, 0.2, 0.3), (0.8, 0.3, 0.05)]:
        assert guided(torch.empty(3, 5, device="meta"), [SDE.level(t) for t in times]).shape == (3, 5)


SCALES = torch.tensor([4.0, 1.0, 2.5])
SHARES = torch.tensor([0.7, 0.5, 0.0])
INTERVALS = torch.tensor([[0.0, math.inf], [0.0, math.inf], [0.5, 4.0]])


@every_prediction
def test_rows_are_independent_of_their_neighbours(prediction):
    """Scale, rescale and interval are a row's own, and so is the answer, at whatever level its neighbours are."""
    denoiser = Denoiser(Recorder(), SDE, prediction)
    guided = classifier_free_guidance(denoiser, COND, UNCOND, SCALES, SHARES, INTERVALS)
    for times in [(0.1, 0.2, 0.3), (0.8, 0.3, 0.05), (0.4, 0.4, 0.4)]:
        x, levels = randn(3, 5), [SDE.level(t) for t in times]
        together = guided(x, levels)
        for i in range(3):
            row = slice(i, i + 1)
            alone = classifier_free_guidance(denoiser, COND[row], UNCOND[row], SCALES[row], SHARES[row], INTERVALS[row])
            assert torch.equal(together[row], alone(x[row], levels[i]))


def test_each_option_off_leaves_the_others_bit_for_bit():
    denoiser, x, point = Denoiser(Recorder(), SDE, PREDICTIONS["eps"]), randn(3, 5), SDE.level(0.4)
    plain = classifier_free_guidance(denoiser, COND, UNCOND, 3.0)(x, point)
    assert torch.equal(classifier_free_guidance(denoiser, COND, UNCOND, 3.0, 0.0, (0.0, math.inf))(x, point), plain)
    mixed = classifier_free_guidance(denoiser, COND, UNCOND, 3.0, torch.tensor([0.0, 0.7, 0.0]))(x, point)
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]]) and not torch.equal(mixed[1], plain[1])
    assert torch.equal(classifier_free_guidance(denoiser, COND, UNCOND, 1.0, 0.7)(x, point), denoiser(x, point, COND))


def test_gradients_flow_after_the_texts_were_joined_under_inference_mode():
    denoiser, x, point = Denoiser(Recorder(), SDE, PREDICTIONS["v"]), randn(3, 5), SDE.level(0.4)
    guided = classifier_free_guidance(denoiser, COND, UNCOND, 3.0)
    with torch.inference_mode():
        before = guided(x, point)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(guided(x, point).sum(), x)
    torch.testing.assert_close(before, guided(x, point).detach())
    text = COND.context[:, 0, 0]
    torch.testing.assert_close(slope, (point.alpha - point.sigma * (3 * text + 2))[:, None].expand(3, 5))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rescale": 1.5}, "guidance rescale 1.5: between 0 and 1"),
        ({"rescale": torch.tensor([0.0, math.nan, 0.5])}, "guidance rescale nan"),
        ({"interval": (2.0, 1.0)}, r"guidance interval \(2, 1\): 0 <= low < high"),
        ({"interval": (-1.0, 1.0)}, r"guidance interval \(-1, 1\)"),
    ],
)
def test_what_is_no_share_and_no_interval_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        classifier_free_guidance(Denoiser(Recorder(), SDE, PREDICTIONS["v"]), COND, UNCOND, 3.0, **options)


WIDE = Gaussian(GAUSSIAN.mu * 0, 4 * GAUSSIAN.cov)


@every_prediction
def test_guidance_of_gaussian_data_has_the_score_of_the_product_of_powers(prediction):
    """score = scale score_c + (1 - scale) score_u, in closed form, whatever the network predicts."""

    def network(x, timesteps, cond):
        alpha, sigma = SDE.marginal((timesteps[:1].double() + 1) / SDE.num_train_timesteps)
        data, point = {1.0: GAUSSIAN, 0.0: WIDE}, SDE.level(0.6)
        texts = cond.context[:, 0, 0].tolist()
        x0 = torch.cat([data[text].denoise(row[None].double(), point) for text, row in zip(texts, x, strict=True)])
        return prediction.to_output(x0, x.double(), alpha, sigma)

    cond, uncond = Conditioning(torch.ones(4, 1, 1)), Conditioning(torch.zeros(4, 1, 1))
    x, point = randn(4, 2), SDE.level(0.6)
    x0 = classifier_free_guidance(Denoiser(network, SDE, prediction), cond, uncond, 2.5)(x, point).double()
    score = (point.alpha * x0 - x.double()) / point.sigma**2
    expected = 2.5 * GAUSSIAN.score(x.double(), point) - 1.5 * WIDE.score(x.double(), point)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


def test_autoguidance_is_the_good_model_led_away_from_the_bad_one():
    good, bad = NFECounter(GAUSSIAN.denoise), NFECounter(WIDE.denoise)
    x, point = randn(3, 2).double(), SDE.level(0.4)
    scale = torch.tensor([1.0, 2.0, 0.5])
    answer = autoguidance(good, bad, scale)(x, point)
    g, b = GAUSSIAN.denoise(x, point), WIDE.denoise(x, point)
    torch.testing.assert_close(answer, scale[:, None] * g + (1 - scale[:, None]) * b)
    assert torch.equal(answer[0], g[0]) and (good.nfe, bad.nfe) == (1, 1)
    torch.testing.assert_close(autoguidance(good, bad, 2.0)(x, point), 2 * g - b)
    for one in (1.0, torch.ones(3)):
        assert torch.equal(autoguidance(good, bad, one)(x, point), g)
    assert bad.nfe == 2
