"""FastVID: small cases by hand, edges, and equality with the naive reference."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from stts.pruners import ops
from stts.pruners.base import HostInfo
from stts.pruners.check import example_video
from stts.pruners.fastvid import FastVID
from stts.pruners.naive.fastvid import fastvid
from stts.tokens import Budget, Grid, SinkPenalty, VideoTokens

HOST = HostInfo(
    family="tiny", vit_width=8, vit_mlp=12, vit_heads=2, vit_depth=6, lowest_tap=5, llm_width=8, llm_layers=8,
    patches_per_group=4,
)  # fmt: skip
VARIANTS = ["ov", "lv", "qw"]


def scenes(grid: Grid, num_scenes: int, seed: int = 0, width: int = 8) -> VideoTokens:
    """Frames of a scene resemble each other; scenes do not."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    scene_T = torch.arange(grid.t) * num_scenes // grid.t
    x_TSD = randn(num_scenes, grid.per_frame, width)[scene_T] + 0.3 * randn(grid.t, grid.per_frame, width)
    frame_TC = randn(num_scenes, 12)[scene_T] + 0.15 * randn(grid.t, 12)
    salience_G = randn(grid.num_groups).exp()
    cell_G = torch.arange(grid.num_groups)
    return VideoTokens(x_TSD.flatten(0, 1), grid, cell_G, salience_G=salience_G, frame_TC=frame_TC)


def line(*frames: list[float], frame_TC: torch.Tensor | None = None) -> VideoTokens:
    """Frames of one row of tokens on the number line; place 0 is the most salient. One scene unless told otherwise."""
    x_TS = torch.tensor(frames)
    grid = Grid(len(frames), 1, x_TS.shape[1])
    salience_G = (-torch.arange(grid.per_frame, dtype=torch.float)).repeat(grid.t)
    frame_TC = torch.ones(grid.t, 1) if frame_TC is None else frame_TC
    cell_G = torch.arange(grid.num_groups)
    return VideoTokens(x_TS.view(-1, 1), grid, cell_G, salience_G=salience_G, frame_TC=frame_TC)


# --- segments and counts -------------------------------------------------------------------------------------------


def test_cuts_are_the_least_similar_pairs_and_all_below_tau():
    similarity_T = torch.tensor([0.99, 0.7, 0.95, 0.2, 0.92])

    def lengths(**options: Any) -> list[int]:
        return [len(frames) for frames, _ in FastVID(**options).segments(similarity_T)]

    assert lengths(min_segments=2, tau=0.0) == [4, 2]
    assert lengths(min_segments=3, tau=0.0) == [2, 2, 2]
    assert lengths(min_segments=1, tau=0.93) == [2, 2, 1, 1]
    assert lengths(min_segments=1, tau=0.2) == [6], "below, not at, the threshold"
    assert lengths(min_segments=9, tau=0.0) == [1] * 6


def test_in_qw_only_the_last_of_repeated_frames_keeps_tokens():
    similarity_T = torch.tensor([0.99, 0.9, 0.99, 0.2, 0.99])
    stage = FastVID(variant="qw", min_segments=1)
    assert stage.segments(similarity_T) == [(range(0, 4), [1, 3]), (range(4, 6), [5])]
    assert replace(stage, variant="lv").segments(similarity_T) == [(range(0, 4), [0, 1, 2, 3]), (range(4, 6), [4, 5])]


# 196 places at 0.1 are 19 per frame. Six frames with stride 4 have the anchor frames 5 and 1; a lone frame itself.
SIX_AND_ONE = [(range(6), list(range(6))), (range(6, 7), [6])]


def test_counts_of_ov_drop_remainders():
    # floor(0.4 * 19) = 7 anchors and 12 salient per frame; 7 * 6 / 2 = 21 per anchor frame.
    assert FastVID().counts(SIX_AND_ONE, 196, 0.1) == ([12] * 7, [0, 21, 0, 0, 0, 21, 7])
    five = [(range(5), list(range(5)))]
    assert FastVID().counts(five, 196, 0.1) == ([12] * 5, [17, 0, 0, 0, 17]), "7 * 5 / 2 = 17.5"


def test_counts_of_lv_share_remainders_out():
    # 6 * 19 = 114 with floor(45.6) = 45 anchors, the odd one to the last frame; 69 = 6 * 11 + 3 salient.
    stage = FastVID(variant="lv")
    assert stage.counts(SIX_AND_ONE, 196, 0.1) == ([12, 12, 12, 11, 11, 11, 12], [0, 22, 0, 0, 0, 23, 7])


def test_counts_of_qw_are_capped_by_the_frame():
    # Frames 2 and 5 keep: 6 * 5 = 30 tokens, 12 of them anchors of frame 5, capped to 10 / 2 = 5; 18 = 9 + 9 salient,
    # of which frame 5 has room for 5.
    stage = FastVID(variant="qw")
    assert stage.counts([(range(6), [2, 5])], 10, 0.5) == ([0, 0, 9, 0, 0, 5], [0, 0, 0, 0, 0, 5])
    assert stage.counts([(range(1), [0])], 10, 0.1) == ([0], [1]), "at least one anchor"


