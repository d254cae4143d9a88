"""Each fast path equals the plain loops of `stts/pruners/naive/`; a method joins with one line below."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

from stts.pruners.check import HOST, example_video
from stts.pruners.registry import make_pruner
from stts.tokens import Budget, Grid

OWN_COUNT = ("prunevid", "flashvid")  # loops that follow the release's count only
METHODS: dict[str, dict[str, Any]] = {  # name -> options of the method and its loops
    "divprune": {},
    "cdpruner": {},
    "prunevid": {},
    "dycoke": {},
    "framefusion": {"threshold": 0.9},
    "flashvid": {"min_segments": 3},
    "tome": {},
    "vcast": {},
}


CASES = [(name, exact) for name in METHODS for exact in (True, False) if not (exact and name in OWN_COUNT)]


@pytest.mark.parametrize("grid", [Grid(1, 2, 3), Grid(4, 2, 3), Grid(9, 3, 3), Grid(13, 4, 4)], ids=str)
@pytest.mark.parametrize(("name", "exact"), CASES)
def test_a_fast_path_equals_its_loops(name: str, grid: Grid, exact: bool) -> None:
    [stage] = make_pruner(name, HOST, **METHODS[name]).stages[:1]
    loops = getattr(import_module(f"stts.pruners.naive.{name}"), name)
    for seed, ratio in enumerate((0.1, 0.25, 0.5, 0.8)):
        # As wide as there are tokens: behind the rank of its kernel CDPruner has nothing to choose by.
        video = example_video(stage, grid, seed=seed, width=grid.num_groups if name == "cdpruner" else 17)
        # Noise, so that no two tokens are equal: ties are settled by the last bit.
        video = replace(video, x_ND=video.x_ND + 0.05 * torch.randn(video.x_ND.shape, generator=torch.Generator()))
        least = grid.per_frame if stage.site.kind == "vit" else 1
        budget = Budget(max(least, round(grid.num_groups * ratio)), ratio, exact)
        [fast], slow = stage([video], [budget]), loops(video, budget, **METHODS[name])
        assert fast.index_K.tolist() == slow.index_K.tolist(), f"at {ratio}"
        rows = slice(None)
        if fast.x_ND is not None:  # in the tower: patches of the groups that stay
            rows = video.group_GW[fast.index_K].flatten()  # type: ignore[index]
        for name_of, where in (("x_KD", slice(None)), ("scores_G", slice(None)), ("x_ND", rows), ("size_N", rows)):
            found, expected = getattr(fast, name_of), getattr(slow, name_of)
            if expected is not None:
                found, expected = found[where], expected[where]
                torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)
