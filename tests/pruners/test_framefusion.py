"""`framefusion`: chains and runs by hand, budgets, the share that is left to remove."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stts.pruners.check import HOST, example_video
from stts.pruners.framefusion import NO_PREDECESSOR, FrameFusion, FrameFusionInner, chain_similarity
from stts.pruners.naive.framefusion import left_to_remove
from stts.tokens import Budget, Grid, VideoTokens

# Two places, three frames. Place 0 stays, then turns by 90 degrees; place 1 turns by 90 degrees, then stays.
TURNS = VideoTokens(torch.tensor([[1.0, 0], [1, 0], [3, 0], [0, 1], [0, 1], [0, 5]]), Grid(3, 1, 2), torch.arange(6))


def test_a_token_joins_the_one_before_it_at_its_place() -> None:
    [kept] = FrameFusion()([TURNS], [Budget(4, 0.5, True)])
    assert kept.index_K.tolist() == [0, 1, 3, 4] and kept.x_KD is not None
    assert kept.x_KD.tolist() == [[2, 0], [1, 0], [0, 3], [0, 1]], "means of (1, 3) and of (1, 5)"
    assert kept.scores_G is not None and kept.scores_G.tolist() == [-NO_PREDECESSOR] * 2 + [-1, 0, 0, -1]


def test_a_run_of_merged_tokens_is_one_mean_and_gaps_do_not_break_a_chain() -> None:
    x_ND = torch.tensor([[1.0, 0], [2, 0], [3, 0], [6, 0]])
    part = VideoTokens(x_ND, Grid(5, 1, 1), torch.tensor([0, 1, 3, 4]))  # frame 2 was dropped earlier
    assert chain_similarity(x_ND, part.cell_G % 1).tolist()[1:] == [1, 1, 1]
    [kept] = FrameFusion()([part], [Budget(1, 0.25, True)])
    assert kept.index_K.tolist() == [0] and kept.x_KD is not None and kept.x_KD.tolist() == [[3, 0]]


def test_what_is_not_alike_is_merged_for_an_exact_budget_only() -> None:
    [natural] = FrameFusion()([TURNS], [Budget(2, 1 / 3)])
    assert natural.index_K.tolist() == [0, 1, 3, 4], "cosines of 0 are below the threshold"
    [exact] = FrameFusion()([TURNS], [Budget(2, 1 / 3, True)])
    assert exact.index_K.tolist() == [0, 1]
    [one] = FrameFusion()([TURNS], [Budget(1, 1 / 6, True)])
    assert len(one.index_K) == 1, "below one token a place"
    still = example_video(FrameFusion(), Grid(4, 2, 2), scene="still")
    assert len(FrameFusion()([still], [Budget(8, 0.5)])[0].index_K) == 8, "a budget above is not gone below"


def test_the_share_left_to_remove() -> None:
    assert left_to_remove([], 0.3, 28) == pytest.approx(0.7)
    # One layer has seen half: (8.4 - 0.5) / (27 * 0.5) of what is there may stay.
    assert left_to_remove([0.5], 0.3, 28) == pytest.approx(1 - 7.9 / 13.5)
    assert left_to_remove([0.9], 0.3, 28) == 0
    with pytest.raises(ValueError, match="used up"):
        left_to_remove([0.0, 0.0], 0.05, 28)


def test_the_threshold_is_that_of_the_family() -> None:
    assert FrameFusion.for_host(HOST).threshold == 0.6
    assert FrameFusion.for_host(replace(HOST, mrope=True)).threshold == 0.5


# --- inside the LLM: calls before layers 1, 2 and 4 of 10 -------------------------------------------------------------

FIRST, SECOND, THIRD, LAST = FrameFusionInner(num_layers=10, layers=(1, 2, 4)).stages
SEEN = torch.arange(6.0) / 15
"""Attention: the later, the more."""


def test_a_call_merges_what_is_alike_until_few_are_and_the_next_one_prunes() -> None:
    [kept] = FIRST([TURNS], [Budget(3, 0.5)])
    assert kept.index_K.tolist() == [0, 1, 3, 4], "two of six are alike, one less than the ratio asks for"
    [kept] = FIRST([TURNS], [Budget(5, 0.9)])
    assert kept.index_K.tolist() == [0, 1, 3, 4, 5], "enough are alike: the most similar one alone is merged"
    for before, expected in ((8, [0, 1, 3, 4]), (6, [3, 4, 5])):
        # A quarter was merged before, so merging goes on; nothing was, so the tokens most looked at stay.
        [kept] = SECOND([replace(TURNS, num_before=before, salience_G=SEEN)], [Budget(3, 0.5)])
        assert kept.index_K.tolist() == expected and (kept.x_KD is None) == (before == 6)


def test_a_call_prunes_where_going_on_would_use_up_the_ratio() -> None:
    seen = replace(TURNS, num_before=8, salience_G=SEEN)
    # Budgets of one token for 9 and 8 layers: 9 and 8 token layers. Four tokens fit one of the 9 and leave 5 for 8
    # layers, so not every layer has one. Two for 8 layers are 16: four in two of them leave 8 for 6.
    assert SECOND([seen], [Budget(1, 0.5)])[0].index_K.tolist() == [5]
    assert THIRD([seen], [Budget(2, 0.5)])[0].index_K.tolist() == [0, 1, 3, 4]
    assert THIRD([seen], [Budget(1, 0.5)])[0].index_K.tolist() == [5]
    # There is no call behind the last one.
    assert LAST([seen], [Budget(3, 0.5)])[0].index_K.tolist() == [3, 4, 5]
    # On the embeddings there is no attention: the most similar are merged below the threshold too.
    assert (
        FIRST([TURNS], [Budget(1, 0.1)])[0].index_K.tolist()
        == FrameFusion()([TURNS], [Budget(1, 0.1, True)])[0].index_K.tolist()
    )


def test_calls_stand_in_the_first_layers() -> None:
    deep = FrameFusionInner.for_host(replace(HOST, llm_layers=36, mrope=True))
    assert deep.layers == tuple(range(1, 9)) and deep.num_layers == 36 and deep.threshold == 0.5
    assert [stage.site.layer for stage in FrameFusionInner.for_host(HOST).stages] == [None, 1, 2]
    with pytest.raises(ValueError, match="must be layers 1 to 27"):
        FrameFusionInner(layers=(3, 2))
