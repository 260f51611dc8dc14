"""Learning-rate schedules, by their formulas."""

import math

import pytest
from trainings import recipe_of

from ldm.train.optimizers import LR_SCHEDULES, compute_lr_factor

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
