"""Packing: every image once, in order, no batch over the budget unless one image alone is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrt.engine.batcher import pack


@pytest.mark.parametrize(
    ("counts", "budget", "expected"),
    [
        ([], 10, []),
        ([4], 10, [[0]]),
        ([4, 6, 1], 10, [[0, 1], [2]]),  # exactly full
        ([4, 7, 3], 10, [[0], [1, 2]]),
        ([11, 1, 1], 10, [[0], [1, 2]]),  # over the budget: alone, though room stays negative
        ([1, 30, 1], 10, [[0], [1], [2]]),
        ([1, 1, 1], 1, [[0], [1], [2]]),
    ],
)
def test_pack(counts: list[int], budget: int, expected: list[list[int]]) -> None:
    assert pack(range(len(counts)), budget, counts.__getitem__) == expected


@given(st.lists(st.integers(1, 60)), st.integers(1, 100))
def test_pack_keeps_the_order_and_the_budget(counts: list[int], budget: int) -> None:
    batches = pack(range(len(counts)), budget, counts.__getitem__)
    assert [index for batch in batches for index in batch] == list(range(len(counts)))
    sums = [sum(counts[index] for index in batch) for batch in batches]
    for batch, tokens in zip(batches, sums, strict=True):
        assert batch
        assert tokens <= budget or len(batch) == 1
    for tokens, following in zip(sums, batches[1:], strict=False):
        assert tokens + counts[following[0]] > budget  # no batch is closed while the next fits


@pytest.mark.parametrize("budget", [0, -5])
def test_pack_refuses_a_budget_below_one(budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget is {budget}"):
        pack([1], budget, int)
