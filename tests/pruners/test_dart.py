"""`dart`: cases to follow by hand in the plane, counts at every budget, and equality with the loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stts.pruners.check import HOST, example_video
from stts.pruners.dart import DART
from stts.pruners.naive.dart import dart
from stts.tokens import Budget, Grid, PromptTokens, VideoTokens

ONE_EACH = {"num_image_pivots": 1, "num_text_pivots": 1}


def turned(degrees: list[float]) -> Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def video(x_GD: Tensor, text_LD: Tensor, norm: tuple[float, float] = (1, 1)) -> VideoTokens:
    """Keys fall in size, so the first group and the first prompt token are pivots."""
    keys_GD, keys_LD = (torch.arange(len(x), 0, -1.0)[:, None] * torch.tensor([[-1.0, 1.0]]) for x in (x_GD, text_LD))
    return VideoTokens(
        x_GD,
        Grid(1, 1, len(x_GD)),
        torch.arange(len(x_GD)),
        keys_GD=keys_GD,
        prompt=PromptTokens(text_LD, keys_LD, torch.tensor(norm)),
    )


def kept(method: DART, tokens: VideoTokens, num_kept: int, ratio: float | None = None) -> list[int]:
    """Exact unless a ratio is given."""
    budget = Budget(num_kept, num_kept / tokens.num_groups, exact=True) if ratio is None else Budget(num_kept, ratio)
    [result] = method([tokens], [budget])
    return result.index_K.tolist()


PLANE = video(turned([0, 10, 60, 100, 180, 250]), turned([90, 0]))


def test_pivots_pick_in_turn_what_is_least_like_them():
    # Three picks for two pivots: two for the image pivot at 0 degrees (180, then 250), one for the text pivot at 90
    # (10 of what is left: 10, 60, 100).
    assert kept(DART(**ONE_EACH), PLANE, 4) == [0, 1, 4, 5]


def test_another_order_of_pivots_keeps_others():
    # The text pivot picks 250 and 180, then the image pivot 100.
    assert kept(DART(**ONE_EACH, pivot_order=(1, 0)), PLANE, 4) == [0, 3, 4, 5]


def test_the_weight_of_the_final_norm_counts():
    # cos((1, 1), .) is 0.32 and 0.38; weighted by (2, 0.5) it is 0.93 and -0.71.
    x_GD, no_text = torch.tensor([[1.0, 1.0], [1.0, -0.5], [-0.5, 1.2]]), torch.empty(0, 2)
    assert kept(DART(), video(x_GD, no_text), 2) == [0, 1]
    assert kept(DART(), video(x_GD, no_text, norm=(2, 0.5)), 2) == [0, 2]


def test_image_pivots_are_the_groups_with_the_largest_keys_by_l1():
    tokens = PLANE
    keys_GD = torch.tensor([[1.0, 1.0], [0.0, 2.5], [-2.0, -2.0], [1.0, 0.0], [3.0, 0.5], [0.0, 0.0]])
    assert kept(DART(**ONE_EACH), replace(tokens, keys_GD=keys_GD), 1) == [2]  # L1 4 beats 3.5; L2 2.83 loses to 3.04


def test_the_count_of_the_ports():
    tokens = example_video(DART(), Grid(5, 6, 6), seed=1)
    assert tokens.num_groups > 100
    for ratio in (0.01, 0.1, 0.3, 0.9):
        picks = math.floor(tokens.num_groups * ratio / 8)
        assert len(kept(DART(), tokens, 1, ratio)) == 4 + 8 * picks
    assert len(kept(DART(), tokens, 1, 1.0)) == tokens.num_groups, "groups run out"


def test_the_ratio_is_read_as_a_decimal():
    # 80 * 0.7 is 55.99999999999999 in floating point, which would be 6 picks per pivot.
    tokens = video(torch.randn(80, 2, generator=torch.Generator().manual_seed(0)), turned([0, 40, 80, 120]))
    assert len(kept(DART(), tokens, 56, 0.7)) == 4 + 8 * 7


@pytest.mark.parametrize("num_text", [0, 1, 3, 9])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 5, 13, 40])
def test_an_exact_budget_is_met_exactly(num_groups, num_text):
    draw = torch.Generator().manual_seed(num_groups)
    tokens = video(torch.randn(num_groups, 2, generator=draw), torch.randn(num_text, 2, generator=draw))
    for num_kept in range(1, num_groups + 1):
        index = kept(DART(), tokens, num_kept)
        assert len(index) == num_kept and index == sorted(set(index))


def test_small_budgets_have_fewer_pivots():
    # Keys fall in size, so image pivots are the first groups. 5 // 3 = 1, 8 // 3 = 2, 11 // 3 = 3, then 4.
    x_GD = turned([0.0, 1.0, 2.0, 3.0, 4.0, *range(100, 240, 10)])
    tokens = video(x_GD, torch.empty(0, 2))
    for num_kept, pivots in [(5, 1), (8, 2), (11, 3), (12, 4), (15, 4)]:
        assert [g for g in kept(DART(), tokens, num_kept) if g < 5] == list(range(pivots))


def test_an_order_skips_pivots_that_are_not_there():
    tokens = video(turned([0, 10, 60, 100, 180, 250]), torch.empty(0, 2))
    assert kept(DART(**ONE_EACH, pivot_order=(1, 0)), tokens, 3) == kept(DART(**ONE_EACH), tokens, 3) == [0, 4, 5]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", [Grid(1, 2, 3), Grid(4, 3, 5), Grid(9, 4, 4)])
def test_equals_the_loop(grid, seed, exact):
    tokens = example_video(DART(), grid, seed=seed, width=16)
    assert tokens.prompt is not None
    prompt = replace(tokens.prompt, norm_D=torch.linspace(0.5, 2, 16))
    tokens = replace(tokens, prompt=prompt)
    for ratio in (0.01, 0.125, 0.5, 0.75):
        budget = Budget(max(1, round(tokens.num_groups * ratio)), ratio, exact)
        [fast] = DART()([tokens], [budget])
        assert torch.equal(fast.index_K, dart(tokens, budget).index_K)


def test_the_layer_is_the_published_one_scaled_for_shallow_llms():
    assert DART.for_host(replace(HOST, llm_layers=28)).site.layer == 2
    assert DART.for_host(HOST, num_text_pivots=0).site.layer == 1
    with pytest.raises(TypeError):
        DART.for_host(HOST, pivots=8)


def test_missing_signals_and_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="'keys'"):
        kept(DART(), replace(PLANE, keys_GD=None), 3)
    with pytest.raises(ValueError, match="'prompt'"):
        kept(DART(), replace(PLANE, prompt=None), 3)
    with pytest.raises(ValueError, match="num_kept=7"):
        kept(DART(), PLANE, 7)
    with pytest.raises(ValueError, match="pivot_order"):
        DART(pivot_order=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="num_image_pivots=0"):
        DART(num_image_pivots=0)


def test_flops_by_hand():
    # Per group and channel: 1 for the weight, 2 for the norm, 2 for each of 8 pivots.
    assert DART().flops(Grid(2, 3, 4), 10, 12) == 24 * 10 * 19
