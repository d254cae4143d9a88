"""DivPrune: the tokens that are farthest from one another.

Shape suffixes beside those of `stts.tokens`: B = pools of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from stts.pruners import ops
from stts.pruners.base import ByHost
from stts.tokens import Budget, Grid, Kept, VideoTokens


@dataclass(frozen=True, kw_only=True)
class DivPrune(ByHost):
    """Keep tokens that are farthest from those already chosen, first the one whose nearest neighbour is farthest.

        d_ij = 1 - cos(x_i, x_j);   first: argmax_j min_{i != j} d_ij;   next: argmax_j min_{i chosen} d_ij

    arXiv:2503.02175 (max-min diversity); `llava_arch.py` of vbdi/divprune, which treats one image. Here all tokens of
    the clip are one pool, or with `scope="frame"` those of each frame, which then keep equal shares. Tokens keep their
    values and their order.

    **Differs:** a chosen token is not chosen again. The release relies on its distance to itself being 0, so where
    every other token repeats a chosen one it returns fewer tokens than asked for. fp32 always; ties go to the earlier
    token."""

    paper: ClassVar[str] = "2503.02175"
    scope: Literal["clip", "frame"] = "clip"
    """Tokens that compete: those of the whole clip, or of each frame."""

    def __post_init__(self) -> None:
        if self.scope not in ("clip", "frame"):
            raise ValueError(f"scope={self.scope!r} is unknown; expected 'clip' or 'frame'")

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        if self.scope == "clip":
            [order_K] = ops.farthest_first(video.x_ND[None].detach(), budget.num_kept)
            return Kept(index_K=order_K.sort().values)
        ops.need_full_grid(video)
        num_frames, per_frame = video.grid.t, video.grid.per_frame
        share, more = divmod(budget.num_kept, num_frames)  # earlier frames keep what does not divide
        order_TK = ops.farthest_first(
            video.x_ND.view(num_frames, per_frame, -1).detach(), min(share + (more > 0), per_frame)
        )
        frame_T1 = torch.arange(num_frames, device=order_TK.device)[:, None]
        kept_TK = torch.arange(order_TK.shape[1], device=order_TK.device) < share + (frame_T1 < more)
        return Kept(index_K=(frame_T1 * per_frame + order_TK)[kept_TK].sort().values)

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Norms and every distance between tokens that compete."""
        pool, pools = (grid.num_groups, 1) if self.scope == "clip" else (grid.per_frame, grid.t)
        return 2 * grid.num_groups * width + 2 * pools * pool**2 * width
