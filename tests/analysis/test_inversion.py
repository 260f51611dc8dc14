"""Inversion: the flow is the Gaussian's to its tolerance; the exact scheme returns every bit, whatever the network."""

import math
from functools import partial

import pytest
import torch

from ldm.analysis.inversion import (
    FIXED_POINT_STEP,
    INVERSION_SCHEMES,
    bdia_decode,
    bdia_encode,
    measure_round_trip,
    ode_encode,
    solve_probability_flow,
)
from ldm.conditioning import Conditioning
from ldm.diffusion.denoiser import Denoiser, NFECounter, as_level_list
from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.sde import CLEAN_LEVEL, VPSDE, scaled_linear_alphas_cumprod
from ldm.diffusion.timesteps import SPACINGS, TimeGrid
from tests.diffusion.gaussian import GAUSSIAN

SD = VPSDE.tabulated(scaled_linear_alphas_cumprod(0.00085, 0.012, 1000))
SDES = {"table": SD, "linear": VPSDE.linear(), "cosine": VPSDE.cosine()}
X0 = torch.tensor([[0.3, -1.1], [1.4, 0.2], [-2.0, 0.5]], dtype=torch.float64)
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def exact_answer(x, levels):
    """The Gaussian's denoiser with a level per row."""
    level = as_level_list(levels)
    level = level if len(level) == len(x) else [*level] * len(x)
    return torch.cat([GAUSSIAN.denoise(row[None], point) for row, point in zip(x, level, strict=True)])


@every_sde
@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_the_flow_is_the_gaussian_s_both_ways_to_the_tolerance(sde, tolerance):
    low, high = sde.level(1e-3), sde.level(1.0)
    x = solve_probability_flow(exact_answer, X0, sde, low, high, tolerance, tolerance)
    torch.testing.assert_close(x, GAUSSIAN.probability_flow(X0, low, high), rtol=0, atol=5 * tolerance)
    back = solve_probability_flow(exact_answer, x, sde, high, low, tolerance, tolerance)
    torch.testing.assert_close(back, X0, rtol=0, atol=30 * tolerance)


def test_a_tighter_tolerance_asks_more_and_dormand_prince_is_of_order_five():
    """Questions grow as tolerance^(-1/5)."""
    asked = []
    for tolerance in (1e-7, 1e-12):
        denoise = NFECounter(exact_answer)
        solve_probability_flow(denoise, X0[:1], SD, SD.level(1e-3), SD.level(1.0), tolerance, tolerance)
        asked.append(denoise.nfe)
    assert math.log10(asked[1] / asked[0]) == pytest.approx(1, abs=0.35)


@every_sde
def test_encoding_the_clean_image_is_the_flow_but_for_the_lowest_level(sde):
    """Below t = 1/steps, v is that level's: what this misses is of second order in sigma there."""
    grid = SPACINGS["log_snr"](sde, 10)
    (x,) = ode_encode(exact_answer, X0, grid, 1e-8, 1e-8)
    assert (x - GAUSSIAN.probability_flow(X0, CLEAN_LEVEL, grid[0])).abs().max() < 20 * sde.level(
        1 / sde.num_train_timesteps
    ).sigma ** 2


def test_an_image_s_flow_does_not_depend_on_its_batch():
    batch = solve_probability_flow(exact_answer, X0, SD, SD.level(1e-3), SD.level(1.0))
    for i in range(3):
        assert torch.equal(
            solve_probability_flow(exact_answer, X0[i : i + 1], SD, SD.level(1e-3), SD.level(1.0)), batch[i : i + 1]
        )


@pytest.mark.parametrize("tolerances", [(0, 1e-5), (1e-5, -1), (math.nan, 1e-5)])
def test_tolerances_that_are_none_are_refused(tolerances):
    with pytest.raises(ValueError, match="rtol"):
        solve_probability_flow(exact_answer, X0, SD, SD.level(1e-3), SD.level(1.0), *tolerances)


@pytest.mark.parametrize("scheme", INVERSION_SCHEMES)
def test_an_answer_that_is_not_finite_is_one_clear_error(scheme):
    grid = SPACINGS["log_snr"](SD, 10)
    with pytest.raises(ValueError, match="not finite"):
        INVERSION_SCHEMES[scheme].encode(lambda x, levels: x * math.nan, X0, grid)


