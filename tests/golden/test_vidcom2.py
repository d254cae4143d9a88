"""VidCom2 against vectors of the release, step by step and through the stage."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from stts.pruners.base import with_newlines
from stts.pruners.vidcom2 import VidCom2
from stts.tokens import Budget, Grid, Kept, VideoTokens
from tests.golden.conftest import Case, cases

CASES = cases("vidcom2", containing="features")
GRID_CASES = cases("vidcom2", containing="r0.1.grid_kept_with_newlines")
RATIOS = ["0.1", "0.15", "0.25", "0.5"]


def run(case: Case, ratio: float, stage: VidCom2) -> tuple[VideoTokens, Kept]:
    grid = Grid(len(case["features"]), *case["grid"].tolist())
    video = VideoTokens(x_ND=case["features"].flatten(0, 1), grid=grid, cell_G=torch.arange(grid.num_groups))
    [kept] = stage([video], [Budget(round(grid.num_groups * ratio), ratio)])
    return video, kept


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_those_of_the_release(case: Case) -> None:
    stage, x_TSD = VidCom2(), case["features"]
    assert torch.equal(stage.quiet_channels(x_TSD.flatten(0, 1)), case["low_var_channels"])
    v_TS, w_TS = stage.redundancy(x_TSD)
    torch.testing.assert_close(v_TS, case["video_score"], atol=1e-5, rtol=0)
    torch.testing.assert_close(w_TS, case["frame_score"], atol=1e-5, rtol=0)
    torch.testing.assert_close(-v_TS.mean(1), case["frame_uniqueness"], atol=1e-5, rtol=0)
    _, kept = run(case, 0.25, stage)
    expected_TS = -(case["video_score"] + case["frame_score"])
    torch.testing.assert_close(kept.scores_G, expected_TS.flatten(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_what_the_release_keeps(case: Case, ratio: str, compat: Literal["official"] | None) -> None:
    stage, expected = VidCom2(compat=compat), case.group(f"r{ratio}")
    scale_T = stage.frame_scales(case["video_score"], float(ratio))
    torch.testing.assert_close(scale_T, expected["scales"], atol=1e-5, rtol=0)
    video, kept = run(case, float(ratio), stage)
    assert torch.equal(kept.index_K, expected["kept"])
    assert torch.equal(torch.bincount(kept.index_K // video.grid.per_frame), expected["k_per_frame"])
    assert torch.equal(video.x_ND[kept.index_K], expected["tokens"])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("case", GRID_CASES, ids=str)
def test_official_puts_newlines_behind_their_frame(case: Case, ratio: str) -> None:
    stage = VidCom2(compat="official", newline_per_row=True)
    video, kept = run(case, float(ratio), stage)
    places = with_newlines(kept.index_K, video.grid, stage.newlines)
    assert torch.equal(places, case[f"r{ratio}.grid_kept_with_newlines"])
    corrected = with_newlines(kept.index_K, video.grid, VidCom2(newline_per_row=True).newlines)
    assert torch.equal(corrected, places.sort().values), "the same tokens in raster order"
