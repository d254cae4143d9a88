"""Tango: salient and merged tokens per window of frames, chosen by features that know place and second.

Shape suffixes beside those of `stts.tokens`: W = windows, Q = frames of all parts, M = rows that stay, C = rows whose
features change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import ByHost, HostInfo, Newlines, PerVideo, Positions, keep_top, most_alike
from stts.pruners.st_rope import st_rope
from stts.pruners.tango_pools import Part, divide, merge_context, pool_rows, rows_of, select_salient
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens

SINKS_ONEVISION = (28, 27, 41, 169, 11, 12)
"""Places of the 14x14 grid that are salient in every video."""
SINKS_LLAVA_VIDEO = (26, 157, 11)
"""The same on the 13x13 grid."""


@dataclass(frozen=True, kw_only=True)
class Tango(ByHost):
    """Keep salient tokens that differ from each other, and centres that speak for all the rest.

    arXiv 2604.09547; `tango/utils.py` and `tango/pruner.py` of the release.

    * Windows: the video is cut where most tokens repeat (cosine of neighbours above tau), `ops.temporal_windows`.
    * Static places of a window (all cosines above `static_tau`) become one frame, the mean over time, at its start; the
      ratio rises for what is left, r' = min(1, r N / (N - (n - 1) S_static)).
    * Of every frame ceil(r' P) tokens stay: a share 1 - c is salient (`select_salient`), c is merged (`merge_context`).
      Merged tokens are chosen among what is left of all frames of the window together.
    * Distances are those of `st_rope` features, turned by second, row and column.

    Seconds come from `timestamps_T`, without it frame numbers count as seconds. The release's count is not exact:
    ceilings lift it, and a still video stays below it, as r' ends at 1. An exact budget drops merged tokens by their
    density score and then the least salient, or adds salient ones. Salience at `sinks` counts as 0.

    **Differs:** the release lists centres by falling density and writes the merged values in the order of the video, so
    most land on another centre of the same part (compat="official" does that; the kept places are the same). It adds
    noise to break ties of density; here the earlier token is denser, among salient candidates the more salient one.
    Every centre owns itself, so that of two equal points none leaves an empty cluster. Angles are fp64."""

    paper: ClassVar[str] = "2604.09547"
    needs_time: ClassVar[str] = "it prunes windows of frames and merges places that stand still"
    signals = frozenset[Signal]({"probe"})
    count_known = False
    newlines: ClassVar[Newlines] = "kept_rows"

    tau: float | None = None
    """Cosine above which a place repeats, when windows are cut. None: as published for the nearest ratio, 0.65 for 0.1,
    0.8 for 0.15 and more; so 0.65 below 0.125."""
    static_tau: float = 0.8
    """The same inside a window; not lowered with tau, as in the release."""
    expansion: float = 1.5
    """Candidates per salient token (alpha)."""
    context_share: float = 0.4
    """Share of merged tokens (c)."""
    num_neighbours: int = 7
    beta: float = 0.6
    """Weight of a centre against the mean of its cluster."""
    base_time: float = 1e4
    base_space: float = 1e3
    section: tuple[int, int, int] | None = None
    """Channels turned by second, row and column; None: `sections`."""
    sinks: tuple[int, ...] = ()
    """Places of a frame that attract attention whatever they show."""
    compat: Literal["official"] | None = None

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """Published sinks where the grid is the published one: LLaVA models with 27x27 patches per frame."""
        sinks: tuple[int, ...] = ()
        if host.family.startswith("llava") and host.patches_per_frame == 729:
            sinks = SINKS_LLAVA_VIDEO if host.newline_per_row else SINKS_ONEVISION
        return super().for_host(host, **{"sinks": sinks, **options})

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        grid, ratio = video.grid, budget.retention_ratio
        x_GD, device = video.x_ND.detach(), video.x_ND.device
        second_T = torch.arange(grid.t) if video.timestamps_T is None else video.timestamps_T
        z_GD = st_rope(x_GD, grid, second_T.to(device), self.section, self.base_time, self.base_space)
        similarity_TP = ops.neighbour_similarity(x_GD, grid, video.norm_N).view(grid.t, -1)[1:]  # frames t and t + 1
        tau = self.tau if self.tau is not None else 0.65 if ratio < 0.125 else 0.8
        windows, _ = ops.temporal_windows(similarity_TP > tau)
        static_WP = ops.static_places(similarity_TP > self.static_tau, windows)
        num_static = static_WP.sum(1).tolist()
        still = [window for window, number in zip(windows, num_static, strict=True) if number]
        tokens = rows_of(video, self.salience(video), z_GD, still)
        row_QP, parts = pool_rows(windows, static_WP, num_static), self.parts(windows, num_static, video, ratio)

        pools = [part.frame for part in parts for _ in range(part.num_frames)]
        chosen_QP = select_salient(tokens, row_QP, pools, self.expansion, self.num_neighbours)
        divided = divide(row_QP, chosen_QP, parts, self.expansion)
        row_M = divided.settled_M
        row_C = row_M[: sum(divided.settled[: len(still)])]  # means over time, and what others are merged into
        x_CD, score_M = tokens.still(row_C), torch.full((len(row_M),), torch.inf, device=device)
        if divided.pools:
            swapped = self.compat == "official"
            place_C, value_CD, score_C = merge_context(
                tokens, divided.open_L, divided.pools, self.num_neighbours, self.beta, swapped=swapped
            )
            centre_C = divided.open_L[place_C]
            row_M, row_C = torch.cat([row_M, centre_C]), torch.cat([row_C, centre_C])
            x_CD, score_M = torch.cat([x_CD, value_CD]), torch.cat([score_M, score_C])
        index_K, order_K = tokens.cell_R[row_M].sort()
        kept = Kept(index_K=index_K)
        if budget.exact:
            kept = ops.fit_count(video, kept, budget.num_kept, tokens.salience_R[: video.num_groups], score_M[order_K])
        return replace(kept, x_KD=ops.features_of(video.x_ND, kept.index_K, tokens.cell_R[row_C], x_CD))

    def parts(
        self, windows: Sequence[tuple[int, int]], num_static: Sequence[int], video: VideoTokens, ratio: float
    ) -> list[Part]:
        """Static places of every window that has some, then the moving places of every window."""
        still: list[Part] = []
        moving: list[Part] = []
        for (start, end), number in zip(windows, num_static, strict=True):
            num_frames, num_places, raised = end - start, video.grid.per_frame, ratio
            if num_frames > 1:
                size = num_frames * num_places
                raised = min(1.0, ratio * size / (size - (num_frames - 1) * number))
            for parts, frames, places in ((still, 1, number), (moving, num_frames, num_places - number)):
                num_kept = math.ceil(places * raised)
                parts.append(Part(frames, places, num_kept, math.floor(num_kept * (1 - self.context_share))))
        return [part for part in still if part.num_places] + moving

    def salience(self, video: VideoTokens) -> Tensor:
        """(G,) fp32, 0 at sinks: these can still be merged."""
        salience_G = ops.need(video.salience_G, "probe", video).float()
        if not self.sinks:
            return salience_G
        if not 0 <= min(self.sinks) <= max(self.sinks) < video.grid.per_frame:
            raise ValueError(
                f"sinks={self.sinks} are places of a frame, below {video.grid.per_frame} for {video.grid}; give those "
                "of this grid, or () for none"
            )
        sink_I = torch.tensor(self.sinks, device=salience_G.device)
        return salience_G.view(video.grid.t, -1).index_fill(1, sink_I, 0.0).flatten()

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Upper bound: one window without static places, in which distances are dearest."""
        per_frame = min(grid.per_frame, math.ceil(num_kept / grid.t))
        num_salient = math.floor(per_frame * (1 - self.context_share))
        num_candidates = min(grid.per_frame, math.floor(self.expansion * num_salient))
        num_left = grid.num_groups - grid.t * num_salient
        pairs = grid.t * num_candidates**2 + num_left**2
        return 2 * width * (pairs + 6 * grid.num_groups)  # cosine, norm (2 each), rotation, mean of the cluster


# --- inside the LLM ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TangoInner(PerVideo):
    """Keep what the last prompt token attends to, and fold each dropped token into the kept one most like it.

        x_k <- beta x_k + (1 - beta) mean(x_k and the tokens folded into it)

    arXiv 2604.09547, rows "w/ intra-LLM" of its tables; `intra_llm_pruning/fastv_tango.py` of the release: before
    layer 18 of 28, half of what is present stays. `budget.plan` raises the ratio of the stage before the LLM to match.

    **Differs:** in shallower LLMs the layer number is scaled; equal attention keeps the earlier token."""

    paper: ClassVar[str] = "2604.09547"
    signals = frozenset[Signal]({"last_row"})
    positions: ClassVar[Positions] = "original"

    layer: int = 18
    share: float = 0.5
    beta: float = 0.6
    """Weight of the kept token against the mean of its cluster."""

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published layer, scaled to this host."""
        return cls(**{"layer": host.llm_layer(18), **options})

    @property
    def site(self) -> Site:  # type: ignore[override]  # fields decide, so it cannot be a class variable
        return Site("llm", layer=self.layer, share=self.share)

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        kept = keep_top(video, ops.need(video.salience_G, "last_row", video).float(), budget.num_kept)
        x_RD, target_R = most_alike(video, kept.index_K)
        count_K = torch.ones_like(kept.index_K).scatter_add_(0, target_R, torch.ones_like(target_R))
        share_K1 = (1 - self.beta) / count_K[:, None]
        x_KD = video.x_ND[kept.index_K].float() * (self.beta + share_K1)
        x_KD = ops.add_rows(x_KD, target_R, x_RD.mul_(share_K1[target_R]))
        return replace(kept, x_KD=x_KD.to(video.x_ND.dtype))

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        present = min(grid.num_groups, round(num_kept / self.share))
        return 2 * width * ((present - num_kept) * num_kept + 2 * present)  # cosines; norms and means of the clusters
