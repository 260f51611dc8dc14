"""Conditioning: rows are cut and joined without change."""

import pytest
import torch

from ldm.conditioning import Conditioning


def projected(rows, seed=0, added=False, channels=False):
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(rows, 3, 4, generator=g)
    pairs = (draw(), draw()), (draw(), draw())
    return Conditioning(draw(), pairs, draw()[:, 0] if added else None, draw()[:, None] if channels else None)


def equal(a, b):
    flat = lambda c: [
        c.context,
        *(t for pair in c.kv_cache or () for t in pair),
        *(t for t in (c.vector, c.concat) if t is not None),
    ]
    return len(flat(a)) == len(flat(b)) and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_joining_the_rows_of_a_conditioning_gives_it_back(added, channels):
    cond = projected(5, added=added, channels=channels)
    assert len(cond) == 5
    assert equal(Conditioning.cat([cond[:2], cond[2:3], cond[3:]]), cond)
    assert equal(cond[torch.tensor([3, 1])], Conditioning.cat([cond[3:4], cond[1:2]]))
    assert Conditioning.cat([cond]) is cond


def test_a_part_without_keys_and_values_leaves_the_projection_to_the_network():
    joined = Conditioning.cat([projected(2), Conditioning(torch.zeros(1, 3, 4))])
    assert joined.kv_cache is None and len(joined) == 3


def test_the_added_vector_and_the_channels_are_of_all_rows_or_of_none():
    rows = projected(2, added=True)
    joined = Conditioning.cat([rows, Conditioning(rows.context, vector=rows.vector)])
    assert joined.kv_cache is None and torch.equal(joined.vector[2:], rows.vector)
    with pytest.raises(ValueError, match="1 of 2 parts have vector"):
        Conditioning.cat([rows, projected(1)])
    with pytest.raises(ValueError, match="1 of 2 parts have concat"):
        Conditioning.cat([projected(1), projected(2, channels=True)])


def test_texts_in_a_chain_follow_one_another_and_the_first_one_s_vector_stands_for_all():
    first, second = projected(2, added=True), projected(2, seed=1, added=True)
    whole = Conditioning.cat_context([first, second])
    for part, rows in ((first, slice(0, 3)), (second, slice(3, 6))):
        cut = Conditioning(
            whole.context[:, rows], tuple((k[:, rows], v[:, rows]) for k, v in whole.kv_cache), part.vector
        )
        assert equal(cut, part)
    assert torch.equal(whole.vector, first.vector)
