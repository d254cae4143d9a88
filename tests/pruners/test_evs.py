"""`evs`: the first frame whole, budgets below it, and what sets it apart from `novelty`."""

from __future__ import annotations

import pytest
import torch

from stts.pruners.check import HOST, example_video
from stts.pruners.evs import EVS, released_count
from stts.pruners.novelty import Novelty
from stts.tokens import Budget, Grid, VideoTokens

# Two places, three frames: place 0 turns about in frame 1 (cosine -1), place 1 by 90 degrees in frame 2.
TURNS = VideoTokens(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, 1], [-1, 0], [1, 0]]), Grid(3, 1, 2), torch.arange(6))


def index(stage: EVS | Novelty, video: VideoTokens, num_kept: int, ratio: float = 0.5, exact: bool = True) -> list[int]:
    [kept] = stage([video], [Budget(num_kept, ratio, exact)])
    return kept.index_K.tolist()


def test_the_first_frame_comes_before_a_token_that_turned_about() -> None:
    assert index(EVS(), TURNS, 2) == [0, 1] and index(Novelty(), TURNS, 1) == [2]
    assert index(EVS(), TURNS, 3) == [0, 1, 2] and index(EVS(), TURNS, 4) == [0, 1, 2, 5]


def test_a_budget_below_one_frame_is_spread_over_it() -> None:
    video = example_video(EVS(), Grid(3, 2, 4))
    assert index(EVS(), video, 2) == [2, 6] and index(EVS(), video, 8) == list(range(8))
    assert index(EVS(), example_video(EVS(), Grid(1, 2, 4)), 4) == [1, 3, 5, 7], "one frame"


def test_the_release_truncates_in_binary_and_keeps_a_frame() -> None:
    assert [released_count(Grid(10, 2, 5), ratio) for ratio in (0.9, 0.2, 0.01, 1.0)] == [90, 19, 10, 100]
    official = EVS(compat="official")
    assert not official.count_known and EVS().count_known
    assert index(official, TURNS, 1, 0.1, exact=False) == [0, 1] and index(official, TURNS, 1, 0.1) == [1]


def test_bfloat16_is_compared_in_fp32_unless_official() -> None:
    torch.manual_seed(0)
    x_ND = torch.randn(4, 16).repeat(30, 1) + 0.02 * torch.randn(120, 16)
    video = VideoTokens(x_ND.bfloat16(), Grid(30, 2, 2), torch.arange(120))
    found = [len(stage.scores(video)[4:].unique()) for stage in (EVS(), EVS(compat="official"))]
    assert found[0] > 50 > 5 > found[1], "a still scene has hardly any values in bfloat16"


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="compat='offical'"):
        EVS(compat="offical")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole frames"):
        index(EVS(), VideoTokens(TURNS.x_ND[:3], TURNS.grid, torch.tensor([0, 1, 3])), 2)
    assert EVS.for_host(HOST).positions == "compact"
