"""Novelty: keep what changed since the previous frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stts.pruners.base import PerVideo, keep_top
from stts.pruners.ops import neighbour_similarity
from stts.tokens import Budget, Grid, Kept, VideoTokens


@dataclass(frozen=True)
class Novelty(PerVideo):
    """Keep what changed since the previous frame. A floor for every learned scorer to beat.

    Score of token (t, i) = -cos(x[t, i], x[t-1, i]); the first frame scores 0, i.e. counts as new. Ours, no paper.

    `evs` is the published rule beside it (arXiv:2510.14624): there the first frame always stays whole, even where later
    tokens have negative cosines, which outrank it here."""

    needs_time: ClassVar[str] = "it ranks tokens by their change since the frame before"

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        score_N = -neighbour_similarity(video.x_ND, video.grid, video.norm_N)
        return keep_top(video, score_N, budget.num_kept)

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 4 * grid.num_groups * width  # one norm and one dot product per token
