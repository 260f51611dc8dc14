"""Noise depends on an image's own seed and on how often it was drawn, never on its neighbours."""

import pytest
import torch

from ldm.rng import noise_for, noise_from, stream


def test_first_draw_is_the_latent_that_a_cpu_generator_of_that_seed_gives():
    drawn = noise_for([3, 2**40, 7])(torch.empty(3, 4, 8, 8))
    for row, seed in zip(drawn, [3, 2**40, 7], strict=True):
        assert torch.equal(row[None], torch.randn([1, 4, 8, 8], generator=torch.Generator().manual_seed(seed)))


def test_rows_are_pure_in_any_batch_and_order():
    like = torch.empty(1, 4, 8, 8)
    together, alone = noise_for([5, 9]), noise_for([9])
    for _ in range(3):
        assert torch.equal(together(like.expand(2, -1, -1, -1))[1:], alone(like))


def test_streams_retire_and_join_without_disturbing_the_others():
    like = torch.empty(1, 3, 5)
    a, b, c = map(stream, [1, 2, 3])
    noise_from([a, b])(like.expand(2, -1, -1))
    second = noise_from([c, b])(like.expand(2, -1, -1))  # a has retired, c has joined
    alone = noise_for([2])
    alone(like)
    assert torch.equal(second[1:], alone(like))
    assert torch.equal(second[:1], noise_for([3])(like))


def test_a_float64_picture_gets_the_same_numbers():
    like = torch.empty(1, 4, 8, 8)
    assert torch.equal(noise_for([4])(like.double()), noise_for([4])(like).double())


def test_a_missing_stream_is_refused():
    with pytest.raises(ValueError, match="2 images, but 1 noise"):
        noise_for([0])(torch.empty(2, 4))
