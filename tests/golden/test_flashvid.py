"""FlashVID against vectors of the release, step by step and through the stage.

Integers are exact, values to 1e-3 and 1e-4 of their size.
"""

from __future__ import annotations

import ast
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from stts.pruners.flashvid import FlashVID
from stts.tokens import Budget, Grid, Kept, VideoTokens
from tests.golden.conftest import Case, cases

CASES = cases("flashvid", containing="attention")
RUNS = [(case, run) for case in CASES for run in ast.literal_eval(case.meta["runs"])]
each_run = pytest.mark.parametrize(("case", "run"), RUNS, ids=str)
EXPANSION = 1.25


def stage_of(case: Case, run: str, compat: Literal["official"] | None = None) -> tuple[FlashVID, float]:
    """The stage and the ratio that it is given before the LLM."""
    meta: dict[str, Any] = ast.literal_eval(case.meta["common"]) | ast.literal_eval(case.meta["runs"])[run]
    one = not meta.get("do_segment", True)
    stage = FlashVID(
        selection=meta["token_selection_method"],
        min_segments=1 if one else meta.get("min_segment_num", 8),
        segment_tau=-1 if one else meta["segment_threshold"],
        tau=meta.get("temporal_threshold", 0.8),
        compat=compat,
    )
    return stage, meta["retention_ratio"] * EXPANSION


def run_stage(case: Case, run: str, compat: Literal["official"] | None) -> Kept:
    x_TSD = case["features"]
    grid = Grid(len(x_TSD), *map(int, case.meta["grid"].split("x")))
    video = VideoTokens(
        x_ND=x_TSD.flatten(0, 1), grid=grid, cell_G=torch.arange(grid.num_groups),
        salience_G=case["attention"].flatten(),
    )  # fmt: skip
    stage, ratio = stage_of(case, run, compat)
    [kept] = stage([video], [Budget(1, ratio)])
    return kept


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


@each_run
def test_every_step_is_that_of_the_release(case: Case, run: str) -> None:
    x_TSD, expected = case["features"], case.group(run)
    stage, ratio = stage_of(case, run)
    segment_T, length_T = stage.segments(x_TSD)
    assert torch.bincount(segment_T).tolist() == expected["segments"].tolist()
    num_selected, num_merged = stage.counts(Budget(1, ratio), Grid(len(x_TSD), 1, x_TSD.shape[1]))
    assert [num_selected, num_merged] == expected["budget"].tolist()
    place_TA = stage.select(x_TSD, case["attention"], segment_T, num_selected)
    assert torch.equal(place_TA, expected["adts"])

    selected_TS = torch.zeros(x_TSD.shape[:2], dtype=torch.bool).scatter_(1, place_TA, True)
    for compat, values in ((None, "tstm_values_tree_mean"), ("official", "tstm_values_official")):
        stage, _ = stage_of(case, run, compat)  # type: ignore[arg-type]
        trees = stage.merge_trees(x_TSD, selected_TS, segment_T, length_T, num_selected + num_merged)
        root_TS = trees.root_TP & (length_T > 1)[:, None]
        assert torch.equal(root_TS.flatten().nonzero()[:, 0], expected["tstm_roots"])
        close(trees.x_TPD[root_TS], expected[values])


@each_run
def test_keeps_and_merges_as_the_release_does(case: Case, run: str) -> None:
    expected, stage = case.group(run), stage_of(case, run)[0]
    released = run_stage(case, run, "official")
    place_K, count_K = expected["kept"].unique(return_counts=True)
    assert torch.equal(released.index_K, place_K)
    once = torch.isin(expected["kept"], place_K[count_K == 1])
    assert released.x_KD is not None
    close(released.x_KD[count_K == 1], expected["tokens_official"][once])
    # A place that stands twice there is kept as it was selected.
    close(released.x_KD[count_K > 1], case["features"].flatten(0, 1)[place_K[count_K > 1]])

    kept = run_stage(case, run, None)
    if (count_K > 1).any():  # segments of one frame: what was selected takes no part in the merging
        assert stage.min_segments == 8 and len(kept.index_K) == len(expected["kept"])
        assert len(expected["tokens_tree_mean"]) == len(expected["kept"])
        return
    assert torch.equal(kept.index_K, expected.get("kept_tree_mean", expected["kept"])) and kept.x_KD is not None
    close(kept.x_KD, expected["tokens_tree_mean"])
