"""`vidcom2`: one case to follow by hand, counts at every budget, and equality with the loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stts.pruners.check import HOST, example_video
from stts.pruners.frames import share_out
from stts.pruners.naive.vidcom2 import vidcom2
from stts.pruners.vidcom2 import VidCom2
from stts.tokens import Budget, Grid, Kept, VideoTokens

# Two frames of two tokens. Channels 0 and 1 vary least; on them all tokens are (1, 0) but the last, which is (0, 1).
SMALL = VideoTokens(
    torch.tensor([[1.0, 0, 9, -9], [1, 0, -9, 9], [1, 0, 9, 9], [0, 1, -9, -9]]), Grid(2, 1, 2), torch.arange(4)
)


def run(tokens: VideoTokens, num_kept: int, ratio: float, exact: bool = True) -> Kept:
    [result] = VidCom2()([tokens], [Budget(num_kept, ratio, exact)])
    return result


def test_the_scores_by_hand():
    # Video mean (3/4, 1/4): squared distances 1/8 and 9/8, kernels 4.17647 and 1.76578. Frame 0 is at its mean: 5.
    # Frame 1 has mean (1/2, 1/2): both at 1/2, kernel 2.77104.
    expected_G = -torch.tensor([9.17647, 9.17647, 6.94752, 4.53683])
    torch.testing.assert_close(run(SMALL, 2, 0.5).scores_G, expected_G, atol=2e-5, rtol=0)


def test_the_unusual_frame_keeps_more():
    # u = -4.18 and -2.97, so p = (0, 1): scales 0.5 * 0.5 and 0.5 * 1.5, counts round(0.5) = 0 -> 1, round(1.5) = 2.
    assert run(SMALL, 2, 0.5, exact=False).index_K.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("num_kept", "index"),
    [(1, [3]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])],  # quotas 1 : 3; frame 1 holds two at most
)
def test_exact_budgets_by_hand(num_kept, index):
    assert run(SMALL, num_kept, 0.5).index_K.tolist() == index


@pytest.mark.parametrize(
    ("weights", "total", "most", "counts"),
    [
        ([1.0, 1.0, 2.0], 8, 9, [2, 2, 4]),
        ([1.0, 1.0, 1.0], 7, 9, [3, 2, 2]),  # equal remainders: the earlier
        ([1.0, 1.3, 1.6], 7, 9, [2, 2, 3]),  # quotas 1.79, 2.33, 2.87
        ([0.1, 1.0, 8.9], 10, 6, [2, 2, 6]),  # 8.9 is cut to 6, 0.1 lifted to 1; the 2 left go to the others in turn
        ([0.1, 0.1, 9.8], 5, 9, [1, 1, 3]),
        ([3.0, 1.0, 2.0], 2, 9, [1, 0, 1]),  # fewer than one each
        ([1.0, 1.0], 4, 2, [2, 2]),
    ],
)
def test_quotas_are_rounded_by_largest_remainder(weights, total, most, counts):
    assert share_out(torch.tensor(weights), total, most).tolist() == counts


@pytest.mark.parametrize("scene", ["cuts", "still", "flat"])
@pytest.mark.parametrize("grid", [Grid(1, 2, 3), Grid(6, 2, 3), Grid(5, 3, 2), Grid(3, 1, 1)])
def test_an_exact_budget_is_met_and_every_frame_keeps_a_token_if_it_can(grid, scene):
    tokens = example_video(VidCom2(), grid, scene=scene)
    for num_kept in range(1, grid.num_groups + 1):
        index_K = run(tokens, num_kept, num_kept / grid.num_groups).index_K
        count_T = torch.bincount(index_K // grid.per_frame, minlength=grid.t)
        assert len(index_K) == num_kept and (index_K.diff() > 0).all()
        assert count_T.min() >= (num_kept >= grid.t) and count_T.max() <= grid.per_frame


def test_without_exact_every_frame_keeps_one_token_at_least():
    tokens = example_video(VidCom2(), Grid(4, 3, 3))
    assert torch.bincount(run(tokens, 1, 0.01, exact=False).index_K // 9).tolist() == [1, 1, 1, 1]
    assert len(run(tokens, 36, 1.0, exact=False).index_K) >= 4 * round(9 * 0.75), "scale 1 - 1/4 at least"


def test_equal_tokens_keep_the_earlier():
    tokens = example_video(VidCom2(), Grid(3, 2, 2), scene="flat")
    assert run(tokens, 6, 0.5).index_K.tolist() == [0, 1, 4, 5, 8, 9]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", [Grid(1, 2, 3), Grid(4, 3, 5), Grid(9, 4, 4)])
def test_equals_the_loops(grid, seed, exact):
    tokens = example_video(VidCom2(), grid, seed=seed, width=17)
    for ratio in (0.05, 0.1, 0.25, 0.7):
        budget = Budget(max(1, round(grid.num_groups * ratio)), ratio, exact)
        [fast] = VidCom2()([tokens], [budget])
        slow = vidcom2(tokens, budget)
        assert torch.equal(fast.index_K, slow.index_K)
        torch.testing.assert_close(fast.scores_G, slow.scores_G, atol=1e-4, rtol=0)


def test_zero_tokens_and_a_single_channel_are_no_trouble():
    tokens = replace(SMALL, x_ND=torch.tensor([[0.0], [0.0], [1.0], [2.0]]))
    kept = run(tokens, 2, 0.5)
    assert kept.scores_G.isfinite().all() and len(kept.index_K) == 2


def test_the_host_decides_positions_and_newlines():
    plain, rows = VidCom2.for_host(HOST), replace(HOST, newline_per_row=True)
    assert (plain.positions, plain.newlines) == ("compact", "every_row")
    assert VidCom2.for_host(replace(HOST, mrope=True)).positions == "original"
    assert VidCom2.for_host(rows).newlines == "every_row"
    assert VidCom2.for_host(rows, compat="official").newlines == "after_frame"
    assert VidCom2.for_host(HOST, compat="official").newlines == "every_row"


def test_wrong_input_is_refused():
    with pytest.raises(TypeError):
        VidCom2.for_host(HOST, share=0.5)
    with pytest.raises(ValueError, match="compat='offical'"):
        VidCom2(compat="offical")
    with pytest.raises(ValueError, match="whole frames"):
        run(replace(SMALL, x_ND=SMALL.x_ND[:3], cell_G=torch.tensor([0, 1, 3])), 2, 0.5)
    with pytest.raises(ValueError, match="num_kept=5"):
        run(SMALL, 5, 0.5)


def test_flops_by_hand():
    # Per token: variance 4 per channel; on half of the channels norm 2, scaling 1, two means 2, two distances 3 each.
    assert VidCom2().flops(Grid(2, 3, 4), 10, 12) == 24 * (4 * 10 + 11 * 5)
