"""The cache: what was made is there for good, whole, once, whoever made it."""

import multiprocessing
import os

import numpy as np
import pytest
import torch

from ldm.data.latent_cache import LatentCache, blake2b_hexdigest, hash_network_weights

KEYS = [blake2b_hexdigest(str(k)) for k in range(40)]


def array(key):
    return np.random.default_rng(int(key, 16)).standard_normal((2, 4, 8, 6)).astype(np.float16)


def never(rows):
    raise AssertionError(f"made again: {rows}")


def fill(folder, start, made):
    cache = LatentCache(folder, "f")

    def make(rows):
        made.put(len(rows))
        return [array(keys[row]) for row in rows]

    order = KEYS[start:] + KEYS[:start]
    for at in range(0, 40, 5):
        keys = order[at : at + 5]
        got = cache.get_or_compute(keys, make)
        assert all(np.array_equal(a, array(key)) for a, key in zip(got, keys, strict=True))


def test_what_was_made_is_mapped_not_made_again(tmp_path):
    made = LatentCache(tmp_path, "f").get_or_compute(KEYS, lambda rows: [array(KEYS[row]) for row in rows])
    again = LatentCache(tmp_path, "f").get_or_compute(KEYS[::-1], never)
    for key, first, second in zip(KEYS, made, again[::-1], strict=True):
        assert np.array_equal(first, array(key)) and np.array_equal(second, array(key))
        assert second.dtype == np.float16 and not second.flags.writeable and not second.flags.owndata


@pytest.mark.parametrize("value", [np.float32(3), np.zeros((0, 3)), np.arange(6).reshape(2, 3).T, np.array([True])])
def test_any_array_comes_back_as_it_was(tmp_path, value):
    cache = LatentCache(tmp_path, "f")
    for make in (lambda rows: [np.asarray(value)], never):
        (found,) = cache.get_or_compute(["ab"], make)
        assert np.array_equal(found, value) and found.dtype == value.dtype


def test_only_what_is_missing_is_made_and_a_key_twice_once(tmp_path):
    cache, asked = LatentCache(tmp_path, "f"), []

    def make(rows):
        asked.append(rows)
        return [array(keys[row]) for row in rows]

    for keys in ([KEYS[0], KEYS[1], KEYS[0]], [KEYS[1], KEYS[2], KEYS[3], KEYS[2]]):
        got = cache.get_or_compute(keys, make)
        assert all(np.array_equal(a, array(key)) for a, key in zip(got, keys, strict=True))
    assert asked == [[0, 1], [1, 2]]


def test_another_network_s_arrays_are_apart(tmp_path):
    LatentCache(tmp_path, "one").get_or_compute(["ab"], lambda rows: [np.zeros(1)])
    (other,) = LatentCache(tmp_path, "two").get_or_compute(["ab"], lambda rows: [np.ones(1)])
    assert other == 1


@pytest.mark.parametrize("harm", ["cut", "empty", "bit", "short", "head"])
def test_a_torn_entry_is_made_again(tmp_path, harm):
    cache = LatentCache(tmp_path, "f")
    cache.get_or_compute(KEYS[:2], lambda rows: [array(KEYS[row]) for row in rows])
    (file,) = tmp_path.rglob(f"{KEYS[0]}*")
    data = bytearray(file.read_bytes())
    data[300] ^= harm == "bit"
    data[0] ^= harm == "head"
    file.write_bytes(data[: {"cut": -1, "empty": 0, "short": 2}.get(harm, len(data))])
    asked = []

    def make(rows):
        asked.extend(rows)
        return [array(KEYS[row]) for row in rows]

    for _ in range(2):
        assert np.array_equal(cache.get_or_compute(KEYS[:2], make)[0], array(KEYS[0]))
    assert asked == [0]


def test_two_processes_fill_one_cache_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    made = context.Queue()
    both = [context.Process(target=fill, args=(tmp_path, start, made)) for start in (0, 0)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    counts = sum(made.get() for _ in iter(lambda: made.empty(), True))
    assert 40 <= counts <= 80
    assert all(
        np.array_equal(a, array(key))
        for a, key in zip(LatentCache(tmp_path, "f").get_or_compute(KEYS, never), KEYS, strict=True)
    )
    assert sum(len(files) for _, _, files in os.walk(tmp_path)) == 40  # and nothing half-written


def test_a_fingerprint_is_of_the_weights_alone():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    whole = hash_network_weights(network, {"scale": 0.5})
    assert whole == hash_network_weights(network, {"scale": 0.5}) and len(whole) == 32
    others = [hash_network_weights(network, {"scale": 0.6}), hash_network_weights(network.bfloat16(), {"scale": 0.5})]
    with torch.no_grad():
        network[0].bias[1] += 1
    others.append(hash_network_weights(network, {"scale": 0.5}))
    assert len({whole, *others}) == 4


def test_parts_of_a_digest_are_told_apart():
    assert (
        len(
            {
                blake2b_hexdigest("ab", "c"),
                blake2b_hexdigest("a", "bc"),
                blake2b_hexdigest("abc"),
                blake2b_hexdigest("ab", "c", ""),
            }
        )
        == 4
    )
    assert blake2b_hexdigest("é") == blake2b_hexdigest("é".encode())
