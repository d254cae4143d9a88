"""HoliTom: merge what stands still, rank what moves by attention; and its second stage inside the LLM.

Shape suffixes beside those of `stts.tokens`: W = windows, B = windows with static places, Q = static places of one,
padded to the most of any, C = cluster centres, M = groups that move, R = groups that are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from stts.pruners import density, ops
from stts.pruners.base import ByHost, HostInfo, Newlines, PerVideo, Positions, keep_top, most_alike
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens


class Still(NamedTuple):
    """Static places of a window."""

    start: int
    end: int
    """Behind its last frame."""
    num_places: int
    num_centres: int


@dataclass(frozen=True, kw_only=True)
class HoliTom(ByHost):
    """Merge places that stand still over a window of frames and cluster them; of what moves keep the most attended.

    A place is static in a window if cos(x[t, p], x[t+1, p]) > tau for all of its pairs of frames. The windows are cut
    so that merging static places saves the most tokens, g in all; what is left is pruned at the ratio that makes up for
    it, R' = min(1, R / ((N - g) / N)), N tokens in all:

        static, per window:   mean over its frames, then round(P R') cluster centres, placed in the first frame:
                              beta centre + (1 - beta) mean(other members)
        moving, per frame:    the ceil(M R') places with the highest attention, as they are

    arXiv 2505.21334 (outer stage); `holitom/llava_arch.py` of the release. One frame: nothing is static. A window with
    round(P R') = 0 loses its static places. R' = 1: static places are still merged over time, not clustered.

    **Differs:** in order: the release puts the static tokens of a window before all of its frames, unless every row
    ends with a newline; here the order is that of the video (compat="official": the release's). The release adds noise
    to break ties of the density; here the earlier of two equally dense places counts as denser (two that are each
    other's nearest always tie if there are two centres, and everything ties if there is one). The release keeps R'
    for the next video of a batch; here every video starts from R. A share of the moving budget for clustering (0 in
    every published run, other values crash in the release) is not offered. An exact budget drops the static centres of
    the lowest density score first, and is in the order of the video under both values of `compat`. A video that would
    lose every token gets its planned number by attention. Hosts with (t, h, w) positions keep the original ones."""

    paper: ClassVar[str] = "2505.21334"
    needs_time: ClassVar[str] = "it merges places that stand still from frame to frame"
    signals: ClassVar[frozenset[Signal]] = frozenset({"attn"})
    count_known: ClassVar[bool] = False
    newlines: ClassVar[Newlines] = "kept_rows"

    tau: float | None = None
    """Similarity above which a place stands still; None: as published for the ratio, see `published_tau`."""
    static_tau: float | None = None
    """The same for what is merged inside the windows that `tau` cut; None: equal to `tau` (SToP: 0.8)."""
    beta: float = 0.6
    """Weight of a cluster's centre against the mean of its other members."""
    num_neighbours: int = 7
    max_window: int = 1024
    newline_per_row: bool = False
    """The host ends every row with a newline; official order only."""
    compat: Literal["official"] | None = None

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published values, in the layout and positions of this host."""
        return super().for_host(host, **{"newline_per_row": host.newline_per_row, **options})

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        num_groups, num_places = video.num_groups, video.grid.per_frame
        salience_G = ops.rank_salience(video)
        tau = published_tau(budget.retention_ratio) if self.tau is None else self.tau
        similarity_TP = ops.neighbour_similarity(video.x_ND, video.grid, video.norm_N).view(-1, num_places)[1:]
        windows, gain = ops.temporal_windows(similarity_TP > tau, self.max_window)
        ratio = min(budget.retention_ratio / ((num_groups - gain) / num_groups), 1.0)
        stays_TP = ops.is_static(video, similarity_TP, tau if self.static_tau is None else self.static_tau)
        static_WP = ops.static_places(stays_TP, windows)
        num_static = static_WP.sum(1).tolist()
        num_moving = [math.ceil((num_places - n) * ratio) for n in num_static]

        window_of = [number for number, (start, end) in enumerate(windows) for _ in range(start, end)]
        window_T = torch.tensor(window_of, device=salience_G.device)
        num_moving_T = torch.tensor(num_moving, device=salience_G.device)[window_T]
        total = sum(n * (end - start) for n, (start, end) in zip(num_moving, windows, strict=True))
        index_M = _most_attended(salience_G.view(-1, num_places), static_WP[window_T], num_moving_T, total)

        sets = [
            Still(start, end, n, centres)
            for (start, end), n in zip(windows, num_static, strict=True)
            if (centres := round(n * ratio))
        ]
        merged = self._merge_static(video, static_WP[window_T], sets)
        merged = [(index_M[:0], video.x_ND[:0], salience_G[:0]), *merged]
        index_C, x_CD, score_C = (torch.cat(column) for column in zip(*merged, strict=True))
        index_K, order_K = torch.cat([index_M, index_C]).sort()
        score_K = torch.cat([torch.full_like(salience_G[index_M], torch.inf), score_C])[order_K]
        kept = Kept(index_K=index_K)
        in_order = budget.exact or not len(index_K)
        if in_order:
            kept = ops.fit_count(video, kept, budget.num_kept, salience_G, score_K)
        if not len(index_C):
            return kept
        x_KD = ops.features_of(video.x_ND, kept.index_K, index_C, x_CD)
        if in_order or self.compat != "official" or self.newline_per_row:
            return replace(kept, x_KD=x_KD)
        moves_K = score_K.isinf()
        order_K = (kept.index_K + num_groups * (2 * window_T[kept.index_K // num_places] + moves_K)).argsort()
        return Kept(index_K=kept.index_K[order_K], x_KD=x_KD[order_K])

    def _merge_static(
        self, video: VideoTokens, static_TP: Tensor, sets: Sequence[Still]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Groups of the centres, their tokens, and the density scores they were chosen by; sets of alike size together.

        static_TP: for each frame the static places of its window."""
        x_TN = video.x_ND.reshape(video.grid.t, -1)
        merged = []
        for group in density.alike([still.num_places for still in sets]):
            chosen = [sets[n] for n in group]
            set_T = torch.full((video.grid.t,), -1)
            for number, still in enumerate(chosen):
                set_T[still.start : still.end] = number
            mean_BN, _ = ops.cluster_mean(x_TN, set_T.to(x_TN.device), len(chosen))
            start_B, _, size_B, num_B = torch.tensor(chosen, device=x_TN.device).unbind(1)
            most = max(still.num_places for still in chosen)
            # Static places first, ascending; behind them padding.
            place_BQ = ops.top(static_TP[start_B].to(torch.uint8), most)
            y_BPD = mean_BN.view(len(chosen), video.grid.per_frame, -1)
            y_BQD = y_BPD.gather(1, place_BQ[..., None].expand(-1, -1, y_BPD.shape[-1]))
            num_centres = sum(still.num_centres for still in chosen)
            row_C, x_CD, score_BQ = self._cluster(video, y_BQD, place_BQ, size_B, num_B, num_centres)
            index_BQ = start_B[:, None] * video.grid.per_frame + place_BQ
            merged.append((index_BQ.flatten()[row_C], x_CD.to(video.x_ND.dtype), score_BQ.flatten()[row_C]))
        return merged

    def _cluster(
        self, video: VideoTokens, y_BQD: Tensor, place_BQ: Tensor, size_B: Tensor, num_B: Tensor, num_centres: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `num_B` centres among the first `size_B` tokens of each set, (C,) of all rows; blended; all scores."""
        _, most, width = y_BQD.shape
        number_Q = torch.arange(most, device=y_BQD.device)
        with torch.no_grad():
            valid_BQ = number_Q < size_B[:, None]
            distance_BQQ = density.distances(y_BQD) / math.sqrt(width)
            score_BQ = density.density_peaks(
                distance_BQQ, self.num_neighbours, count_self=True, valid_BN=valid_BQ, fewer_B=num_B
            )
            score_BQ = ops.rank_density(video, score_BQ, place_BQ)
            first_BQ = number_Q < num_B[:, None]
            centre_BQ = torch.zeros_like(first_BQ).scatter_(1, ops.top(score_BQ, most), first_BQ)
            nearest_BQ = distance_BQQ.masked_fill_(~centre_BQ[:, None, :], torch.inf).argmin(-1)
            row_C = centre_BQ.flatten().nonzero_static(size=num_centres)[:, 0]
            number_BQ = centre_BQ.flatten().cumsum(0).view_as(centre_BQ) - 1  # of each centre among all
            cluster_BQ = number_BQ.gather(1, nearest_BQ)
            cluster_BQ = cluster_BQ.masked_fill(centre_BQ | ~valid_BQ, -1)  # the mean is that of the other members
        mean_CD, count_C = ops.cluster_mean(y_BQD.flatten(0, 1), cluster_BQ.flatten(), num_centres)
        own_CD = y_BQD.flatten(0, 1)[row_C]
        weight_C1 = torch.where(count_C[:, None] > 0, self.beta, 1.0)  # a centre alone stays as it is
        return row_C, mean_CD.mul_(1 - weight_C1).addcmul_(own_CD, weight_C1), score_BQ

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """At most: windows of two frames in which nothing moves cost the most."""
        static = (grid.t // 2) * grid.per_frame  # places that are compared with the others of their window
        return 8 * grid.num_groups * width + 2 * static * grid.per_frame * width  # norms, cosines, two means; distances


def _most_attended(salience_TP: Tensor, static_TP: Tensor, num_moving_T: Tensor, total: int) -> Tensor:
    """(M,) groups, increasing: in each frame the given number of places that move, by attention; `total` in all."""
    ranked_TP = ops.top(salience_TP.masked_fill(static_TP, -torch.inf), salience_TP.shape[1])
    first_TP = torch.arange(salience_TP.shape[1], device=salience_TP.device) < num_moving_T[:, None]
    return torch.zeros_like(static_TP).scatter(1, ranked_TP, first_TP).flatten().nonzero_static(size=total)[:, 0]


def published_tau(retention_ratio: float) -> float:
    """0.65 at a ratio of 0.10, 0.8 at 0.15, 0.20 and 0.25 (arXiv 2505.21334); other ratios take the nearest one's."""
    return 0.65 if retention_ratio < (0.10 + 0.15) / 2 else 0.8


@dataclass(frozen=True, kw_only=True)
class HoliTomInner(PerVideo):
    """Keep what the last prompt token attends to, and merge each dropped token into the kept one most like it.

        h_k <- (h_k + h_r) / 2,   for every dropped r that has k as its target, one after the other, ascending

    arXiv 2505.21334 (inner stage); `holitom/modeling_qwen2.py` of the release: before layer 18 of 28, half stays. Later
    sources weigh more. Computed in closed form, equal to 1e-5: of m sources the j-th weighs 2^-(m - j + 1), the kept
    token 2^-m. Nothing dropped: every token stays as it is.

    **Differs:** newline tokens are no candidates, they all stay; in the release they are ranked and merged with the
    rest. Hidden states are averaged in fp32. In shallow LLMs the layer number is scaled."""

    paper: ClassVar[str] = "2505.21334"
    signals: ClassVar[frozenset[Signal]] = frozenset({"last_row"})
    positions: ClassVar[Positions] = "original"

    layer: int = 18
    share: float = 0.5

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published layer, scaled to this host."""
        return cls(**{"layer": host.llm_layer(18), **options})

    @property
    def site(self) -> Site:  # type: ignore[override]  # fields decide, so it cannot be a class variable
        return Site("llm", layer=self.layer, share=self.share)

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        salience_G = ops.need(video.salience_G, "last_row", video).float()
        kept = keep_top(video, salience_G, budget.num_kept)
        x_RD, target_R = most_alike(video, kept.index_K)
        sorted_R, order_R = target_R.sort(stable=True)
        to_come_R = torch.empty_like(order_R)  # sources, this one included, that the same target has yet to take
        to_come_R[order_R] = torch.searchsorted(sorted_R, sorted_R, right=True) - torch.arange(
            len(order_R), device=order_R.device
        )
        count_K = torch.zeros_like(kept.index_K).scatter_add_(0, target_R, torch.ones_like(target_R))
        x_KD = video.x_ND[kept.index_K].float() * torch.exp2(-count_K.float())[:, None]
        x_KD = ops.add_rows(x_KD, target_R, x_RD.mul_(torch.exp2(-to_come_R.float())[:, None]))
        return replace(kept, x_KD=x_KD.to(video.x_ND.dtype))

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        present = min(
            grid.num_groups, round(num_kept / self.share)
        )  # an earlier stage may have left fewer than the grid
        return 2 * (present - num_kept) * num_kept * width + 4 * present * width  # cosines; norms and weighted sums
