"""Noise depends on an image's own seed and on how often it was drawn, never on its neighbours."""

from itertools import pairwise

import pytest
import torch

from ldm.rng import BrownianPath, Noise, derive_seed, derive_uniform, torch_seed

SHAPE = torch.Size([40_000])


def test_first_draw_is_the_latent_that_a_cpu_generator_of_that_seed_gives():
    seeds = [3, 2**32 - 1, 7]
    drawn = Noise(seeds)(torch.empty(3, 4, 8, 8))
    for row, seed in zip(drawn, seeds, strict=True):
        assert torch.equal(row[None], torch.randn([1, 4, 8, 8], generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("low", [0, 5, 2**32 - 1])
def test_every_bit_of_a_seed_of_64_bits_counts(low):
    """torch's CPU generator reads 32 of them: seeds 5 and 5 + 2**32 would give one image."""
    seeds = [low + (high << 32) for high in (0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1)]
    noise, like = Noise(seeds), torch.empty(len(seeds), 10_000)
    for drawn in (noise(like), noise(like), noise.between(like, 0.9, 0.5)):
        cov = drawn.corrcoef()
        assert (cov - torch.eye(len(seeds))).abs().max() < 0.05
        assert drawn.mean(1).abs().max() < 0.05 and (drawn.std(1) - 1).abs().max() < 0.05


def test_keyed_generates_come_from_more_than_32_bits():
    """Two keys whose derived seeds have equal low halves are different streams."""
    seed = derive_seed(0, "a", "noise")
    assert seed >= 2**32
    like = torch.empty(2, 1000)
    a, b = Noise([seed, seed ^ (1 << 40)])(like)
    assert abs(torch.dot(a, b) / 1000) < 0.2


def test_torch_seed_keeps_small_seeds_and_tells_large_ones_apart():
    assert [torch_seed(k) for k in (0, 5, 2**32 - 1)] == [0, 5, 2**32 - 1]
    large = [torch_seed(5 + (k << 32)) for k in range(1, 100)] + [torch_seed(2**70)]
    assert len({5, *large}) == 101 and max(large) < 2**32


def test_rows_are_pure_in_any_batch_and_order():
    like = torch.empty(1, 4, 8, 8)
    together, alone = Noise([5, 9]), Noise([9])
    for sigma in (0.9, 0.5, 0.1):
        assert torch.equal(together(like.expand(2, -1, -1, -1))[1:], alone(like))
        both = together.between(like.expand(2, -1, -1, -1), sigma, sigma / 2)
        assert torch.equal(both[1:], Noise([9]).between(like, sigma, sigma / 2))
        assert not torch.equal(both[0], both[1])


def test_a_float64_image_gets_the_same_numbers():
    like = torch.empty(1, 4, 8, 8)
    assert torch.equal(Noise([4])(like.double()), Noise([4])(like).double())


def test_a_missing_stream_is_refused():
    with pytest.raises(ValueError, match="2 images, but 1 noise"):
        Noise([0])(torch.empty(2, 4))
    with pytest.raises(ValueError, match="2 images, but 1 noise"):
        Noise([0]).between(torch.empty(2, 4), 1.0, 0.5)


def test_path_is_a_brownian_motion_in_the_signal_to_noise_ratio():
    """Increments have the variance of their SNR and do not correlate, from SNR 0 to 1e6."""
    sigmas = [1.0, 1 - 1e-6, 0.99, 0.8, 0.8 - 1e-4, 0.3, 0.1, 0.1 - 1e-5, 0.01, 0.001]
    path = [BrownianPath(11).value_at(sigma, SHAPE).double() for sigma in sigmas]
    clock = torch.tensor([1 / s**2 - 1 for s in sigmas], dtype=torch.float64)
    steps = torch.stack([b - a for a, b in pairwise(path)]) / clock.diff().sqrt()[:, None]
    assert torch.equal(path[0], torch.zeros(SHAPE, dtype=torch.float64))
    cov = steps @ steps.T / SHAPE[0]
    assert (cov - torch.eye(len(cov))).abs().max() < 4 * (2 / SHAPE[0]) ** 0.5
    kurtosis = (steps**4).mean(1)
    assert (kurtosis - 3).abs().max() < 4 * (96 / SHAPE[0]) ** 0.5


def test_finer_steps_refine_the_same_path():
    like = torch.empty(1, 1000)
    snr = lambda s: 1 / s**2 - 1
    whole = Noise([3]).between(like, 0.9, 0.2) * (snr(0.2) - snr(0.9)) ** 0.5
    noise = Noise([3])
    parts = [noise.between(like, a, b) * (snr(b) - snr(a)) ** 0.5 for a, b in [(0.9, 0.7), (0.7, 0.25), (0.25, 0.2)]]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-4)


def test_consecutive_steps_descend_the_tree_once_for_each_level(monkeypatch):
    descents = []
    bridge = BrownianPath._bridge
    monkeypatch.setattr(BrownianPath, "_bridge", lambda self, *words: descents.append(1) or bridge(self, *words))
    noise, like = Noise([0]), torch.empty(1, 4)
    for a, b in pairwise([1.0, 0.8, 0.5, 0.2, 0.1]):
        noise.between(like, a, b)
    assert len(descents) == 5


def test_keys_are_fixed_for_ever_and_tell_their_parts_apart():
    assert derive_seed(0, "a.png", 3, "noise") == 3322915060813602510
    parts = [(1, 23), (12, 3), ("1", 23), (1, "23"), (1, 2, 3), ("a", "b"), ("ab",), ("a, b",), ("a", "b", 0)]
    keys = {derive_seed(*p) for p in parts}
    assert len(keys) == len(parts) and all(0 <= key < 2**63 for key in keys)


def test_keyed_numbers_are_uniform_and_independent_between_purposes():
    u, v = (torch.tensor([derive_uniform(5, k, 0, purpose) for k in range(20_000)]) for purpose in ("time", "caption"))
    for values in (u, v, (u + v) % 1):  # of independent pairs the sum is uniform too
        counts = torch.histc(values, 50, 0, 1)
        assert ((counts - 400) ** 2 / 400).sum() < 95  # chi-square of 49 degrees: one in 10,000 is above
    assert max(u.max(), v.max()) < 1
