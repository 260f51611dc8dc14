"""Optimizers: what each row of the table is, and that Muon moves every direction of a matrix by the same amount.

Learning-rate schedules, by their formulas.
"""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from trainings import needs, recipe_of

from ldm.train import optimizers
from ldm.train.optimizers import (
    LR_SCHEDULES,
    Muon,
    adamw,
    compute_lr_factor,
    create_optimizer,
    flatten_to_matrix,
    newton_schulz_orthogonalize,
)

RECIPE = recipe_of(learning_rate=0.01, adam_weight_decay=0.1)


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 32, 3), nn.GroupNorm(4, 32), nn.Conv2d(32, 48, 3), nn.Flatten(), nn.Linear(48, 16))
    return net.to(memory_format=torch.channels_last)


def step(net, optimizer):
    x = torch.randn(512, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def moved(net, change):
    """How each parameter moves in one step."""
    before = copy.deepcopy(net.state_dict())
    change()
    return {name: value - before[name] for name, value in net.state_dict().items()}


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_polar_keeps_the_directions_and_levels_the_sizes(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    between = u.T @ newton_schulz_orthogonalize(matrix) @ v.T
    sizes = between.diagonal()
    assert sizes.min() > 0.6 and sizes.max() < 1.3
    assert (between - sizes.diag()).abs().max() < 0.05  # bfloat16


def test_rows_are_a_view_of_the_weight():
    weight = torch.randn(6, 3, 3, 3).to(memory_format=torch.channels_last)
    matrix = flatten_to_matrix(weight)
    assert matrix.shape == (6, 27) and matrix.data_ptr() == weight.data_ptr()
    assert torch.equal(matrix.sum(1), weight.permute(0, 2, 3, 1).flatten(1).sum(1))


def test_a_matrix_moves_by_its_polar_factor_and_decays():
    net = model()
    change = moved(net, lambda: step(net, Muon(net, RECIPE, adamw_modules=frozenset("0"))))
    weight = model()[2].weight.detach()
    direction = flatten_to_matrix(change["2.weight"] + 0.01 * 0.1 * weight) / (-0.01 * 0.2 * 288**0.5)
    u, _, v = torch.linalg.svd(flatten_to_matrix(net[2].weight.grad), full_matrices=False)
    between = u[:, :5].T @ direction @ v[:5].T  # the gradient's five largest directions: downhill, by the same amount
    sizes = between.diagonal()
    assert sizes.min() > 0.6 and sizes.max() < 1.3
    assert (between - sizes.diag()).abs().max() < 0.05


def test_edges_vectors_and_the_schedule_are_adamw_s():
    net, other = model(), model()
    muon, reference = Muon(net, RECIPE, adamw_modules=frozenset("0")), adamw(other.parameters(), RECIPE)
    for group in itertools.chain(muon.param_groups, reference.param_groups):
        group["lr"] = 0.003
    ours, theirs = moved(net, lambda: step(net, muon)), moved(other, lambda: step(other, reference))
    for name in ours.keys() - {"2.weight", "4.weight"}:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "prodigy"])
def test_the_kinds_of_adam_take_the_recipe_s_options_and_their_own(name):
    needs(name)
    recipe = recipe_of(optimizer=name, learning_rate=0.5, adam_beta2=0.97, optimizer_options={"eps": 1e-5})
    (group,) = create_optimizer(model(), recipe).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.9, 0.97), 0.01, 1e-5)


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy"])
def test_adamw_s_relatives_move_as_it_does(name):
    """8 bits round Adam's step; Prodigy's, at its first distance d0 = 1e-6 and a rate of 1e4, is Adam's at 0.01."""
    needs(name)
    net, other = wide(), wide()
    options = {"learning_rate": 1e4} if name == "prodigy" else {}
    recipe = recipe_of(**{"learning_rate": 0.01, "adam_weight_decay": 0, "optimizer": name, **options})
    ours = moved(net, lambda: step(net, create_optimizer(net, recipe)))
    plain = recipe_of(learning_rate=0.01, adam_weight_decay=0)
    theirs = moved(other, lambda: step(other, adamw(other.parameters(), plain)))
    for key in ours:
        a, b = ours[key].flatten(), theirs[key].flatten()
        assert torch.cosine_similarity(a, b, dim=0) > 0.98 and 0.9 < a.norm() / b.norm() < 1.1, key


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 64))


