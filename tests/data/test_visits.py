"""The order of visits: exactly once, without end, from any step, and as random as it says."""

import math
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from scipy.stats import chi2

from ldm.data.batch_sampler import BucketBatchSampler, permute_indices, splitmix64_finalizer

LEVEL = 1e-4  # of each chi-square test, which a true law fails as often


def uniform(counts, cells):
    """Does a chi-square test accept that all `read_csv_rows` are alike?"""
    counts = list(counts) + [0] * (cells - len(counts))
    wanted = sum(counts) / cells
    assert wanted >= 5
    return sum((n - wanted) ** 2 for n in counts) / wanted < chi2.isf(LEVEL, cells - 1)


def datasets(many=24):
    """Data sets at random: repeats, buckets, batch and seed; some with more buckets than one batch has samples."""
    for seed in range(many):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 40))
        repeats = rng.integers(1, 5, n) if seed % 2 else np.ones(n, int)
        yield repeats, rng.integers(0, rng.integers(1, 7), n), int(rng.integers(1, 12)), seed


def test_no_visit_is_lost_or_comes_twice_and_an_epoch_is_short_of_less_than_a_batch_a_bucket():
    for repeats, buckets, batch, seed in datasets():
        visits = BucketBatchSampler(repeats, buckets, batch, seed)
        epochs = 2 * batch + 1
        seen = Counter()
        for epoch in range(epochs):
            assert set(map(visits.epoch_of_step, range(visits.first_step(epoch), visits.first_step(epoch + 1)))) <= {
                epoch
            }
            for k in range(visits.first_step(epoch), visits.first_step(epoch + 1)):
                assert len(visits[k]) == batch and len({buckets[v.row] for v in visits[k]}) == 1
                seen.update(visits[k])
            for bucket in set(buckets.tolist()):
                due = (epoch + 1) * repeats[buckets == bucket].sum()
                had = sum(n for visit, n in seen.items() if buckets[visit.sample] == bucket)
                assert due - batch < had <= due  # the remainder, and it is never too much
        assert set(seen.values()) == {1}
        for sample, times in enumerate(repeats):
            numbers = sorted(visit.number for visit in seen if visit.sample == sample)
            assert set(range((epochs - batch) * times)) <= set(numbers) and numbers[-1] < epochs * times


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 12])
def test_an_epoch_of_whole_batches_shows_each_sample_its_repeats_exactly(batch):
    repeats, buckets = np.array([1, 2, 4, 5, 12, 6, 6]), np.array([0, 1, 1, 0, 2, 0, 1])
    visits = BucketBatchSampler(repeats, buckets, batch, 3)
    assert visits.first_step(1) * batch == repeats.sum()
    for epoch in range(5):
        steps = range(visits.first_step(epoch), visits.first_step(epoch + 1))
        shown = Counter(visit.row for k in steps for visit in visits[k])
        assert [shown[sample] for sample in range(7)] == repeats.tolist()


def test_epochs_and_seeds_differ_and_a_seed_tells_all():
    orders = [
        [v.row for k in range(e * 10, e * 10 + 10) for v in BucketBatchSampler([1] * 40, [0] * 40, 4, seed)[k]]
        for seed in (0, 1)
        for e in range(3)
    ]
    assert len(set(map(tuple, orders))) == 6 and all(sorted(order) == list(range(40)) for order in orders)
    again = BucketBatchSampler([1] * 40, [0] * 40, 4, 1)
    assert [v.row for k in range(20, 30) for v in again[k]] == orders[-1]


def test_batches_of_all_buckets_are_mixed():
    visits = BucketBatchSampler([1] * 400, [0] * 200 + [1] * 200, 4, 0)
    firsts = [visits[k][0].row < 200 for k in range(100)]
    turns = sum(a != b for a, b in pairwise(firsts))
    assert sum(firsts) == 50 and 30 < turns < 70  # 49.5 on average, deviation 5


@pytest.mark.parametrize("n", [*range(1, 30), 64, 81, 100, 1000])
def test_a_shuffle_is_a_permutation(n):
    for key in splitmix64_finalizer(np.arange(5, dtype=np.uint64)):
        assert sorted(permute_indices(np.arange(n), n, np.array([key]))) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_come_equally_often(n):
    many = 100 * math.factorial(n)
    keys = splitmix64_finalizer(np.arange(many, dtype=np.uint64))
    found = Counter(zip(*(permute_indices(np.full(many, at), n, keys).tolist() for at in range(n)), strict=True))
    assert uniform(found.values(), math.factorial(n))


def test_every_place_and_every_pair_of_neighbours_come_equally_often():
    n, many = 20, 4000
    keys = splitmix64_finalizer(np.arange(many, dtype=np.uint64))
    first, second = (permute_indices(np.full(many, at), n, keys) for at in (7, 8))
    assert uniform(Counter(first.tolist()).values(), n)
    assert uniform(Counter(((first - second) % n).tolist()).values(), n - 1)


def test_a_million_samples_at_any_step():
    n = 10**6
    visits = BucketBatchSampler(np.ones(n, int), np.arange(n) % 29, 8, 0)
    far = 10**9
    epoch = visits.epoch_of_step(far)
    assert visits.first_step(epoch) <= far < visits.first_step(epoch + 1)
    assert visits[far] == BucketBatchSampler(np.ones(n, int), np.arange(n) % 29, 8, 0)[far]
    some = list(chain.from_iterable(visits[k] for k in range(300)))
    assert len(set(some)) == 2400 and uniform(Counter(v.row * 10 // n for v in some).values(), 10)


def test_nothing_to_see_is_refused():
    for repeats, batch in (([], 1), ([1], 0), ([1, 0], 1)):
        with pytest.raises(ValueError, match="visits"):
            BucketBatchSampler(repeats, [0] * len(repeats), batch, 0)


def test_what_shares_a_batch_and_which_batch_comes_first_change_from_epoch_to_epoch():
    one, many = BucketBatchSampler([1] * 40, [0] * 40, 4, 1), BucketBatchSampler([1] * 40, list(range(10)) * 4, 4, 1)
    shared = [{frozenset(v.row for v in one[k]) for k in range(e * 10, e * 10 + 10)} for e in range(3)]
    assert not shared[0] & shared[1] and not shared[1] & shared[2]
    turns = [tuple(many[k][0].row % 10 for k in range(e * 10, e * 10 + 10)) for e in range(3)]
    assert len(set(turns)) == 3
