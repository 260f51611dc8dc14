"""Choices: uniform, independent of one another, and each sample's own."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare

from ldm.config import ImageDataConfig
from ldm.data.augment import augment_tags, center_crop_corner, random_crop_corner, should_drop_caption, should_flip

LEVEL = 1e-4
MANY = [(7, f"pictures/{k // 20}.png", k % 20) for k in range(4000)]


def test_half_are_mirrored_and_captions_are_dropped_at_their_rate():
    for chosen, rate in ((should_flip, 0.5), (lambda *chance: should_drop_caption(0.1, *chance), 0.1)):
        times = sum(chosen(*chance) for chance in MANY)
        assert chisquare([times, 4000 - times], [4000 * rate, 4000 * (1 - rate)]).pvalue > LEVEL
    assert not any(should_drop_caption(0, *chance) for chance in MANY) and all(
        should_drop_caption(1, *chance) for chance in MANY
    )


def test_crops_are_uniform_over_the_slack_and_reach_its_ends():
    places = Counter(random_crop_corner((4, 6), *chance) for chance in MANY)
    assert set(places) == set(product(range(5), range(7)))
    assert chisquare(list(places.values())).pvalue > LEVEL
    assert random_crop_corner((0, 0), *MANY[0]) == (0, 0) and center_crop_corner((5, 8)) == (2, 4)


def test_choices_are_independent_of_one_another_and_of_the_visit_before():
    left = [random_crop_corner((3, 0), *chance)[0] for chance in MANY]
    choices = {
        "flip": [should_flip(*chance) for chance in MANY],
        "drop": [should_drop_caption(0.5, *chance) for chance in MANY],
        "left": left,
        "top": [random_crop_corner((0, 3), *chance)[1] for chance in MANY],
        "left, next visit": [random_crop_corner((3, 0), seed, key, visit + 1)[0] for seed, key, visit in MANY],
        "left, next seed": [random_crop_corner((3, 0), seed + 1, key, visit)[0] for seed, key, visit in MANY],
    }
    names = list(choices)
    for a, b in ((a, b) for k, a in enumerate(names) for b in names[:k]):
        counts = np.zeros((4, 4))
        np.add.at(counts, (np.int64(choices[a]), np.int64(choices[b])), 1)
        counts = counts[counts.any(1)][:, counts.any(0)]
        assert chi2_contingency(counts, correction=False).pvalue > LEVEL, (a, b)


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_tags_are_shuffled_but_for_those_kept(keep):
    data = ImageDataConfig(train_data_dir="x", shuffle_caption=True, keep_tokens=keep)
    orders = Counter(augment_tags("a,  b , c,d", data, *chance) for chance in MANY)
    assert all(
        sorted(order.split(", ")) == list("abcd") and order.split(", ")[:keep] == list("abcd")[:keep]
        for order in orders
    )
    assert len(orders) == {0: 24, 1: 6, 4: 1}[keep]
    if keep < 4:
        assert chisquare(list(orders.values())).pvalue > LEVEL


def test_tags_between_marks_are_shuffled_and_dropped_and_those_outside_stay():
    data = ImageDataConfig(
        train_data_dir="x", shuffle_caption=True, caption_tag_dropout=0.25, keep_tokens_separator="|||"
    )
    captions = [augment_tags("sks, girl ||| a, b ||| best", data, *chance).split(", ") for chance in MANY]
    assert all(caption[:2] == ["sks", "girl"] and caption[-1] == "best" for caption in captions)
    counts = Counter(tuple(caption[2:-1]) for caption in captions)
    n = len(MANY)
    expected = {("a", "b"): 9 / 32, ("b", "a"): 9 / 32, ("a",): 3 / 16, ("b",): 3 / 16, (): 1 / 16}
    assert counts.keys() == expected.keys()
    assert chisquare([counts[k] for k in expected], [n * p for p in expected.values()]).pvalue > LEVEL