@pytest.mark.parametrize("name, package", [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_package_is_said_with_its_cure(name, package, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(optimizers, "import_module", absent)
    with pytest.raises(ValueError, match=rf"optimizer '{name}' needs {package}: .*pip install .*\[optim\]"):
        create_optimizer(model(), recipe_of(optimizer=name))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_unknown_option_or_optimizer_is_named(name):
    with pytest.raises(ValueError, match=f"optimizer_options of {name}: .*wait"):
        create_optimizer(model(), recipe_of(optimizer=name, optimizer_options={"wait": [1]}))
    with pytest.raises(ValueError, match="optimizer 'adam'"):
        create_optimizer(model(), recipe_of(optimizer="adam"))


def test_what_is_frozen_does_not_learn():
    net = model()
    net[0].requires_grad_(False)
    for name in ("adamw", "prodigy", "muon"):
        learns = [p for group in create_optimizer(net, recipe_of(optimizer=name)).param_groups for p in group["params"]]
        assert len(learns) == 6 and not any(p is net[0].weight for p in learns)


LONG = {"max_train_steps": 100, "lr_warmup_steps": 10}


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_every_schedule_warms_up_in_optimizer_steps(name):
    recipe = recipe_of(**LONG, lr_scheduler=name, gradient_accumulation_steps=4)
    assert [compute_lr_factor(k, recipe) for k in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1])


@pytest.mark.parametrize(
    "name, formula",
    [
        ("constant", lambda x: 1),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: math.cos(math.pi / 2 * x) ** 2),
    ],
)
def test_what_follows_the_warm_up(name, formula):
    recipe = recipe_of(**LONG, lr_scheduler=name)
    assert [compute_lr_factor(k, recipe) for k in (10, 55, 99)] == pytest.approx(
        [formula(x) for x in (0, 0.5, 89 / 90)]
    )


def test_the_default_holds_and_then_falls_by_half_a_cosine():
    recipe = recipe_of(**LONG, lr_decay=0.5)
    assert [compute_lr_factor(k, recipe) for k in (10, 30, 50)] == [1, 1, 1]
    assert compute_lr_factor(75, recipe) == pytest.approx(0.5) and compute_lr_factor(99, recipe) == pytest.approx(
        math.sin(math.pi / 100) ** 2
    )


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="lr_scheduler 'cosin'"):
        compute_lr_factor(0, recipe_of(lr_scheduler="cosin"))


def test_lion_moves_by_the_sign_of_interpolated_momentum():
    """Chen et al. 2023, algorithm 2, in numbers: two steps of one weight."""
    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 2.0)
    made = create_optimizer(
        weight, recipe_of(optimizer="lion", learning_rate=0.1, adam_beta2=0.5, adam_weight_decay=0.5)
    )
    for gradient, value in ((1.0, 1.8), (-8.0, 1.81)):  # .95 * 2 - .1; then c = .9 * .5 + .1 * -8 < 0: .95 * 1.8 + .1
        weight.weight.grad = torch.full((1, 1), gradient)
        made.step()
        assert weight.weight.item() == pytest.approx(value)


@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine_with_restarts", "polynomial"])
def test_schedules_of_diffusers_are_theirs(name):
    from diffusers.optimization import get_scheduler

    recipe = recipe_of(lr_scheduler=name, lr_warmup_steps=5, max_train_steps=40, lr_num_cycles=3, lr_power=2.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40, num_cycles=3, power=2.0)
    for step in range(5, 40):  # in the warm-up ours begins one step further: no step is lost
        while theirs.last_epoch < step:
            optimizer.step()
            theirs.step()
        assert compute_lr_factor(step, recipe) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
