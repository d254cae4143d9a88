"""Which groups STTS keeps for given scores, by hand."""

from __future__ import annotations

import pytest
import torch

from stts.pruners.stts import choose
from stts.tokens import Budget, Grid


def test_choice_by_hand():
    # Frames of 2: the first is kept in spite of its scores, then 0.9 and the earlier 0.5.
    scores_G = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.9, 0.5])
    [index_K] = choose(scores_G, [Grid(3, 1, 2)], [Budget(4, 0.6)])
    assert index_K.tolist() == [0, 1, 3, 4]


def test_ties_go_to_the_earlier_group():
    [index_K] = choose(torch.full((100,), 0.5), [Grid(50, 1, 2)], [Budget(7, 0.07)])
    assert index_K.tolist() == list(range(7))


def test_every_video_has_its_own_ranking():
    scores_G = torch.tensor([0.1, 0.3, 0.2, 0.9, 0.7, 0.8])
    first, second = choose(scores_G, [Grid(3, 1, 1)] * 2, [Budget(2, 0.6)] * 2)
    assert first.tolist() == [0, 1] and second.tolist() == [0, 2]


def test_a_budget_below_one_frame_keeps_the_best_of_the_first():
    [index_K] = choose(torch.tensor([0.1, 0.3, 0.2, 0.9, 0.9, 0.9]), [Grid(2, 1, 3)], [Budget(2, 0.3)])
    assert index_K.tolist() == [1, 2]


def test_min_groups_per_frame():
    scores_G = torch.tensor([0.5, 0.5, 0.1, 0.2, 0.8, 0.9])
    grids, budgets = [Grid(3, 1, 2)], [Budget(4, 0.6)]
    assert choose(scores_G, grids, budgets)[0].tolist() == [0, 1, 4, 5]
    assert choose(scores_G, grids, budgets, min_groups_per_frame=1)[0].tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize("num_kept", [0, 7])
def test_impossible_budget(num_kept):
    with pytest.raises(ValueError, match=r"outside \[1, 6\]"):
        choose(torch.zeros(6), [Grid(3, 1, 2)], [Budget(num_kept, 1.0)])
