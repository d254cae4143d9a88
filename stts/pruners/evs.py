"""EVS: the first frame, then what changed since the frame before. What vLLM and SGLang serve."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import ByHost, keep_top
from stts.tokens import Budget, Grid, Kept, VideoTokens

FIRST_FRAME = 255.0
"""Score of the first frame, above any dissimilarity."""


@dataclass(frozen=True, kw_only=True)
class EVS(ByHost):
    """Keep the first frame whole, then the tokens that differ most from the same place one frame earlier.

        s[0, p] = 255,   s[t, p] = 1 - cos(x[t, p], x[t-1, p])

    The highest scores of the whole clip stay; a later frame may lose everything. arXiv:2510.14624;
    `compute_retention_mask` of transformers 5.23 (`models/nemotron_h_omni`) and `multimodal/evs.py` of vLLM.

    * A budget below one frame: evenly spaced places of the first frame (the release always keeps all of it).

    **Differs:** the count is the planned one, the ratio read as a decimal; the release truncates in binary and keeps
    one frame at least (compat="official" with exact=False). Cosines are fp32: in bfloat16, the precision of the release
    (and of compat="official"), a still scene has a few dozen values, and ties go to its beginning. Each video is
    compared with itself only; the release in transformers joins all videos of a call."""

    paper: ClassVar[str] = "2510.14624"
    needs_time: ClassVar[str] = "it keeps what differs from the frame before, and one frame whole"
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.compat not in (None, "official"):
            raise ValueError(f"compat={self.compat!r} is unknown; expected None or 'official'")

    @property
    def count_known(self) -> bool:  # type: ignore[override]  # an option decides
        return self.compat is None

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        num_kept, per_frame = budget.num_kept, video.grid.per_frame
        if self.compat == "official" and not budget.exact:
            num_kept = released_count(video.grid, budget.retention_ratio)
        score_N = self.scores(video)
        if num_kept < per_frame:
            index_K = ops.evenly_spaced(per_frame, num_kept, score_N.device)
            return Kept(index_K=index_K, scores_G=score_N)
        return keep_top(video, score_N, num_kept)

    def scores(self, video: VideoTokens) -> Tensor:
        """(N,) fp32; the first frame has 255."""
        x_ND, per_frame = video.x_ND.detach(), video.grid.per_frame
        if self.compat == "official":  # in the precision of the features
            x_TPD = x_ND.view(video.grid.t, per_frame, -1)
            score_N = 1 - F.cosine_similarity(x_TPD[1:], x_TPD[:-1], dim=-1).flatten().float()
        else:
            score_N = 1 - ops.neighbour_similarity(x_ND, video.grid, video.norm_N)[per_frame:]
        return torch.cat([score_N.new_full((per_frame,), FIRST_FRAME), score_N])

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 4 * grid.num_groups * width  # one norm and one dot product per token


def released_count(grid: Grid, retention_ratio: float) -> int:
    """max(one frame, trunc(N (1 - q))) with q the fraction removed, in binary floating point."""
    removed = float(1 - Decimal(str(retention_ratio)))
    return max(grid.per_frame, int(grid.num_groups * (1 - removed)))
