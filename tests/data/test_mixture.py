"""What an epoch of several sources holds."""

from __future__ import annotations

import numpy as np
import pytest

from stts.data.mixture import Mixture, Source, limited, weights_of


def shares(mixture: Mixture, order: np.ndarray) -> list[int]:
    source = np.searchsorted(np.cumsum(mixture.sizes), order, side="right")
    return np.bincount(source, minlength=len(mixture.sizes)).tolist()


def test_without_weights_every_row_comes_once_per_epoch() -> None:
    mixture = Mixture((5, 20, 75))
    first, again, second = mixture.draw(0, 0), mixture.draw(0, 0), mixture.draw(0, 1)
    assert first.tolist() == again.tolist() != second.tolist() != mixture.draw(1, 1).tolist()
    assert sorted(first) == sorted(second) == list(range(100))


def test_weights_are_shares_of_every_epoch() -> None:
    # 1000 samples at 0.7 : 0.2 : 0.1, whatever the sources' sizes
    mixture = Mixture((100, 300, 600), (7, 2, 1))
    assert mixture.counts == (700, 200, 100)
    for epoch in range(3):
        order = mixture.draw(3, epoch)
        assert shares(mixture, order) == [700, 200, 100]
        for part in np.split(order, 4):  # mixed evenly: 175 : 50 : 25, give or take four standard deviations
            assert np.abs(np.array(shares(mixture, part)) - (175, 50, 25)).max() < 4 * np.sqrt(250 * 0.7 * 0.3)


def test_shares_that_are_no_whole_numbers_still_fill_the_epoch() -> None:
    # 10 samples: 3.33 each; the largest remainder, first of equals, gets the one left over
    assert Mixture((3, 3, 4), (1, 1, 1)).counts == (4, 3, 3)
    assert Mixture((5, 5), (2, 1)).counts == (7, 3)


def test_a_source_repeats_nothing_before_it_has_shown_everything() -> None:
    mixture = Mixture((10, 30), (3, 1))  # 30 and 10 samples per epoch
    epochs = [mixture.draw(0, epoch) for epoch in range(3)]
    assert all((np.bincount(order[order < 10]) == 3).all() for order in epochs), "three whole passes in each"
    large = np.concatenate([order[order >= 10] for order in epochs])
    assert sorted(large) == list(range(10, 40)), "10 of 30 rows in each of three epochs"


def test_limits() -> None:
    assert limited("all", 5, 0).tolist() == [0, 1, 2, 3, 4]
    assert limited("first:2", 5, 0).tolist() == [0, 1]
    assert limited("first:10%", 15, 0).tolist() == [0, 1], "1.5 rows, rounded up"
    assert limited("first:9", 5, 0).tolist() == [0, 1, 2, 3, 4]
    some = limited("random:30%", 1000, 4)
    assert len(some) == len(set(some.tolist())) == 300 and (np.diff(some) > 0).all()
    assert some.tolist() == limited("random:300", 1000, 4).tolist() != limited("random:300", 1000, 5).tolist()
    assert abs(some.mean() - 500) < 70, "from all of the file (four standard deviations)"
    with pytest.raises(ValueError, match="leaves none of 5 rows"):
        limited("first:0", 5, 0)


@pytest.mark.parametrize("limit", ["first", "first:", "last:3", "first:-1", "random:x%", "10%", "first:1e3"])
def test_bad_limits_are_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=r"a\.json: limit="):
        Source("a.json", limit=limit)


def test_bad_weights_are_refused() -> None:
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"a\.json: weight="):
            Source("a.json", weight=weight)
    with pytest.raises(ValueError, match="every source a weight or none"):
        weights_of([Source("a.json", weight=1.0), Source("b.json")])
    assert weights_of([Source("a.json"), Source("b.json")]) is None
    assert weights_of([Source("a.json", weight=2.0), Source("b.json", weight=1)]) == (2, 1)
    with pytest.raises(ValueError, match="without a sample in epochs of 10"):
        Mixture((5, 5), (1000, 1))