def test_more_anchors_than_a_frame_has_left_are_cut_and_told(caplog):
    with caplog.at_level(logging.INFO):
        # 9 of 10 places: floor(3.6) = 3 anchors, 6 salient; 3 * 4 = 12 anchors asked of frame 3, which has 4 left.
        assert FastVID().counts([(range(4), list(range(4)))], 10, 0.9) == ([6] * 4, [0, 0, 0, 4])
    assert "8 more anchors" in caplog.text


# --- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "first", "second"),
    [
        ("ov", 0.6 * 1 + 0.4 * 10 / 4, 0.6 * 3 + 0.4 * 10 / 4),  # everything but the salient: 1 2 3 4
        ("lv", 0.6 * 1 + 0.4 * 9 / 3, 0.6 * 3 + 0.4 * 7 / 3),  # without its own anchor: 2 3 4, and 1 2 4
    ],
)
def test_an_anchor_takes_in_the_tokens_of_its_segment(variant, first, second):
    # Per frame one salient token (9) and one anchor; of two equally dense tokens the first.
    video = line([9.0, 1.0, 2.0], [9.0, 3.0, 4.0])
    kept = FastVID(variant=variant, min_segments=1, stride=1, context=0.5).prune(video, Budget(4, 0.67))
    assert kept.index_K.tolist() == [0, 1, 3, 4]
    assert_close(kept.x_KD.flatten(), torch.tensor([9.0, first, 9.0, second]))


def test_frames_that_keep_nothing_are_still_merged():
    # qw, three frames alike: 3 * 1 tokens, one anchor (place 0 or 1 of the last frame) and 2 salient, 3 places.
    video = line([9.0, 1.0, 2.0], [9.0, 3.0, 4.0], [9.0, 5.0, 6.0])
    kept = FastVID(variant="qw", min_segments=1).prune(video, Budget(3, 0.34))
    assert kept.index_K.tolist() == [6, 7, 8]
    others = (9 + 1 + 2 + 9 + 3 + 4) / 6
    assert_close(kept.x_KD.flatten(), torch.tensor([9.0, 5.0, 0.6 * 6 + 0.4 * others]))


def test_tokens_join_the_anchor_of_the_highest_cosine():
    # Squared distances from places 1 to 4 to the others sum to 52, 52, 28, 28: place 3 is densest and place 4 next;
    # delta 4 and 2 make them the anchors (scores 0.121, 0.060) before places 1 and 2 (0.0015 each).
    x_ND = torch.tensor([[9.0, 9.0], [4.0, 0.0], [0.0, 4.0], [3.0, 1.0], [1.0, 3.0]])
    salience_G = torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0])
    video = VideoTokens(x_ND, Grid(1, 1, 5), torch.arange(5), salience_G=salience_G, frame_TC=torch.ones(1, 2))
    kept = FastVID(variant="lv", context=0.7).prune(video, Budget(3, 0.6))
    assert kept.index_K.tolist() == [0, 3, 4]
    # 0.6 (3, 1) + 0.4 (4, 0) and 0.6 (1, 3) + 0.4 (0, 4)
    assert_close(kept.x_KD, torch.tensor([[9.0, 9.0], [3.4, 0.6], [0.6, 3.4]]))


def test_gradients_reach_what_was_merged():
    video = line([9.0, 1.0, 2.0], [9.0, 3.0, 4.0])
    x_ND = video.x_ND.clone().requires_grad_()
    stage = FastVID(min_segments=1, stride=1, context=0.5)
    stage.prune(replace(video, x_ND=x_ND), Budget(4, 0.67)).x_KD.sum().backward()
    # Salient 1; each of two anchors takes 0.4 / 4 of all four others and 0.6 of itself.
    assert_close(x_ND.grad.flatten(), torch.tensor([1.0, 0.8, 0.2, 1.0, 0.8, 0.2]))


@pytest.mark.parametrize(("num_frames", "anchor"), [(1, 2), (2, 1)])
def test_the_sink_penalty_counts_twice_where_frames_are_merged(num_frames, anchor):
    # Places 1, 2, 3 at 0, 1, 3: rho = exp(-10/3), exp(-5/3), exp(-13/3); delta = 1, 3, 2; scores 0.036, 0.567, 0.026.
    # Place 2 is a sink: 0.3 off leaves it first (0.267), 0.6 off does not (-0.033).
    video = line(*[[9.0, 0.0, 1.0, 3.0]] * num_frames)
    sink = SinkPenalty(torch.tensor([0.0, 0.0, 1.0, 0.0]), density=0.3)
    stage = FastVID(min_segments=1, context=0.5, stride=2)
    kept = stage.prune(replace(video, sink=sink), Budget(2, 0.5))
    assert anchor in (kept.index_K - 4 * (num_frames - 1)).tolist()
    assert len(kept.index_K) == (2 if num_frames == 1 else 4)


