"""PruneVid against vectors of the release: segments, stage 1 through the stage, stage 2 as a function."""

from __future__ import annotations

from itertools import groupby
from typing import Literal

import pytest
import torch

from stts.pruners.prunevid import PruneVid, asked_tokens, refine
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases

CASES = cases("prunevid", containing="features")
REFINE = cases("prunevid", containing="refined")


def stage_of(case: Case, compat: Literal["official"] | None) -> PruneVid:
    meta = case.meta
    return PruneVid(
        tau=float(meta["tau"]), segment_share=float(meta["temporal_segment_ratio"]),
        cluster_share=float(meta["cluster_ratio"]), compat=compat,
    )  # fmt: skip


def runs(labels: list[int]) -> list[int]:
    return [len(list(run)) for _, run in groupby(labels)]


@pytest.mark.parametrize("case", REFINE, ids=str)
def test_runs_are_made_contiguous_as_released(case: Case) -> None:
    for labels_T, refined_T in zip(case["labels"], case["refined"], strict=True):
        expected = refined_T[refined_T >= 0].tolist()
        assert runs(refine(labels_T[labels_T >= 0].tolist())) == runs(expected)


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_makes_the_tokens_of_the_release(case: Case, compat: Literal["official"] | None) -> None:
    x_TSD, stage = case["features"], stage_of(case, compat)
    grid = Grid(len(x_TSD), *map(int, case.meta["grid"].split("x")))
    assert stage.frame_clusters(x_TSD) == case["frame_clusters_raw"].tolist()
    lengths = runs(refine(case["frame_clusters_raw"].tolist()))
    assert lengths == runs(case["frame_clusters_refined"].tolist()) == case["window_sizes"].tolist()

    video = VideoTokens(x_ND=x_TSD.flatten(0, 1), grid=grid, cell_G=torch.arange(grid.num_groups))
    [kept] = stage([video], [Budget(1, 0.17)])
    expected = case["tokens"]
    assert kept.x_KD is not None and len(kept.index_K) == len(expected)
    frame_K = kept.index_K // grid.per_frame
    sizes = [static + moving for static, moving in zip(case["static_sizes"], case["dynamic_sizes"], strict=True)]
    segment_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert torch.bincount(segment_T[frame_K]).tolist() == sizes
    if compat is None:  # the same rows in another order
        assert (kept.index_K.diff() > 0).all()
        nearest_K = torch.cdist(kept.x_KD, expected).argmin(1)
        assert len(nearest_K.unique()) == len(expected)
        expected = expected[nearest_K]
    torch.testing.assert_close(kept.x_KD, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stage_2_keeps_what_the_question_attends_to(case: Case) -> None:
    sizes: list[int] = []
    counts = zip(case["static_sizes"], case["dynamic_sizes"], case["window_sizes"], strict=True)
    for static, moving, length in (map(int, row) for row in counts):
        sizes += [static, *[moving // length] * length]
    kept_K = asked_tokens(case["text_to_image_attn"], sizes, float(case.meta["alpha"]))
    assert torch.equal(kept_K, case["kept_in_llm"])
