"""The SDE's closed forms, its inverse, and its agreement with diffusers' tables."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.diffusion.sde import (
    BETA_SCHEDULES,
    CLEAN_LEVEL,
    VPSDE,
    betas_from_alphas_cumprod,
    cosine_alphas_cumprod,
    forward_markov_chain,
    linear_alphas_cumprod,
    rescale_zero_terminal_snr,
    scaled_linear_alphas_cumprod,
)

TABLES = {name: table(0.00085, 0.012, 1000) for name, table in BETA_SCHEDULES.items()}
SDES = {
    "linear": VPSDE.linear(),
    "cosine": VPSDE.cosine(),
    "scaled_linear": VPSDE.scaled_linear(),
    **{f"table {name}": VPSDE.tabulated(table) for name, table in TABLES.items()},
    "table ddpm": VPSDE.tabulated(linear_alphas_cumprod(1e-4, 0.02, 1000)),
    "table zero SNR": VPSDE.tabulated(rescale_zero_terminal_snr(TABLES["scaled_linear"])),
}
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
TIMES = torch.linspace(0, 1, 4001, dtype=torch.float64)


@every_sde
def test_variance_is_preserved_from_the_clean_image_on(sde):
    alpha, sigma = sde.marginal(TIMES)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    assert (alpha.diff() < 0).all()
    assert sde.level(0.0) == CLEAN_LEVEL and math.copysign(1, sde.level(0.0).sigma) == 1


@every_sde
def test_time_inverts_log_snr(sde):
    t = TIMES[1:]
    torch.testing.assert_close(sde.time_at_log_snr(sde.log_snr(t)), t, rtol=1e-9, atol=0)
    beyond = sde.time_at_log_snr(torch.tensor([math.inf, -math.inf], dtype=torch.float64))
    torch.testing.assert_close(beyond, torch.tensor([0.0, 1.0], dtype=torch.float64))


@every_sde
def test_beta_is_the_slope_that_log_alpha_integrates(sde):
    t = torch.linspace(0, 0.99, 20001, dtype=torch.float64)
    with torch.inference_mode():
        integral = torch.trapezoid(sde.beta(t), t)
        torch.testing.assert_close(integral, -2 * sde.log_alpha(t[-1]), rtol=1e-5, atol=0)


def test_linear_beta_is_linear_and_scaled_linear_has_the_table_s_rate():
    torch.testing.assert_close(VPSDE.linear(0.1, 20).beta(TIMES), 0.1 + 19.9 * TIMES)
    root = math.sqrt(0.00085) + TIMES * (math.sqrt(0.012) - math.sqrt(0.00085))
    torch.testing.assert_close(VPSDE.scaled_linear().beta(TIMES), 1000 * root**2)


def test_cosine_is_nichol_and_dhariwal_s_and_ends_in_pure_noise():
    f = torch.cos((TIMES + 0.008) / 1.008 * math.pi / 2)
    alpha, _ = VPSDE.cosine().marginal(TIMES)
    torch.testing.assert_close(alpha, f / f[0], rtol=1e-12, atol=1e-15)
    assert VPSDE.cosine().level(1.0) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize(("start", "end"), [(0.0001, 0.02), (0.00085, 0.012)])
def test_tables_are_diffusers_tables(name, start, end):
    theirs = DDIMScheduler(beta_start=start, beta_end=end, beta_schedule=name).alphas_cumprod
    torch.testing.assert_close(BETA_SCHEDULES[name](start, end, 1000).float(), theirs, rtol=2e-5, atol=1e-9)


def test_zero_terminal_snr_is_diffusers_rescaling():
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    ours = rescale_zero_terminal_snr(scaled_linear_alphas_cumprod(0.00085, 0.012, 1000))
    torch.testing.assert_close(ours.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-8)
    assert ours[-1] == 0


@pytest.mark.parametrize("table", [*TABLES.values(), rescale_zero_terminal_snr(TABLES["scaled_linear"])])
def test_tabulated_passes_through_every_value_and_falls_between(table):
    sde = VPSDE.tabulated(table)
    alpha, _ = sde.marginal((torch.arange(1000) + 1).double() / 1000)
    torch.testing.assert_close(alpha**2, table, rtol=1e-9, atol=0)
    log_alpha = sde.log_alpha(torch.linspace(0, 1, 20001, dtype=torch.float64))
    assert (log_alpha.diff() < 0).all()


def test_a_rough_table_stays_monotone_and_smooth():
    steps = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 6
    sde = VPSDE.tabulated(torch.exp(-steps.cumsum(0)))
    t = torch.linspace(0, 1, 50 * 400 + 1, dtype=torch.float64)
    beta = sde.beta(t)
    assert (beta > -1e-12).all()
    knots = torch.arange(1, 50, dtype=torch.float64) / 50
    torch.testing.assert_close(sde.beta(knots - 1e-9), sde.beta(knots + 1e-9), rtol=1e-4, atol=1e-4)


def test_tabulated_recovers_a_smooth_schedule_between_its_values():
    exact = VPSDE.scaled_linear()
    alpha, _ = exact.marginal((torch.arange(1000) + 1).double() / 1000)
    sde, t = VPSDE.tabulated(alpha**2), TIMES[1:]
    torch.testing.assert_close(sde.log_alpha(t), exact.log_alpha(t), rtol=1e-5, atol=0)
    torch.testing.assert_close(sde.beta(t), exact.beta(t), rtol=1e-4, atol=0)


@pytest.mark.parametrize("table", [[0.9, 0.9, 0.5], [1.0, 0.5, 0.2], [0.9, 0.5, -0.1], [0.9, 0.5]])
def test_a_table_that_is_no_schedule_is_refused(table):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VPSDE.tabulated(torch.tensor(table))


@pytest.mark.parametrize("name", [name for name in SDES if name.startswith("table")])
def test_tabulated_is_monotone_and_smooth_in_log_snr_with_beta_its_derivative(name):
    sde, h = SDES[name], 1e-8
    assert (sde.log_snr(torch.linspace(0, 1, 20001, dtype=torch.float64)[1:]).diff() < 0).all()
    knots = torch.arange(1, 999, dtype=torch.float64) / 1000  # the tail of a zero-SNR table has a corner at the last
    for t in (knots, knots + 0.0003):
        slope = (sde.log_snr(t + h) - sde.log_snr(t - h)) / (2 * h)
        torch.testing.assert_close(slope, -sde.beta(t) / sde.marginal(t)[1] ** 2, rtol=1e-4, atol=0)
    torch.testing.assert_close(sde.beta(knots - 1e-10), sde.beta(knots + 1e-10), rtol=1e-5, atol=0)


@pytest.mark.parametrize("table", [*TABLES.values(), rescale_zero_terminal_snr(TABLES["scaled_linear"])])
def test_tabulated_passes_through_every_value_in_log_snr(table):
    ours = VPSDE.tabulated(table).log_snr((torch.arange(1000) + 1).double() / 1000)
    torch.testing.assert_close(ours, torch.log(table / (1 - table)), rtol=1e-8, atol=1e-10)


def test_cosine_table_is_the_closed_form_but_for_the_step_that_is_clipped():
    alpha, _ = VPSDE.cosine().marginal((torch.arange(1000) + 1).double() / 1000)
    table = cosine_alphas_cumprod(0, 0, 1000)
    torch.testing.assert_close(table[:-1], alpha[:-1] ** 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(table[-1] / table[-2], torch.tensor(0.001, dtype=torch.float64), rtol=1e-9, atol=0)


def test_betas_are_what_the_tables_accumulate():
    expected = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(
        betas_from_alphas_cumprod(linear_alphas_cumprod(1e-4, 0.02, 1000)), expected, rtol=1e-10, atol=0
    )
    assert betas_from_alphas_cumprod(rescale_zero_terminal_snr(TABLES["linear"]))[-1] == 1


@pytest.mark.parametrize(
    "table",
    [linear_alphas_cumprod(1e-3, 0.2, 64), rescale_zero_terminal_snr(scaled_linear_alphas_cumprod(1e-3, 0.2, 64))],
)
def test_the_chain_has_the_marginals_of_its_table_at_every_step(table):
    """The chain is linear in x_0 and each z: row 0 gets x_0 = 1 and no noise, row i + 1 the i-th z = 1 alone."""
    unit = iter(torch.eye(65, dtype=torch.float64)[1:])
    sde = VPSDE.tabulated(table)
    for i, x in enumerate(
        forward_markov_chain(torch.eye(65, dtype=torch.float64)[0], table, lambda like: next(unit)), 1
    ):
        point = sde.level(i / 64)
        assert x[0].item() == pytest.approx(point.alpha, rel=1e-12, abs=1e-15)
        assert x[1:].square().sum().item() == pytest.approx(point.sigma**2, rel=1e-10)
    assert i == 64


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear"])
def test_the_chain_converges_to_the_sde_at_first_order(name):
    """beta_i = beta(i/n) / n: the law of the chain at t = 3/4, both moments, halves its error as n doubles."""
    sde, errors = SDES[name], []
    for n in (128, 256, 512, 1024, 2048, 4096):
        steps = torch.arange(1, 3 * n // 4 + 1, dtype=torch.float64) / n
        alpha_squared = torch.cumprod(1 - sde.beta(steps) / n, 0)[-1].item()
        point = sde.level(0.75)
        errors.append([abs(alpha_squared**0.5 - point.alpha), abs((1 - alpha_squared) - point.sigma**2)])
    slopes = -torch.tensor(errors, dtype=torch.float64).log2().diff(dim=0)
    torch.testing.assert_close(slopes[-1], torch.ones(2, dtype=torch.float64), rtol=0, atol=0.05)


def test_the_discrete_schedules_converge_to_their_closed_forms():
    cases = {
        "linear": [(linear_alphas_cumprod(0.1 / n, 20 / n, n), n) for n in (500, 1000, 2000)],
        "scaled_linear": [(scaled_linear_alphas_cumprod(0.85 / n, 12 / n, n), n) for n in (500, 1000, 2000)],
    }
    for name, tables in cases.items():
        errors = []
        for table, n in tables:
            alpha, _ = SDES[name].marginal((torch.arange(n) + 1).double() / n)
            errors.append((table.sqrt() - alpha).abs().max())
        assert errors[1] < 0.002
        slopes = -torch.stack(errors).log2().diff()
        torch.testing.assert_close(slopes, torch.ones(2, dtype=torch.float64), rtol=0, atol=0.05)


def test_timesteps_and_steps_are_each_other_s_inverse():
    sde = SDES["table scaled_linear"]
    for k in [0, 1, 37.25, 999]:
        assert sde.timestep(sde.level_at_timestep(k).t) == pytest.approx(k, abs=1e-9)
    assert sde.level_at_timestep(0).alpha ** 2 == pytest.approx(1 - 0.00085, rel=1e-12)


def test_perturb_adds_each_row_s_own_noise():
    sde, x0 = VPSDE.linear(), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t, noise = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), x0.flip(0)
    x = sde.perturb(x0, noise, t)
    for i, row in enumerate(x):
        point = sde.level(t[i].item())
        torch.testing.assert_close(row, point.alpha * x0[i] + point.sigma * noise[i])
