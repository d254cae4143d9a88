"""EVS against vectors of transformers' `compute_retention_mask`, through the stage."""

from __future__ import annotations

import pytest
import torch

from stts.pruners.evs import EVS
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases

CASES = cases("evs", containing="dissimilarity")


def video_of(case: Case) -> VideoTokens:
    num_frames, height, width = case["thw"].tolist()
    side = int(case["spatial_merge_size"])
    grid = Grid(num_frames, height // side, width // side)
    return VideoTokens(x_ND=case["features"], grid=grid, cell_G=torch.arange(grid.num_groups))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_what_the_release_keeps(case: Case) -> None:
    video = video_of(case)
    for removed, expected in ((name[1:-6], case[name]) for name in case.names(".index")):
        ratio = round(1 - float(removed), 6)
        [official] = EVS(compat="official")([video], [Budget(1, ratio)])
        assert torch.equal(official.index_K, expected), f"q = {removed}"
        assert len(expected) == case.meta["counts"][removed]
        [planned] = EVS()([video], [Budget(len(expected), ratio)])
        assert torch.equal(planned.index_K, expected), "the same tokens at the same count"
        torch.testing.assert_close(planned.scores_G, case["dissimilarity"], atol=1e-5, rtol=0)
