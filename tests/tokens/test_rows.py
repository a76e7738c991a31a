"""Rows that are written in place, and rows that other code refers to."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from decoders import MASK, VOCABULARY, decoder

from diffcache.tokens import cache_for
from diffcache.tokens.rows import can_write, write_rows


@pytest.mark.parametrize("by_position", [False, True], ids=["heads outside", "heads inside"])
def test_rows_are_written_at_their_positions(by_position: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, 7, 4, generator=generator)
    new = torch.randn(2, 3, 3, 4, generator=generator)
    index = torch.tensor([[0, 6, 2], [5, 1, 3]])
    wanted = rows.scatter(2, index[:, None, :, None].expand_as(new), new)
    if by_position:
        rows = rows.transpose(1, 2).contiguous().transpose(1, 2)
    assert can_write(rows, 7)
    write_rows(rows, new, index)
    assert torch.equal(rows, wanted)


def test_rows_of_another_size_or_with_gaps_or_of_inference_mode_are_not_written() -> None:
    assert not can_write(torch.zeros(2, 3, 7, 4), 8)
    assert not can_write(torch.zeros(2, 3, 7, 8)[..., :4], 7)
    with torch.inference_mode():
        made = torch.zeros(2, 3, 7, 4)
        assert can_write(made, 7)
    assert not can_write(made, 7)


@pytest.mark.parametrize("outside", [False, True], ids=["grad off", "first forwards in inference mode"])
def test_later_forwards_write_in_place_and_leave_the_logits_exact(outside: bool) -> None:
    model: Any = decoder()
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 4:] = MASK
    cache = cache_for(model, "dkv:refresh=100")
    cache.attach()
    try:
        seen = []
        for step in range(4):
            with torch.inference_mode() if outside and step < 2 else torch.no_grad():
                model(ids)
            seen.append(cache.canvas.cache.rows()[0][0])
            ids = ids.clone()
            ids[:, 4 + step] = 1 + step
    finally:
        cache.detach()
    # the first forward's rows are the network's; the second makes a copy, and the third writes into it
    same = [a.data_ptr() == b.data_ptr() for a, b in itertools.pairwise(seen)]
    assert same == [False, not outside, True]


def test_a_trial_leaves_the_rows_that_it_is_given() -> None:
    model: Any = decoder()
    ids = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(2))
    cache = cache_for(model, "full")
    cache.attach()
    try:
        with torch.no_grad():
            model(ids)
            rows = cache.canvas.cache.rows()
            before = {number: [part.clone() for part in pair] for number, pair in rows.items()}
            for token in (1, 2):
                cache.trial(torch.full_like(ids, token), rows, np.array([[1, 5], [0, 7]]))
    finally:
        cache.detach()
    assert all(torch.equal(a, b) for n, pair in rows.items() for a, b in zip(pair, before[n], strict=True))
