"""`flashvid`: trees by hand, exact budgets, the defects of the release, the stage inside the LLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stts.pruners import ops
from stts.pruners.check import HOST, example_video
from stts.pruners.flashvid import FlashVID, FlashVIDInner
from stts.pruners.listing import EXAMPLE_HOST
from stts.tokens import Budget, Grid, VideoTokens


def trees(compat: str | None = None, budget: int = 1) -> tuple[list[list[bool]], list[list[float]]]:
    """Two places, three frames: place 0 repeats with lengths 1, 2, 6; place 1 turns by 90 degrees once."""
    x_TSD = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[2, 0, 0], [0, 0, 1]], [[6, 0, 0], [0, 0, 3]]])
    nothing_TS, segment_T = torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    stage = FlashVID(compat=compat)  # type: ignore[arg-type]
    found = stage.merge_trees(x_TSD, nothing_TS, segment_T, torch.full((3,), 3), budget)
    return found.root_TP.tolist(), found.x_TPD[found.root_TP].tolist()


def test_a_tree_is_the_mean_of_its_tokens() -> None:
    roots, values = trees()
    assert roots == [[True, True], [False, True], [False, False]]
    assert values == [[3, 0, 0], [0, 1, 0], [0, 0, 2]]


def test_the_release_divides_by_direct_children_only() -> None:
    _, values = trees("official")
    assert values == [[4.5, 0, 0], [0, 1, 0], [0, 0, 2]], "(1 + 2 + 6) / 2"


def test_too_few_roots_raise_the_limit() -> None:
    # Two tokens a frame are to stay, so nothing may join.
    assert trees(budget=2)[0] == [[True, True]] * 3


def test_a_cpu_that_goes_frame_by_frame_keeps_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = FlashVID(min_segments=2, segment_tau=-1)
    video = example_video(stage, Grid(6, 3, 4))
    [whole] = stage([video], [Budget(1, 0.5)])
    monkeypatch.setattr(ops, "CACHED", 1)
    [by_frame] = stage([video], [Budget(1, 0.5)])
    assert torch.equal(by_frame.index_K, whole.index_K)
    torch.testing.assert_close(by_frame.x_KD, whole.x_KD)


@pytest.mark.parametrize("scene", ["cuts", "still", "flat"])
def test_every_exact_budget_is_met(scene: str) -> None:
    video = example_video(FlashVID(), Grid(5, 3, 4), scene=scene)  # type: ignore[arg-type]
    for num_kept in range(1, 61):
        [kept] = FlashVID()([video], [Budget(num_kept, num_kept / 60, exact=True)])
        assert len(kept.index_K) == num_kept and (kept.index_K.diff() > 0).all()


def test_equal_frames_are_selected_and_merged_once() -> None:
    video = example_video(FlashVID(min_segments=1), Grid(6, 2, 5), scene="still")
    [kept] = FlashVID(min_segments=1)([video], [Budget(18, 0.3)])
    # Of 3 a frame all are selected (ceil(0.7 * 3)), so 18; what repeats joins the first frame and its quota is 0.
    assert len(kept.index_K) == 18


def test_the_count_is_about_the_ratio() -> None:
    video = example_video(FlashVID(), Grid(16, 8, 8))
    [kept] = FlashVID()([video], [Budget(1, 0.25)])
    assert 256 <= len(kept.index_K) <= 256 + 16


def test_the_family_decides() -> None:
    plain, qwen = FlashVID.for_host(HOST), FlashVID.for_host(replace(HOST, mrope=True))
    assert (plain.selection, plain.min_segments, plain.positions) == ("attn_div_v2", 8, "compact")
    assert (qwen.selection, qwen.min_segments, qwen.positions) == ("attn_div", 4, "original")
    inner = FlashVIDInner.for_host(EXAMPLE_HOST)
    assert (inner.layer, inner.share) == (20, 0.3)
    inner = FlashVIDInner.for_host(replace(EXAMPLE_HOST, family="qwen3_vl", llm_layers=36))
    assert (inner.layer, inner.share) == (28, 0.1)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="selection='attention'"):
        FlashVID(selection="attention")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_segments=0"):
        FlashVID(min_segments=0)
    video = example_video(FlashVID(), Grid(2, 2, 2))
    with pytest.raises(ValueError, match="'attn' signal"):
        FlashVID()([replace(video, salience_G=None)], [Budget(2, 0.5)])
    with pytest.raises(ValueError, match="whole frames"):
        FlashVID()([VideoTokens(video.x_ND[:3], video.grid, torch.tensor([0, 1, 3]))], [Budget(2, 0.5)])
