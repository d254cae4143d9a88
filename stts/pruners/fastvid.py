"""FastVID: dense segments of a video keep salient tokens, and density peaks that absorb the rest.

Shape suffixes beside those of `stts.tokens`: B = anchor frames, M = anchors of one, padded to the most of any, C =
all anchors (of `frame_TC`: width of a frame feature), E = pairs of an anchor frame and a frame of its segment.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import density, ops
from stts.pruners.base import HostInfo, Newlines, PerVideo, Positions
from stts.tokens import Budget, Grid, Kept, Signal, VideoTokens

Variant = Literal["ov", "lv", "qw"]


class Anchors(NamedTuple):
    """An anchor frame."""

    segment: range
    frame: int
    number: int
    """Anchors chosen of it."""


class Pair(NamedTuple):
    """An anchor frame and a frame of its segment."""

    number: int
    """Of the anchor frame."""
    frame: int
    itself: bool
    skipped: bool


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
    needs_time: ClassVar[str] = "it chooses what to merge in segments of similar frames"
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

        anchors = [Anchors(segment, t, num_anchors[t]) for segment, _ in segments for t in segment if num_anchors[t]]
        salient_K = salient_TP.flatten().nonzero_static(size=sum(num_salient))[:, 0]
        score_K = salience_N.new_full(salient_K.shape, torch.inf)
        index_C, x_CD, score_C = salient_K[:0], video.x_ND[:0], score_K[:0]
        if anchors:
            index_C, x_CD, score_C = self._anchors(video, salient_TP, anchors)
        index_K, order_K = torch.cat([salient_K, index_C]).sort()
        kept, score_K = Kept(index_K=index_K), torch.cat([score_K, score_C])[order_K]
        if budget.exact:
            kept = ops.fit_count(video, kept, budget.num_kept, salience_N, score_K)
        return replace(kept, x_KD=ops.features_of(video.x_ND, kept.index_K, index_C, x_CD))

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

    def _anchors(
        self, video: VideoTokens, salient_TP: Tensor, anchors: Sequence[Anchors]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of the anchors, (C,), their merged features, (C, D), and density scores, (C,)."""
        places, device = video.grid.per_frame, video.x_ND.device
        table = [(own.frame, own.number, len(own.segment)) for own in anchors]
        frame_B, num_B, length_B = torch.tensor(table, device=device).unbind(1)
        x_TPD, place_P = video.x_ND.view(*salient_TP.shape, -1), torch.arange(places, device=device)
        with torch.no_grad():
            free_BP = ~salient_TP[frame_B]
            score_BP = density_scores(video, x_TPD.detach(), free_BP, self.num_neighbours, frame_B)
        # Once more in longer segments, as the release of SToP does; nothing changes without a sink penalty.
        score_BP = torch.where(length_B[:, None] > 1, ops.rank_density(video, score_BP, place_P), score_BP)
        most = max(own.number for own in anchors)
        place_BM = ops.top(score_BP, most)
        valid_BM = torch.arange(most, device=device) < num_B[:, None]
        place_BM = torch.where(valid_BM, place_BM, place_BM[:, :1])  # padding repeats the first anchor
        cell_BM = frame_B[:, None] * places + place_BM
        centre_BMD = video.x_ND[cell_BM].float()
        merged_BMD = self._merge(x_TPD, salient_TP, anchors, centre_BMD, place_BM, valid_BM)
        row_C = valid_BM.flatten().nonzero_static(size=sum(own.number for own in anchors))[:, 0]
        x_CD = merged_BMD.flatten(0, 1)[row_C].to(x_TPD.dtype)
        return cell_BM.flatten()[row_C], x_CD, score_BP.gather(1, place_BM).flatten()[row_C]

    def _merge(
        self,
        x_TPD: Tensor,
        salient_TP: Tensor,
        anchors: Sequence[Anchors],
        centre_BMD: Tensor,
        place_BM: Tensor,
        valid_BM: Tensor,
    ) -> Tensor:
        """(B, M, D) anchors with their share of what joins them: each pool token of the segment joins the anchor of an
        anchor frame with the highest cosine, the first on ties."""
        num_sets, most, width = centre_BMD.shape
        unit_BMD = F.normalize(centre_BMD.detach(), dim=-1)  # a token's own length does not change which one is nearest
        own_BP = torch.zeros(num_sets, x_TPD.shape[1], dtype=torch.bool, device=x_TPD.device)
        if self.variant != "ov":
            own_BP.scatter_(1, place_BM, True)
        sum_CD = x_TPD.new_zeros(num_sets * most + 1, width, dtype=torch.float32)  # the last row: outside the pool
        count_C = torch.zeros(num_sets * most + 1, dtype=torch.int64, device=x_TPD.device)
        for x_EPD, target_EP in self._targets(x_TPD, salient_TP, anchors, unit_BMD, own_BP, valid_BM):
            sum_CD = ops.add_rows(sum_CD, target_EP.flatten(), x_EPD.flatten(0, 1))
            count_C.scatter_add_(0, target_EP.flatten(), torch.ones_like(target_EP.flatten()))
        count_BM1 = count_C[:-1].view(num_sets, most, 1)
        mean_BMD = sum_CD[:-1].view(num_sets, most, width).div_(count_BM1.clamp_min(1))
        return mean_BMD.lerp_(centre_BMD, (1 / (count_BM1 + 1)).clamp_min(self.beta))

    @staticmethod
    def _targets(
        x_TPD: Tensor,
        salient_TP: Tensor,
        anchors: Sequence[Anchors],
        unit_BMD: Tensor,
        own_BP: Tensor,
        valid_BM: Tensor,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Frames, and for each of their tokens the anchor it joins for one anchor frame: b M + m, or B M outside the
        pool. A CPU goes segment by segment, as it reads the tokens once for all anchor frames of one."""
        num_sets, most, _ = unit_BMD.shape
        if ops.frame_block(x_TPD) < len(x_TPD):
            for _, group in groupby(enumerate(anchors), key=lambda pair: pair[1].segment.start):
                numbers = [number for number, _ in group]
                sets, segment = slice(numbers[0], numbers[-1] + 1), anchors[numbers[0]].segment
                step = max(1, x_TPD.numel() // 4 // (x_TPD.shape[1] * len(numbers) * most))  # as many similarities
                for frames in (segment[start : start + step] for start in range(0, len(segment), step)):
                    x_LPD = x_TPD[frames.start : frames.stop]
                    similarity = x_LPD.detach().flatten(0, 1).float() @ unit_BMD[sets].flatten(0, 1).T
                    similarity_LPAM = similarity.view(*x_LPD.shape[:2], -1, most)
                    nearest_LPA = similarity_LPAM.masked_fill_(~valid_BM[sets], -torch.inf).argmax(-1)
                    for place, number in enumerate(numbers):
                        outside_LP = salient_TP[frames.start : frames.stop].clone()
                        if anchors[number].frame in frames:
                            outside_LP[anchors[number].frame - frames.start] |= own_BP[number]
                        target_LP = nearest_LPA[..., place] + most * number
                        yield x_LPD, target_LP.masked_fill_(outside_LP, num_sets * most)
            return
        unit_EMD = torch.empty_like(unit_BMD[:0])  # one buffer for all blocks: new memory takes as long as the copy
        for pairs, is_whole in blocks(anchors, len(x_TPD), ops.CACHED // x_TPD[0].numel()):
            set_E, frame_E, own_E, none_E = torch.tensor(pairs, device=x_TPD.device).unbind(1)
            x_EPD = x_TPD if is_whole else x_TPD.index_select(0, frame_E)
            torch.index_select(unit_BMD, 0, set_E, out=unit_EMD.resize_(len(set_E), most, unit_BMD.shape[2]))
            similarity_EPM = x_EPD.detach().float() @ unit_EMD.transpose(1, 2)
            nearest_EP = similarity_EPM.masked_fill_(~valid_BM[set_E][:, None, :], -torch.inf).argmax(-1)
            outside_EP = salient_TP[frame_E] | own_BP[set_E] & own_E[:, None].bool() | none_E[:, None].bool()
            yield x_EPD, (nearest_EP + most * set_E[:, None]).masked_fill_(outside_EP, num_sets * most)


def blocks(anchors: Sequence[Anchors], num_frames: int, few: int) -> list[tuple[list[Pair], bool]]:
    """Every anchor frame with every frame of its segment; True beside a block with one pair for each frame, in order.

    One block where there are few pairs. Else by turns, the first anchor frames of all segments, the second, ...: a turn
    that holds half of the frames is filled up to all, so that the video is read as it lies in memory."""
    order: dict[int, list[int]] = {}
    for number, own in enumerate(anchors):
        order.setdefault(own.segment.start, []).append(number)
    turns: list[list[Pair]] = []
    for turn in zip_longest(*order.values()):  # ever fewer frames
        chosen = [number for number in turn if number is not None]
        turns.append([Pair(n, t, t == anchors[n].frame, False) for n in chosen for t in anchors[n].segment])
    if sum(map(len, turns)) <= few:
        return [([pair for turn in turns for pair in turn], False)]
    whole: list[tuple[list[Pair], bool]] = []
    rest: list[Pair] = []
    for pairs in turns:
        if 2 * len(pairs) >= num_frames:
            of_frame = {pair.frame: pair for pair in pairs}
            whole.append(([of_frame.get(t, Pair(0, t, False, True)) for t in range(num_frames)], True))
        else:
            rest += pairs
    size = max(few, num_frames)
    return whole + [(rest[start : start + size], False) for start in range(0, len(rest), size)]


def frame_similarity(video: VideoTokens) -> Tensor:
    """(T - 1,) fp32 cosine of each frame's global feature with the next."""
    frame_TC = F.normalize(ops.need(video.frame_TC, "frame", video).detach().float(), dim=-1)
    return (frame_TC[:-1] * frame_TC[1:]).sum(-1)


def density_scores(
    video: VideoTokens, x_TPD: Tensor, free_BP: Tensor, num_neighbours: int, frame_B: Tensor | None = None
) -> Tensor:
    """(B, S) density peak scores of each frame's free tokens among themselves, -inf at the others.

    frame_B: int64 frames to score; all where it is None."""
    num_places = x_TPD.shape[1]
    frame_B = torch.arange(len(x_TPD), device=x_TPD.device) if frame_B is None else frame_B
    place_P = torch.arange(num_places, device=x_TPD.device)
    distance_BPP = density.distances_of(x_TPD.flatten(0, 1), frame_B[:, None] * num_places + place_P)
    distance_BPP.div_(math.sqrt(x_TPD.shape[-1]))
    score_BP = density.density_peaks(distance_BPP, num_neighbours, count_self=True, valid_BN=free_BP)
    return ops.rank_density(video, score_BP, place_P)


def share_out(total: int, num_parts: int) -> list[int]:
    """`total` in equal whole parts; the first ones take one more where it does not divide."""
    return [total // num_parts + (part < total % num_parts) for part in range(num_parts)]
