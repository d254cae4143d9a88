"""`fastv`: cases to follow by hand, its budget, and equality with the loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stts.budget import plan
from stts.pruners.check import HOST, example_video
from stts.pruners.fastv import FastV
from stts.pruners.naive.fastv import fastv
from stts.tokens import Budget, Grid, VideoTokens


def video(salience: list[float], cells: list[int] | None = None) -> VideoTokens:
    cell_G = torch.arange(len(salience)) if cells is None else torch.tensor(cells)
    return VideoTokens(torch.ones(len(salience), 4), Grid(3, 1, 2), cell_G, salience_G=torch.tensor(salience))


def kept(tokens: VideoTokens, num_kept: int) -> list[int]:
    [result] = FastV()([tokens], [Budget(num_kept, num_kept / tokens.num_groups, exact=True)])
    return result.index_K.tolist()


def test_the_most_attended_stay_in_video_order():
    assert kept(video([0.1, 0.3, 0.05, 0.2, 0.25, 0.1]), 3) == [1, 3, 4]


def test_equal_attention_keeps_the_earlier():
    assert kept(video([0.1, 0.2, 0.1, 0.2, 0.1, 0.1]), 3) == [0, 1, 3]
    assert kept(video([0.1] * 6), 4) == [0, 1, 2, 3]


def test_rows_are_counted_among_the_groups_that_are_left():
    assert kept(video([0.1, 0.3, 0.2], cells=[0, 3, 5]), 2) == [1, 2]


def test_scores_are_the_attention():
    tokens = video([0.1, 0.3, 0.05, 0.2, 0.25, 0.1])
    [result] = FastV()([tokens], [Budget(2, 1 / 3)])
    assert torch.equal(result.scores_G, tokens.salience_G) and result.x_KD is None


@pytest.mark.parametrize(
    ("ratio", "num_layers", "num_kept"),
    [(0.1, 28, 193), (0.15, 28, 531), (0.25, 28, 1206), (0.1, 24, 114), (0.25, 24, 1140), (0.1, 36, 295)],
)
def test_the_share_after_layer_2_makes_up_for_the_full_layers(ratio, num_layers, num_kept):
    # (N r - 2) / (N - 2) of 6272: 3.077 %, 8.462 %, 19.231 % of 28 layers, 1.818 % and 18.182 % of 24, 4.706 % of 36.
    [[budget]] = plan([FastV().site], ratio, [Grid(32, 14, 14)], num_layers)
    assert budget.num_kept == num_kept


def test_the_layer_is_the_published_one_scaled_for_shallow_llms():
    assert FastV.for_host(replace(HOST, llm_layers=28)).site.layer == 2
    assert FastV.for_host(replace(HOST, llm_layers=8)).site.layer == 1
    assert FastV.for_host(HOST, layer=3).site.layer == 3
    with pytest.raises(TypeError):
        FastV.for_host(HOST, depth=3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scene", ["cuts", "still", "flat"])
@pytest.mark.parametrize("grid", [Grid(1, 2, 3), Grid(4, 3, 5), Grid(7, 2, 2)])
def test_equals_the_loop(grid, scene, seed):
    tokens = example_video(FastV(), grid, seed=seed, scene=scene)
    for num_kept in {1, tokens.num_groups // 2 or 1, tokens.num_groups}:
        assert kept(tokens, num_kept) == fastv(tokens, Budget(num_kept, 0.5)).index_K.tolist()


def test_no_attention_and_too_many_are_refused():
    with pytest.raises(ValueError, match="'last_row'"):
        kept(replace(video([0.1] * 6), salience_G=None), 3)
    with pytest.raises(ValueError, match="num_kept=7"):
        kept(video([0.1] * 6), 7)


def test_costs_nothing_but_sorting():
    assert FastV().flops(Grid(32, 14, 14), 3584, 193) == 0
