"""DivPrune against vectors of the release, through the stage and in the order of its choice."""

from __future__ import annotations

import pytest
import torch

from stts.pruners import ops
from stts.pruners.divprune import DivPrune
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases

CASES = cases("divprune", containing="features")


@pytest.mark.parametrize("wide", [True, False], ids=["one matrix", "rows"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chooses_what_the_release_chooses(case: Case, wide: bool) -> None:
    x_ND = case["features"]
    if wide:  # zeros change no cosine, and then the matrix of distances is the smaller one
        x_ND = torch.nn.functional.pad(x_ND, (0, len(x_ND)))
    video = VideoTokens(x_ND=x_ND, grid=Grid(1, 1, len(x_ND)), cell_G=torch.arange(len(x_ND)))
    for name in case.names(".order"):
        ratio, order = float(name[1:-6]), case[name]
        assert torch.equal(ops.farthest_first(x_ND[None], len(order))[0], order)
        assert round(len(x_ND) * ratio) == len(order)
        [kept] = DivPrune()([video], [Budget(len(order), ratio)])
        assert torch.equal(kept.index_K, order.sort().values)
