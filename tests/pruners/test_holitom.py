"""HoliTom by hand: what stands still is merged, what moves is ranked; inside the LLM the rest is folded in."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stts.pruners.base import HostInfo
from stts.pruners.holitom import HoliTom, HoliTomInner, published_tau
from stts.pruners.naive.holitom import holitom, holitom_inner
from stts.tokens import Budget, Grid, SinkPenalty, VideoTokens

HOST = HostInfo(
    family="tiny", vit_width=8, vit_mlp=12, vit_heads=2, vit_depth=6, lowest_tap=5, llm_width=8, llm_layers=28,
    patches_per_group=4,
)  # fmt: skip


def still_and_moving() -> VideoTokens:
    """Two frames of 2 x 2: places 0 and 1 only change in length, places 2 and 3 turn by 90 degrees."""
    x_ND = torch.tensor([[1, 0], [0, 2], [1, 0], [0, 1], [3, 0], [0, 4], [0, 1], [1, 0]], dtype=torch.float32)
    salience_G = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.9, 0.8, 0.4, 0.3])
    return VideoTokens(x_ND, Grid(2, 2, 2), torch.arange(8), salience_G=salience_G)


def scenes(grid: Grid, width: int = 16, seed: int = 0) -> VideoTokens:
    """Random scenes of two to four frames in which about half of the places stand still, the others move."""
    draw = torch.Generator().manual_seed(seed)
    size = (grid.per_frame, width)
    frames: list[Tensor] = []
    while len(frames) < grid.t:
        scene_SD = torch.randn(size, generator=draw)
        still_S1 = torch.rand((grid.per_frame, 1), generator=draw) < 0.5
        for _ in range(int(torch.randint(2, 5, (), generator=draw))):
            noise_SD = torch.randn(size, generator=draw)
            frames.append(scene_SD + torch.where(still_S1, 0.2, 2.0) * noise_SD)
    x_ND = torch.cat(frames[: grid.t])
    salience_G = torch.rand(grid.num_groups, generator=draw)
    return VideoTokens(x_ND, grid, torch.arange(grid.num_groups), salience_G=salience_G)


# --- before the LLM ----------------------------------------------------------------------------------------------


def test_still_places_are_merged_over_time_and_moving_ones_kept_by_attention():
    # cos = 1 at places 0 and 1: one window, gain 2. R' = 0.25 / (6 / 8) = 1/3: round(2/3) = 1 centre, and
    # ceil(2/3) = 1 moving place per frame: 3 (0.2 > 0.1) and 2 (0.4 > 0.3). The two means (2, 0) and (0, 3) are
    # equally dense, so the earlier is the centre: 0.6 (2, 0) + 0.4 (0, 3).
    kept = HoliTom(tau=0.8).prune(still_and_moving(), Budget(2, 0.25))
    assert kept.index_K.tolist() == [0, 3, 6]
    assert_close(kept.x_KD, torch.tensor([[1.2, 1.2], [0, 1], [0, 1]]))


def test_at_full_ratio_still_places_are_merged_over_time_only():
    kept = HoliTom(tau=0.8).prune(still_and_moving(), Budget(8, 1.0))
    assert kept.index_K.tolist() == [0, 1, 2, 3, 6, 7]
    assert_close(kept.x_KD[:2], torch.tensor([[2.0, 0.0], [0.0, 3.0]]))


def test_the_release_puts_static_tokens_before_the_frames_of_their_window():
    # Two copies of the clip in opposite directions: two windows. Attention makes place 2 the moving survivor of the
    # first frame, in front of a static centre at place 3.
    x_ND = still_and_moving().x_ND[:, [1, 0]][[2, 3, 0, 1, 6, 7, 4, 5]]  # now places 2 and 3 stand still
    video = VideoTokens(torch.cat([x_ND, -x_ND]), Grid(4, 2, 2), torch.arange(16), salience_G=torch.arange(16.0))
    budget = Budget(4, 0.25)
    ours, theirs, by_row = (
        HoliTom(tau=0.8, compat=compat, newline_per_row=by_row).prune(video, budget)
        for compat, by_row in [(None, False), ("official", False), ("official", True)]
    )
    assert ours.index_K.tolist() == [1, 2, 5, 9, 10, 13]
    assert theirs.index_K.tolist() == [2, 1, 5, 10, 9, 13]
    assert by_row.index_K.tolist() == ours.index_K.tolist()
    assert torch.equal(theirs.x_KD, ours.x_KD[[1, 0, 2, 4, 3, 5]])
    exact = HoliTom(tau=0.8, compat="official").prune(video, Budget(6, 0.25, exact=True))
    assert torch.equal(exact.index_K, ours.index_K), "an exact budget is in the order of the video"


def test_an_exact_budget_drops_centres_first_and_fills_by_attention():
    fewer = HoliTom(tau=0.8).prune(still_and_moving(), Budget(2, 0.25, exact=True))
    assert fewer.index_K.tolist() == [3, 6]
    more = HoliTom(tau=0.8).prune(still_and_moving(), Budget(5, 0.25, exact=True))
    assert more.index_K.tolist() == [0, 1, 3, 4, 6]  # 4 and 1 have the highest attention of what was left
    assert_close(more.x_KD[[0, 3]], torch.tensor([[1.2, 1.2], [3.0, 0.0]]))


def test_tau_follows_the_nearest_published_ratio():
    assert [published_tau(r) for r in (0.05, 0.10, 0.12, 0.13, 0.15, 0.25, 0.5)] == [0.65] * 3 + [0.8] * 4
    # Places 0 and 1 turn by 45 degrees: cos = 0.71 stands still at ratio 0.1 only.
    x_ND = still_and_moving().x_ND
    x_ND[4:6] = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    video = dataclasses.replace(still_and_moving(), x_ND=x_ND)
    assert HoliTom().prune(video, Budget(1, 0.1)).index_K.tolist() == [3, 6]  # R' = 0.13: no centre left
    low = HoliTom(tau=0.65).prune(video, Budget(2, 0.25))
    assert torch.equal(low.index_K, torch.tensor([0, 3, 6])) and low.x_KD is not None
    high = HoliTom().prune(video, Budget(2, 0.25))
    assert high.index_K.tolist() == [0, 4] and high.x_KD is None, "nothing stands still: the most attended, untouched"


def test_static_tau_decides_what_is_merged_but_not_the_windows():
    # Place 0 turns by 37 degrees (cos 0.8), place 1 not at all: with 0.75 inside the window both are merged. The gain
    # stays 1 (place 1): R' = 0.5 / (7 / 8) = 0.57, round(2 R') = 1 centre, ceil(2 R') = 2 moving places per frame.
    x_ND = still_and_moving().x_ND
    x_ND[4] = torch.tensor([4.0, 3.0])
    video = dataclasses.replace(still_and_moving(), x_ND=x_ND)
    assert HoliTom(tau=0.9).prune(video, Budget(4, 0.5)).index_K.tolist() == [0, 1, 3, 4, 6]
    assert HoliTom(tau=0.9, static_tau=0.75).prune(video, Budget(4, 0.5)).index_K.tolist() == [0, 2, 3, 6, 7]


def test_a_sink_penalty_reaches_attention_static_places_and_centres_but_not_the_windows():
    video, budget = still_and_moving(), Budget(2, 0.25)
    penalty_P = torch.tensor([1.0, 0.0, 0.0, 1.0])

    def index(**options: Any) -> list[int]:
        sink = SinkPenalty(penalty_P, **options)
        return HoliTom(tau=0.8).prune(dataclasses.replace(video, sink=sink), budget).index_K.tolist()

    assert index() == [0, 3, 6]
    assert index(salience=0.5) == [0, 2, 6], "place 3 is a sink, so place 2 of the first frame wins"
    assert index(density=9.0) == [1, 3, 6], "place 0 is a sink, so place 1 is the centre"
    # Place 3 (cos 0) now counts as static: round(3 / 3) = 1 centre, ceil(1 / 3) = 1 moving place, which is 2.
    assert index(temporal=0.9)[1:] == [2, 6]


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.7])
@pytest.mark.parametrize("grid", [Grid(1, 3, 5), Grid(5, 2, 3), Grid(9, 4, 5), Grid(12, 5, 7)], ids=str)
def test_the_fast_way_equals_token_by_token(grid: Grid, ratio: float):
    video, budget = scenes(grid), Budget(1, ratio)
    fast, slow = HoliTom(tau=0.8).prune(video, budget), holitom(video, budget, tau=0.8)
    assert torch.equal(fast.index_K, slow.index_K)
    assert_close(video.x_ND[fast.index_K] if fast.x_KD is None else fast.x_KD, slow.x_KD, atol=1e-4, rtol=0)


def test_scenes_exercise_every_part():
    video = scenes(Grid(12, 5, 7))
    kept = HoliTom(tau=0.8).prune(video, Budget(1, 0.3))
    rewritten_K = (kept.x_KD != video.x_ND[kept.index_K]).any(1)
    assert 10 < rewritten_K.sum() < len(kept.index_K) - 10
    assert len(set((kept.index_K[rewritten_K] // 35).tolist())) > 2, "several windows"


@pytest.mark.parametrize("grid", [Grid(1, 1, 1), Grid(1, 2, 3), Grid(2, 1, 1), Grid(7, 2, 3), Grid(4, 5, 3)], ids=str)
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("compat", [None, "official"])
def test_exact_budgets_are_met_exactly(grid: Grid, ratio: float, compat):
    video = scenes(grid)
    before = video.x_ND.clone()
    for num_kept in {1, max(1, round(video.num_groups * ratio)), video.num_groups}:
        [kept] = HoliTom(compat=compat)([video], [Budget(num_kept, ratio, exact=True)])
        assert len(kept.index_K) == num_kept and (kept.index_K.diff() > 0).all()
        assert kept.x_KD is None or (kept.x_KD.shape == (num_kept, 16) and kept.x_KD.isfinite().all())
    assert torch.equal(video.x_ND, before)


def test_one_frame_is_plain_attention():
    video = scenes(Grid(1, 3, 4))
    kept = HoliTom().prune(video, Budget(4, 0.33))  # ceil(12 * 0.33) = 4
    assert torch.equal(kept.index_K, video.salience_G.argsort(descending=True)[:4].sort().values)
    assert kept.x_KD is None


def test_equal_frames_and_equal_attention_fall_to_the_earlier_place():
    # Five equal frames of six equal tokens: R' = 0.1 / (6 / 30) = 0.5, three centres, the earliest.
    video = VideoTokens(torch.ones(30, 4), Grid(5, 2, 3), torch.arange(30), salience_G=torch.full((30,), 0.1))
    kept = HoliTom().prune(video, Budget(3, 0.1))
    assert kept.index_K.tolist() == [0, 1, 2]
    assert_close(kept.x_KD, torch.ones(3, 4))


def test_a_video_that_would_lose_everything_keeps_its_planned_number():
    # Everything stands still and round(6 * 0.01 / (6 / 30)) = round(0.3) = 0 centres.
    salience_G = torch.zeros(30)
    salience_G[17] = 1
    video = VideoTokens(torch.ones(30, 4), Grid(5, 2, 3), torch.arange(30), salience_G=salience_G)
    assert HoliTom().prune(video, Budget(1, 0.01)).index_K.tolist() == [17]


def test_gradients_reach_every_frame_of_a_merged_token_and_features_keep_their_type():
    video = still_and_moving()
    x_ND = video.x_ND.requires_grad_()
    HoliTom(tau=0.8).prune(video, Budget(2, 0.25)).x_KD.sum().backward()
    # The centre is a mean of two frames of place 0 (0.6 / 2 each) and of place 1 (0.4 / 2 each).
    assert_close(x_ND.grad[:, 0], torch.tensor([0.3, 0.2, 0, 1, 0.3, 0.2, 1, 0]))
    half = dataclasses.replace(video, x_ND=x_ND.detach().bfloat16())
    assert HoliTom(tau=0.8).prune(half, Budget(2, 0.25)).x_KD.dtype == torch.bfloat16


def test_what_the_host_decides():
    assert HoliTom.for_host(HOST) == HoliTom()
    by_row = HoliTom.for_host(dataclasses.replace(HOST, newline_per_row=True, mrope=True), tau=0.7)
    assert (by_row.newline_per_row, by_row.positions, by_row.tau) == (True, "original", 0.7)
    assert HoliTomInner.for_host(HOST).site.layer == 18
    assert HoliTomInner.for_host(dataclasses.replace(HOST, llm_layers=8)).site.layer == 5
    for method in (HoliTom, HoliTomInner):
        with pytest.raises(TypeError, match="nonsense"):
            method.for_host(HOST, nonsense=1)


def test_missing_attention_and_missing_groups_are_refused():
    video = scenes(Grid(2, 2, 3))
    with pytest.raises(ValueError, match="no 'attn' signal"):
        HoliTom().prune(dataclasses.replace(video, salience_G=None), Budget(3, 0.25))
    with pytest.raises(ValueError, match="whole frames"):
        HoliTom().prune(dataclasses.replace(video, cell_G=torch.arange(11)), Budget(3, 0.25))
    with pytest.raises(ValueError, match="no 'last_row' signal"):
        HoliTomInner().prune(dataclasses.replace(video, salience_G=None), Budget(3, 0.25))


def test_flops_by_hand():
    # 24 tokens of width 8: 8 * 24 * 8 for norms, cosines and means; two windows of two frames, each at most 6 x 6
    # distances of width 8: 2 * 2 * 36 * 8.
    assert HoliTom().flops(Grid(4, 2, 3), 8, 12) == 1536 + 1152
    assert HoliTom().flops(Grid(1, 2, 3), 8, 3) == 8 * 6 * 8
    # 24 present, 12 stay: 12 x 12 cosines of width 8, then norms and weighted sums of all 24.
    assert HoliTomInner().flops(Grid(4, 2, 3), 8, 12) == 2 * 144 * 8 + 4 * 24 * 8
    assert HoliTomInner().flops(Grid(9, 9, 9), 8, 12) == 2 * 144 * 8 + 4 * 24 * 8, "an earlier stage left 24"


# --- inside the LLM ----------------------------------------------------------------------------------------------


def test_dropped_tokens_are_halved_into_their_target_one_after_the_other():
    # Kept: 1 and 4. Tokens 0, 2, 3 point along token 1, in this order: ((((8 + 16) / 2) + 32) / 2 + 64) / 2 = 43.
    x_ND = torch.tensor([[16.0, 0], [8, 0], [32, 0], [64, 0], [0, 5]])
    video = VideoTokens(x_ND, Grid(1, 1, 5), torch.arange(5), salience_G=torch.tensor([0.1, 0.9, 0.1, 0.1, 0.8]))
    kept = HoliTomInner().prune(video, Budget(2, 0.4))
    assert kept.index_K.tolist() == [1, 4]
    assert torch.equal(kept.x_KD, torch.tensor([[43.0, 0.0], [0.0, 5.0]]))
    assert torch.equal(kept.scores_G, video.salience_G)


@pytest.mark.parametrize("num_kept", [1, 2, 17, 299, 300])
def test_the_closed_form_equals_the_sequence_of_halvings(num_kept: int):
    # One kept token takes 299 sources: weights down to 2^-299 vanish in fp32, in both.
    video, budget = scenes(Grid(5, 6, 10)), Budget(num_kept, num_kept / 300)
    fast, slow = HoliTomInner().prune(video, budget), holitom_inner(video, budget)
    assert torch.equal(fast.index_K, slow.index_K)
    assert_close(fast.x_KD, slow.x_KD, atol=1e-5, rtol=0)


def test_the_inner_stage_works_on_what_an_earlier_stage_left():
    video = scenes(Grid(2, 2, 3))
    left = torch.tensor([0, 3, 4, 8, 11])
    part = dataclasses.replace(video, x_ND=video.x_ND[left], cell_G=left, salience_G=video.salience_G[left])
    kept = HoliTomInner().prune(part, Budget(2, 0.5))
    assert torch.equal(kept.index_K, part.salience_G.argsort(descending=True)[:2].sort().values)


def test_the_inner_stage_averages_in_fp32_and_rounds_once():
    video, budget = scenes(Grid(2, 4, 5)), Budget(4, 0.1)
    low = dataclasses.replace(video, x_ND=video.x_ND.bfloat16())
    high = dataclasses.replace(video, x_ND=low.x_ND.float())
    assert torch.equal(HoliTomInner().prune(low, budget).x_KD, HoliTomInner().prune(high, budget).x_KD.bfloat16())
