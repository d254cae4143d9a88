"""`divprune`: a case by hand, both pools, repeated tokens."""

from __future__ import annotations

import pytest
import torch

from stts.pruners import ops
from stts.pruners.divprune import DivPrune
from stts.tokens import Budget, Grid, VideoTokens

# Angles of 0, 10, 90 and 200 degrees; the nearest of the last is 110 degrees away, more than of any other.
ANGLES = torch.tensor([0.0, 10, 90, 200]).deg2rad()
FAN = VideoTokens(torch.stack([ANGLES.cos(), ANGLES.sin()], 1), Grid(2, 1, 2), torch.arange(4))


def test_the_order_by_hand() -> None:
    # From 200 degrees: 160 to 0, 170 (over 360) to 10, 110 to 90; then the farthest from both is 90.
    assert ops.farthest_first(FAN.x_ND[None], 4).tolist() == [[3, 1, 2, 0]]


def test_the_weight_scales_the_column_of_the_candidate() -> None:
    # At w = (1, 1, 5, 1) token 2 wins at first: 5 (1 - cos 80) against 1 - cos 110 of token 3.
    assert ops.farthest_first(FAN.x_ND[None], 2, torch.tensor([[1.0, 1, 5, 1]]))[0, 0] == 2


@pytest.mark.parametrize(("num_kept", "index"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2])])
def test_frames_are_pools_with_equal_shares(num_kept: int, index: list[int]) -> None:
    [kept] = DivPrune(scope="frame")([FAN], [Budget(num_kept, 0.5, True)])
    assert kept.index_K.tolist() == index


def test_repeated_tokens_are_chosen_once_each() -> None:
    video = VideoTokens(torch.ones(6, 3), Grid(1, 2, 3), torch.arange(6))
    [kept] = DivPrune()([video], [Budget(5, 0.8, True)])
    assert kept.index_K.tolist() == [0, 1, 2, 3, 4]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="scope='video'"):
        DivPrune(scope="video")  # type: ignore[arg-type]
    part = VideoTokens(FAN.x_ND[:3], FAN.grid, torch.tensor([0, 1, 3]))
    assert len(DivPrune()([part], [Budget(2, 0.5)])[0].index_K) == 2, "a clip may have lost tokens before"
    with pytest.raises(ValueError, match="whole frames"):
        DivPrune(scope="frame")([part], [Budget(2, 0.5)])
