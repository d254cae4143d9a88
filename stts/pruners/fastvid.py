"""FastVID: dense segments of a video keep salient tokens, and density peaks that absorb the rest.

Shape suffixes beside those of `stts.tokens`: C = width of a frame feature, B = anchor frames whose segments are
equally long, M = anchors of an anchor frame, padded to the most of any, Q = tokens of such a segment.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import HostInfo, Newlines, PerVideo, Positions
from stts.tokens import Budget, Grid, Kept, Signal, VideoTokens

Variant = Literal["ov", "lv", "qw"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FastVID(PerVideo):
    """Keep salient tokens as they are, and cluster centres that stand for what similar frames repeat.

    A video is cut where neighbouring frames differ: at the `min_segments - 1` least similar pairs and at every pair
    below `tau`. Each frame keeps its most salient tokens; every `stride`-th frame of a segment, counted back from its
    last, also keeps density peaks of its other tokens, and each peak takes in the tokens of the segment most like it:

        s_t = cos(f_t, f_t+1),   score = rho delta of the distances |x_i - x_j| / sqrt(D),
        anchor' = w anchor + (1 - w) mean(assigned),   w = max(1 / (number assigned + 1), beta)

    arXiv:2503.11187, LunarShen/FastVID: its `fastvid_llavaonevision` (ov), `fastvid_llavavideo` (lv) and
    `fastvid_qwen25vl` (qw) share out the budget and choose the tokens to merge differently; `variant` follows each:

    * ov: per frame floor(S r) tokens, floor of the share `context` of them as anchors; a segment's anchors are divided
      equally among its anchor frames and the remainder is lost. Anchors are merged too, so each takes in itself.
    * lv: counts per segment, remainders shared out from the first frame (salient) or the last (anchors). An anchor
      frame's own anchors stay out of its merge, those of other frames do not.
    * qw: as lv, but frames more similar to the next than `repeat` keep nothing and only merge, at least one anchor per
      segment, at most half a frame of anchors.

    **Differs:** no noise on the densities: equally dense tokens go by order. More anchors than a frame has left (the
    release fails) are cut to what there is; fewer than `min_segments` frames (fails) are one segment each; where a
    frame's share is below one token (the release keeps nothing, or fails) it counts as one. Natural counts fall short
    of the budget (ov by the lost remainders, qw by repeated frames); an exact budget is filled by salience."""

    paper: ClassVar[str] = "2503.11187"
    variant: Variant = "ov"
    """Which release to follow: LLaVA-OneVision, LLaVA-Video or Qwen2.5-VL."""
    min_segments: int = 8
    tau: float | None = None
    """Neighbouring frames less similar than this are cut apart; None: 0.9, for qw 0.84."""
    repeat: float = 0.95
    """qw: frames at least this similar to the next of their segment keep no tokens."""
    context: float = 0.4
    """Share of the budget for anchors."""
    stride: int = 4
    """Frames from one anchor frame to the next."""
    beta: float = 0.6
    """Least weight of the anchor in the merge."""
    num_neighbours: int = 4
    """Nearest tokens, itself included, that make up the density."""

    signals: ClassVar[frozenset[Signal]] = frozenset({"probe", "frame"})
    count_known: ClassVar[bool] = False
    positions: ClassVar[Positions] = "original"
    newlines: ClassVar[Newlines] = "kept_rows"

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant={self.variant!r} is unknown; expected one of {get_args(Variant)}")
        if min(self.min_segments, self.stride, self.num_neighbours) < 1:
            raise ValueError(
                f"min_segments={self.min_segments}, stride={self.stride} and num_neighbours={self.num_neighbours} "
                "must be at least 1"
            )
        if not (0 <= self.context <= 1 and 0 <= self.beta <= 1):
            raise ValueError(f"context={self.context} and beta={self.beta} are shares and must be in [0, 1]")

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The variant of the release nearest to the host, unless `options` name one."""
        variant = "qw" if host.mrope else "lv" if host.newline_per_row else "ov"
        return cls(**{"variant": variant, **options})

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        places, device = video.grid.per_frame, video.x_ND.device
        segments = self.segments(frame_similarity(video))
        num_salient, num_anchors = self.counts(segments, places, budget.retention_ratio)

        salience_N = ops.rank_salience(video).detach()
        place_TP = ops.top(salience_N.view(-1, places), places)
        first_TP = torch.arange(places, device=device) < torch.tensor(num_salient, device=device)[:, None]
        salient_TP = torch.zeros_like(first_TP).scatter_(1, place_TP, first_TP)

        groups: dict[int, list[tuple[int, int, int]]] = {}  # segments of equal length are merged in one batch
        for segment, _ in segments:
            anchors = [(segment.start, t, num_anchors[t]) for t in segment if num_anchors[t]]
            groups.setdefault(len(segment), []).extend(anchors)
        order = [t for group in groups.values() for _, t, _ in group]
        scores = torch.split(self._densities(video, salient_TP, order), [len(group) for group in groups.values()])
        salient_K = salient_TP.flatten().nonzero().squeeze(1)
        parts = [(salient_K, video.x_ND[salient_K], salience_N.new_full(salient_K.shape, torch.inf))]
        parts += [
            self._anchors(video, salient_TP, length, group, score_BP)
            for (length, group), score_BP in zip(groups.items(), scores, strict=True)
            if group
        ]
        index_K, x_KD, score_K = map(torch.cat, zip(*parts, strict=True))
        index_K, order_K = index_K.sort()
        kept = Kept(index_K=index_K, x_KD=x_KD[order_K])
        return ops.fit_count(video, kept, budget.num_kept, salience_N, score_K[order_K]) if budget.exact else kept

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """For equally long segments, frame features as wide as the tokens, and no repeated frames."""
        segments = min(self.min_segments, grid.t)
        anchor_frames = math.ceil(math.ceil(grid.t / segments) / self.stride)  # of one segment
        similarity = 4 * grid.t * width  # one norm and one dot product per frame
        density = 2 * segments * anchor_frames * grid.per_frame**2 * width
        assign = 2 * grid.num_groups * width * math.ceil(num_kept * self.context) // segments
        merge = 2 * grid.num_groups * width * anchor_frames
        return similarity + density + assign + merge

    def segments(self, similarity_T: Tensor) -> list[tuple[range, list[int]]]:
        """Frames of each segment, and those of them that keep tokens; similarity_T: (T - 1,), one synchronisation."""
        tau = (0.84 if self.variant == "qw" else 0.9) if self.tau is None else self.tau
        num_frames = len(similarity_T) + 1
        cut_T = similarity_T < tau
        cut_T[ops.top(-similarity_T, min(self.min_segments, num_frames) - 1)] = True
        keep_T = similarity_T < self.repeat if self.variant == "qw" else torch.ones_like(cut_T)
        cut, keep = torch.stack([cut_T, keep_T | cut_T]).tolist()
        ends = [t + 1 for t in range(num_frames - 1) if cut[t]] + [num_frames]
        keep.append(True)  # like every last frame of a segment
        return [(s, [t for t in s if keep[t]]) for s in map(range, [0, *ends[:-1]], ends)]

    def counts(
        self, segments: Sequence[tuple[range, list[int]]], places: int, ratio: float
    ) -> tuple[list[int], list[int]]:
        """Salient tokens and anchors of each frame."""
        num_salient, num_anchors = [0] * segments[-1][0].stop, [0] * segments[-1][0].stop
        per_frame, shortfall = max(1, int(places * ratio)), 0
        for segment, frames in segments:
            anchor_frames = frames[:: -self.stride]  # the last frame first
            salient, anchors = self._shares(len(segment), len(frames), len(anchor_frames), per_frame)
            for t, count in zip(frames, salient, strict=True):
                num_salient[t] = count
            for t, count in zip(anchor_frames, anchors, strict=True):
                if self.variant == "qw" and len(segment) > 1:  # here anchors come before salient tokens
                    num_anchors[t] = min(count, places // 2)
                else:
                    num_anchors[t] = min(count, places - num_salient[t])
                    shortfall += count - num_anchors[t]
            for t in frames:
                num_salient[t] = min(num_salient[t], places - num_anchors[t])
        if shortfall:
            log.info("retention ratio %g asks for %d more anchors than the frames have left", ratio, shortfall)
        return num_salient, num_anchors

    def _shares(
        self, length: int, num_frames: int, num_anchor_frames: int, per_frame: int
    ) -> tuple[list[int], list[int]]:
        """What a segment asks of its frames and anchor frames, before what a frame can give."""
        if self.variant == "ov":
            context = int(per_frame * self.context)
            return [per_frame - context] * num_frames, [context * length // num_anchor_frames] * num_anchor_frames
        context = max(int(per_frame * length * self.context), 1 if self.variant == "qw" else 0)
        return share_out(per_frame * length - context, num_frames), share_out(context, num_anchor_frames)

    @torch.no_grad()
    def _densities(self, video: VideoTokens, salient_TP: Tensor, frames: list[int]) -> Tensor:
        """(B, S) scores of all anchor frames, in one call however many lengths segments have."""
        frame_B = torch.tensor(frames, dtype=torch.long, device=video.x_ND.device)
        x_TPD = video.x_ND.view(*salient_TP.shape, -1)
        return density_scores(video, x_TPD[frame_B], ~salient_TP[frame_B], self.num_neighbours)

    def _anchors(
        self,
        video: VideoTokens,
        salient_TP: Tensor,
        length: int,
        chosen: list[tuple[int, int, int]],
        score_BP: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of the anchors, (K,), their merged features, (K, D), and density scores, (K,).

        chosen: for each anchor frame the first frame of its segment, itself, and its number of anchors."""
        places, device = video.grid.per_frame, video.x_ND.device
        start_B, frame_B, num_B = torch.tensor(chosen, device=device).unbind(1)
        x_TPD = video.x_ND.view(*salient_TP.shape, -1)
        if length > 1:  # once more, as the release of SToP does; nothing changes without a sink penalty
            score_BP = ops.rank_density(video, score_BP, torch.arange(places, device=device))
        most = max(count for _, _, count in chosen)
        place_BM = ops.top(score_BP, most)
        valid_BM = torch.arange(most, device=device) < num_B[:, None]
        place_BM = torch.where(valid_BM, place_BM, place_BM[:, :1])  # padding repeats the first anchor
        cell_BM = frame_B[:, None] * places + place_BM

        frame_BT = start_B[:, None] + torch.arange(length, device=device)
        x_BQD = x_TPD.index_select(0, frame_BT.flatten()).view(len(chosen), length * places, -1)
        pool_BQ = ~salient_TP[frame_BT].flatten(1)
        if self.variant != "ov":
            pool_BQ.scatter_(1, cell_BM - start_B[:, None] * places, value=False)
        merged_BMD = self._merge(x_BQD.float(), pool_BQ, video.x_ND[cell_BM].float(), valid_BM)
        return cell_BM[valid_BM], merged_BMD[valid_BM].to(x_TPD.dtype), score_BP.gather(1, place_BM)[valid_BM]

    def _merge(self, x_BQD: Tensor, pool_BQ: Tensor, centre_BMD: Tensor, valid_BM: Tensor) -> Tensor:
        """Each pool token joins the centre with the highest cosine, the first on ties. Returns (B, M, D)."""
        with torch.no_grad():
            # A token's own length does not change which centre is nearest, so only centres are normalised.
            similarity_BQM = x_BQD @ F.normalize(centre_BMD, dim=-1).transpose(1, 2)
            nearest_BQ = similarity_BQM.masked_fill(~valid_BM[:, None, :], -torch.inf).argmax(-1)
            number_M1 = torch.arange(valid_BM.shape[1], device=x_BQD.device)[:, None]
            member_BMQ = (nearest_BQ[:, None, :] == number_M1) & pool_BQ[:, None, :]
            count_BM1 = member_BMQ.sum(-1, keepdim=True)
        # Not ops.cluster_mean: in one call for all frames its membership matrix on CUDA would be B times as large.
        mean_BMD = member_BMQ.float() @ x_BQD / count_BM1.clamp_min(1)
        weight_BM1 = (1 / (count_BM1 + 1)).clamp_min(self.beta)
        return weight_BM1 * centre_BMD + (1 - weight_BM1) * mean_BMD


def frame_similarity(video: VideoTokens) -> Tensor:
    """(T - 1,) fp32 cosine of each frame's global feature with the next."""
    frame_TC = F.normalize(ops.need(video.frame_TC, "frame", video).detach().float(), dim=-1)
    return (frame_TC[:-1] * frame_TC[1:]).sum(-1)


def density_scores(video: VideoTokens, x_BPD: Tensor, free_BP: Tensor, num_neighbours: int) -> Tensor:
    """(B, S) density peak scores of each frame's free tokens among themselves, -inf at the others."""
    distance_BPP = ops.distances(x_BPD) / math.sqrt(x_BPD.shape[-1])
    score_BP = ops.density_peaks(distance_BPP, num_neighbours, count_self=True, valid_BN=free_BP)
    return ops.rank_density(video, score_BP, torch.arange(x_BPD.shape[1], device=x_BPD.device))


def share_out(total: int, num_parts: int) -> list[int]:
    """`total` in equal whole parts; the first ones take one more where it does not divide."""
    return [total // num_parts + (part < total % num_parts) for part in range(num_parts)]
