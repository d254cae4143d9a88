"""AdaTP, our reconstruction: cut by attention in many LLM layers, against its preference for some frames and places.

Shape suffixes beside those of `stts.tokens`: C = width of a frame feature, J = segments (T at most: unused ones stay
empty), R = groups in a certain order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import HostInfo, PerVideo, Positions, Stage
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens

_TOKEN = 1_000_000  # shares are counted in millionths, so that shares equal on paper tie, for the earlier segment


@dataclass(frozen=True, kw_only=True)
class AdaTP:
    """Keep what the prompt attends to in each scene, a place once per scene before any place twice.

    Our reconstruction of arXiv 2505.20100. Attention of the LLM crowds at the ends of a video and at the same few
    places of all frames. So tokens compete only inside segments of similar frames, segments that resemble the question
    get more, and inside a segment every place offers its strongest frame first. One cut before each layer of `layers`,
    all with one share.

    No code of the authors was found, and the description at hand is second-hand: tau_s, the range of layers and the
    ideas are reported, the details below are **our reconstruction**, to be named so beside every number.

    * Segments: frames i and i + 1 part where cos(v_i, v_i+1) < tau_s.
    * A segment is relevant where the mean of cos(v_t, e) over its frames, scaled to [0, 1] over the segments of the
      video, reaches tau_t; nothing is relevant where all are equal, or where no aligned text tower gives e (`text_C` is
      None): then there is no global debiasing, only competition inside segments.
    * Share of a segment: rho, and max(rho, min(alpha_boost rho, gamma_cap)) where relevant, rho from the budget; counts
      by largest remainder, one token for every segment first if the budget has that many.
    * Inside a segment `max_copies` tokens of a place by falling attention, then one more of each place, and so on.

    **Differs** from what is reported: gamma_cap ends the boost but never takes a relevant segment below the others, so
    every budget can be met; layers fall away from the deepest on while less than 3 % would be left (else almost nothing
    reaches the end at small ratios); each cut rounds what the one before it left."""

    label: ClassVar[str] = "our reconstruction"
    paper: ClassVar[str] = "2505.20100"

    layers: tuple[int, ...] = tuple(range(2, 17))
    tau_s: float = 0.95
    tau_t: float = 0.5
    tau_t_mode: Literal["minmax", "raw"] = "minmax"
    """raw: tau_t is compared with the cosines themselves."""
    alpha_boost: float = 1.5
    gamma_cap: float = 0.9
    max_copies: int = 1

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers={self.layers} must be one or more LLM layers, increasing")
        if self.tau_t_mode not in ("minmax", "raw"):
            raise ValueError(f"tau_t_mode={self.tau_t_mode!r} is unknown; expected 'minmax' or 'raw'")
        if self.alpha_boost < 1 or not 0 < self.gamma_cap <= 1 or self.max_copies < 1:
            raise ValueError(
                f"alpha_boost={self.alpha_boost}, gamma_cap={self.gamma_cap}, max_copies={self.max_copies}: expected a "
                "boost of 1 or more, a cap in (0, 1] and at least one copy"
            )

    @classmethod
    def for_host(cls, host: HostInfo, *, single_stage: bool = False, **options: Any) -> Self:
        """Cuts before layers 2 .. N - 12 of N (shallow LLMs: 2 .. 16 of 28, scaled); `single_stage`: the first only."""
        first = host.llm_layer(2)
        last = host.llm_layers - 12 if host.llm_layers >= 24 else host.llm_layer(16)
        layers = (first,) if single_stage else tuple(cut for cut in host.cut_layers if first <= cut <= last)
        return cls(**{"layers": layers, **options})

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Cut(layer=layer, method=self) for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Cut(PerVideo):
    """One cut of AdaTP (our reconstruction), before `layer`; `scores_G` is how much each token is due."""

    label: ClassVar[str] = AdaTP.label
    needs_time: ClassVar[str] = "its tokens compete inside segments of similar frames"
    signals: ClassVar[frozenset[Signal]] = frozenset({"last_row", "frame", "text"})
    positions: ClassVar[Positions] = "original"
    reads_features: ClassVar[bool] = False

    layer: int
    method: AdaTP

    @property
    def site(self) -> Site:  # type: ignore[override]  # a field decides, so it cannot be a class variable
        return Site("llm", layer=self.layer, floor=0.03)

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        """Rank tokens by how much they are due: share of the segment less the token's number in the segment.

        The best `num_kept` of that ranking are the segments' counts by largest remainder and the choice inside them at
        once, without a loop or a host synchronisation."""
        attention_G = ops.need(video.salience_G, "last_row", video).float()
        frame_TC = F.normalize(ops.need(video.frame_TC, "frame", video).float(), dim=-1)
        per_frame = video.grid.per_frame
        segment_T = F.pad((frame_TC[1:] * frame_TC[:-1]).sum(-1) < self.method.tau_s, (1, 0)).cumsum(0)
        segment_G = segment_T[video.cell_G // per_frame]

        order_R = torch.sort(attention_G, descending=True, stable=True).indices
        slot_R = (segment_G * per_frame + video.cell_G % per_frame)[order_R]
        round_R = (_number_among_equal(slot_R) - self.method.max_copies + 1).clamp_min(0)
        order_R = order_R[torch.sort(round_R, stable=True).indices]
        order_R = order_R[torch.sort(segment_G[order_R], stable=True).indices]
        segment_R = segment_G[order_R]
        number_R = _number_among_equal(segment_R)

        size_J = _counts(segment_G, video.grid.t)
        relevant_J = self._relevant(video, frame_TC, segment_T)
        share_J = self._shares(size_J, relevant_J, budget.num_kept)
        due_R = share_J[segment_R] - _TOKEN * number_R
        one_each = budget.num_kept >= (size_J > 0).sum()
        due_R = torch.where(one_each & (number_R == 0), due_R + _TOKEN * video.num_groups, due_R)
        index_K = order_R[ops.top(due_R, budget.num_kept)].sort().values
        return Kept(index_K=index_K, scores_G=torch.empty_like(due_R).scatter_(0, order_R, due_R).float() / _TOKEN)

    def _relevant(self, video: VideoTokens, frame_TC: Tensor, segment_T: Tensor) -> Tensor:
        """bool (J,) segments that resemble the question."""
        if video.text_C is None:
            return torch.zeros_like(segment_T, dtype=torch.bool)
        cosine_T = frame_TC @ F.normalize(video.text_C.float(), dim=-1)
        length_J = _counts(segment_T, len(segment_T))
        score_J = torch.zeros_like(cosine_T).scatter_add(0, segment_T, cosine_T) / length_J.clamp_min(1)
        if self.method.tau_t_mode == "minmax":
            low = score_J.masked_fill(length_J == 0, torch.inf).amin()
            high = score_J.masked_fill(length_J == 0, -torch.inf).amax()
            equal = high - low < 1e-6  # below the rounding of an fp32 cosine there is nothing to tell apart
            score_J = torch.where(equal, -torch.inf, (score_J - low) / (high - low).clamp_min(1e-6))
        return (score_J >= self.method.tau_t) & (length_J > 0)

    def _shares(self, size_J: Tensor, relevant_J: Tensor, num_kept: int) -> Tensor:
        """int64 (J,) millionths of tokens due to each segment; together `num_kept` tokens.

        With m tokens in relevant segments and n in others, n rho + m max(rho, min(alpha rho, gamma)) = num_kept has
        three straight pieces: boosted, held at the cap, and past the cap, where all segments are treated alike."""
        boost, cap = self.method.alpha_boost, self.method.gamma_cap
        size_J = size_J.double()
        m, n = (size_J * relevant_J).sum(), (size_J * ~relevant_J).sum()
        boosted, alike = num_kept / (n + boost * m), num_kept / (n + m)
        held = ((num_kept - cap * m) / n.clamp_min(1)).clamp(cap / boost, cap)
        rho = torch.where(boosted <= cap / boost, boosted, torch.where(alike <= cap, held, alike))
        share_J = size_J * torch.where(relevant_J, torch.maximum(rho, (boost * rho).clamp_max(cap)), rho)
        return (share_J * _TOKEN).round().long()

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 6 * grid.t * width  # norm, neighbour and text product of every frame


def _counts(number_N: Tensor, size: int) -> Tensor:
    """int64 (size,) how often each number occurs; unlike bincount without a host synchronisation."""
    return torch.zeros(size, dtype=torch.long, device=number_N.device).scatter_add(
        0, number_N, torch.ones_like(number_N)
    )


def _number_among_equal(value_R: Tensor) -> Tensor:
    """int64 (P,) how many equal values stand in front of each."""
    order_R = torch.sort(value_R, stable=True).indices
    sorted_R = value_R[order_R]
    place_R = torch.arange(len(value_R), device=value_R.device)
    starts_R = F.pad(sorted_R[1:] != sorted_R[:-1], (1, 0), value=True)
    number_R = place_R - torch.where(starts_R, place_R, 0).cummax(0).values
    return torch.empty_like(place_R).scatter_(0, order_R, number_R)
