"""FrameFusion: a token joins the one before it at its place where they are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import HostInfo, Newlines, PerVideo, Positions
from stts.tokens import Budget, Grid, Kept, VideoTokens

NO_PREDECESSOR = -2.0
"""Similarity of the first token of a place, below any cosine."""


@dataclass(frozen=True, kw_only=True)
class FrameFusion(PerVideo):
    """Merge each token into the one before it at the same place, where their cosine is highest.

    Tokens of a place form a chain; every run of merged tokens is absorbed by the token before the run, which becomes
    the plain mean of all and keeps its position. arXiv:2501.01986, `framefusion/main.py` of thu-nics/FrameFusion. This
    is its first merging, on the embeddings that enter LLM layer 0, and all there is of it before the LLM: the rest of
    the release, merging again behind the attention of layers 0, 1, ... and one cut by attention, needs a stage between
    attention and MLP and is found as loops only (`naive/framefusion.py`). So the whole budget falls to this merging.

    * `budget.exact`: as where the release meets its budget at once, the most similar tokens are merged until num_kept
      are left. Below one token per place: evenly spaced ones of those (ours).
    * otherwise only tokens with a cosine of at least `threshold` are merged, as long as the budget is not reached; the
      release leaves what is missing to its later steps.

    **Differs:** equal similarity merges the lower place first, then the earlier frame (undefined in the release)."""

    label: ClassVar[str] = "before the LLM only"
    needs_time: ClassVar[str] = "it merges tokens into the same place of the frame before"
    paper: ClassVar[str] = "2501.01986"
    newlines: ClassVar[Newlines] = "kept_rows"
    positions: Positions = "original"  # type: ignore[misc]  # a field, so that one may renumber
    count_known: ClassVar[bool] = False

    threshold: float = 0.6
    """Cosine from which on tokens are merged where the budget is not exact; published: 0.6, Qwen2-VL 0.5."""

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published threshold of this family."""
        return cls(**{"threshold": 0.5 if host.mrope else cls.threshold, **options})

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        place_N = video.cell_G % video.grid.per_frame
        similarity_N = similarity_of(video, place_N)
        merged_N = merge_most_similar(similarity_N, place_N, video.num_groups - budget.num_kept)
        if not budget.exact:
            merged_N &= similarity_N >= self.threshold
        index_K, x_KD = merge_runs(video.x_ND, place_N, merged_N)
        if budget.exact and len(index_K) > budget.num_kept:
            chosen_K = ops.evenly_spaced(len(index_K), budget.num_kept, index_K.device)
            index_K, x_KD = index_K[chosen_K], x_KD[chosen_K]
        return Kept(index_K=index_K, x_KD=x_KD.to(video.x_ND.dtype), scores_G=-similarity_N)

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 5 * grid.num_groups * width  # one norm and one dot product per token, the means


def similarity_of(video: VideoTokens, place_N: Tensor) -> Tensor:
    """`chain_similarity` of a video; of a whole one without gathering, as its places follow each other in memory."""
    if video.num_groups != video.grid.num_groups:
        return chain_similarity(video.x_ND, place_N, video.norm_N)
    similarity_N = ops.neighbour_similarity(video.x_ND, video.grid, video.norm_N)
    return similarity_N.index_fill_(0, place_N[: video.grid.per_frame], NO_PREDECESSOR)


def chain_similarity(x_ND: Tensor, place_N: Tensor, norm_N: Tensor | None = None) -> Tensor:
    """(N,) fp32 cosine of each token with the one before it at its place; `NO_PREDECESSOR` for the first."""
    order_N = torch.sort(place_N, stable=True).indices
    same_N = F.pad(place_N[order_N].diff() == 0, (1, 0))  # the first of a place is compared with itself, for nothing
    other_N = torch.empty_like(order_N).scatter_(0, order_N, torch.where(same_N, order_N.roll(1), order_N))
    has_other_N = torch.empty_like(same_N).scatter_(0, order_N, same_N)
    return ops.similarity_to(x_ND, other_N, norm_N).masked_fill(~has_other_N, NO_PREDECESSOR)


def merge_most_similar(similarity_N: Tensor, place_N: Tensor, number: int) -> Tensor:
    """bool (N,): the `number` tokens of highest similarity that have a predecessor."""
    order_N = torch.sort(place_N, stable=True).indices  # equal similarity: the lower place, then the earlier frame
    chosen_M = order_N[ops.top(similarity_N[order_N], number)]
    merged_N = torch.zeros_like(similarity_N, dtype=torch.bool).index_fill_(0, chosen_M, True)
    return merged_N & (similarity_N > NO_PREDECESSOR)


def merge_runs(x_ND: Tensor, place_N: Tensor, merged_N: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that are not merged, (K,) int64, and their fp32 means with the run of merged ones behind each, (K, D)."""
    order_N = torch.sort(place_N, stable=True).indices
    index_K = (~merged_N).nonzero()[:, 0]
    number_N = torch.empty_like(order_N)  # of the last token of the chain that stays, at or before each token
    number_N[order_N] = (~merged_N)[order_N].cumsum(0) - 1
    rank_N = torch.empty_like(order_N)
    rank_N[number_N[index_K]] = torch.arange(len(index_K), device=order_N.device)
    x_KD, _ = ops.cluster_mean(x_ND, rank_N[number_N], len(index_K))
    return index_K, x_KD


def left_to_remove(removed: Sequence[float], cost: float, num_layers: int) -> float:
    """Share of the present tokens to remove now so that the layers see `cost` of all on average (rho of the release).

    removed: shares removed so far, each of what was there; every entry counts as one layer. ValueError where the layers
    before have used up the cost."""
    present, used = 1.0, 0.0
    for share in removed:
        present *= 1 - share
        used += present
    remain = num_layers * cost - used
    if remain < 0:
        raise ValueError(f"cost={cost} of {num_layers} layers is used up by the first {len(removed)}; raise it")
    return max(0.0, 1 - remain / ((num_layers - len(removed)) * present))
