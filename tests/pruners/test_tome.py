"""`tome`: steps by hand, shares of frames, overlapping windows, schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stts.pruners.check import HOST, example_video
from stts.pruners.tome import ToMe, destination, merge_down, schedule, schedule_for_total
from stts.tokens import Budget, Grid, VideoTokens

# Keys at 0, 5, 90 and 170 degrees: of the even places 0 and 2, place 0 is most like place 1.
ANGLES = torch.tensor([0.0, 5, 90, 170]).deg2rad()
KEYS = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def video(per_group: int = 1, frames: int = 1) -> VideoTokens:
    patches = torch.arange(4 * per_group * frames)
    return VideoTokens(
        x_ND=patches[:, None].float(), grid=Grid(frames, 1, 4), cell_G=torch.arange(4 * frames),
        group_GW=patches.view(-1, per_group), keys_GD=KEYS.repeat(frames, 1),
    )  # fmt: skip


def test_the_most_alike_pair_becomes_one() -> None:
    [kept] = ToMe()([video(2)], [Budget(3, 0.75, True)])
    assert kept.index_K.tolist() == [1, 2, 3] and kept.x_ND is not None and kept.size_N is not None
    assert kept.x_ND[2:, 0].tolist() == [1, 2, 4, 5, 6, 7], "patch by patch: (0, 1) and (2, 3) give (1, 2)"
    assert kept.size_N[2:].tolist() == [2, 2, 1, 1, 1, 1]
    [plain] = ToMe(proportional=False)([video()], [Budget(3, 0.75, True)])
    assert plain.size_N is None


def test_sizes_count_every_group_that_was_merged() -> None:
    [kept] = ToMe()([video()], [Budget(1, 0.25, True)])  # two steps: to places 1 and 3, then to 3
    assert kept.index_K.tolist() == [3] and kept.size_N is not None and kept.x_ND is not None
    assert kept.size_N[3] == 4 and kept.x_ND[3] == 1.5


def test_frames_keep_equal_shares_and_earlier_ones_what_does_not_divide() -> None:
    [kept] = ToMe()([video(frames=3)], [Budget(8, 8 / 12, True)])
    assert torch.bincount(kept.index_K // 4).tolist() == [3, 3, 2]
    [few] = ToMe()([video(frames=3)], [Budget(2, 1 / 6, True)])
    assert len(few.index_K) == 2, "less than a group a frame: of evenly spaced frames"


def test_roots_are_survivors_whatever_the_target() -> None:
    metric_TPC = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    for target in range(1, 8):
        root_TP = merge_down(metric_TPC, [target, target, max(1, target - 1)])
        for root_P, number in zip(root_TP, (target, target, max(1, target - 1)), strict=True):
            survivors = root_P[root_P == torch.arange(7)]
            assert len(survivors) == number and torch.isin(root_P, survivors).all()


def test_a_patch_that_a_survivor_needs_stays() -> None:
    group_GW = torch.tensor([[0, 1], [1, 2], [3, -1]])  # patch 1 lies in two windows
    to_N = destination(torch.tensor([1, 1, 2]), group_GW, 5)
    assert to_N.tolist() == [1, 1, 2, 3, -1], "patch 0 joins patch 1 of window 1; patch 4 lies in no window"
    to_N = destination(torch.tensor([0, 0, 0]), group_GW, 5)
    assert to_N.tolist() == [0, 1, 1, 0, -1]


def test_schedules() -> None:
    assert schedule(3, 4) == [3, 3, 3, 3] and schedule((3, -1.0), 4) == [6, 4, 2, 0] and schedule([5], 3) == [5, 0, 0]
    rate, blocks = schedule_for_total(10, 4)
    assert sum(blocks) == 10 and rate in (2, 3)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="prune_block=9"):
        ToMe.for_host(HOST, prune_block=9)
    with pytest.raises(ValueError, match="vit site"):
        ToMe()([replace(video(), group_GW=None)], [Budget(2, 0.5)])
    with pytest.raises(ValueError, match="'keys' signal"):
        ToMe()([replace(video(), keys_GD=None)], [Budget(2, 0.5)])
    assert example_video(ToMe(), Grid(2, 2, 2)).keys_GD is not None
