"""`vcast`: curvature and shares by hand, budgets below one token a frame, what the release keeps."""

from __future__ import annotations

import pytest
import torch

from stts.pruners.check import example_video
from stts.pruners.vcast import VCAST, curvature, share_out
from stts.tokens import Budget, Grid, VideoTokens


def counts(stage: VCAST, grid: Grid, num_kept: int, exact: bool = True) -> list[int]:
    video = example_video(stage, grid)
    [kept] = stage([video], [Budget(num_kept, num_kept / grid.num_groups, exact)])
    return torch.bincount(kept.index_K // grid.per_frame, minlength=grid.t).tolist()


def test_the_curvature_by_hand() -> None:
    # On, on, back, and a turn to the left: 1 - cos = 0, 2 and 1; ends count as a right angle.
    frame_TD = torch.tensor([[0.0, 0], [1, 0], [2, 0], [1, 0], [1, 1]])
    assert curvature(frame_TD).tolist() == [1, 0, 2, 1, 1]
    assert curvature(frame_TD[:2]).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("weights", "total", "most", "counts", "released"),
    [
        ([1.0, 1.0, 2.0], 8, 9, [2, 2, 4], [2, 2, 4]),  # quotas 1.25, 1.25, 2.5 behind the one each
        ([1.0, 1.0, 1.0], 8, 9, [3, 3, 2], [4, 2, 2]),  # the release gives both leftovers to the first
        ([1.0, 1.0, 8.0], 11, 5, [3, 3, 5], [5, 1, 5]),  # 6.4 is cut to 4; the surplus in proportion
        ([1.0, 3.0, 2.0], 2, 9, [0, 1, 1], [0, 1, 1]),  # less than one each
        ([1.0, 1.0], 6, 3, [3, 3], [3, 3]),
    ],
)
def test_shares(weights: list[float], total: int, most: int, counts: list[int], released: list[int]) -> None:
    assert share_out(weights, total, most) == counts
    assert share_out(weights, total, most, one_frame=True) == released


def test_counts_are_those_of_the_budget_and_no_frame_is_empty_if_it_can() -> None:
    for num_kept in (1, 5, 6, 40, 54):
        found = counts(VCAST(), Grid(6, 3, 3), num_kept)
        assert sum(found) == num_kept and (min(found) >= 1) == (num_kept >= 6)
    assert counts(VCAST(), Grid(1, 3, 3), 4) == [4]


def test_the_release_keeps_a_token_of_every_frame_and_all_of_a_single_one() -> None:
    official = VCAST(compat="official")
    assert not official.count_known and VCAST().count_known
    assert counts(official, Grid(6, 3, 3), 2, exact=False) == [1] * 6
    assert counts(official, Grid(1, 3, 3), 4, exact=False) == [9] and counts(official, Grid(1, 3, 3), 4) == [4]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature=0"):
        VCAST(temperature=0)
    video = example_video(VCAST(), Grid(2, 2, 2))
    with pytest.raises(ValueError, match="whole frames"):
        VCAST()([VideoTokens(video.x_ND[:3], video.grid, torch.tensor([0, 1, 3]))], [Budget(2, 0.5)])
