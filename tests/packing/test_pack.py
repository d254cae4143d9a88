from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts.packing.pack import pack_samples
from tests.golden.stts_rows import first_fit_decreasing

sizes_and_capacity = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(0, capacity), max_size=30), st.just(capacity))
)


def textbook_first_fit(items: list[tuple[int, int]], capacity: int) -> list[list[int]]:
    """Try every open row from the first on, by summing what is in it; open a new one when none has room."""
    rows: list[list[tuple[int, int]]] = []
    for item in items:
        for row in rows:
            if sum(size for _, size in row) + item[1] <= capacity:
                row.append(item)
                break
        else:
            rows.append([item])
    return [[number for number, _ in row] for row in rows]


def test_first_fit_decreasing_golden() -> None:
    # 7 and 3 fill row 0; the 5 opens row 1, takes the first 4 (9 used) and has no room for the 2; row 2 takes it.
    assert first_fit_decreasing([4, 0, 7, 3, 5, 2], capacity=10) == [[2, 3], [4, 0], [5]]


def test_equal_items_keep_their_order() -> None:
    assert first_fit_decreasing([2, 2, 2, 2, 2], capacity=4) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_nothing_to_pack_needs_no_row(counts: list[int]) -> None:
    assert first_fit_decreasing(counts, capacity=4) == []


@given(sizes_and_capacity)
def test_first_fit_decreasing_packs_every_item_once_and_never_too_much(case: tuple[list[int], int]) -> None:
    counts, capacity = case
    rows = first_fit_decreasing(counts, capacity)
    assert all(sum(counts[i] for i in row) <= capacity for row in rows)
    assert sorted(i for row in rows for i in row) == [i for i, count in enumerate(counts) if count]


@given(sizes_and_capacity)
def test_first_fit_decreasing_equals_the_textbook_loop(case: tuple[list[int], int]) -> None:
    counts, capacity = case
    items = sorted(((i, c) for i, c in enumerate(counts) if c), key=lambda item: (-item[1], item[0]))
    assert first_fit_decreasing(counts, capacity) == textbook_first_fit(items, capacity)


@pytest.mark.parametrize(("counts", "message"), [([1, 5], "item 1 has size 5"), ([-1], "item 0 has size -1")])
def test_items_that_cannot_fit_are_refused(counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        first_fit_decreasing(counts, capacity=4)


def test_pack_samples_golden() -> None:
    # In the given order, not by size: 6 opens row 0, 5 opens row 1, 4 fills row 0, 3 goes to row 1, 9 opens row 2.
    assert pack_samples([6, 5, 4, 3, 9], max_tokens=10) == [[0, 2], [1, 3], [4]]


def test_pack_samples_of_nothing() -> None:
    assert pack_samples([], max_tokens=10) == []


@given(sizes_and_capacity)
def test_pack_samples_keeps_order_and_budget(case: tuple[list[int], int]) -> None:
    lengths, max_tokens = [max(size, 1) for size in case[0]], case[1]
    rows = pack_samples(lengths, max_tokens)
    assert rows == textbook_first_fit(list(enumerate(lengths)), max_tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= max_tokens for row in rows)
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 11, 12], r"sample 1 alone has 11 tokens.*max_tokens=10"), ([3, 0], r"sample 1 has 0 tokens")],
)
def test_samples_that_cannot_be_packed_are_named(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_samples(lengths, max_tokens=10)
