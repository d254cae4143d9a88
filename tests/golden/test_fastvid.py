"""FastVID against the authors' three releases (LLaVA-OneVision, LLaVA-Video, Qwen2.5-VL); tolerance 2e-5.

The default is the release wherever the release runs, apart from the noise on its densities, which is 0 in the vectors.
Shape suffixes: T = frames, S = places of a frame, Q = salient tokens, R = other tokens, K = kept tokens.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stts.pruners import density, ops
from stts.pruners.base import with_newlines
from stts.pruners.fastvid import FastVID, density_scores, frame_similarity
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import cases

ALL = cases("fastvid", containing="out.keep_index")
WITH_STEPS = cases("fastvid", containing="mid.density_score")


def close(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, atol=2e-5, rtol=0)


def make(case: Any) -> tuple[FastVID, VideoTokens, Budget]:
    meta = case.meta
    h, _, w = meta["grid"].partition("x")
    grid = Grid(len(case["in.feat"]), int(h), int(w or h))
    video = VideoTokens(
        case["in.feat"].flatten(0, 1),
        grid,
        torch.arange(grid.num_groups),
        salience_G=case["in.attn"].flatten(),
        frame_TC=case["in.frame_global"],
    )
    stage = FastVID(
        variant=case.name[:2],
        min_segments=int(meta["c"]),
        tau=float(meta["tau"]),
        repeat=float(meta.get("ignore", 0.95)),
        context=float(meta["d"]),
        stride=int(meta["p"]),
        beta=float(meta["beta"]),
        num_neighbours=int(meta["knn"]),
    )
    return stage, video, Budget(grid.num_groups, float(meta["retention"]))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_what_is_kept_and_what_it_becomes(case):
    stage, video, budget = make(case)
    [kept] = stage([video], [budget])
    grid, prefix, suffix = video.grid, case["in.prefix"], case["in.suffix"]
    places_K, tokens_KD = kept.index_K, kept.x_KD
    num_places = grid.num_groups
    if "in.newline" in case:
        num_places += grid.t * grid.h
        places_K = with_newlines(kept.index_K, grid, stage.newlines)
        is_newline_K = places_K % (grid.w + 1) == grid.w
        tokens_KD = case["in.newline"].repeat(len(places_K), 1)
        tokens_KD[~is_newline_K] = kept.x_KD
    around = torch.arange(len(prefix)), len(prefix) + num_places + torch.arange(len(suffix))
    assert torch.equal(torch.cat([around[0], len(prefix) + places_K, around[1]]), case["out.keep_index"])
    close(torch.cat([prefix, tokens_KD, suffix]), case["out.hidden"][0])


@pytest.mark.parametrize("case", ALL, ids=str)
def test_segments(case):
    stage, video, _ = make(case)
    similarity_T = frame_similarity(video)
    close(similarity_T, case["mid.frame_similarity"])
    assert [len(frames) for frames, _ in stage.segments(similarity_T)] == case["mid.segment_sizes"].tolist()


@pytest.mark.parametrize("case", WITH_STEPS, ids=str)
def test_counts_ranks_and_density_peaks(case):
    stage, video, budget = make(case)
    num_frames, places = video.grid.t, video.grid.per_frame
    segments = stage.segments(frame_similarity(video))
    num_salient, num_anchors = stage.counts(segments, places, budget.retention_ratio)
    assert num_anchors == case["mid.context_per_frame"].tolist()
    [num_salient] = set(num_salient)
    rank_TS = ops.top(ops.rank_salience(video).view(num_frames, places), places)
    salient_TQ = rank_TS[:, :num_salient]
    assert torch.equal(salient_TQ, case["mid.salient_topk_order"])
    free_TS = torch.ones(num_frames, places, dtype=torch.bool).scatter(1, salient_TQ, value=False)
    rest_TR = torch.arange(places).expand(num_frames, -1)[free_TS].view(num_frames, -1)
    assert torch.equal(rest_TR, case["mid.rest_pos"])

    score_TS = density_scores(video, case["in.feat"], free_TS, stage.num_neighbours)
    close(score_TS[free_TS].view_as(rest_TR), case["mid.density_score"])
    # The release keeps both factors; ours only their product.
    x_TRD = case["in.feat"].gather(1, rest_TR[:, :, None].expand(-1, -1, case["in.feat"].shape[-1]))
    near = (density.distances(x_TRD) / math.sqrt(x_TRD.shape[-1])).sort(-1).values[..., : stage.num_neighbours]
    close(torch.exp(-near.square().mean(-1)), case["mid.density"])
    close(score_TS[free_TS].view_as(rest_TR) / case["mid.density"], case["mid.delta"])
