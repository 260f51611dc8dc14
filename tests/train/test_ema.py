"""Averages of the weights: each follows its formula, and snapshots of two give all others."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from trainings import go

from ldm.checkpoints.tensors import DIFFUSERS_WEIGHTS_NAME
from ldm.commands.train import average
from ldm.train.ema import (
    SIGMA_RELS,
    EMAModel,
    EMAProfile,
    exponential_ema_rate,
    p_dot_p,
    power_ema_rate,
    reconstruct_posthoc_ema,
    save_ema_snapshot,
    sigma_rel_to_gamma,
    solve_posthoc_coefficients,
)

STEPS, EVERY = 4000, 250


def test_an_exponential_average_follows_its_formula():
    model = nn.Linear(1, 1, bias=False)
    ema, expected = EMAModel(model, exponential_ema_rate(0.5)), model.weight.item()
    for step in range(1, 20):
        model.weight.data += 1.0
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.item()
    assert ema.tensors["weight"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_a_power_average_weighs_the_past_by_its_profile_which_has_the_deviation(sigma_rel):
    model, exponent = nn.Linear(1000, 1, bias=False), sigma_rel_to_gamma(sigma_rel) + 1
    ema = EMAModel(model, power_ema_rate(sigma_rel))
    for step in range(1, 1001):  # the weights of step k are the k-th unit vector: the average is the profile
        model.weight.data = nn.functional.one_hot(torch.tensor([step - 1]), 1000).float()
        ema.update(model, step)
    edges = torch.arange(1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(ema.tensors["weight"][0].double(), (edges**exponent).diff(), rtol=1e-4, atol=1e-9)
    profile, middle = (edges**exponent).diff(), (edges[1:] + edges[:-1]) / 2
    mean = (profile * middle).sum()
    assert (profile * (middle - mean) ** 2).sum().sqrt() == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.29])
def test_a_length_that_no_profile_has_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=f"sigma_rel {sigma_rel}"):
        sigma_rel_to_gamma(sigma_rel)


def test_inner_products_are_the_integrals():
    for a, b in ((EMAProfile(300, 6.9), EMAProfile(1000, 16.97)), (EMAProfile(1000, 0.5), EMAProfile(700, 3.0))):
        tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * min(a.step, b.step)
        values = [(p.gamma + 1) * tau**p.gamma / p.step ** (p.gamma + 1) for p in (a, b)]
        expected = (values[0] * values[1]).mean().item() * min(a.step, b.step)
        assert p_dot_p(a, b) == p_dot_p(b, a) == pytest.approx(expected, rel=1e-6)


def test_a_snapshot_s_own_profile_is_given_back():
    known = [EMAProfile(t, sigma_rel_to_gamma(s)) for t in (500, 1000) for s in SIGMA_RELS]
    assert solve_posthoc_coefficients(known, known[2]) == pytest.approx([0, 0, 1, 0], abs=1e-9)


def test_averages_made_afterwards_are_those_that_were_tracked(tmp_path):
    """Regression by Adam, whose weights never rest: errors over the distance of the average from the last weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 4))
    teacher = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 4))
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(1)
    kept = {s: EMAModel(model, power_ema_rate(s)) for s in SIGMA_RELS}
    wanted = {s: EMAModel(model, power_ema_rate(s)) for s in (0.04, 0.075, 0.15)}
    for step in range(1, STEPS + 1):
        x = torch.randn(16, 8, generator=generator)
        loss = (model(x) - teacher(x) - 0.5 * torch.randn(16, 4, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for ema in (*kept.values(), *wanted.values()):
            ema.update(model, step)
        if step % EVERY == 0:
            for s, ema in kept.items():
                save_ema_snapshot(tmp_path, step, s, ema.tensors, torch.float16)
    last = flat(model.state_dict())
    for s, ema in wanted.items():
        tracked, made = flat(ema.tensors), flat(reconstruct_posthoc_ema(tmp_path, s))
        assert (made - tracked).norm() < 0.01 * tracked.norm()
        assert (made - tracked).norm() < 0.01 * (last - tracked).norm()


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_no_snapshots_no_average(tmp_path):
    with pytest.raises(ValueError, match="posthoc_steps"):
        reconstruct_posthoc_ema(tmp_path, 0.1)


def test_a_run_is_exported_with_an_average_made_afterwards(recipe_file, tmp_path):
    go(recipe_file("diffusion", posthoc_steps=2))
    out = tmp_path / "model"
    average(tmp_path / "run", 0.08, out)
    made = load_file(out / "unet" / DIFFUSERS_WEIGHTS_NAME)  # float16
    for name, value in reconstruct_posthoc_ema(tmp_path / "run", 0.08).items():
        torch.testing.assert_close(made[name], value, rtol=1e-3, atol=1e-6, check_dtype=False)
    with pytest.raises(ValueError, match="not a training's folder"):
        average(tmp_path, 0.08, tmp_path / "other")
