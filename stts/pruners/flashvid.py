"""FlashVID: attended tokens that differ from one another, and trees of repeated tokens; a cut inside the LLM.

Shape suffixes beside those of `stts.tokens`: W = segments, A = tokens selected in each frame, R = roots of trees, C =
roots that stay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import density, ops
from stts.pruners.base import HostInfo, Newlines, PerVideo, Positions, keep_top
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens

Selection = Literal["attn_div_v2", "attn_div", "attn", "div"]


class Trees(NamedTuple):
    """Tokens of a segment that repeat one another, merged into the first of them."""

    root_TP: Tensor
    """bool: tokens that stay, selected ones apart."""
    roots: list[int]
    """Their number in each frame."""
    row_R: Tensor
    """int64 rows of the roots among the tokens of the video and, behind them, `mean_AD`."""
    x_ND: Tensor
    mean_AD: Tensor
    """fp32 features of the roots that others have joined."""

    @property
    def x_TPD(self) -> Tensor:
        """Features of the roots at their places; zeros elsewhere."""
        x_RD = density.take_rows(self.x_ND, self.row_R, self.mean_AD)
        return x_RD.new_zeros(*self.root_TP.shape, x_RD.shape[1]).index_put_((self.root_TP,), x_RD)


@dataclass(frozen=True, kw_only=True)
class FlashVID(PerVideo):
    """Select diverse, attended tokens of each frame; merge the others along trees in time, then by density peaks.

    A video is cut where frame means differ (cosine below `segment_tau`, and at the `min_segments - 1` least similar
    pairs). Of B = ceil(S r) tokens a frame, ceil(B alpha) are selected by a greedy max-min choice on

        C_ij = (1 - cos(x_i, x_j)) a_j e_j,   a = attention,   e_j = x_j . (mean of the frame means of the segment)

    (e only in `attn_div_v2`). Every other token joins the token of the frame before that is most like it, if their
    cosine exceeds tau; where fewer than B tokens a frame would be left, only the most similar join. A tree becomes the
    mean of its tokens at its first one. Of the roots of a segment, as many cluster centres stay as B allows, shared out
    by the roots of each frame and merged with the nearest roots of their frame (density peaks).

    arXiv:2602.08024; `flashvid/utils.py` of Fanziyang-v/FlashVID. `budget.exact`: B = ceil(num_kept / T), then merged
    tokens of lowest score are dropped, or attended ones added. `flashvid+inner` is the published pair with the cut
    inside the LLM; `budget.plan` raises the ratio before it (expansion 1.25).

    **Differs:** a tree is the mean of all of its tokens; the release divides their sum by 1 + the direct children of
    the root, so norms grow with depth. A segment of one frame merges what was not selected; the release merges all of
    it, and one place may stand twice in its output. compat="official" does both, but keeps such a place once, as it was
    selected. A token is selected once (in the release `attn_div_v2` may repeat one). Equally dense tokens go by order
    (the release adds noise); a segment without roots keeps its selected tokens (fails there)."""

    paper: ClassVar[str] = "2602.08024"
    needs_time: ClassVar[str] = "it merges tokens along trees from frame to frame"
    signals: ClassVar[frozenset[Signal]] = frozenset({"attn"})
    count_known: ClassVar[bool] = False
    newlines: ClassVar[Newlines] = "after_frame"
    positions: Positions = "compact"  # type: ignore[misc]  # the host decides, so it is a field

    selection: Selection = "attn_div_v2"
    min_segments: int = 8
    segment_tau: float = 0.9
    selected_share: float = 0.7
    """Share of the budget that is selected (alpha)."""
    tau: float = 0.8
    """Cosine above which a token joins one of the frame before."""
    num_neighbours: int = 7
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.selection not in get_args(Selection):
            raise ValueError(f"selection={self.selection!r} is unknown; expected one of {get_args(Selection)}")
        if not 0 <= self.selected_share <= 1 or min(self.min_segments, self.num_neighbours) < 1:
            raise ValueError(
                f"selected_share={self.selected_share} must be in [0, 1], min_segments={self.min_segments} and "
                f"num_neighbours={self.num_neighbours} at least 1"
            )

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published selection and number of segments of this family."""
        qwen = {"selection": "attn_div", "min_segments": 4, "positions": "original"} if host.mrope else {}
        return cls(**{**qwen, **options})

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        grid = video.grid
        x_TPD = video.x_ND.float().view(grid.t, grid.per_frame, -1)
        attention_TP = ops.rank_salience(video).detach().view(grid.t, -1)
        segment_T, length_T = self.segments(x_TPD.detach())
        num_selected, num_merged = self.counts(budget, grid)
        place_TA = self.select(x_TPD.detach(), attention_TP, segment_T, num_selected, video.norm_N)
        selected_TP = torch.zeros_like(attention_TP, dtype=torch.bool).scatter_(1, place_TA, True)
        total = num_selected + num_merged
        trees = self.merge_trees(x_TPD, selected_TP, segment_T, length_T, total, video.norm_N)
        counts = self.root_counts(segment_T.tolist(), trees.roots, num_merged)
        found = density.cluster(
            x_TPD.detach().flatten(0, 1), trees.row_R, trees.roots, counts, self.num_neighbours,
            fewer=True, extra_AD=trees.mean_AD.detach(),
        )  # fmt: skip
        cluster_R = trees.row_R.new_full((video.num_groups + len(trees.mean_AD),), -1)
        cluster_R = cluster_R.index_copy_(0, trees.row_R, found.cluster_M)
        x_CD, _ = ops.cluster_mean(trees.x_ND, cluster_R, len(found.centre_C), trees.mean_AD)
        root_R = trees.root_TP.flatten().nonzero_static(size=len(trees.row_R))[:, 0]
        index_C, score_C = root_R[found.centre_C], found.score_C
        if self.compat == "official":  # a place that was selected and merged
            once_C = ~selected_TP.flatten()[index_C]
            index_C, x_CD, score_C = index_C[once_C], x_CD[once_C], score_C[once_C]
        selected_K = selected_TP.flatten().nonzero_static(size=place_TA.numel())[:, 0]
        index_K, order_K = torch.cat([selected_K, index_C]).sort()
        kept = Kept(index_K=index_K)
        if budget.exact:
            score_K = torch.cat([torch.full_like(selected_K, torch.inf, dtype=torch.float32), score_C])[order_K]
            kept = ops.fit_count(video, kept, budget.num_kept, attention_TP.flatten(), score_K)
        return replace(kept, x_KD=ops.features_of(video.x_ND, kept.index_K, index_C, x_CD))

    def segments(self, x_TPD: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) int64 segment of each frame, and how many frames it has."""
        unit_TD = F.normalize(frame_sums(x_TPD), dim=-1)
        similarity_T = torch.linalg.vecdot(unit_TD[:-1], unit_TD[1:])
        cut_T = similarity_T < self.segment_tau
        cut_T[ops.top(-similarity_T, min(self.min_segments, len(x_TPD)) - 1)] = True
        segment_T = F.pad(cut_T.long().cumsum(0), (1, 0))
        return segment_T, (segment_T[:, None] == segment_T).sum(1)

    def counts(self, budget: Budget, grid: Grid) -> tuple[int, int]:
        """Selected and merged tokens of a frame."""
        wanted = Decimal(str(budget.retention_ratio)) * grid.per_frame
        if budget.exact:
            wanted = Decimal(budget.num_kept) / grid.t
        total = max(1, _ceil(wanted))
        selected = _ceil(total * Decimal(str(self.selected_share)))
        return max(1, selected), total - max(1, selected)

    def select(
        self, x_TPD: Tensor, attention_TP: Tensor, segment_T: Tensor, number: int, norm_N: Tensor | None = None
    ) -> Tensor:
        """(T, A) places of the selected tokens of each frame, increasing; norm_N: `VideoTokens.norm_N`."""
        if self.selection == "attn":
            return ops.top(attention_TP, number).sort(-1).values
        weight_TP = torch.ones_like(attention_TP) if self.selection == "div" else attention_TP
        if self.selection == "attn_div_v2":
            same_TT = (segment_T[:, None] == segment_T).float()
            event_TD = same_TT @ frame_sums(x_TPD) / (same_TT.sum(1, keepdim=True) * x_TPD.shape[1])
            weight_TP = weight_TP * torch.bmm(event_TD[:, None], x_TPD.transpose(1, 2))[:, 0]
        norm_TP = None if norm_N is None else norm_N.view_as(attention_TP)
        return ops.farthest_first(x_TPD, number, weight_TP, norm_TP).sort(-1).values

    def merge_trees(
        self,
        x_TPD: Tensor,
        selected_TP: Tensor,
        segment_T: Tensor,
        length_T: Tensor,
        budget: int,
        norm_N: Tensor | None = None,
    ) -> Trees:
        """Every token that is not selected joins the most similar one of the frame before, where it may."""
        num_frames, num_places, _ = x_TPD.shape
        device, first_T = x_TPD.device, F.pad(segment_T.diff() != 0, (1, 0), value=True)
        with torch.no_grad():
            cosine_TPP = cosines_before(x_TPD, first_T, norm_N).masked_fill_(selected_TP[:-1, None, :], -1)
            match_TP, parent_TP = cosine_TPP.masked_fill_(selected_TP[1:, :, None], -1).max(-1)
            match_TP = F.pad(match_TP, (0, 0, 1, 0), value=-1).masked_fill_(first_T[:, None], -1)
            joins_TP = match_TP > self._limits(match_TP, segment_T, length_T, budget)[:, None]
            cell_TP = torch.arange(num_frames * num_places, device=device).view(num_frames, num_places)
            parent_TP = F.pad(parent_TP, (0, 0, 1, 0)) + cell_TP[:, :1] - num_places
            parent_N = torch.where(joins_TP, parent_TP, cell_TP).flatten()
            top_N = parent_N
            for _ in range(math.ceil(math.log2(max(2, num_frames)))):  # each step doubles the way to the root
                top_N = top_N[top_N]
            root_TP = ~joins_TP & ~selected_TP
            if self.compat == "official":
                root_TP |= (length_T == 1)[:, None]
            root_N = root_TP.flatten()
            joined_N = F.pad(torch.zeros_like(root_N), (0, 1))  # the last entry takes what joins nothing
            joined_N = joined_N.index_fill_(0, torch.where(joins_TP.flatten(), top_N, len(top_N)), True)[:-1]
            *roots, num_joined = torch.cat([root_TP.sum(1), joined_N.sum()[None]]).tolist()
            number_N = torch.where(joined_N, joined_N.cumsum(0) - 1, -1)
            row_R = torch.where(joined_N, len(root_N) + number_N, cell_TP.flatten())
            row_R = row_R[root_N.nonzero_static(size=sum(roots))[:, 0]]
        x_ND = x_TPD.flatten(0, 1)
        # One row at least, so that a video without trees takes the same steps.
        mean_AD, size_A = ops.cluster_mean(x_ND, number_N[top_N], max(1, num_joined))
        if self.compat == "official":
            children_N = torch.bincount(parent_N[joins_TP.flatten()], minlength=len(parent_N))
            mean_AD[:num_joined] *= (size_A[:num_joined] / (1 + children_N[joined_N]))[:, None]
        return Trees(root_TP, roots, row_R, x_ND, mean_AD)

    def _limits(self, match_TP: Tensor, segment_T: Tensor, length_T: Tensor, budget: int) -> Tensor:
        """(T,) what a match must exceed: tau, or more where too few tokens of the segment would be left."""
        num_places = match_TP.shape[1]
        too_few_T = ops.cluster_mean((match_TP <= self.tau).float().sum(1, keepdim=True), segment_T, len(segment_T))[0]
        too_few_T = too_few_T[segment_T, 0] < budget  # mean over the frames of the segment
        falling_N = torch.sort(match_TP.flatten(), descending=True).indices
        segment_N = segment_T.repeat_interleave(num_places, output_size=match_TP.numel())
        by_segment_N = falling_N[torch.sort(segment_N[falling_N], stable=True).indices]
        before_T = (segment_T[:, None] > segment_T).sum(1)  # frames of earlier segments
        place_T = before_T * num_places + length_T * (num_places - budget) - 1
        limit_T = match_TP.flatten()[by_segment_N[place_T.clamp_min(0)]].clamp_min(-1 + 1e-6)
        limit_T = limit_T.masked_fill(torch.tensor(num_places <= budget, device=limit_T.device), torch.inf)
        return torch.where(too_few_T, limit_T, self.tau)

    def root_counts(self, segments: Sequence[int], roots: Sequence[int], num_merged: int) -> list[int]:
        """Roots that stay in each frame: the segment's quota, shared out by the roots of its frames and rounded up."""
        frames_of, roots_of = Counter(segments), Counter[int]()
        for segment, number in zip(segments, roots, strict=True):
            roots_of[segment] += number
        counts = []
        for segment, number in zip(segments, roots, strict=True):
            share = num_merged * frames_of[segment] / max(1, roots_of[segment])
            counts.append(math.ceil(number * share) if share < 1 else number)
        return counts

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Cosines of neighbouring frames, distances inside frames (twice), means."""
        return (6 * grid.t * grid.per_frame**2 + 8 * grid.num_groups) * width


def frame_sums(x_TPD: Tensor) -> Tensor:
    """(T, D) sum over the tokens of each frame, by a product, which takes half as long as `sum` on a CPU."""
    return (x_TPD.new_ones(1, 1, x_TPD.shape[1]).expand(len(x_TPD), -1, -1) @ x_TPD)[:, 0]


def cosines_before(x_TPD: Tensor, first_T: Tensor, norm_N: Tensor | None) -> Tensor:
    """(T - 1, S, S) fp32 cosines of the tokens of each frame with those of the frame before.

    first_T: bool, frames that are compared with none; what stands there is arbitrary. A CPU that goes frame by frame
    leaves them out."""
    inverse_TP1 = 1 / (ops.lengths(x_TPD) if norm_N is None else norm_N).view(*x_TPD.shape[:2], 1)
    if ops.frame_block(x_TPD) >= len(x_TPD):
        cosine_TPP = x_TPD[1:] @ x_TPD[:-1].transpose(1, 2)
    else:
        cosine_TPP = x_TPD.new_zeros(len(x_TPD) - 1, x_TPD.shape[1], x_TPD.shape[1])
        for t, is_first in enumerate(first_T[1:].tolist()):
            if not is_first:
                torch.mm(x_TPD[t + 1], x_TPD[t].T, out=cosine_TPP[t])
    return cosine_TPP.mul_(inverse_TP1[1:]).mul_(inverse_TP1[:-1].transpose(1, 2))


def _ceil(value: Decimal) -> int:
    return int(value.to_integral_value(ROUND_CEILING))


@dataclass(frozen=True, kw_only=True)
class FlashVIDInner(PerVideo):
    """Keep what the last prompt token attends to: the stage of FlashVID inside the LLM, fixed at its published share.

    arXiv:2602.08024: before layer 20 of 28, 0.3 of what is present stays (Qwen3-VL: layer 28 of 36, 0.1).

    **Differs:** the planned count, where the release rounds up; newline tokens are not counted."""

    paper: ClassVar[str] = "2602.08024"
    signals: ClassVar[frozenset[Signal]] = frozenset({"last_row"})
    positions: ClassVar[Positions] = "original"
    reads_features: ClassVar[bool] = False

    layer: int = 20
    share: float = 0.3

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published layer and share of this family, the layer scaled to shallow hosts."""
        qwen3 = {"layer": host.llm_layers - 8, "share": 0.1} if host.family == "qwen3_vl" else {}
        qwen3 = qwen3 if host.llm_layers >= 24 else {}
        return cls(**{"layer": host.llm_layer(20), **qwen3, **options})

    @property
    def site(self) -> Site:  # type: ignore[override]  # fields decide, so it cannot be a class variable
        return Site("llm", layer=self.layer, share=self.share)

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        return keep_top(video, ops.need(video.salience_G, "last_row", video).detach().float(), budget.num_kept)
