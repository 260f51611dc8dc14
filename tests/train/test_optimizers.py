"""Muon: every direction of a matrix moves by the same amount, and what is no matrix is AdamW's."""

import copy
import itertools

import pytest
import torch
from torch import nn

from ldm.config import Recipe
from ldm.train.optimizers import Muon, adamw, polar, rows

RECIPE = Recipe.model_validate(
    {
        "objective": {"kind": "autoencoder", "model": {}},
        "data": {"sprites": "none"},
        "output_dir": "none",
        "max_train_steps": 1,
        "train_batch_size": 1,
        "learning_rate": 0.01,
        "adam_weight_decay": 0.1,
    }
)


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
    between = u.T @ polar(matrix) @ v.T
    sizes = between.diagonal()
    assert sizes.min() > 0.6 and sizes.max() < 1.3
    assert (between - sizes.diag()).abs().max() < 0.05  # bfloat16


def test_rows_are_a_view_of_the_weight():
    weight = torch.randn(6, 3, 3, 3).to(memory_format=torch.channels_last)
    matrix = rows(weight)
    assert matrix.shape == (6, 27) and matrix.data_ptr() == weight.data_ptr()
    assert torch.equal(matrix.sum(1), weight.permute(0, 2, 3, 1).flatten(1).sum(1))


def test_a_matrix_moves_by_its_polar_factor_and_decays():
    net = model()
    change = moved(net, lambda: step(net, Muon(net, RECIPE, edges=frozenset("0"))))
    weight = model()[2].weight.detach()
    direction = rows(change["2.weight"] + 0.01 * 0.1 * weight) / (-0.01 * 0.2 * 288**0.5)
    u, _, v = torch.linalg.svd(rows(net[2].weight.grad), full_matrices=False)
    between = u[:, :5].T @ direction @ v[:5].T  # the gradient's five largest directions: downhill, by the same amount
    sizes = between.diagonal()
    assert sizes.min() > 0.6 and sizes.max() < 1.3
    assert (between - sizes.diag()).abs().max() < 0.05


def test_edges_vectors_and_the_schedule_are_adamw_s():
    net, other = model(), model()
    muon, reference = Muon(net, RECIPE, edges=frozenset("0")), adamw(other, RECIPE)
    for group in itertools.chain(muon.param_groups, reference.param_groups):
        group["lr"] = 0.003
    ours, theirs = moved(net, lambda: step(net, muon)), moved(other, lambda: step(other, reference))
    for name in ours.keys() - {"2.weight", "4.weight"}:
        assert torch.equal(ours[name], theirs[name]), name
