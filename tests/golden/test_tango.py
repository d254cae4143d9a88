"""Tango against its authors' code (arXiv 2604.09547), in our default and with `compat="official"`.

`tokens_fixed` are the functions of the authors with the order of the merged values corrected, our default; kept places
are the same in both. Tolerances: indices exact, tokens 2e-5, ST-RoPE 1e-5. A budget that is not exact gives the count
of the release; `stage.*` are its inner functions, on frame 0, on frames 0 and 1, or on one window.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stts.pruners import ops
from stts.pruners.st_rope import sections, st_rope
from stts.pruners.tango import Tango
from stts.pruners.tango_pools import clusters
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases
from tests.tango_points import merged, salient_places


def run_name(ratio: float, tau: float, context_share: float) -> str:
    return f"r{ratio}_tau{tau}_ctx{context_share}_k7"


CASES = cases("tango", containing="features")
STAGES = cases("tango", containing="stage.segment_range")
SETTINGS = list(itertools.product((0.1, 0.15, 0.2, 0.3), (0.65, 0.8), (0.0, 0.4, 1.0)))  # ratio, tau, context share
RUNS = [
    pytest.param(case, *setting, id=f"{case}-{setting}")
    for case in CASES
    for setting in SETTINGS
    if f"{run_name(*setting)}.kept" in case
]


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert_close(actual, expected, atol=tolerance, rtol=0)


def grid_of(case: Case) -> Grid:
    h, w = case["grid"].tolist()
    return Grid(len(case["features"]), h, w)


def frames(case: Case, start: int, end: int) -> VideoTokens:
    """Frames start .. end - 1 as a video of their own."""
    grid = grid_of(case)
    part = Grid(end - start, grid.h, grid.w)
    return VideoTokens(
        x_ND=case["features"][start:end].flatten(0, 1),
        grid=part,
        cell_G=torch.arange(part.num_groups),
        timestamps_T=case["timestamps"][start:end].double(),
        salience_G=case["salience"][start:end].flatten(),
    )


def method(case: Case, **options: Any) -> Tango:
    section = case["section"].tolist()
    sinks = tuple(place for place in case["sinks"].tolist() if place >= 0)
    return Tango(section=(section[0], section[1], section[2]), sinks=sinks, **options)


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize(("case", "ratio", "tau", "context_share"), RUNS)
def test_kept_places_and_values(case, ratio, tau, context_share, compat):
    run = run_name(ratio, tau, context_share)
    stage = method(case, tau=tau, context_share=context_share, compat=compat)
    [kept] = stage([frames(case, 0, len(case["features"]))], [Budget(1, ratio, exact=False)])
    assert torch.equal(kept.index_K, case[f"{run}.kept"])
    fixed, official = case[f"{run}.tokens_fixed"], case[f"{run}.tokens_official"]
    close(kept.x_KD, official if compat else fixed)
    if context_share > 0:
        assert (fixed - official).abs().max() > 1e-3, "the two orders differ, so this test tells them apart"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_published_tau_is_chosen_by_ratio(case):
    video = frames(case, 0, len(case["features"]))
    for ratio, tau in ((0.1, 0.65), (0.15, 0.8), (0.2, 0.8)):
        [kept] = method(case)([video], [Budget(1, ratio, exact=False)])
        assert torch.equal(kept.index_K, case[f"{run_name(ratio, tau, 0.4)}.kept"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_features_for_distances(case):
    grid, x_GD = grid_of(case), case["features"].flatten(0, 1)
    section = tuple(case["section"].tolist())
    assert sections(x_GD.shape[1]) == section
    z_GD = st_rope(x_GD, grid, case["timestamps"].double(), section)
    close(z_GD, case["st_rope"].flatten(0, 1), 1e-5)
    close(z_GD[: grid.per_frame] @ z_GD[grid.per_frame : 2 * grid.per_frame].T, case["st_cos_frame01"], 1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_windows_and_their_static_places(case):
    grid = grid_of(case)
    similarity_TS = ops.neighbour_similarity(case["features"].flatten(0, 1), grid).view(grid.t, -1)[1:]
    close(similarity_TS, case["frame_token_similarity"], 1e-5)
    for tau in (0.65, 0.8):
        windows, _ = ops.temporal_windows(similarity_TS > tau)
        assert [end - start for start, end in windows] == case[f"segments.tau{tau}"].tolist()
        for (start, end), static_S in zip(windows, case[f"static_mask_0.8.tau{tau}"].bool(), strict=True):
            ours_S = (similarity_TS[start : end - 1] > 0.8).all(0) & (end - start > 1)
            assert torch.equal(ours_S, static_S)


@pytest.mark.parametrize("case", STAGES, ids=str)
def test_one_frame(case):
    video = frames(case, 0, 1)
    [kept] = method(case, compat="official")([video], [Budget(1, 0.2, exact=False)])
    assert torch.equal(kept.index_K, case["stage.compressor.frame0.r0.2.kept"])
    close(kept.x_KD, case["stage.compressor.frame0.r0.2.tokens_official"])

    expected_K = case["stage.salient_only.frame0.r0.2.kept"]
    z_GD = st_rope(video.x_ND, video.grid, video.timestamps_T)
    salience_G = method(case).salience(video)
    place_BK = salient_places(z_GD, salience_G, video.cell_G[None], len(expected_K), 1.5, 7)
    assert torch.equal(place_BK[0], expected_K)


@pytest.mark.parametrize("case", STAGES, ids=str)
def test_one_window(case):
    video = frames(case, *case["stage.segment_range"].tolist())
    for ratio in (0.1, 0.2):
        [kept] = method(case, tau=0.8)([video], [Budget(1, ratio, exact=False)])
        assert torch.equal(kept.index_K, case[f"stage.merger.r{ratio}.kept_local"])


@pytest.mark.parametrize("case", STAGES, ids=str)
def test_centres_clusters_and_merged_values(case):
    x_BND, z_BND = (case[name][:2].flatten(0, 1)[None] for name in ("features", "st_rope"))
    chosen = clusters(z_BND, None, torch.ones(1, 9, dtype=torch.bool), 7)
    by_score_BC = torch.empty_like(chosen.rank_BC).scatter_(1, chosen.rank_BC, chosen.centre_BC)
    assert torch.equal(by_score_BC[0], case["stage.dpc.input_frames01.centers_by_score"])
    assert torch.equal(chosen.cluster_BL[0], case["stage.dpc.assign_to_sorted_centers"])
    centre_BC, value_BCD, _ = merged(x_BND, z_BND, 9, 7, 0.6)
    assert torch.equal(centre_BC, by_score_BC.sort(1).values)
    close(value_BCD[0], case["stage.merge.tokens"])
