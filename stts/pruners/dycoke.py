"""DyCoke: in groups of four frames the first stays whole, of the others what differs most from an earlier one.

Shape suffixes beside those of `stts.tokens`: B = rows of a cache, M = its slots of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import frames, ops
from stts.pruners.base import ByHost, HostInfo, Newlines, Shown
from stts.tokens import Budget, Grid, Kept, VideoTokens


@dataclass(frozen=True, kw_only=True)
class DyCoke(ByHost):
    """Keep every fourth frame whole, and of the frames between the tokens least like the same place of a reference.

    The reference of frame t is the frame before it (t odd) or two before it (t = 2 in its group), always unpruned. Each
    pruned frame keeps n = trunc((1 - K) S) tokens of lowest cosine; values and order are those of the video.

    arXiv:2411.15024, token merging of `llava_arch.py` of KD-TAO/DyCoke, which merges nothing. The share kept of a
    pruned frame follows from the ratio r: 1 - K = (4 r - 1) / 3 at least 0, so a quarter is the least this keeps.

    * `budget.exact`: what whole frames leave is divided equally among the pruned ones, one token more for those with
      the lowest mean cosine. Where whole frames alone exceed the budget, groups of 8, 16, ... frames take the place of
      those of four, references following the same pattern; a budget below one frame is spread over the first (ours).
    * `frame_ratio` sets 1 - K whatever the ratio; for published rows.

    **Differs:** an odd last frame counts like any other, and so does the last group; the release drops an odd last
    frame, keeps the third frame of the last group whole, and lists the tokens of a frame by rising cosine
    (compat="official").

    Its second part, with `hidden`: at each decode step the layers from `layer` on read only the trunc((1 - P) V) keys
    of the video that the layer before attends to most, and everything outside the video. A step whose attention is like
    the last one's (cosine of at least `limit`) keeps the last choice; the release reads the whole cache then
    (compat="official"), and compares the first step of an answer with the answer before. Hidden keys stay in memory.
    Without `hidden`, the default, the numbers are those of the first part alone, as they are where no cache is used."""

    paper: ClassVar[str] = "2411.15024"
    needs_time: ClassVar[str] = "it drops tokens that are like those of the frame before"
    newlines: ClassVar[Newlines] = "kept_rows"
    count_known: ClassVar[bool] = False

    frame_ratio: float | None = None
    """Share kept of a pruned frame (1 - K) where the budget is not exact; None: from the retention ratio."""
    hidden: float | None = None
    """P, the share of a video's keys hidden from deeper layers while decoding (published: 0.7); None: nothing is."""
    layer: int = 3
    """The first LLM layer that reads a part of the keys."""
    limit: float = 0.9
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.hidden is not None and not 0 <= self.hidden < 1:
            raise ValueError(f"hidden={self.hidden} is the share of a video's keys hidden while decoding, in [0, 1)")
        if self.frame_ratio is not None and not 0 <= self.frame_ratio <= 1:
            raise ValueError(f"frame_ratio={self.frame_ratio} is the share kept of a pruned frame, in [0, 1]")

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """Original positions where they have a time of their own; the published layer, scaled for shallow LLMs."""
        return super().for_host(host, **{"layer": host.llm_layer(cls.layer), **options})

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        grid, device = video.grid, video.x_ND.device
        if budget.exact and budget.num_kept < grid.per_frame:
            return Kept(index_K=ops.evenly_spaced(grid.per_frame, budget.num_kept, device))
        group = 4
        while budget.exact and -(-grid.t // group) * grid.per_frame > budget.num_kept:
            group *= 2
        whole = [t % group == 0 for t in range(grid.t)]
        if self.compat == "official":
            whole = [full or (t % 4 == 2 and t - 2 >= grid.t - 4) for t, full in enumerate(whole)]
        reference = [t & (t - 1) if t % group else t for t in range(grid.t)]  # the lowest bit of t cleared
        similarity_TP = self.similarity(video, reference)
        whole_T = torch.tensor(whole, device=device)
        count_T = whole_T * grid.per_frame
        if budget.exact:
            count_T = count_T + self._shares(similarity_TP, whole_T, budget.num_kept - sum(whole) * grid.per_frame)
        else:
            count_T = count_T + ~whole_T * self._natural(grid.per_frame, budget.retention_ratio)
            if self.compat == "official" and grid.t % 2:
                count_T[-1] = 0
        # In a whole frame all tokens are kept, so that any order of them is that of the video.
        score_TP = torch.where(whole_T[:, None], 0.0, -similarity_TP)
        if self.compat != "official":
            return Kept(index_K=frames.top_per_frame(score_TP, count_T), scores_G=score_TP.flatten())
        order_TP = ops.top(score_TP, grid.per_frame)
        place_P = torch.arange(grid.per_frame, device=device)
        cell_TP = order_TP + grid.per_frame * torch.arange(grid.t, device=device)[:, None]
        index_K = cell_TP[place_P < count_T[:, None]]
        return Kept(index_K=index_K.sort().values if budget.exact else index_K, scores_G=score_TP.flatten())

    def similarity(self, video: VideoTokens, reference: list[int]) -> Tensor:
        """(T, S) fp32 cosine of each token with the same place of the reference of its frame.

        reference: the number of each frame with its lowest bit cleared; a frame that is its own gets 0."""
        x_TPD = video.x_ND.view(video.grid.t, video.grid.per_frame, -1)
        norm_TP = (ops.lengths(video.x_ND) if video.norm_N is None else video.norm_N).view(x_TPD.shape[:2])
        similarity_TP, step = torch.zeros_like(norm_TP), 1
        while (
            step < video.grid.t and reference[step] != step
        ):  # frames step, 3 step, 5 step, ... refer to 0, 2 step, ...
            later, earlier = slice(step, None, 2 * step), slice(0, video.grid.t - step, 2 * step)
            dot_TP = ops.row_dots(x_TPD[later], x_TPD[earlier])
            similarity_TP[later] = dot_TP / (norm_TP[later] * norm_TP[earlier])
            step *= 2
        return similarity_TP

    def _natural(self, per_frame: int, retention_ratio: float) -> int:
        """n of the release; 1 - K is taken in binary there, here as a decimal."""
        keep = (4 * Decimal(str(retention_ratio)) - 1) / 3
        if self.frame_ratio is not None:
            keep = Decimal(str(self.frame_ratio))
        keep = max(Decimal(0), keep)
        return int((1 - float(1 - keep)) * per_frame) if self.compat == "official" else int(keep * per_frame)

    def _shares(self, similarity_TP: Tensor, whole_T: Tensor, left: int) -> Tensor:
        """(T,) tokens of each pruned frame; they sum to `left`. No host synchronisation beyond the budget's own."""
        num_pruned = (~whole_T).sum()
        rank_T = similarity_TP.mean(1).masked_fill(whole_T, torch.inf).argsort(stable=True).argsort()
        share = left // num_pruned.clamp_min(1)
        return ~whole_T * (share + (rank_T < left - share * num_pruned))

    # --- while decoding ----------------------------------------------------------------------------------------------

    @property
    def hides_from(self) -> int | None:
        return None if self.hidden is None else self.layer

    def num_visible(self, num_keys: int) -> int:
        return num_keys if self.hidden is None else int(num_keys * (1 - Decimal(str(self.hidden))))

    def show(self, attention_BM: Tensor, inside_BM: Tensor, num_keys: int, last: Shown | None) -> Tensor:
        """bool (B, M) keys of the video that this step reads."""
        inside_only_BM = attention_BM.masked_fill(~inside_BM, -torch.inf)
        most_BK = ops.top(inside_only_BM, self.num_visible(num_keys))
        chosen_BM = torch.zeros_like(inside_BM).scatter_(1, most_BK, True) & inside_BM
        if last is None:
            return chosen_BM
        now_BM, before_BM = attention_BM * inside_BM, last.attention_BM * inside_BM
        again_B1 = F.cosine_similarity(now_BM, before_BM, dim=1)[:, None] >= self.limit
        earlier_BM = inside_BM if self.compat == "official" else last.visible_BM & inside_BM
        return torch.where(again_B1, earlier_BM, chosen_BM)

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 4 * grid.num_groups * width  # one norm and one dot product per token
