"""Frame subsets and votes, by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from stts.eval.answering.voting import combine, interleaved

LOG = math.log


def test_subsets_are_interleaved() -> None:
    assert interleaved(8, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert interleaved(7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert interleaved(4, 1) == [[0, 1, 2, 3]]
    for looks in (0, 5):
        with pytest.raises(ValueError, match=r"must be in \[1, 4\]"):
            interleaved(4, looks)


@given(some.integers(1, 200).flatmap(lambda n: some.tuples(some.just(n), some.integers(1, n))))
def test_subsets_are_disjoint_whole_and_of_nearly_one_size(case: tuple[int, int]) -> None:
    frames, looks = case
    parts = interleaved(frames, looks)
    assert sorted(number for part in parts for number in part) == list(range(frames))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_mean_and_the_majority_may_disagree() -> None:
    """Two looks lean to the first option, one is sure of the second."""
    looks = [[LOG(0.55), LOG(0.45)], [LOG(0.55), LOG(0.45)], [LOG(0.01), LOG(0.99)]]
    majority, mean = combine(looks, "majority"), combine(looks, "mean")
    assert (majority.option, majority.votes, mean.option) == (0, (2, 1), 1)
    assert mean.mean_logprob == pytest.approx(((2 * LOG(0.55) + LOG(0.01)) / 3, (2 * LOG(0.45) + LOG(0.99)) / 3))


def test_a_tied_majority_goes_to_the_higher_mean() -> None:
    assert combine([[LOG(0.6), LOG(0.4)], [LOG(0.1), LOG(0.9)]], "majority").option == 1
    assert combine([[LOG(0.9), LOG(0.1)], [LOG(0.4), LOG(0.6)]], "majority").option == 0


@pytest.mark.parametrize("how", ["mean", "majority"])
def test_the_last_tie_goes_to_the_first_option(how: str) -> None:
    assert combine([[LOG(0.5), LOG(0.5)], [LOG(0.5), LOG(0.5)]], how).option == 0  # type: ignore[arg-type]
    assert combine([[LOG(0.2), LOG(0.8)], [LOG(0.8), LOG(0.2)]], how).option == 0  # type: ignore[arg-type]


def test_an_option_no_look_chose_can_win_by_the_mean_only() -> None:
    looks = [[LOG(0.5), LOG(0.49), LOG(0.01)], [LOG(0.01), LOG(0.49), LOG(0.5)]]
    assert combine(looks, "mean").option == 1 and combine(looks, "majority").option == 0


def test_what_cannot_be_combined_is_refused() -> None:
    for looks in ([], [[]], [[-1.0], [-1.0, -2.0]]):
        with pytest.raises(ValueError, match="same options"):
            combine(looks, "mean")
    for value in (math.nan, 0.5):
        with pytest.raises(ValueError, match="not log-probabilities"):
            combine([[value]], "mean")
    with pytest.raises(ValueError, match="vote="):
        combine([[-1.0]], "loudest")  # type: ignore[arg-type]
