"""The order in which samples are seen: a function of (seed, step), computed for any step without those before it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldm.rng import derive_seed

FEISTEL_ROUNDS = 12
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class SampleIndex(NamedTuple):
    """One showing of a sample: its index, and how often it was shown before."""

    row: int
    times_seen: int


class BucketBatchSampler:
    """Batches of `batch` visits, each from one bucket; `visits[k]` is that of step k, for k = 0, 1, ... without end.

    Every bucket is an endless stream of passes through its samples, each `repeats` times a pass, in an order of its own
    every pass, cut into batches; epoch e shows, in an order of its own, the batches that end within every bucket's pass
    e. So no visit is lost or comes twice, and of a bucket that does not divide into batches the remainder, fewer than
    `batch` visits, opens the next epoch. Fixed batches, and all samples equally often: filling up batches would show
    the samples of small buckets more often, dropping what is left would show them less.
    """

    def __init__(self, repeats: Sequence[int], buckets: Sequence[int], batch_size: int, seed: int) -> None:
        """`buckets[i]` is the number of sample i's bucket. ValueError where nothing is to be seen."""
        counts, homes = np.asarray(repeats, np.int64), np.asarray(buckets, np.int64)
        if batch_size < 1 or len(counts) == 0 or counts.min() < 1:
            raise ValueError("visits: need a sample, a batch of one or more, and every sample at least once")
        self.batch_size, self.seed, self.repeats = batch_size, seed, counts
        self.bucket_samples = [np.flatnonzero(homes == home) for home in np.unique(homes)]
        self.cumulative_repeats = [
            np.cumsum(counts[rows]) for rows in self.bucket_samples
        ]  # of each sample's turns in a pass
        self.pass_lengths = np.array([ends[-1] for ends in self.cumulative_repeats])  # visits in a pass

    def first_step(self, epoch: int) -> int:
        """Steps before an epoch: sum over buckets of floor(epoch * length / batch)."""
        return int(self._num_whole_batches(epoch).sum())

    def epoch_of_step(self, k: int) -> int:
        """The epoch of step k, by bisection."""
        beyond = (k + len(self.pass_lengths) + 1) * self.batch_size // int(self.pass_lengths.sum()) + 2
        return bisect_right(range(beyond), k, key=self.first_step) - 1

    def __getitem__(self, k: int) -> list[SampleIndex]:
        bucket, nth = self._locate_batch(k)
        at = np.arange(nth * self.batch_size, (nth + 1) * self.batch_size)
        passes, turns = np.divmod(at, self.pass_lengths[bucket])
        turns = permute_indices(turns, int(self.pass_lengths[bucket]), self._permutation_keys("pass", bucket, passes))
        member = np.searchsorted(self.cumulative_repeats[bucket], turns, side="right")
        samples = self.bucket_samples[bucket][member]
        times = self.repeats[samples]
        numbers = passes * times + turns - (self.cumulative_repeats[bucket][member] - times)
        return [SampleIndex(int(sample), int(number)) for sample, number in zip(samples, numbers, strict=True)]

    def _num_whole_batches(self, epoch: int) -> np.ndarray:
        return epoch * self.pass_lengths // self.batch_size

    def _locate_batch(self, k: int) -> tuple[int, int]:
        """The bucket of step k, and which of its batches it is."""
        epoch = self.epoch_of_step(k)
        first, last = self._num_whole_batches(epoch), self._num_whole_batches(epoch + 1)
        ends = np.cumsum(last - first)
        at = np.array([k - self.first_step(epoch)])
        place = int(
            permute_indices(at, int(ends[-1]), np.array([derive_seed(self.seed, "epoch", epoch)], np.uint64))[0]
        )
        bucket = int(np.searchsorted(ends, place, side="right"))
        return bucket, int(last[bucket] - (ends[bucket] - place))

    def _permutation_keys(self, purpose: str, bucket: int, passes: np.ndarray) -> np.ndarray:
        found = {p: derive_seed(self.seed, purpose, bucket, p) for p in set(passes.tolist())}
        return np.array([found[p] for p in passes.tolist()], np.uint64)


def permute_indices(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Elements `at` of the permutations of range(n) that belong to 64-bit keys, each without computing the others.

    A Feistel network on a x b > n numbers, walked until it comes back below n (Black & Rogaway 2002, section 5). `at`
    int64 and `keys` uint64, [m] or [1]; int64 [m].
    """
    a = math.isqrt(n) + 1
    sides = np.uint64(a), np.uint64(n // a + 1)
    starts = splitmix64_finalizer(
        keys + np.arange(1, FEISTEL_ROUNDS + 1, dtype=np.uint64)[:, None] * GOLDEN_GAMMA
    )  # [ROUNDS, m]
    x = _feistel(indices.astype(np.uint64), sides, starts)
    while (out := x >= n).any():
        x = np.where(out, _feistel(x, sides, starts), x)
    return x.astype(np.int64)


def _feistel(x: np.ndarray, radices: tuple[np.uint64, np.uint64], round_keys: np.ndarray) -> np.ndarray:
    halves = list(np.divmod(x, radices[1]))
    for r, start in enumerate(round_keys):
        one, other = r % 2, 1 - r % 2
        halves[one] = (
            halves[one] + splitmix64_finalizer(start + halves[other] * GOLDEN_GAMMA) % radices[one]
        ) % radices[one]
    return halves[0] * radices[1] + halves[1]


def splitmix64_finalizer(z: np.ndarray) -> np.ndarray:
    """Every bit of 64 changed by every bit: SplitMix's finaliser (Steele, Lea & Flood 2014, figure 14)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
