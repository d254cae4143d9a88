"""Stages read one time per temporal cell, also where a cell holds two sampled frames."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

import stts
from stts.models.pruning.stages import cell_times
from stts.pruners.base import PerVideo, keep_top
from stts.tokens import Budget, Grid, Kept, Site, VideoTokens
from tests.models.families.qwen_tiny import make, make_inputs


@pytest.mark.parametrize(
    ("frames_s", "cells", "expected"),
    [
        ([0, 1, 2, 4, 10], 3, [0, 2, 10]),  # at frames 0, 2 and 4
        ([0, 1, 2, 4, 10, 11], 3, [0, 3, 11]),  # at frames 0, 2.5 and 5
        ([3, 7], 1, [3]),
        ([3, 7, 9], 3, [3, 7, 9]),
    ],
)
def test_cells_are_spread_evenly_over_the_frames(frames_s: list[float], cells: int, expected: list[float]) -> None:
    made = cell_times(torch.tensor(frames_s, dtype=torch.float64), Grid(cells, 2, 2))
    assert made is not None and made.tolist() == expected
    assert cell_times(None, Grid(cells, 2, 2)) is None


def test_too_few_times_are_refused() -> None:
    with pytest.raises(ValueError, match="the times of 2 frames for a video of 3 temporal cells"):
        cell_times(torch.tensor([0.0, 1.0]), Grid(3, 1, 1))


@dataclass(frozen=True)
class Look(PerVideo):
    """Keeps the first groups and remembers the times it was shown."""

    site: Site  # type: ignore[misc]  # a class variable of the base; here each test has its own
    seen: list[Tensor | None] = field(default_factory=list)

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        self.seen.append(video.timestamps_T)
        return keep_top(video, -video.cell_G.float(), budget.num_kept)


@pytest.mark.parametrize("site", [Site("vit", 1, 2), Site("pre_llm"), Site("llm", 1, share=0.5)])
def test_stages_at_every_site_see_them(tmp_path: Path, site: Site) -> None:
    model, processor = make("qwen3_vl", tmp_path, deepstack_visual_indexes=[5, 6], num_position_embeddings=36)
    look = Look(site)
    pruner = stts.pruning(model, look, retention_ratio=0.625)
    with torch.no_grad(), pruner:
        pruner.describe(["a"], [torch.tensor([0.0, 1, 2, 4, 10], dtype=torch.float64)])
        model(**make_inputs(processor, ["v what colour ?"]))
    assert [time.tolist() for time in look.seen if time is not None] == [[0, 2, 10]]