# --- against the naive reference, and the edges --------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("grid", "num_scenes", "min_segments"),
    [
        (Grid(12, 5, 4), 3, 3),
        (Grid(11, 4, 4), 2, 1),
        (Grid(5, 2, 3), 2, 8),
        (Grid(1, 3, 5), 1, 8),
        (Grid(9, 1, 1), 1, 2),
    ],
)
def test_equals_the_naive_reference(variant, exact, grid, num_scenes, min_segments):
    for seed, ratio in enumerate([0.04, 0.1, 0.25, 0.6, 1.0]):
        video = scenes(grid, num_scenes, seed)
        budget = Budget(max(1, round(ratio * grid.num_groups)), ratio, exact)
        kept = FastVID(variant=variant, min_segments=min_segments).prune(video, budget)
        expected = fastvid(video, budget, variant, min_segments)
        assert torch.equal(kept.index_K, expected.index_K), ratio
        assert_close(kept.x_KD, expected.x_KD, atol=1e-4, rtol=0)
        assert not exact or len(kept.index_K) == budget.num_kept


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["one frame", "alike", "zeros", "equal attention", "one place"])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
def test_edges_keep_a_valid_choice(variant, exact, kind, ratio):
    grid = {"one frame": Grid(1, 2, 3), "one place": Grid(6, 1, 1)}.get(kind, Grid(6, 2, 3))
    video = scenes(grid, 1)
    if kind == "alike":
        video = replace(video, x_ND=video.x_ND[:6].repeat(6, 1), frame_TC=video.frame_TC[:1].repeat(6, 1))
    if kind == "zeros":
        video = replace(video, x_ND=torch.zeros_like(video.x_ND), frame_TC=torch.zeros_like(video.frame_TC))
    if kind == "equal attention":
        video = replace(video, salience_G=torch.ones_like(video.salience_G))
    num_kept = max(1, round(ratio * grid.num_groups))
    [kept] = FastVID(variant=variant)([video], [Budget(num_kept, ratio, exact)])
    assert 1 <= len(kept.index_K) <= grid.num_groups and kept.x_KD.shape == (len(kept.index_K), 8)
    assert (kept.index_K.diff() > 0).all() and kept.index_K[0] >= 0 and kept.index_K[-1] < grid.num_groups
    assert kept.x_KD.isfinite().all()
    assert not exact or len(kept.index_K) == num_kept


def test_features_come_back_in_their_own_dtype_and_inputs_stay():
    video = scenes(Grid(6, 3, 3), 2)
    video = replace(video, x_ND=video.x_ND.bfloat16())
    before = video.x_ND.clone()
    kept = FastVID().prune(video, Budget(20, 0.4, exact=True))
    assert kept.x_KD.dtype == torch.bfloat16 and len(kept.index_K) == 20
    assert torch.equal(video.x_ND, before)


# --- the stage -----------------------------------------------------------------------------------------------------


def test_the_host_names_the_release_to_follow():
    assert FastVID.for_host(HOST).variant == "ov"
    assert FastVID.for_host(replace(HOST, newline_per_row=True)).variant == "lv"
    assert FastVID.for_host(replace(HOST, mrope=True)).variant == "qw"
    assert FastVID.for_host(replace(HOST, mrope=True), variant="lv", stride=2) == FastVID(variant="lv", stride=2)
    with pytest.raises(TypeError, match="strides"):
        FastVID.for_host(HOST, strides=2)


def test_flops_by_hand():
    # 16 frames of 2 x 3, 8 segments of 2 frames with 1 anchor frame each; 20 kept, 8 of them anchors, 1 per segment.
    similarity, density = 16 * 2 * 2 * 5, 8 * 6 * 6 * 2 * 5
    assign, merge = 96 * 1 * 2 * 5, 96 * 2 * 5
    assert FastVID().flops(Grid(16, 2, 3), 5, 20) == similarity + density + assign + merge
    counts = [FastVID().flops(Grid(t, 3, 3), 8, 7) for t in range(1, 80)]
    assert counts == sorted(counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"variant": "qwen"}, "'qwen' is unknown"), ({"stride": 0}, "stride=0"), ({"beta": 1.5}, "beta=1.5")],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FastVID(**options)


def test_missing_signals_and_partial_grids_are_refused():
    video, budget = scenes(Grid(4, 2, 2), 1), Budget(4, 0.25)
    with pytest.raises(ValueError, match="'frame' signal"):
        FastVID().prune(replace(video, frame_TC=None), budget)
    with pytest.raises(ValueError, match="signal"):
        FastVID().prune(replace(video, salience_G=None), budget)
    partial = replace(video, x_ND=video.x_ND[:9], cell_G=video.cell_G[:9], salience_G=video.salience_G[:9])
    with pytest.raises(ValueError, match="9 of 16 groups"):
        FastVID().prune(partial, budget)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cpu_that_goes_segment_by_segment_keeps_the_same(variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = FastVID(variant=variant, min_segments=3)
    video = example_video(stage, Grid(20, 4, 4), width=16)
    [whole] = stage([video], [Budget(1, 0.4)])
    monkeypatch.setattr(ops, "CACHED", 1)
    [by_segment] = stage([video], [Budget(1, 0.4)])
    assert torch.equal(by_segment.index_K, whole.index_K)
    assert_close(by_segment.x_KD, whole.x_KD)
