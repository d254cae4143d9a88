"""Tango by hand, at its edges, and against the plain loops. The authors' vectors are in tests/golden."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stts.budget import plan
from stts.pruners.base import HostInfo
from stts.pruners.naive.tango import tango as naive_tango
from stts.pruners.st_rope import sections, st_rope
from stts.pruners.tango import Tango, TangoInner
from stts.tokens import Budget, Grid, Kept, VideoTokens
from tests.tango_points import merged, salient_places

HOST = HostInfo(
    family="llava_onevision", vit_width=8, vit_mlp=8, vit_heads=1, vit_depth=26, lowest_tap=25, llm_width=8,
    llm_layers=28, patches_per_group=4,
)  # fmt: skip


def clip(grid: Grid, width: int = 24, cuts: tuple[int, ...] = (), seed: int = 0) -> VideoTokens:
    """Scenes whose left places stand still, while the right ones change more and more."""
    draw = torch.Generator().manual_seed(seed)
    noise_S1 = torch.linspace(0.05, 1.4, grid.per_frame)[:, None]
    frames = []
    for t in range(grid.t):
        if t == 0 or t in cuts:
            scene_SD = torch.randn(grid.per_frame, width, generator=draw)
        frames.append(scene_SD + noise_S1 * torch.randn(grid.per_frame, width, generator=draw))
    salience_G = torch.rand(grid.t, grid.per_frame, generator=draw).softmax(1).flatten()
    return video_of(torch.cat(frames), grid, salience_G, timestamps_T=torch.arange(grid.t).double() * 0.7)


def video_of(x_ND: Tensor, grid: Grid, salience_G: Tensor, **more: Any) -> VideoTokens:
    return VideoTokens(x_ND=x_ND, grid=grid, cell_G=torch.arange(grid.num_groups), salience_G=salience_G, **more)


def run(stage: Tango | TangoInner, video: VideoTokens, ratio: float, *, exact: bool = True) -> Kept:
    num_kept = max(1, round(ratio * video.num_groups))
    [kept] = stage([video], [Budget(num_kept, ratio, exact)])
    return kept


# --- ST-RoPE -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "expected"), [(3584, (1196, 1194, 1194)), (896, (300, 298, 298)), (8, (4, 2, 2)), (2, (2, 0, 0))]
)
def test_sections_of_the_width(width, expected):
    assert sections(width) == expected
    x_GD = torch.randn(4, width)
    assert_close(st_rope(x_GD, Grid(1, 2, 2), torch.tensor([3.0])).norm(dim=1), torch.ones(4))


def test_second_row_and_column_turn_their_own_pair_of_channels():
    # Width 6: one pair for each direction, theta = 1. Every token is (1, 0 | 1, 0 | 1, 0), of norm sqrt(3).
    x_GD = torch.tensor([1.0, 0.0] * 3).repeat(8, 1)
    z_GD = st_rope(x_GD, Grid(2, 2, 2), torch.tensor([0.0, math.pi / 2], dtype=torch.float64)) * math.sqrt(3)
    cos, sin = math.cos(1), math.sin(1)
    assert_close(z_GD[0], torch.tensor([1.0, 0, 1, 0, 1, 0]))  # frame 0, row 0, column 0
    assert_close(z_GD[1], torch.tensor([1.0, 0, 1, 0, cos, sin]))  # column 1
    assert_close(z_GD[2], torch.tensor([1.0, 0, cos, sin, 1, 0]))  # row 1
    assert_close(z_GD[7], torch.tensor([0.0, 1, cos, sin, cos, sin]))  # a quarter turn after pi / 2 seconds


def test_channels_pair_as_halves_with_falling_frequency():
    # d = 4 in time: channel 0 turns with 2 by 1 rad, channel 1 with 3 by 100^(-2/4) = 0.1 rad.
    z_GD = st_rope(torch.tensor([[0.6, 0.8, 0, 0]]), Grid(1, 1, 1), torch.tensor([1.0]), (4, 0, 0), base_time=100)
    expected_D = [0.6 * math.cos(1), 0.8 * math.cos(0.1), 0.6 * math.sin(1), 0.8 * math.sin(0.1)]
    assert_close(z_GD[0], torch.tensor(expected_D))


def test_late_seconds_are_turned_exactly():
    # One step of 1/30 s after two hours is a turn by 1/30 rad; fp32 angles would be off by 2e-4.
    second_T = torch.tensor([7200.0, 7200.0 + 1 / 30], dtype=torch.float64)
    z_GD = st_rope(torch.tensor([[1.0, 0.0]]).repeat(2, 1), Grid(2, 1, 1), second_T, (2, 0, 0))
    assert_close(z_GD[0] @ z_GD[1], torch.tensor(math.cos(1 / 30)), atol=1e-6, rtol=0)


def test_widths_that_cannot_be_turned_are_refused():
    with pytest.raises(ValueError, match="width 7 is odd"):
        sections(7)
    for section in ((4, 4, 2), (3, 3, 2)):
        with pytest.raises(ValueError, match="three even numbers that sum to the width 8"):
            st_rope(torch.ones(1, 8), Grid(1, 1, 1), torch.zeros(1), section)


# --- salient tokens and merging, three points on a line ------------------------------------------------------------
# Points 0, 0.1, 1: mean squared distances 0.505, 0.41, 0.905, so rho = 0.604, 0.664, 0.405; delta = 0.1, 1 (densest:
# the largest distance), 0.9; scores 0.060, 0.664, 0.364. Two centres: 0.1, then 1; point 0 belongs to 0.1.


def test_of_two_alike_only_the_more_salient_stays():
    z_N1, row_BP = torch.tensor([[0.0], [0.1], [1.0], [9.0]]), torch.arange(4)[None]
    salience_N = torch.tensor([0.5, 0.4, 0.3, 0.0])  # two wanted: floor(1.5 * 2) = 3 candidates
    assert salient_places(z_N1, salience_N, row_BP, 2, 1.5, 7).tolist() == [[0, 2]]
    salience_N = torch.tensor([0.4, 0.5, 0.3, 0.0])
    assert salient_places(z_N1, salience_N, row_BP, 2, 1.5, 7).tolist() == [[1, 2]]


def test_one_salient_token_is_the_most_salient():
    z_N1, salience_N = torch.tensor([[0.0], [0.1], [1.0]]), torch.tensor([0.2, 0.5, 0.5])
    assert salient_places(z_N1, salience_N, torch.arange(3)[None], 1, 1.5, 7).tolist() == [[1]]
    assert salient_places(z_N1, salience_N, torch.arange(3)[None], 0, 1.5, 7).shape == (1, 0)


def test_salient_tokens_of_many_frames_are_those_of_each():
    draw = torch.Generator().manual_seed(0)
    z_ND, salience_N = torch.randn(60, 6, generator=draw), torch.rand(60, generator=draw)
    row_BP = torch.randperm(60, generator=draw).view(5, 12)
    together = salient_places(z_ND, salience_N, row_BP, 4, 1.5, 7)
    for row_P, place_K in zip(row_BP, together, strict=True):
        assert torch.equal(salient_places(z_ND, salience_N, row_P[None], 4, 1.5, 7)[0], place_K)


def test_centres_speak_for_their_clusters():
    x_BND = torch.tensor([[[50.0], [20.0], [10.0]]])
    centre_BC, value_BCD, score_BC = merged(x_BND, torch.tensor([[[1.0], [0.1], [0.0]]]), 2, 7, 0.6)
    assert centre_BC.tolist() == [[0, 1]]
    # Alone: itself. Two members: w = max(1/2, 0.6), 0.6 * 20 + 0.4 * 15 = 18.
    assert_close(value_BCD, torch.tensor([[[50.0], [18.0]]]))
    assert_close(score_BC, torch.tensor([[0.9 * math.exp(-0.905), math.exp(-0.41)]]))


def test_the_release_writes_values_in_the_order_of_the_scores():
    x_BND = torch.tensor([[[50.0], [20.0], [10.0]]])
    centre_BC, value_BCD, _ = merged(x_BND, torch.tensor([[[1.0], [0.1], [0.0]]]), 2, 7, 0.6, swapped=True)
    assert centre_BC.tolist() == [[0, 1]]
    assert_close(value_BCD, torch.tensor([[[18.0], [50.0]]]))  # the densest, 1, gets the value of the first centre


def test_equal_points_leave_no_cluster_empty():
    x_BND = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    centre_BC, value_BCD, _ = merged(x_BND, torch.zeros(1, 4, 2), 2, 7, 0.5)
    assert centre_BC.tolist() == [[0, 1]]
    assert_close(value_BCD, torch.tensor([[[0.5 + 0.5 * 8 / 3], [2.0]]]))  # 0 with 2 and 3; 1 owns itself
    assert salient_places(torch.zeros(4, 2), torch.ones(4), torch.arange(4)[None], 2, 2.0, 7).tolist() == [[0, 1]]


# --- whole videos by hand ------------------------------------------------------------------------------------------


def test_a_still_video_becomes_its_mean_in_the_first_frame():
    # One window, all four places static: r' = min(1, 0.5 * 12 / (12 - 2 * 4)) = 1, so all four stay, and only four.
    x_SD = torch.randn(4, 6)
    video = video_of(torch.cat([x_SD, 2 * x_SD, 3 * x_SD]), Grid(3, 2, 2), torch.rand(12))
    kept = run(Tango(), video, 0.5, exact=False)
    assert kept.index_K.tolist() == [0, 1, 2, 3]
    assert_close(kept.x_KD, 2 * x_SD)


def half_still(salience_G: Tensor) -> VideoTokens:
    """Two frames of five places; only place 0 repeats (twice as long), the others turn to new directions."""
    x_ND = torch.eye(10)
    x_ND[5] = 2 * x_ND[0]
    return video_of(x_ND, Grid(2, 1, 5), salience_G)


def test_static_places_leave_their_share_to_the_others():
    # r' = 0.5 * 10 / (10 - 1) = 0.556. Static: ceil(0.556) = 1, floor(0.6) = 0 salient and 1 merged of one: the mean.
    # Dynamic: ceil(4 * 0.556) = 3 per frame, floor(1.8) = 1 salient each, and 2 * 2 merged of the 6 that are left.
    salience_G = torch.tensor([9.0, 1, 4, 1, 1, 9, 1, 1, 1, 5])
    kept = run(Tango(), half_still(salience_G), 0.5, exact=False)
    assert len(kept.index_K) == 1 + 2 + 4
    assert {0, 2, 9} <= set(kept.index_K.tolist()) and 5 not in kept.index_K
    values = dict(zip(kept.index_K.tolist(), kept.x_KD, strict=True))
    assert_close(values[0], 1.5 * torch.eye(10)[0])
    assert_close(values[2], torch.eye(10)[2])
    assert_close(values[9], torch.eye(10)[9])


def test_nothing_merged_without_context_and_nothing_salient_with_context_only():
    video = clip(Grid(1, 4, 5))
    salient = run(Tango(context_share=0.0), video, 0.5)
    assert torch.equal(salient.x_KD, video.x_ND[salient.index_K])
    # Every token is in one cluster, and values are weighted means: the gradient of each channel sums to 1 per value.
    x_ND = video.x_ND.clone().requires_grad_()
    kept = run(Tango(context_share=1.0), replace(video, x_ND=x_ND), 0.5)
    kept.x_KD.sum().backward()
    assert_close(x_ND.grad.sum(0), torch.full((24,), float(len(kept.index_K))))
    assert (x_ND.grad.abs().sum(1) > 0).all(), "dropped tokens learn through the centre that speaks for them"


def test_sinks_are_not_salient_but_can_be_merged():
    video = video_of(torch.eye(6), Grid(1, 1, 6), torch.tensor([9.0, 1, 3, 2, 1, 1]))
    assert run(Tango(context_share=0.0), video, 1 / 6).index_K.tolist() == [0]
    assert run(Tango(context_share=0.0, sinks=(0, 2)), video, 1 / 6).index_K.tolist() == [3]
    assert 0 in run(Tango(context_share=1.0, sinks=(0,)), video, 1.0).index_K
    with pytest.raises(ValueError, match=r"sinks=\(6,\) are places of a frame, below 6"):
        run(Tango(sinks=(6,)), video, 0.5)


def test_too_many_merged_tokens_go_before_salient_ones():
    video = clip(Grid(1, 4, 5))
    natural_K = run(Tango(), video, 0.5, exact=False).index_K  # 10: 6 salient, 4 merged
    z_GD = st_rope(video.x_ND, video.grid, video.timestamps_T)
    salient_K = salient_places(z_GD, video.salience_G, torch.arange(20)[None], 6, 1.5, 7)[0]
    merged_C = natural_K[~torch.isin(natural_K, salient_K)]
    left_L = torch.arange(20)[~torch.isin(torch.arange(20), salient_K)]
    centre_BC, _, score_BC = merged(video.x_ND[None, left_L], z_GD[None, left_L], 4, 7, 0.6)
    assert torch.equal(left_L[centre_BC[0]], merged_C)

    [nine], [six], [five] = (Tango()([video], [Budget(num_kept, 0.5, exact=True)]) for num_kept in (9, 6, 5))
    assert set(natural_K.tolist()) - set(nine.index_K.tolist()) == {int(merged_C[score_BC[0].argmin()])}
    assert torch.equal(six.index_K, salient_K)
    assert set(six.index_K.tolist()) - set(five.index_K.tolist()) == {
        int(salient_K[video.salience_G[salient_K].argmin()])
    }


def test_frame_numbers_stand_in_for_seconds():
    video = clip(Grid(5, 3, 4), cuts=(2,))
    told = run(Tango(), replace(video, timestamps_T=torch.arange(5.0, dtype=torch.float64)), 0.3)
    silent = run(Tango(), replace(video, timestamps_T=None), 0.3)
    assert torch.equal(silent.index_K, told.index_K) and torch.equal(silent.x_KD, told.x_KD)


@pytest.mark.parametrize(("ratio", "tau"), [(0.05, 0.65), (0.1, 0.65), (0.1217, 0.65), (0.125, 0.8), (0.15, 0.8)])
def test_tau_is_that_of_the_nearest_published_ratio(ratio, tau):
    # Neighbours have cosine 0.7: at tau = 0.65 one window, static throughout here, so only its first frame is kept.
    x_ND = torch.tensor([[1.0, 0, 0, 0], [0.7, math.sqrt(0.51), 0, 0]]).repeat_interleave(40, 0)
    kept = run(Tango(static_tau=0.65), video_of(x_ND, Grid(2, 5, 8), torch.rand(80)), ratio, exact=False)
    assert (tau == 0.65) == bool(kept.index_K.max() < 40)


# --- edges ---------------------------------------------------------------------------------------------------------

SHAPES = [Grid(1, 2, 3), Grid(1, 1, 1), Grid(7, 1, 1), Grid(4, 2, 3), Grid(6, 3, 4)]


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.33, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("grid", SHAPES, ids=str)
def test_exact_budgets_are_met(grid, ratio, compat):
    video = clip(grid, cuts=(2, 3))
    before = video.x_ND.clone(), video.salience_G.clone()
    kept = run(Tango(compat=compat), video, ratio)
    assert len(kept.index_K) == max(1, round(ratio * grid.num_groups))
    assert (kept.index_K.diff() > 0).all() and kept.index_K.min() >= 0 and kept.index_K.max() < grid.num_groups
    assert kept.x_KD.isfinite().all() and kept.x_KD.shape == (len(kept.index_K), 24)
    assert torch.equal(video.x_ND, before[0]) and torch.equal(video.salience_G, before[1])


@pytest.mark.parametrize("x_ND", [torch.ones(24, 6), torch.zeros(24, 6)], ids=["equal", "zero"])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_equal_frames_with_equal_attention_neither_fail_nor_change(x_ND, ratio):
    for exact in (True, False):
        kept = run(Tango(), video_of(x_ND, Grid(4, 2, 3), torch.full((24,), 1 / 6)), ratio, exact=exact)
        assert_close(kept.x_KD, x_ND[: len(kept.index_K)])


def test_half_precision_features_come_back_as_they_came():
    video = clip(Grid(4, 3, 4))
    half = replace(video, x_ND=video.x_ND.bfloat16())
    kept, exact = run(Tango(), half, 0.4), run(Tango(), replace(half, x_ND=half.x_ND.float()), 0.4)
    assert kept.x_KD.dtype == torch.bfloat16
    assert torch.equal(kept.index_K, exact.index_K) and torch.equal(kept.x_KD, exact.x_KD.bfloat16())


def test_what_is_missing_is_named():
    video = clip(Grid(2, 2, 3))
    with pytest.raises(ValueError, match="no 'probe' signal"):
        run(Tango(), replace(video, salience_G=None), 0.5)
    with pytest.raises(ValueError, match="11 of 12 groups left"):
        run(Tango(), replace(video, x_ND=video.x_ND[1:], cell_G=video.cell_G[1:]), 0.5)
    with pytest.raises(ValueError, match="no 'last_row' signal"):
        run(TangoInner(), replace(video, salience_G=None), 0.5)


# --- against plain loops -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("grid", "cuts"), [(Grid(8, 4, 5), (3, 4)), (Grid(5, 2, 3), (2,)), (Grid(1, 4, 4), ())], ids=str
)
def test_equals_plain_loops(grid, cuts, exact, compat):
    for seed, ratio in enumerate((0.05, 0.1, 0.3, 0.7, 1.0)):
        video = clip(grid, cuts=cuts, seed=seed)
        kept = run(Tango(compat=compat, sinks=(1,)), video, ratio, exact=exact)
        budget = Budget(max(1, round(ratio * grid.num_groups)), ratio, exact)
        expected = naive_tango(video, budget, 0.65 if ratio < 0.125 else 0.8, sinks=(1,), official=compat is not None)
        assert torch.equal(kept.index_K, expected.index_K)
        assert_close(kept.x_KD, expected.x_KD, atol=1e-4, rtol=0)


# --- host, cost ----------------------------------------------------------------------------------------------------


def test_the_host_decides_sinks_and_positions():
    assert Tango.for_host(HOST).sinks == (28, 27, 41, 169, 11, 12)
    assert Tango.for_host(replace(HOST, newline_per_row=True)).sinks == (26, 157, 11)
    assert Tango.for_host(replace(HOST, patches_per_frame=196)).sinks == ()
    assert Tango.for_host(replace(HOST, family="qwen2_5_vl")).sinks == ()
    assert Tango.for_host(HOST, sinks=(3,)).sinks == (3,)
    assert Tango.for_host(HOST).positions == "compact"
    assert Tango.for_host(replace(HOST, mrope=True)).positions == "original"
    with pytest.raises(TypeError, match="taw"):
        Tango.for_host(HOST, taw=0.8)


def test_flops_by_hand():
    # 6 of 2x2x3: 3 per frame, 1 salient of 1 candidate; 12 - 2 = 10 left: 2 * 1 + 100 pairs, and 6 passes over 12.
    assert Tango().flops(Grid(2, 2, 3), 8, 6) == 2 * 8 * (102 + 72)


@pytest.mark.parametrize("num_kept", [1, 4, 16])
def test_flops_never_shrink_with_the_grid(num_kept):
    for grid in (Grid(t, h, w) for t in range(1, 5) for h in range(1, 5) for w in range(1, 5)):
        if grid.num_groups >= num_kept:
            here = Tango().flops(grid, 8, num_kept)
            for larger in (Grid(grid.t + 1, grid.h, grid.w), Grid(grid.t, grid.h + 1, grid.w)):
                assert Tango().flops(larger, 8, num_kept) >= here


# --- inside the LLM ------------------------------------------------------------------------------------------------


def test_dropped_tokens_are_folded_into_the_most_similar_kept_one():
    x_ND = torch.tensor([[1.0, 0], [0, 1], [3, 1], [0, 2], [5, 0]], requires_grad=True)
    video = video_of(x_ND, Grid(1, 1, 5), torch.tensor([0.1, 0.3, 0.2, 0.1, 0.3]))
    kept = run(TangoInner(), video, 0.4)
    assert kept.index_K.tolist() == [1, 4]
    # (0, 2) goes to (0, 1): 0.6 (0, 1) + 0.4 (0, 1.5). (1, 0) and (3, 1) go to (5, 0): 0.6 (5, 0) + 0.4 (3, 1/3).
    assert_close(kept.x_KD, torch.tensor([[0.0, 1.2], [4.2, 0.4 / 3]]))
    kept.x_KD.sum().backward()
    assert_close(x_ND.grad[:, 0], torch.tensor([0.4 / 3, 0.8, 0.4 / 3, 0.2, 0.6 + 0.4 / 3]))


def test_the_stage_inside_keeps_its_promises():
    video = clip(Grid(2, 2, 3))
    full = run(TangoInner(), video, 1.0)
    assert full.index_K.tolist() == list(range(12))
    assert_close(full.x_KD, video.x_ND)
    half = run(TangoInner(), replace(video, x_ND=video.x_ND.bfloat16()), 0.5)
    assert half.x_KD.dtype == torch.bfloat16 and half.scores_G.dtype == torch.float32
    equal = run(TangoInner(), replace(video, x_ND=torch.ones(12, 4), salience_G=torch.ones(12)), 0.25)
    assert equal.index_K.tolist() == [0, 1, 2]
    assert_close(equal.x_KD, torch.ones(3, 4))


def test_both_stages_together_cost_the_ratio():
    # 28 layers, half of what is left from layer 18 on: r_pre = 28 r / (18 + 10 * 0.5) = 1.2174 r.
    inner = TangoInner.for_host(HOST)
    assert inner.site.layer == 18 and TangoInner.for_host(replace(HOST, llm_layers=8)).site.layer == 5
    [[before], [inside]] = plan([Tango().site, inner.site], 0.1, [Grid(10, 10, 10)], 28)
    assert before.num_kept == 122 and inside.num_kept == 61
    assert before.retention_ratio == pytest.approx(0.121739, abs=1e-6)


def test_flops_inside_by_hand():
    # 3 kept of 6 present, width 4: cosines 3 x 3, and two passes over 6.
    assert TangoInner().flops(Grid(2, 2, 3), 4, 3) == 2 * 4 * (3 * 3 + 2 * 6)
