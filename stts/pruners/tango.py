"""Tango: salient and merged tokens per window of frames, chosen by features that know place and second.

Shape suffixes beside those of `stts.tokens`: W = windows, B = parts of windows, A = places of a part, Q = frames of all
parts, M = what stays of a part, L = what the salient ones leave, C = centres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import HostInfo, Newlines, PerVideo, Positions, keep_top
from stts.pruners.st_rope import merge_context, select_salient, st_rope
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens

SINKS_ONEVISION = (28, 27, 41, 169, 11, 12)
"""Places of the 14x14 grid that are salient in every video."""
SINKS_LLAVA_VIDEO = (26, 157, 11)
"""The same on the 13x13 grid."""


class Tokens(NamedTuple):
    """Of a video, or of one frame that stands for a window."""

    x_ND: Tensor
    z_ND: Tensor
    """`st_rope` features."""
    salience_N: Tensor


class Piece(NamedTuple):
    """What stays of a part of a window."""

    index_M: Tensor
    """Rows of its tokens."""
    x_MD: Tensor
    score_M: Tensor
    """Density score of a merged token, +inf of any other."""


@dataclass(frozen=True, kw_only=True)
class Tango(PerVideo):
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
    signals = frozenset[Signal]({"probe"})
    count_known = False
    newlines: ClassVar[Newlines] = "kept_rows"
    positions: Positions = "compact"  # type: ignore[misc]  # the host decides, so it is a field

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
        return cls(**{"sinks": sinks, "positions": "original" if host.mrope else "compact", **options})

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        grid, ratio = video.grid, budget.retention_ratio
        x_GD, device = video.x_ND.detach(), video.x_ND.device
        second_T = torch.arange(grid.t) if video.timestamps_T is None else video.timestamps_T
        z_GD = st_rope(x_GD, grid, second_T.to(device), self.section, self.base_time, self.base_space)
        tokens = Tokens(video.x_ND, z_GD, self.salience(video))
        cell_TP = torch.arange(grid.num_groups, device=device).view(grid.t, -1)
        similarity_TP = ops.neighbour_similarity(x_GD, grid).view(grid.t, -1)[1:]  # [t]: frames t and t + 1
        tau = self.tau if self.tau is not None else 0.65 if ratio < 0.125 else 0.8
        windows, _ = ops.temporal_windows(similarity_TP > tau)

        pieces = []
        alone = [start for start, end in windows if end - start == 1]
        if alone:
            pieces.append(self._keep_of_part(tokens, cell_TP[alone, None], ratio))
        long = [window for window in windows if window[1] - window[0] > 1]
        if long:
            static_WP = torch.stack([(similarity_TP[a : b - 1] > self.static_tau).all(0) for a, b in long])
            order_WP = torch.sort(~static_WP, dim=1, stable=True).indices  # static places first
            for (start, end), order_P, num_static in zip(long, order_WP, static_WP.sum(1).tolist(), strict=True):
                pieces += self._keep_of_window(tokens, cell_TP[start:end, order_P], num_static, ratio)
        index_M, x_MD, score_M = (torch.cat(column) for column in zip(*pieces, strict=True))
        index_K, order_K = index_M.sort()
        kept = Kept(index_K=index_K, x_KD=x_MD[order_K].to(video.x_ND.dtype))
        if not budget.exact:
            return kept
        return ops.fit_count(video, kept, budget.num_kept, tokens.salience_N, score_M[order_K])

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

    def _keep_of_window(self, tokens: Tokens, cell_FP: Tensor, num_static: int, ratio: float) -> list[Piece]:
        """What stays of frames whose first `num_static` columns are static."""
        num_frames, num_places = cell_FP.shape
        size = cell_FP.numel()
        ratio = min(1.0, ratio * size / (size - (num_frames - 1) * num_static))
        pieces = []
        if num_static:
            cell_FA = cell_FP[:, :num_static]
            still = Tokens(
                tokens.x_ND[cell_FA].float().mean(0), tokens.z_ND[cell_FA[0]], tokens.salience_N[cell_FA].mean(0)
            )
            row_A = torch.arange(num_static, device=cell_FP.device)
            piece = self._keep_of_part(still, row_A[None, None], ratio)
            pieces.append(piece._replace(index_M=cell_FA[0, piece.index_M]))
        if num_static < num_places:
            pieces.append(self._keep_of_part(tokens, cell_FP[None, :, num_static:], ratio))
        return pieces

    def _keep_of_part(self, tokens: Tokens, row_BFA: Tensor, ratio: float) -> Piece:
        """What stays of B parts of F frames with P places each; `row_BFA` are rows of `tokens`."""
        batch, num_frames, num_places = row_BFA.shape
        num_kept = math.ceil(num_places * ratio)
        num_salient = math.floor(num_kept * (1 - self.context_share))
        num_context = num_frames * (num_kept - num_salient)

        row_QA = row_BFA.flatten(0, 1)
        place_QK = select_salient(
            tokens.z_ND, tokens.salience_N, row_QA, num_salient, self.expansion, self.num_neighbours
        )
        taken_QA = torch.zeros_like(row_QA, dtype=torch.bool).scatter(1, place_QK, True)
        salient_M = row_QA.gather(1, place_QK).flatten()
        num_left = num_frames * (num_places - place_QK.shape[1]) if num_context else 0
        left_BL = torch.sort(taken_QA.view(batch, -1), dim=1, stable=True).indices[:, :num_left]
        left_BL = row_BFA.flatten(1).gather(1, left_BL)
        x_LD = tokens.x_ND[left_BL.flatten()]
        score_L = torch.full((len(x_LD),), torch.inf, device=x_LD.device)
        if num_left > num_context:
            x_BLD, z_BLD = x_LD.view(batch, num_left, -1), tokens.z_ND[left_BL]
            centre_BC, x_BCD, score_BC = merge_context(
                x_BLD, z_BLD, num_context, self.num_neighbours, self.beta, swapped=self.compat == "official"
            )
            left_BL = left_BL.gather(1, centre_BC)
            x_LD, score_L = x_BCD.flatten(0, 1), score_BC.flatten()
        return Piece(
            torch.cat([salient_M, left_BL.flatten()]),
            torch.cat([tokens.x_ND[salient_M].float(), x_LD.float()]),
            torch.cat([score_L.new_full((len(salient_M),), torch.inf), score_L]),
        )

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
        unit_GD = F.normalize(video.x_ND.detach().float(), dim=-1)
        target_G = (unit_GD @ unit_GD[kept.index_K].T).argmax(-1)
        target_G[kept.index_K] = torch.arange(budget.num_kept, device=target_G.device)
        mean_KD, _ = ops.cluster_mean(video.x_ND, target_G, budget.num_kept)
        x_KD = torch.lerp(mean_KD, video.x_ND[kept.index_K].float(), self.beta)
        return replace(kept, x_KD=x_KD.to(video.x_ND.dtype))

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        present = min(grid.num_groups, round(num_kept / self.share))
        return 2 * present * width * (num_kept + 2)  # cosines with every kept token, norm, mean of the cluster
