"""`cdpruner`: the choice by hand, without a question, repeated tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stts.pruners.cdpruner import CDPruner, most_diverse
from stts.tokens import Budget, Grid, Kept, VideoTokens

# Tokens at 0, 10 and 90 degrees; the patch of token 1 is least like the question, so it matters most.
ANGLES = torch.tensor([0.0, 10, 90]).deg2rad()
FAN = VideoTokens(
    torch.stack([ANGLES.cos(), ANGLES.sin()], 1), Grid(1, 1, 3), torch.arange(3),
    aligned_GC=torch.tensor([[1.0, 1], [-1, 0], [1, 0]]), text_C=torch.tensor([2.0, 0]),
)  # fmt: skip


def run(video: VideoTokens, num_kept: int, **options: int) -> Kept:
    [kept] = CDPruner(**options)([video], [Budget(num_kept, num_kept / 3, True)])  # type: ignore[arg-type]
    return kept


def test_relevance_comes_first_and_then_what_is_unlike() -> None:
    kept = run(FAN, 1)
    assert kept.index_K.tolist() == [1] and kept.scores_G is not None
    torch.testing.assert_close(kept.scores_G, torch.tensor([(1 - 0.7071) / 2, 1.0, 0.0]), atol=1e-3, rtol=0)
    # Token 0 is almost token 1 but has weight; token 2 is unlike but has none.
    assert run(FAN, 2).index_K.tolist() == [0, 1]
    assert run(FAN, 1, sign=1).index_K.tolist() == [2]


@pytest.mark.parametrize("missing", ["aligned_GC", "text_C"])
def test_without_a_question_the_most_diverse_stay(missing: str) -> None:
    kept = run(replace(FAN, **{missing: None}), 2)  # type: ignore[arg-type]
    assert kept.index_K.tolist() == [0, 2] and kept.scores_G is not None and kept.scores_G.tolist() == [1, 1, 1]


def test_repeated_tokens_are_chosen_once_each_and_last() -> None:
    x_ND = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 2]])
    assert most_diverse(x_ND, torch.ones(4), 4).tolist() == [0, 2, 1, 3]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="sign=0"):
        CDPruner(sign=0)  # type: ignore[arg-type]
