"""EarlyTom: frames that repeat are merged inside the ViT, and tokens selected in those that are left.

Shape suffixes beside those of `stts.tokens`: M = frames after merging, C = those of them that more than one frame
became, W = windows of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from stts.pruners import ops
from stts.pruners.temporal import AtPruneBlock
from stts.tokens import Budget, Grid, Kept, Signal, VideoTokens

Span = tuple[int, int]
"""First and last frame of a segment."""


class Mix(NamedTuple):
    """How frames are merged."""

    weight_MT: Tensor
    """fp32; a row sums to 1."""
    place_M: Tensor
    """int64: the frame of largest weight in each, whose time and place it takes."""
    places: Sequence[int]
    """The same for the host."""
    mixed: Sequence[int]
    """Rows of more than one frame: the others are frames as they were."""
    cosine: Sequence[Sequence[float]]
    """Of every pair of frames before merging."""


@dataclass(frozen=True, kw_only=True)
class EarlyTom(AtPruneBlock):
    """Merge frames of a segment that look alike, then keep the most attended tokens of those left.

    A segment ends where the mean cosine with its first frame, smoothed over time, falls below tau, or after 5 frames.
    Its first and last frame stay; of those between, neighbours more alike than the first is to the last become one,

        w f_j + (1 - w) f_j+1,   w = c_j / (c_j + c_j+1),   c_j = mean over places of cos(f_j, f_j+1)

    unless f_j+1 is more like the next. Frames left are segmented again: at the ends of a segment the ceil(P r') most
    attended tokens of a frame stay, between them the most attended one of each of round(P r') windows of the raster;
    r' = r T / (frames left). arXiv 2605.30010; `siglip_encoder.py`, `earlytom/llava_arch.py` of viridisGreen/EarlyTom.

    **Our arrangement:** frames are merged once, on the output of block `prune_block` + 1, and tokens selected there by
    that block's attention, so both leave the tower at one drop, where STTS drops. The release merges behind three
    blocks (such as 8, 21 and 23 of 26, tuned per benchmark), each time the frames that the one before left, selects
    behind the connector by the attention of the last of the three, and has HoliTom's stage inside the LLM as its third
    part. So here frames merge once instead of three times, all blocks behind the drop are spared instead of more and
    more, and the attention is that of an early block. A pass has one drop in the tower (`split_sites`), by which its
    FLOPs are counted, and from which `exact` brings tokens of merged frames back where too few are left: it drops the
    least attended tokens or adds the most attended ones.

    **Differs** from the release: in its segments of four frames or more the last frame between the ends never counts;
    here it stays, or is the other half of the last pair (compat="official"). A video is segmented alone."""

    label: ClassVar[str] = "our arrangement"
    paper: ClassVar[str] = "2605.30010"
    signals: ClassVar[frozenset[Signal]] = frozenset({"attn"})
    count_known: ClassVar[bool] = False

    tau: float = 0.5
    limit: int = 6
    """A segment has fewer frames than this (M)."""
    smoothing: float = 0.9
    """Share of the newest cosine in the running one."""
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.limit < 2 or not 0 < self.smoothing <= 1:
            raise ValueError(f"limit={self.limit} must be at least 2 and smoothing={self.smoothing} in (0, 1]")

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        grid = video.grid
        self.need_windows(video)
        x_TUD = video.x_ND.float().view(grid.t, -1, video.x_ND.shape[-1])
        attention_TP = ops.need(video.salience_G, "attn", video).detach().float().view(grid.t, -1)
        mix = self.merge(x_TUD.detach())
        cosine = [list(row) for row in mix.cosine]
        if mix.mixed:  # where no frame merges, nothing is copied or compared again
            rows = torch.tensor(mix.mixed, device=x_TUD.device)
            merged_CUD = (mix.weight_MT[rows] @ x_TUD.flatten(1)).view(-1, *x_TUD.shape[1:])
            x_TUD = x_TUD.index_copy(0, mix.place_M[rows], merged_CUD)
            anew = frame_cosines(x_TUD.detach(), mix.place_M[rows])
            for place, row in zip([mix.places[number] for number in mix.mixed], anew, strict=True):
                cosine[place] = row
                for frame, value in enumerate(row):
                    cosine[frame][place] = value
        attention_MP = mix.weight_MT @ attention_TP
        groups = self.segments([[cosine[a][b] for b in mix.places] for a in mix.places])
        keep_MP, static_MP = select(attention_MP, groups, grid.t, budget.retention_ratio)
        index_K = (mix.place_M[:, None] * grid.per_frame + torch.arange(grid.per_frame, device=keep_MP.device))[keep_MP]
        kept = Kept(index_K=index_K, x_ND=x_TUD.flatten(0, 1).to(video.x_ND.dtype))
        if not budget.exact:
            return kept
        rank_TP = torch.full_like(attention_TP, -1.0)  # frames that were merged away come last
        rank_TP[mix.place_M] = attention_MP.masked_fill(static_MP, torch.inf)
        return ops.fit_count(video, kept, budget.num_kept, rank_TP.flatten())

    def merge(self, x_TUD: Tensor) -> Mix:
        """What frames become; one host synchronisation."""
        cosine = frame_cosines(x_TUD)
        rows = [row for span in self.segments(cosine) for row in self._rows(span, cosine)]
        weights = [[row.get(frame, 0.0) for frame in range(len(x_TUD))] for row in rows]
        weight_MT = torch.tensor(weights, device=x_TUD.device)
        places = [max(row, key=lambda frame: row[frame]) for row in rows]
        mixed = [number for number, row in enumerate(rows) if len(row) > 1]
        return Mix(weight_MT, torch.tensor(places, device=x_TUD.device), places, mixed, cosine)

    def segments(self, cosine: Sequence[Sequence[float]]) -> list[Span]:
        """Spans of frames; cosine: of every pair of them."""
        spans, start, running = [], 0, 1.0
        for frame in range(1, len(cosine)):
            running = self.smoothing * cosine[start][frame] + (1 - self.smoothing) * running
            if running < self.tau or frame - start + 1 >= self.limit:
                spans.append((start, frame - 1))
                start, running = frame, 1.0
        return [*spans, (start, len(cosine) - 1)]

    def _rows(self, span: Span, cosine: Sequence[Sequence[float]]) -> list[dict[int, float]]:
        """Frame -> weight, for every frame that is left of a segment."""
        first, last = span
        middle = list(range(first + 1, last))
        if len(middle) < 2:
            return [{frame: 1.0} for frame in range(first, last + 1)]
        pairs = [cosine[a][b] for a, b in pairwise(middle)]
        least, rows, j = cosine[first][last], [], 0
        while j < len(pairs):
            final = j == len(pairs) - 1
            if pairs[j] > least and (final or pairs[j] > pairs[j + 1]):
                weight = pairs[j] / (pairs[j] + pairs[j + 1]) if not final else 0.5
                if final and self.compat == "official":
                    rows.append({middle[j]: 1.0})
                else:
                    rows.append({middle[j]: weight, middle[j + 1]: 1 - weight})
                j += 2
            else:
                rows.append({middle[j]: 1.0})
                j += 1
        if j == len(pairs) and self.compat != "official":
            rows.append({middle[-1]: 1.0})
        return [{first: 1.0}, *rows, {last: 1.0}]

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Norms, cosines of every pair of frames and the merging, for one patch per group."""
        return (2 + 4 * grid.t) * grid.num_groups * width


def frame_cosines(x_TUD: Tensor, frame_C: Tensor | None = None) -> list[list[float]]:
    """[a][b] mean over places of cos(x[a, p], x[b, p]), a of `frame_C` or of all; one host synchronisation."""
    x_UTD = x_TUD.float().transpose(0, 1)
    length_UT = torch.linalg.vector_norm(x_UTD, dim=-1).clamp_min(1e-12)
    x_UCD, length_UC = (x_UTD, length_UT) if frame_C is None else (x_UTD[:, frame_C], length_UT[:, frame_C])
    dot_UCT = x_UCD @ x_UTD.mT
    rows: list[list[float]] = (dot_UCT / (length_UC[:, :, None] * length_UT[:, None, :])).mean(0).tolist()
    return rows


def select(attention_MP: Tensor, groups: Sequence[Span], num_frames: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Kept tokens of the frames that are left, bool (M, P), and those of them that frames inside a segment keep.

    num_frames: before merging; a frame inside a segment of three or more keeps one token of every window."""
    num_left, num_places = attention_MP.shape
    share = min(ratio * num_frames / num_left, 1.0)
    device = attention_MP.device
    inside = {frame for first, last in groups if last - first > 1 for frame in range(first + 1, last)}
    static_M1 = torch.tensor([frame in inside for frame in range(num_left)], device=device)[:, None]
    moving = min(num_places, math.ceil(num_places * share))
    top_MP = torch.zeros_like(attention_MP, dtype=torch.bool)
    top_MP.scatter_(1, ops.top(attention_MP, moving), True)
    windows = max(1, round(num_places * share))
    length, longer = divmod(num_places, windows)
    size_W = torch.tensor([length + (number < longer) for number in range(windows)], device=device)
    offset = torch.arange(length + 1, device=device)
    place_WL = (size_W.cumsum(0) - size_W)[:, None] + offset
    window_MWL = attention_MP[:, place_WL.clamp_max(num_places - 1)].masked_fill(offset >= size_W[:, None], -torch.inf)
    best_MW = (size_W.cumsum(0) - size_W) + window_MWL.argmax(-1)
    best_MP = torch.zeros_like(top_MP).scatter_(1, best_MW, True)
    return torch.where(static_M1, best_MP, top_MP), best_MP & static_M1
