"""V-CAST against vectors of the release, step by step and through the stage."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from stts.pruners.vcast import VCAST, curvature, frame_means
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases

CASES = cases("vcast", containing="curvature")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_scores_are_those_of_the_release(case: Case) -> None:
    grid = Grid(*case["grid"].tolist())
    x_TSD = case["features"].view(grid.t, grid.per_frame, -1)
    frame_TD = frame_means(x_TSD)
    torch.testing.assert_close(frame_TD, case["frame_reps"], atol=1e-5, rtol=0)
    torch.testing.assert_close(curvature(frame_TD), case["curvature"], atol=1e-5, rtol=0)
    torch.testing.assert_close(VCAST().weights(curvature(frame_TD)), case["weights"], atol=1e-5, rtol=0)
    torch.testing.assert_close(VCAST().scores(x_TSD, frame_TD).flatten(), case["scores"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("compat", "suffix"), [("official", ""), (None, "_largest_remainder")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_what_the_release_keeps(case: Case, compat: Literal["official"] | None, suffix: str) -> None:
    grid = Grid(*case["grid"].tolist())
    video = VideoTokens(x_ND=case["features"], grid=grid, cell_G=torch.arange(grid.num_groups))
    for name in case.names(".index"):
        ratio, expected = name[1 : -len(".index")], case[name + suffix]
        num_kept = max(1, round(grid.num_groups * float(ratio)))
        if compat is None:
            num_kept = max(num_kept, grid.t)  # which the vectors raise and an exact budget does not
        [kept] = VCAST(compat=compat)([video], [Budget(num_kept, float(ratio))])
        assert torch.equal(kept.index_K, expected)
        per_frame = torch.bincount(kept.index_K // grid.per_frame, minlength=grid.t)
        assert torch.equal(per_frame, case[f"r{ratio}.per_frame{suffix}"])
        for rows in case.names("deepstack0") if compat == "official" else ():
            if rows.startswith(f"r{ratio}."):
                assert torch.equal(case["deepstack0"][kept.index_K], case[rows])
    for rows in case.names("deepstack1"):  # a second level of the same rows
        assert len(case[rows]) == grid.num_groups
