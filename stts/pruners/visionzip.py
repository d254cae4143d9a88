"""VisionZip: the most attended tokens of every frame, and a few that sum up the rest.

Shape suffixes beside those of `stts.tokens`: H = key width, L = the rest of a frame, C = contextual tokens of a
frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import HostInfo, Newlines, PerVideo
from stts.tokens import Budget, Grid, Kept, Signal, VideoTokens

RELEASED_PER_FRAME = {0.1: 20, 0.15: 30, 0.2: 40, 0.25: 50}
"""Tokens per frame of 196 in the release; the floor would give 19, 29, 39 and 49."""


@dataclass(frozen=True, kw_only=True)
class VisionZip(PerVideo):
    """Keep the most attended tokens of each frame, and merge the rest into a few spread evenly over it.

    Per frame, with attention A averaged over heads and queries, and keys M averaged over heads:

        dominant    the K places with the highest A, unchanged
        targets     numbers 0, step, 2 step, .. of the other places, in order;  step = floor(L / C)
        contextual  x[target] + mean of x[p] over the others p whose M[p] has its highest cosine at this target

    Every frame gets floor(S r) tokens, at least one, of which floor(54/64 of it) are dominant; S = 196 has the
    release's table. A frame whose budget is S keeps everything unchanged. Equal attention keeps the first places.

    arXiv:2412.04467; `visionzip/llava_arch.py` of the video port in cokeshao/HoliTom, and with explicit counts the
    step of `visionzip/clip_encoder.py` in dvlab-research/VisionZip (give [CLS] attention as the signal).

    **Differs:** the paper averages the tokens of a group; here as in both releases the target is added to the mean
    of the others. Tokens come out in order of place; the release puts the contextual tokens of a frame behind the
    dominant ones, and where rows end with newlines it swaps the dominant tokens among their places by attention
    (`compat="official"` does both). Where a sink penalty (SToP) moves two targets to one place, the second takes the
    next; with `compat="official"` it only stands there, and is x[target] once more, without members."""

    paper: ClassVar[str] = "2412.04467"
    signals: ClassVar[frozenset[Signal]] = frozenset({"attn", "keys"})
    count_known: ClassVar[bool] = False

    dominant_ratio: float = 54 / 64
    """Share of a frame's tokens that is dominant."""
    num_dominant: int | None = None
    """Dominant tokens per frame whatever the ratio is; together with `num_contextual`."""
    num_contextual: int | None = None
    newline_per_row: bool = False
    """The host ends every row with a newline."""
    key_width: int = 72
    """For `flops` only."""
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.dominant_ratio < 1:
            raise ValueError(f"dominant_ratio={self.dominant_ratio} must be in [0, 1): each frame merges some tokens")
        if (self.num_dominant is None) != (self.num_contextual is None):
            raise ValueError(
                f"got num_dominant={self.num_dominant} and num_contextual={self.num_contextual}; give both or neither"
            )
        if self.num_dominant is not None and (self.num_dominant < 0 or (self.num_contextual or 0) < 1):
            raise ValueError(
                f"num_dominant={self.num_dominant} and num_contextual={self.num_contextual} must be at least 0 and 1"
            )

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """With the host's newline layout and key width."""
        return cls(
            **{"newline_per_row": host.newline_per_row, "key_width": host.vit_width // host.vit_heads, **options}
        )

    @property
    def newlines(self) -> Newlines:  # type: ignore[override]  # a field decides, so it cannot be a class variable
        return "every_row" if self.newline_per_row else "all"

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        num_frames, num_places = video.grid.t, video.grid.per_frame
        num_dominant, num_contextual = self._counts(num_places, budget.retention_ratio)
        salience_G = ops.rank_salience(video).detach()
        ranked_TP = ops.top(salience_G.view(num_frames, num_places), num_places)
        dominant_TK = ranked_TP[:, :num_dominant].sort(-1).values
        rest_TL = ranked_TP[:, num_dominant:].sort(-1).values
        place_TC, target_TC = self._targets(video, rest_TL, num_contextual)
        x_TPD = video.x_ND.view(num_frames, num_places, -1)
        key_TPH = F.normalize(ops.need(video.keys_GD, "keys", video).float(), dim=-1).view(num_frames, num_places, -1)
        context_TCD, members_TC = _merge(x_TPD, key_TPH, dominant_TK, target_TC)

        misplaced = self.compat == "official" and self.newline_per_row
        place_TP = torch.cat([ranked_TP[:, :num_dominant] if misplaced else dominant_TK, place_TC], 1)
        first_T1 = torch.arange(num_frames, device=place_TP.device)[:, None] * num_places
        index_K = (first_T1 + place_TP).flatten()
        # Misplaced ones bring their own features.
        source_K = (first_T1 + torch.cat([dominant_TK, place_TC], 1)).flatten()
        merged_score_TP = torch.cat([torch.full_like(dominant_TK, torch.inf, dtype=torch.float32), members_TC], 1)
        merged_score_K = merged_score_TP.flatten()
        if self.compat is None or self.newline_per_row:
            index_K, order_K = index_K.sort()
            source_K, merged_score_K = source_K[order_K], merged_score_K[order_K]
        row_C = merged_score_K.isfinite().nonzero_static(size=num_frames * num_contextual)[:, 0]  # sorted or not
        x_KD = video.x_ND[source_K].index_copy_(0, row_C, context_TCD.flatten(0, 1))
        kept = Kept(index_K=index_K, x_KD=x_KD, scores_G=salience_G)
        return ops.fit_count(video, kept, budget.num_kept, salience_G, merged_score_K) if budget.exact else kept

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Norms of the keys, then similarity and sum for each pair of a token of the rest and a contextual token."""
        num_dominant = int(num_kept * self.dominant_ratio)
        num_pairs = (grid.num_groups - num_dominant) * (num_kept - num_dominant) // grid.t
        return 2 * grid.num_groups * self.key_width + 2 * num_pairs * (self.key_width + width)

    def _counts(self, num_places: int, retention_ratio: float) -> tuple[int, int]:
        """Dominant and contextual tokens per frame."""
        if self.num_dominant is not None and self.num_contextual is not None:
            if self.num_dominant + self.num_contextual > num_places:
                raise ValueError(
                    f"num_dominant={self.num_dominant} + num_contextual={self.num_contextual} is more than the "
                    f"{num_places} tokens of a frame; lower them"
                )
            return self.num_dominant, self.num_contextual
        num_kept = max(1, int(num_places * Decimal(str(retention_ratio))))
        if num_places == 196:
            num_kept = RELEASED_PER_FRAME.get(retention_ratio, num_kept)
        num_dominant = int(num_kept * self.dominant_ratio)
        return num_dominant, num_kept - num_dominant

    def _targets(self, video: VideoTokens, rest_TL: Tensor, num_contextual: int) -> tuple[Tensor, Tensor]:
        """Places that contextual tokens occupy, all different, and places whose features they start from."""
        length = rest_TL.shape[1]
        number_C = torch.arange(num_contextual, device=rest_TL.device)
        slot_TC = ops.free_slots(video, number_C * max(1, length // num_contextual), rest_TL)
        own_TC = (slot_TC - number_C).cummax(1).values.clamp_max(length - num_contextual) + number_C
        place_TC = rest_TL.gather(1, own_TC)
        return place_TC, rest_TL.gather(1, slot_TC) if self.compat else place_TC


def _merge(x_TPD: Tensor, key_TPH: Tensor, dominant_TK: Tensor, target_TC: Tensor) -> tuple[Tensor, Tensor]:
    """(T, C, D) target + mean of its members, in the dtype of x, and (T, C) fp32 how many members it has."""
    cosine_TPC = key_TPH @ _rows(key_TPH, target_TC).transpose(1, 2)
    member_TP = torch.ones_like(x_TPD[..., 0], dtype=torch.float32)
    member_TP = member_TP.scatter(1, torch.cat([dominant_TK, target_TC], 1), 0)
    member_TPC = F.one_hot(cosine_TPC.argmax(-1), target_TC.shape[1]) * member_TP[..., None]
    members_TC = member_TPC.sum(1)
    sum_TCD = member_TPC.transpose(1, 2) @ x_TPD.float()
    context_TCD = _rows(x_TPD, target_TC) + sum_TCD / members_TC.clamp_min(1)[..., None]
    return context_TCD.to(x_TPD.dtype), members_TC


def _rows(x_TPD: Tensor, place_TC: Tensor) -> Tensor:
    """(T, C, D) the rows of each frame at `place_TC`."""
    return x_TPD[torch.arange(len(x_TPD), device=x_TPD.device)[:, None], place_TC]
