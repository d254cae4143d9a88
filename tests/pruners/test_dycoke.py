"""`dycoke`: whole and pruned frames by hand, exact budgets, the last group, keys hidden while decoding."""

from __future__ import annotations

import pytest
import torch

from stts.pruners.base import Shown
from stts.pruners.check import example_video
from stts.pruners.dycoke import DyCoke
from stts.tokens import Budget, Grid, VideoTokens


def counts(stage: DyCoke, grid: Grid, num_kept: int, ratio: float, exact: bool) -> list[int]:
    [kept] = stage([example_video(stage, grid)], [Budget(num_kept, ratio, exact)])
    return torch.bincount(kept.index_K // grid.per_frame, minlength=grid.t).tolist()


def test_a_fourth_of_the_frames_stays_whole() -> None:
    # 1 - K = (4 * 0.625 - 1) / 3 = 0.5
    assert counts(DyCoke(), Grid(9, 2, 5), 1, 0.625, exact=False) == [10, 5, 5, 5, 10, 5, 5, 5, 10]
    assert counts(DyCoke(), Grid(4, 2, 5), 1, 0.1, exact=False) == [10, 0, 0, 0], "never below a quarter"
    assert counts(DyCoke(frame_ratio=0.3), Grid(5, 2, 5), 1, 0.1, exact=False) == [10, 3, 3, 3, 10]


def test_the_release_drops_an_odd_frame_and_spares_the_last_group() -> None:
    official = DyCoke(frame_ratio=0.3, compat="official")
    assert counts(official, Grid(8, 2, 5), 1, 0.5, exact=False) == [10, 3, 3, 3, 10, 3, 10, 3]
    assert counts(official, Grid(5, 2, 5), 1, 0.5, exact=False) == [10, 3, 3, 3, 0]
    assert counts(official, Grid(2, 2, 5), 1, 0.5, exact=False) == [10, 3], "two frames, where the release fails"
    assert counts(DyCoke(frame_ratio=0.9, compat="official"), Grid(4, 2, 5), 1, 0.5, exact=False) == [10, 9, 10, 9]


def test_groups_grow_where_whole_frames_alone_are_too_many() -> None:
    assert counts(DyCoke(), Grid(8, 2, 5), 20, 0.25, exact=True) == [10, 0, 0, 0, 10, 0, 0, 0]
    found = counts(DyCoke(), Grid(8, 2, 5), 19, 0.2375, exact=True)
    assert found[0] == 10 and sorted(found[1:]) == [1, 1, 1, 1, 1, 2, 2]
    assert counts(DyCoke(), Grid(8, 2, 5), 4, 0.05, exact=True) == [4, 0, 0, 0, 0, 0, 0, 0]


def test_what_does_not_divide_goes_to_the_frames_that_differ_most() -> None:
    x_TSD = torch.tensor([[1.0, 0], [1, 0]]).repeat(4, 1, 1)
    x_TSD[2] = torch.tensor([0.0, 1])  # as is frame 3 compared with it
    video = VideoTokens(x_TSD.flatten(0, 1), Grid(4, 1, 2), torch.arange(8))
    [kept] = DyCoke()([video], [Budget(4, 0.5, True)])
    assert kept.index_K.tolist() == [0, 1, 4, 6], "frames 2 and 3 differ from frames 0 and 2, frame 1 does not"


def test_a_step_like_the_last_keeps_the_last_choice() -> None:
    # Slot 0 and slot 4 are no video; the second row has another one. Of its 3 keys trunc(0.7 * 3) = 2 stay.
    stage, inside_BM = DyCoke(hidden=0.3), torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    attention_BM = torch.tensor([[0.1, 0.4, 0.1, 0.3, 0.1], [0.9, 0.0, 0.0, 0.0, 0.1]])
    first_BM = stage.show(attention_BM, inside_BM, 3, None)
    assert first_BM.tolist() == [[False, True, False, True, False], [False] * 5]
    last = Shown(first_BM, attention_BM)
    like_BM = torch.tensor([[0.5, 0.4, 0.2, 0.19, 0.1], [0.9, 0.0, 0.0, 0.0, 0.1]])  # now slot 2 beats slot 3
    assert torch.equal(stage.show(like_BM, inside_BM, 3, last), first_BM)
    assert torch.equal(DyCoke(hidden=0.3, compat="official").show(like_BM, inside_BM, 3, last), inside_BM)
    turned_BM = torch.tensor([[0.1, 0.1, 0.5, 0.0, 0.1], [0.1, 0.0, 0.0, 0.0, 0.9]])
    assert stage.show(turned_BM, inside_BM, 3, last)[0].tolist() == [False, True, True, False, False]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden=1\.0"):
        DyCoke(hidden=1.0)
    with pytest.raises(ValueError, match=r"frame_ratio=1\.5"):
        DyCoke(frame_ratio=1.5)
    video = example_video(DyCoke(), Grid(2, 2, 2))
    with pytest.raises(ValueError, match="whole frames"):
        DyCoke()([VideoTokens(video.x_ND[:3], video.grid, torch.tensor([0, 1, 3]))], [Budget(2, 0.5)])
