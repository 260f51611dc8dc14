"""The order of samples: each exactly once a pass, without end, from any step, and shuffled uniformly."""

import math
import pickle
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from scipy.stats import chi2

from ldm.data.batch_sampler import BucketBatchSampler

LEVEL = 1e-4  # of each chi-square test, which a true law fails as often


def uniform(counts, cells):
    """Does a chi-square test accept that all `cells` are alike?"""
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
                assert len(visits[k]) == batch and len({buckets[v.sample_id] for v in visits[k]}) == 1
                seen.update(visits[k])
            for bucket in set(buckets.tolist()):
                due = (epoch + 1) * repeats[buckets == bucket].sum()
                had = sum(n for visit, n in seen.items() if buckets[visit.sample_id] == bucket)
                assert due - batch < had <= due  # the remainder, and it is never too much
        assert set(seen.values()) == {1}
        for sample, times in enumerate(repeats):
            numbers = sorted(visit.times_seen for visit in seen if visit.sample_id == sample)
            assert set(range((epochs - batch) * times)) <= set(numbers) and numbers[-1] < epochs * times


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 12])
def test_an_epoch_of_whole_batches_shows_each_sample_its_repeats_exactly(batch):
    repeats, buckets = np.array([1, 2, 4, 5, 12, 6, 6]), np.array([0, 1, 1, 0, 2, 0, 1])
    visits = BucketBatchSampler(repeats, buckets, batch, 3)
    assert visits.first_step(1) * batch == repeats.sum()
    for epoch in range(5):
        steps = range(visits.first_step(epoch), visits.first_step(epoch + 1))
        shown = Counter(visit.sample_id for k in steps for visit in visits[k])
        assert [shown[sample] for sample in range(7)] == repeats.tolist()


def test_epochs_and_seeds_differ_and_a_seed_tells_all():
    orders = [
        [v.sample_id for k in range(e * 10, e * 10 + 10) for v in BucketBatchSampler([1] * 40, [0] * 40, 4, seed)[k]]
        for seed in (0, 1)
        for e in range(3)
    ]
    assert len(set(map(tuple, orders))) == 6 and all(sorted(order) == list(range(40)) for order in orders)
    again = BucketBatchSampler([1] * 40, [0] * 40, 4, 1)
    assert [v.sample_id for k in range(20, 30) for v in again[k]] == orders[-1]


def test_batches_of_all_buckets_are_mixed():
    visits = BucketBatchSampler([1] * 400, [0] * 200 + [1] * 200, 4, 0)
    firsts = [visits[k][0].sample_id < 200 for k in range(100)]
    turns = sum(a != b for a, b in pairwise(firsts))
    assert sum(firsts) == 50 and 30 < turns < 70  # 49.5 on average, deviation 5


def first_order(n, seed):
    sampler = BucketBatchSampler([1] * n, [0] * n, 1, seed)
    return [sampler[k][0].sample_id for k in range(n)]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_an_epoch_are_equally_frequent(n):
    found = Counter(tuple(first_order(n, seed)) for seed in range(100 * math.factorial(n)))
    assert uniform(found.values(), math.factorial(n))


def test_every_position_and_every_pair_of_neighbors_are_equally_frequent():
    n = 20
    orders = np.array([first_order(n, seed) for seed in range(2000)])
    first, second = orders[:, 7], orders[:, 8]
    assert uniform(Counter(first.tolist()).values(), n)
    assert uniform(Counter(((first - second) % n).tolist()).values(), n - 1)


def test_batches_of_an_epoch_come_in_any_order_and_do_not_depend_on_the_steps_before():
    repeats, buckets = [1, 2, 3] * 20, [0, 1, 1] * 20
    forward, backward = (BucketBatchSampler(repeats, buckets, 5, 2) for _ in range(2))
    steps = range(forward.first_step(4))
    assert [forward[k] for k in steps] == [backward[k] for k in reversed(steps)][::-1]
    assert pickle.loads(pickle.dumps(forward))[7] == backward[7]


def test_a_million_samples_at_any_step():
    n = 10**6
    visits = BucketBatchSampler(np.ones(n, int), np.arange(n) % 29, 8, 0)
    far = 10**9
    epoch = visits.epoch_of_step(far)
    assert visits.first_step(epoch) <= far < visits.first_step(epoch + 1)
    assert visits[far] == BucketBatchSampler(np.ones(n, int), np.arange(n) % 29, 8, 0)[far]
    some = list(chain.from_iterable(visits[k] for k in range(300)))
    assert len(set(some)) == 2400 and uniform(Counter(v.sample_id * 10 // n for v in some).values(), 10)


def test_nothing_to_see_is_refused():
    for repeats, batch in (([], 1), ([1], 0), ([1, 0], 1)):
        with pytest.raises(ValueError, match="batch sampler: needs"):
            BucketBatchSampler(repeats, [0] * len(repeats), batch, 0)


def test_what_shares_a_batch_and_which_batch_comes_first_change_from_epoch_to_epoch():
    one, many = BucketBatchSampler([1] * 40, [0] * 40, 4, 1), BucketBatchSampler([1] * 40, list(range(10)) * 4, 4, 1)
    shared = [{frozenset(v.sample_id for v in one[k]) for k in range(e * 10, e * 10 + 10)} for e in range(3)]
    assert not shared[0] & shared[1] and not shared[1] & shared[2]
    turns = [tuple(many[k][0].sample_id % 10 for k in range(e * 10, e * 10 + 10)) for e in range(3)]
    assert len(set(turns)) == 3