def wild_network(x, timesteps, cond):
    """A random network that is far from any denoiser, and text that matters to it."""
    mix = torch.randn(x[0].numel(), x[0].numel(), generator=torch.Generator().manual_seed(7)).to(x)
    flat = x.flatten(1)
    answer = torch.sin(3 * flat @ mix + timesteps[:, None] / 100) + cond.context[:, 0, :1] * torch.tanh(flat.flip(1))
    return answer.view_as(x)


PICTURES = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TEXTS, BLANK = Conditioning(torch.tensor([1.0, 2, 3]).view(3, 1, 1)), Conditioning(torch.zeros(3, 1, 1))


@pytest.mark.parametrize("scale", [1.0, torch.tensor([1.0, 2.5, 7.5])], ids=["plain", "guided"])
@pytest.mark.parametrize("spacing", ["trailing", "log_snr"])
@pytest.mark.parametrize("sde", [SD, VPSDE.cosine()], ids=["table", "cosine"])
@pytest.mark.parametrize("n", [1, 2, 5, 20, 50])
def test_the_exact_scheme_returns_the_image_whatever_the_network(n, sde, spacing, scale):
    """Zero terminal SNR and the step into the clean image included; the network is float32."""
    denoise = classifier_free_guidance(Denoiser(wild_network, sde, PREDICTIONS["v"]), TEXTS, BLANK, scale)
    grid = SPACINGS[spacing](sde, n)
    trip = measure_round_trip(INVERSION_SCHEMES["exact"], denoise, PICTURES, grid)
    assert trip.max_error.max() <= FIXED_POINT_STEP / 2
    torch.testing.assert_close(trip.x0, PICTURES, rtol=0, atol=1e-10)
    again = measure_round_trip(INVERSION_SCHEMES["exact"], denoise, trip.x0, grid)
    assert torch.equal(again.x0, trip.x0) and not again.max_error.any()


def test_different_images_have_different_states():
    """The least difference that a state can hold comes back through fifty steps."""
    denoise = partial(Denoiser(wild_network, SD, PREDICTIONS["v"]), cond=TEXTS)
    grid = SPACINGS["log_snr"](SD, 50)
    near = (PICTURES / FIXED_POINT_STEP).round() * FIXED_POINT_STEP
    other = near + FIXED_POINT_STEP
    states = [bdia_encode(denoise, x, grid) for x in (near, other)]
    assert not torch.equal(torch.stack(states[0]), torch.stack(states[1]))
    assert torch.equal(bdia_decode(denoise, states[1], grid) - bdia_decode(denoise, states[0], grid), other - near)


@every_sde
def test_the_exact_scheme_is_of_order_two(sde):
    errors = []
    for n in [64, 128, 256, 512]:
        grid = TimeGrid(sde, SPACINGS["log_snr"](sde, n + 1)[:-1])
        noise, _ = bdia_encode(exact_answer, X0, grid)
        errors.append((noise - GAUSSIAN.probability_flow(X0, grid[-1], grid[0])).norm())
    slopes = -torch.stack(errors).log2().diff()
    torch.testing.assert_close(slopes, torch.full_like(slopes, 2), rtol=0, atol=0.2)


def test_the_round_trip_s_errors_are_each_image_s_own():
    grid = SPACINGS["log_snr"](SD, 10)
    trip = measure_round_trip(INVERSION_SCHEMES["ode"], exact_answer, X0, grid, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(trip.max_error, (trip.x0 - X0).abs().amax(1))
    torch.testing.assert_close(trip.rms_error, (trip.x0 - X0).square().mean(1).sqrt())
    assert 0 < trip.max_error.max() < 0.1


def test_no_steps_leave_the_image_as_it_is():
    assert torch.equal(
        measure_round_trip(INVERSION_SCHEMES["exact"], exact_answer, PICTURES.float(), TimeGrid(SD, (CLEAN_LEVEL,))).x0,
        PICTURES.float().double(),
    )


def test_a_tolerance_below_rounding_is_refused():
    """A float32 denoiser's answers are too rough for it: no step is small enough."""
    rough = lambda x, levels: torch.tanh(x.float())
    with pytest.raises(ValueError, match="no step near t = "):
        ode_encode(rough, torch.full((1, 8), 0.3), SPACINGS["log_snr"](VPSDE.cosine(), 20), rtol=1e-14, atol=1e-14)
