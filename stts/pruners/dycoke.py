"""DyCoke: in groups of four frames the first stays whole, of the others what differs most from an earlier one.

Shape suffixes beside those of `stts.tokens`: H = heads, M = keys in the cache, V = keys of the video among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import HostInfo, Newlines, PerVideo, Positions
from stts.tokens import Budget, Grid, Kept, VideoTokens


@dataclass(frozen=True, kw_only=True)
class DyCoke(PerVideo):
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
    (compat="official"). Its second part, which hides keys of the cache while decoding, is `visible_keys`; no stage runs
    it yet, so the numbers are those of the first part alone."""

    paper: ClassVar[str] = "2411.15024"
    newlines: ClassVar[Newlines] = "kept_rows"
    positions: Positions = "compact"  # type: ignore[misc]  # the host decides, so it is a field
    count_known: ClassVar[bool] = False

    frame_ratio: float | None = None
    """Share kept of a pruned frame (1 - K) where the budget is not exact; None: from the retention ratio."""
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.frame_ratio is not None and not 0 <= self.frame_ratio <= 1:
            raise ValueError(f"frame_ratio={self.frame_ratio} is the share kept of a pruned frame, in [0, 1]")

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """Original positions where they have a time of their own."""
        return cls(**{"positions": "original" if host.mrope else "compact", **options})

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
        similarity_TP = self.similarity(video, [t & (t - 1) for t in range(grid.t)])  # the lowest bit of t cleared
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
            return Kept(index_K=ops.top_per_frame(score_TP, count_T), scores_G=score_TP.flatten())
        order_TP = ops.top(score_TP, grid.per_frame)
        place_P = torch.arange(grid.per_frame, device=device)
        cell_TP = order_TP + grid.per_frame * torch.arange(grid.t, device=device)[:, None]
        index_K = cell_TP[place_P < count_T[:, None]]
        return Kept(index_K=index_K.sort().values if budget.exact else index_K, scores_G=score_TP.flatten())

    def similarity(self, video: VideoTokens, reference: list[int]) -> Tensor:
        """(T, S) fp32 cosine of each token with the same place of the reference of its frame."""
        unit_TPD = F.normalize(video.x_ND.detach().float(), dim=-1).view(video.grid.t, video.grid.per_frame, -1)
        similarity_TP: Tensor = torch.linalg.vecdot(unit_TPD, unit_TPD[torch.tensor(reference, device=unit_TPD.device)])
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

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 4 * grid.num_groups * width  # one norm and one dot product per token


class Visible(NamedTuple):
    """What layers behind `layer` read at one decoding step."""

    key_M: Tensor
    """int64 places in the cache, increasing."""
    attention_V: Tensor
    """What the next step is compared with."""
    similarity: float
    chosen: bool
    """False: the step was so much like the last one that nothing new was chosen."""


def visible_keys(
    attention_HM: Tensor, start: int, num_keys: int, last: Visible | None, *, hidden: float = 0.7, limit: float = 0.9,
    compat: Literal["official"] | None = None,
) -> Visible:  # fmt: skip
    """Part 2 of DyCoke: the keys of the video that a decoding step may read, by the attention of the layer before.

    attention_HM: probabilities of one query in LLM layer 2 (heads x keys of the cache); the video has `num_keys` of
    them from `start` on. The trunc(V (1 - hidden)) most attended stay visible, and everything outside the video. A step
    whose attention is like the last one's (cosine of at least `limit`) keeps the last choice; the release then reads
    the whole cache (compat="official"). `last` is None at the first step of an answer."""
    attention_V = attention_HM[:, start : start + num_keys].float().mean(0)
    similarity = 0.0 if last is None else float(F.cosine_similarity(attention_V, last.attention_V, dim=0))
    num_all, end = attention_HM.shape[1], start + num_keys
    number_M = torch.arange(num_all, device=attention_HM.device)
    if last is not None and similarity >= limit:
        if compat == "official":
            return Visible(number_M, attention_V, similarity, chosen=False)
        earlier_M = last.key_M[last.key_M < end]
        return Visible(torch.cat([earlier_M, number_M[end:]]), attention_V, similarity, chosen=False)
    kept_V = ops.top(attention_V, int(num_keys * (1 - hidden))).sort().values
    return Visible(torch.cat([number_M[:start], start + kept_V, number_M[end:]]), attention_V, similarity, chosen=True)
