"""FlashVID: attended tokens that differ from one another, and trees of repeated tokens; a cut inside the LLM.

Shape suffixes beside those of `stts.tokens`: W = segments, A = tokens selected in each frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    x_TPD: Tensor
    """fp32 features of the roots."""


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
        place_TA = self.select(x_TPD.detach(), attention_TP, segment_T, num_selected)
        selected_TP = torch.zeros_like(attention_TP, dtype=torch.bool).scatter_(1, place_TA, True)
        trees = self.merge_trees(x_TPD, selected_TP, segment_T, length_T, num_selected + num_merged)
        centre_TP, merged_TPD, score_TP = self.merge_roots(trees, segment_T, length_T, num_merged)
        centre_TP &= ~selected_TP  # official: a place that was selected and merged
        kept_TP = selected_TP | centre_TP
        x_KD = torch.where(selected_TP[..., None], x_TPD, merged_TPD)[kept_TP].to(video.x_ND.dtype)
        kept = Kept(index_K=kept_TP.flatten().nonzero()[:, 0], x_KD=x_KD)
        if not budget.exact:
            return kept
        score_K = score_TP.masked_fill(selected_TP, torch.inf)[kept_TP]
        return ops.fit_count(video, kept, budget.num_kept, attention_TP.flatten(), score_K)

    def segments(self, x_TPD: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) int64 segment of each frame, and how many frames it has."""
        unit_TD = F.normalize(x_TPD.mean(1), dim=-1)
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

    def select(self, x_TPD: Tensor, attention_TP: Tensor, segment_T: Tensor, number: int) -> Tensor:
        """(T, A) places of the selected tokens of each frame, increasing."""
        if self.selection == "attn":
            return ops.top(attention_TP, number).sort(-1).values
        weight_TP = torch.ones_like(attention_TP) if self.selection == "div" else attention_TP
        if self.selection == "attn_div_v2":
            same_TT = (segment_T[:, None] == segment_T).float()
            event_TD = same_TT @ x_TPD.mean(1) / same_TT.sum(1, keepdim=True)
            weight_TP = weight_TP * torch.linalg.vecdot(x_TPD, event_TD[:, None])
        return ops.farthest_first(x_TPD, number, weight_TP).sort(-1).values

    def merge_trees(
        self, x_TPD: Tensor, selected_TP: Tensor, segment_T: Tensor, length_T: Tensor, budget: int
    ) -> Trees:
        """Every token that is not selected joins the most similar one of the frame before, where it may."""
        num_frames, num_places, _ = x_TPD.shape
        device, first_T = x_TPD.device, F.pad(segment_T.diff() != 0, (1, 0), value=True)
        with torch.no_grad():
            unit_TPD = F.normalize(x_TPD, dim=-1)
            free_TPP = ~selected_TP[1:, :, None] & ~selected_TP[:-1, None, :]
            match_TP, parent_TP = (unit_TPD[1:] @ unit_TPD[:-1].transpose(1, 2)).masked_fill_(~free_TPP, -1).max(-1)
            match_TP = F.pad(match_TP, (0, 0, 1, 0), value=-1).masked_fill_(first_T[:, None], -1)
            joins_TP = match_TP > self._limits(match_TP, segment_T, length_T, budget)[:, None]
            cell_TP = torch.arange(num_frames * num_places, device=device).view(num_frames, num_places)
            parent_TP = F.pad(parent_TP, (0, 0, 1, 0)) + cell_TP[:, :1] - num_places
            parent_N = torch.where(joins_TP, parent_TP, cell_TP).flatten()
            root_N = parent_N
            for _ in range(math.ceil(math.log2(max(2, num_frames)))):  # each step doubles the way to the root
                root_N = root_N[root_N]
        mean_ND, size_N = ops.cluster_mean(x_TPD.flatten(0, 1), root_N, len(root_N))
        if self.compat == "official":
            children_N = torch.bincount(parent_N[joins_TP.flatten()], minlength=len(parent_N))
            mean_ND = mean_ND * (size_N / (1 + children_N))[:, None]
        root_TP = ~joins_TP & ~selected_TP
        if self.compat == "official":
            root_TP |= (length_T == 1)[:, None]
        return Trees(root_TP, mean_ND.view_as(x_TPD))

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

    def merge_roots(
        self, trees: Trees, segment_T: Tensor, length_T: Tensor, num_merged: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Roots that stay, bool (T, S); what they become, (T, S, D); their density scores, (T, S)."""
        root_TP, x_TPD = trees
        num_frames, num_places, width = x_TPD.shape
        with torch.no_grad():
            root_T = root_TP.sum(1)
            roots_T = ((segment_T[:, None] == segment_T) * root_T).sum(1)  # of the whole segment
            share_T = num_merged * length_T.double() / roots_T.clamp_min(1)
            count_T = torch.where(share_T < 1, (root_T * share_T).ceil(), root_T).long()
            distance_TPP = density.distances(x_TPD) / math.sqrt(width)
            score_TP = density.density_peaks(
                distance_TPP, self.num_neighbours, count_self=True, valid_BN=root_TP, fewer_B=count_T.clamp_min(1)
            )
            first_TP = torch.arange(num_places, device=x_TPD.device) < count_T[:, None]
            centre_TP = torch.zeros_like(root_TP).scatter_(1, ops.top(score_TP, num_places), first_TP)
            nearest_TP = distance_TPP.masked_fill_(~centre_TP[:, None, :], torch.inf).argmin(-1)
            place_P = torch.arange(num_places, device=x_TPD.device)
            nearest_TP = torch.where(centre_TP, place_P, nearest_TP)
            cluster_TP = nearest_TP + num_places * torch.arange(num_frames, device=x_TPD.device)[:, None]
            cluster_TP = torch.where(root_TP & (count_T > 0)[:, None], cluster_TP, -1)
        mean_ND, _ = ops.cluster_mean(x_TPD.flatten(0, 1), cluster_TP.flatten(), num_frames * num_places)
        return centre_TP, mean_ND.view_as(x_TPD), score_TP

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Cosines of neighbouring frames, distances inside frames (twice), means."""
        return (6 * grid.t * grid.per_frame**2 + 8 * grid.num_groups) * width


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
