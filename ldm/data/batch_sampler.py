"""The order of the training samples: a function of (seed, step), so that a resumed run needs no history."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from ldm.rng import derive_seed

SampleId = TypeVar("SampleId", int, str)


class SampleKey(NamedTuple, Generic[SampleId]):
    """One use of a sample: its row in a dataset or its name, and how many times it was seen before.

    With the seed and a purpose it is the key of a random number.
    """

    sample_id: SampleId
    times_seen: int


class BucketBatchSampler:
    """Batches from one bucket each: `sampler[k]` is the list of `batch_size` SampleKey of step k = 0, 1, ...

    Every bucket is an endless stream of passes over its samples, each `repeats` times per pass and shuffled anew every
    pass, cut into batches. Epoch e holds the batches that end within every bucket's pass e, shuffled. So every
    repeat of a sample occurs exactly once per pass; the remainder of a bucket, fewer than `batch_size` samples, opens
    the next epoch. Padding the last batch would show samples of small buckets more often than others, dropping it less
    often.
    """

    def __init__(self, repeats: Sequence[int], buckets: Sequence[int], batch_size: int, seed: int) -> None:
        """`repeats[i]` and `buckets[i]` are those of sample i. ValueError for no samples, or a number below 1."""
        counts = np.asarray(repeats, np.int64)
        if batch_size < 1 or len(counts) == 0 or counts.min() < 1:
            raise ValueError("batch sampler: needs a sample, a batch size of at least 1 and repeats of at least 1")
        self.batch_size, self.seed, self.repeats = batch_size, seed, counts
        rows = [np.flatnonzero(np.asarray(buckets) == bucket) for bucket in np.unique(buckets)]
        self.passes = [np.repeat(members, counts[members]) for members in rows]  # the rows of a pass, in order
        self.pass_lengths = np.array([len(rows) for rows in self.passes])
        self._epoch = -1, np.empty(0, np.int64)  # the epoch computed last and its batches, [steps, batch_size, 2]

    def first_step(self, epoch: int) -> int:
        """Steps before an epoch: sum over buckets of floor(epoch * pass length / batch size)."""
        return int((epoch * self.pass_lengths // self.batch_size).sum())

    def epoch_of_step(self, k: int) -> int:
        """The epoch of step k, by bisection."""
        beyond = (k + len(self.pass_lengths) + 1) * self.batch_size // int(self.pass_lengths.sum()) + 2
        return bisect_right(range(beyond), k, key=self.first_step) - 1

    def __getitem__(self, k: int) -> list[SampleKey[int]]:
        epoch = self.epoch_of_step(k)
        if self._epoch[0] != epoch:
            batches = np.concatenate([self._bucket_batches(bucket, epoch) for bucket in range(len(self.passes))])
            self._epoch = epoch, batches[self._permutation(len(batches), "epoch", epoch)]
        return [SampleKey(*index) for index in self._epoch[1][k - self.first_step(epoch)].tolist()]

    def _bucket_batches(self, bucket: int, epoch: int) -> np.ndarray:
        """A bucket's batches of an epoch, in the stream's order: (row, times_seen) int64 [steps, batch_size, 2]."""
        rows, length = self.passes[bucket], len(self.passes[bucket])
        start, stop = (e * length // self.batch_size * self.batch_size for e in (epoch, epoch + 1))
        first = start // length  # the remainder of epoch - 1 begins in this pass
        nth = np.arange(length) - np.searchsorted(rows, rows)  # of the repeats of a row
        passes = [np.stack([rows, p * self.repeats[rows] + nth], 1) for p in range(first, epoch + 1)]
        stream = [keys[self._permutation(length, "pass", bucket, p)] for p, keys in enumerate(passes, first)]
        return np.concatenate(stream)[start - first * length : stop - first * length].reshape(-1, self.batch_size, 2)

    def _permutation(self, n: int, *parts: int | str) -> np.ndarray:
        return np.random.Generator(np.random.Philox(derive_seed(self.seed, *parts))).permutation(n)
