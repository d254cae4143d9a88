"""SToP by hand: the score, its four ways into a base, presets, and the function for Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stts.pruners.base import HostInfo
from stts.pruners.check import example_video
from stts.pruners.fastvid import FastVID
from stts.pruners.flashvid import FlashVID
from stts.pruners.holitom import HoliTom
from stts.pruners.stop import SToP, sink_score
from stts.pruners.visionzip import VisionZip
from stts.tokens import Budget, Grid, Kept, SinkPenalty, VideoTokens
from tests.golden.stop_feature_norm import FeatureNormSToP, feature_importance

HOST = HostInfo(
    family="tiny", vit_width=8, vit_mlp=8, vit_heads=2, vit_depth=6, lowest_tap=5, llm_width=8, llm_layers=8,
    patches_per_group=4,
)  # fmt: skip
GRID = Grid(2, 2, 3)


def video_with(attention_TS: list[list[float]]) -> VideoTokens:
    draw = torch.Generator().manual_seed(0)
    salience_G = torch.tensor(attention_TS).flatten()
    num_frames = len(attention_TS)
    return VideoTokens(
        x_ND=torch.randn(len(salience_G), 8, generator=draw),
        grid=Grid(num_frames, 2, 3),
        cell_G=torch.arange(len(salience_G)),
        salience_G=salience_G,
        keys_GD=torch.randn(len(salience_G), 4, generator=draw),
        frame_TC=torch.randn(num_frames, 8, generator=draw),
        uid="two frames",
    )


# Place 5 is attended in both frames; in each frame something else (place 1, then place 2) is attended as much.
VIDEO = video_with([[0.1, 0.3, 0.1, 0.1, 0.1, 0.3], [0.1, 0.1, 0.3, 0.1, 0.1, 0.3]])


def run(stage: SToP | VisionZip | FeatureNormSToP, video: VideoTokens, ratio: float, *, exact: bool = False) -> Kept:
    [kept] = stage([video], [Budget(max(1, round(ratio * video.num_groups)), ratio, exact)])
    return kept


def test_sink_score_by_hand():
    # Means over two frames 0.1, 0.2, 0.2, 0.1, 0.1, 0.3; to the power 2: 0.01, 0.04, 0.09, less 0.01, over 0.08.
    penalty = SToP(base=VisionZip(), power=2.0).penalty(VIDEO)
    assert_close(penalty.penalty_P, torch.tensor([0.0, 0.375, 0.375, 0.0, 0.0, 1.0]))
    assert_close(
        SToP(base=VisionZip()).penalty(VIDEO).penalty_P[1], torch.tensor((0.2**1.1 - 0.1**1.1) / (0.3**1.1 - 0.1**1.1))
    )


def test_equal_attention_is_no_sink():
    assert not sink_score(torch.full((6,), 1 / 6), 1.1).any()
    flat = replace(VIDEO, salience_G=torch.full((12,), 1 / 6))
    base = VisionZip()
    plain, stopped = run(base, flat, 0.5), run(SToP(base=base, salience=0.03), flat, 0.5)
    assert torch.equal(plain.index_K, stopped.index_K) and torch.equal(plain.x_KD, stopped.x_KD)


def test_what_every_frame_attends_to_makes_way_for_what_one_frame_does():
    # One dominant token per frame. Plain: ties go to the earlier place, 1 and 2; a nudge makes 5 the winner.
    video = replace(VIDEO, salience_G=VIDEO.salience_G + 0.01 * (torch.arange(12) % 6 == 5))
    base = VisionZip(num_dominant=1, num_contextual=1)

    def dominant(kept: Kept) -> list[int]:
        return kept.index_K[(kept.x_KD == video.x_ND[kept.index_K]).all(1)].tolist()

    assert dominant(run(base, video, 0.3)) == [5, 11]
    assert dominant(run(SToP(base=base, salience=0.1), video, 0.3)) == [1, 8]
    # By hand: 0.31 - 0.1 x 1 < 0.3 - 0.1 x s, s = (0.2^1.1 - 0.1^1.1) / (0.31^1.1 - 0.1^1.1) = 0.46.
    scores_G = run(SToP(base=base, salience=0.1), video, 0.3).scores_G
    assert_close(scores_G[torch.tensor([1, 5, 8])], torch.tensor([0.3 - 0.0462, 0.21, 0.3 - 0.0462]), atol=1e-3, rtol=0)


def test_the_base_does_all_the_choosing():
    stage = SToP(base=HoliTom(tau=0.2), salience=0.1, temporal=0.5, density=0.3)
    seen = replace(VIDEO, sink=stage.penalty(VIDEO))
    ours, theirs = run(stage, VIDEO, 0.5), run(stage.base, seen, 0.5)
    assert torch.equal(ours.index_K, theirs.index_K) and VIDEO.sink is None
    assert seen.sink == replace(SinkPenalty(seen.sink.penalty_P), salience=0.1, temporal=0.5, density=0.3)


def test_merge_slots_leave_the_worst_places_in_either_index_space():
    # Dominant: place 0. Rest 1 2 3 4 5, one target, number 0 = place 1. The two worst places are 0 and 1.
    video = video_with([[0.5, 0.4, 0.02, 0.03, 0.04, 0.01]])
    base = VisionZip(num_dominant=1, num_contextual=1)
    assert run(base, video, 0.4).index_K.tolist() == [0, 1]
    assert run(SToP(base=base, num_slots=2), video, 0.4).index_K.tolist() == [0, 2], "place 1 is a sink, 2 is not"
    # As released, number 0 is taken for place 0, number 1 for place 1; number 2 is free: place 3.
    assert run(SToP(base=base, num_slots=2, compat="official"), video, 0.4).index_K.tolist() == [0, 3]


def test_places_that_hardly_change_are_static_sooner_where_they_are_sinks():
    # Both places turn by 60 degrees (cosine 0.5); only place 1 is a sink, and 0.5 + 0.4 > 0.8.
    turn = [[1.0, 0.0], [0.5, 3**0.5 / 2]]
    x_ND = torch.tensor([turn[0], turn[0], turn[1], turn[1]])
    video = VideoTokens(x_ND, Grid(2, 1, 2), torch.arange(4), salience_G=torch.tensor([0.2, 0.8, 0.2, 0.8]))
    base = HoliTom(tau=0.4, static_tau=0.8)
    assert len(run(base, video, 1.0).index_K) == 4
    kept = run(SToP(base=base, temporal=0.4), video, 1.0)
    assert kept.index_K.tolist() == [0, 1, 2], "place 1 is merged over time"
    assert_close(kept.x_KD[1], x_ND[[1, 3]].mean(0))


@pytest.mark.parametrize("base", [VisionZip(), FastVID(variant="ov"), HoliTom()], ids=lambda base: type(base).__name__)
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("num_frames", [1, 4])
@pytest.mark.parametrize("compat", [None, "official"])
def test_an_exact_budget_is_met_on_every_base(base, ratio, num_frames, compat):
    draw = torch.Generator().manual_seed(num_frames)
    video = video_with(torch.rand(num_frames, 6, generator=draw).softmax(1).tolist())
    stage = SToP(base=base, salience=0.03, temporal=0.07, density=0.3, num_slots=20, compat=compat)
    kept = run(stage, video, ratio, exact=True)
    assert len(kept.index_K) == max(1, round(ratio * video.num_groups)) and (kept.index_K.diff() > 0).all()
    assert kept.x_KD is None or kept.x_KD.isfinite().all()


def test_attention_takes_the_place_of_the_pooling_head_and_the_rest_is_the_base():
    fastvid = SToP(base=FastVID(variant="ov"))
    assert fastvid.signals == {"attn", "frame"} and fastvid.newlines == "kept_rows"
    assert SToP(base=HoliTom()).signals == {"attn"} and not fastvid.count_known
    assert SToP(base=VisionZip(newline_per_row=True)).newlines == "every_row"
    assert fastvid.site.kind == "pre_llm" and fastvid.stages == (fastvid,) and fastvid.positions == "compact"
    grid = Grid(4, 2, 3)
    assert SToP(base=VisionZip()).flops(grid, 8, 12) == VisionZip().flops(grid, 8, 12) + 3 * 24


def test_presets_carry_the_published_values():
    def values(stage: SToP) -> list[float]:
        return [stage.salience, stage.temporal, stage.density, stage.num_slots, stage.power]

    assert values(SToP.for_visionzip(HOST, VisionZip())) == [0.03, 0, 0, 20, 1.1]
    assert values(SToP.for_fastvid(HOST, FastVID())) == [0.02, 0, 0.3, 0, 1.1]
    assert values(SToP.for_holitom(HOST, HoliTom())) == [0.04, 0.07, 0.3, 0, 1.1]
    assert SToP.for_fastvid(HOST, FastVID(), salience=0.0).density == 0, "FastVID's centres only if attention is"
    assert SToP.for_fastvid(HOST, FastVID(), salience=0.0, density=0.1).density == 0.1
    with pytest.raises(TypeError, match="colour"):
        SToP.for_visionzip(HOST, VisionZip(), colour=1)


def test_presets_follow_the_host():
    rows, qwen = replace(HOST, newline_per_row=True), replace(HOST, mrope=True)
    assert SToP.for_fastvid(rows, FastVID()).newlines == "kept_rows"
    assert SToP.for_fastvid(rows, FastVID(), compat="official").newlines == "none", "the release forgets them"
    assert SToP.for_fastvid(HOST, FastVID(), compat="official").newlines == "kept_rows"
    assert SToP.for_fastvid(HOST, FastVID()).positions == "compact", "the release renumbers, FastVID does not"
    assert SToP.for_fastvid(qwen, FastVID()).positions == "original"
    assert SToP.for_holitom(qwen, HoliTom.for_host(qwen)).positions == "original"
    assert not SToP.for_visionzip(HOST, VisionZip()).rescale
    assert SToP.for_visionzip(replace(HOST, patches_per_frame=196), VisionZip()).rescale


def test_strengths_follow_the_attention_and_the_frame_only_if_rescaled():
    # Mean attention 1 / 6, published for 1 / 729; 49 places of the published 196 take a quarter of 20 slots.
    fixed = SToP(base=VisionZip(), salience=0.03, temporal=0.07, density=0.3, num_slots=20)
    assert fixed.penalty(VIDEO).salience == 0.03 and fixed.penalty(VIDEO).num_slots == 20
    rescaled = replace(fixed, rescale=True)
    assert rescaled.penalty(VIDEO).salience == pytest.approx(0.03 * 729 / 6)
    assert (rescaled.penalty(VIDEO).temporal, rescaled.penalty(VIDEO).density) == (0.07, 0.3)
    wide = VideoTokens(torch.ones(49, 2), Grid(1, 7, 7), torch.arange(49), salience_G=torch.full((49,), 1 / 729))
    assert rescaled.penalty(wide).salience == pytest.approx(0.03) and rescaled.penalty(wide).num_slots == 5


def test_gradient_reaches_tokens_but_not_the_attention():
    x_ND, salience_G = VIDEO.x_ND.clone().requires_grad_(), VIDEO.salience_G.clone().requires_grad_()
    kept = run(SToP(base=VisionZip(), salience=0.03), replace(VIDEO, x_ND=x_ND, salience_G=salience_G), 0.5)
    kept.x_KD.sum().backward()
    assert (x_ND.grad != 0).all() and salience_G.grad is None and not kept.scores_G.requires_grad


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="'attn' signal"):
        run(SToP(base=VisionZip()), replace(VIDEO, salience_G=None), 0.5)
    with pytest.raises(ValueError, match="whole frames"):
        run(SToP(base=VisionZip()), replace(VIDEO, cell_G=torch.arange(11)), 0.5)


# --- the function for Qwen2.5-VL ---------------------------------------------------------------------------------


def points(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def test_feature_importance_by_hand():
    # The mean of (3, 0) and (0, 4) is (1.5, 2), of length 2.5: cosines 0.6 and 0.8.
    assert_close(feature_importance(points([3.0, 0.0], [0.0, 4.0])[None]), torch.tensor([[3 * 1.6, 4 * 1.8]]))


def test_feature_norm_halves_what_it_keeps_with_the_mean_of_what_joins():
    # One of three tokens in a row, importance 2, 8, 6: the longest stays and both others join it.
    video = VideoTokens(points([1.0, 0.0], [4.0, 0.0], [3.0, 0.0]), Grid(1, 1, 3), torch.arange(3))
    kept = run(FeatureNormSToP(salience=0.0), video, 1 / 3)
    assert kept.index_K.tolist() == [1]
    assert_close(kept.x_KD, points([(4 + (1 + 3) / 2) / 2, 0.0]))
    # Sink scores 0, 1 and, in between, ((6/2)^1.1 - 1) / (4^1.1 - 1) = 0.65: 8 - 7 < 6 - 7 x 0.65 < 2.
    kept = run(FeatureNormSToP(salience=7.0), video, 1 / 3)
    assert kept.index_K.tolist() == [0]
    assert_close(kept.x_KD, points([(1 + 3.5) / 2, 0.0]))


def test_feature_norm_merges_what_stands_still_over_its_window():
    # Place 0 stands still, place 1 turns about; R = 0.9 keeps one of each: R' = 0.9 / (3 / 4) is cut to 1.
    video = VideoTokens(points([2.0, 0.0], [0.0, 1.0], [4.0, 0.0], [0.0, -1.0]), Grid(2, 1, 2), torch.arange(4))
    kept = run(FeatureNormSToP(), video, 0.9)
    assert kept.index_K.tolist() == [0, 1, 3]
    assert_close(kept.x_KD, points([3.0, 0.0], [0.0, 1.0], [0.0, -1.0]))


@pytest.mark.parametrize("grid", [Grid(1, 2, 3), Grid(5, 2, 3), Grid(4, 4, 4)], ids=str)
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("same", [False, True])
def test_feature_norm_meets_exact_budgets(grid, ratio, same):
    draw = torch.Generator().manual_seed(1)
    x_ND = torch.ones(grid.num_groups, 4) if same else torch.randn(grid.num_groups, 4, generator=draw)
    video = VideoTokens(x_ND, grid, torch.arange(grid.num_groups))
    kept = run(FeatureNormSToP(temporal=0.07), video, ratio, exact=True)
    assert len(kept.index_K) == len(kept.x_KD) == max(1, round(ratio * grid.num_groups))
    assert (kept.index_K.diff() > 0).all() and kept.x_KD.isfinite().all()


def test_feature_norm_flops_by_hand():
    assert FeatureNormSToP().flops(Grid(2, 1, 3), 4, 2) == 8 * 6 * 4 + 4 * (6 * 2 // 2) * 4


def test_on_flashvid_a_place_that_every_frame_attends_to_is_not_selected() -> None:
    host = replace(HOST, patches_per_frame=729)
    grid = Grid(4, 3, 3)
    video = example_video(FlashVID(), grid, seed=3)
    attention_TS = torch.full((4, 9), 0.02)
    attention_TS[:, 4] = 0.05  # everywhere the same: a sink
    video = replace(video, salience_G=attention_TS.flatten())
    budget = Budget(8, 8 / 36, exact=True)
    base = FlashVID(selection="attn", min_segments=1)
    plain = base([video], [budget])[0].index_K % 9
    stop = SToP.for_flashvid(host, base)
    assert stop.salience == 0.02 and not stop.density and not stop.num_slots
    assert 4 in plain.tolist()
    moved = SToP.for_flashvid(host, base, salience=0.1)([video], [budget])[0].index_K % 9
    assert 4 not in moved.tolist()
