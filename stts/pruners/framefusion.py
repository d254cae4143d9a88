"""FrameFusion: a token joins the one before it at its place where they are alike; before the LLM, or as released."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import HostInfo, Newlines, PerVideo, Positions, Stage, keep_top
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens

NO_PREDECESSOR = -2.0
"""Similarity of the first token of a place, below any cosine."""


@dataclass(frozen=True, kw_only=True)
class FrameFusion(PerVideo):
    """Merge each token into the one before it at the same place, where their cosine is highest.

    Tokens of a place form a chain; every run of merged tokens is absorbed by the token before the run, which becomes
    the plain mean of all and keeps its position. arXiv:2501.01986, `framefusion/main.py` of thu-nics/FrameFusion. This
    is its first merging, on the embeddings that enter LLM layer 0, and here the whole budget falls to it; with the
    calls inside the LLM that follow in the release it is `framefusion+inner`.

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


# --- inside the LLM ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FrameFusionInner:
    """Merge tokens layer by layer, as many as are alike, then keep what the last prompt token attends to.

    arXiv:2501.01986, `framefusion/main.py`: FrameFusion as released. A call merges every token with a cosine of
    `threshold` to the one before it at its place. Calls go on, on the embeddings and then layer after layer, until one
    merges less than `least` of what is there; the next one prunes. Every call knows how many tokens, kept to the end,
    make the mean over the LLM's layers what was asked (rho of the release): where enough are alike, the most similar
    are merged down to that number and nothing more happens (on the embeddings: this is `framefusion` then). So the
    count of the calls, and of tokens in each layer before the last call, depend on the video; the mean over all layers
    does not.

    **Differs:** a call stands before layer k, where the release has it between attention and MLP of layer k - 1: it
    reads the same attention, and merges hidden states that have one MLP more behind them, which makes its count of
    layers exact. There is an end to the calls: the one before the last of `layers` prunes if none did before, and so
    does one after which the ratio would be used up (an error there). Newlines are no candidates; the release merges
    those of a row's end like a place. In shallow LLMs the last layer with a call is scaled."""

    paper: ClassVar[str] = "2501.01986"

    layers: tuple[int, ...] = tuple(range(1, 9))
    """LLM layers before which a call stands, besides the one on the embeddings."""
    num_layers: int = 28
    """Of the LLM; the release counts 28 whatever it has."""
    threshold: float = FrameFusion.threshold
    least: float = 0.1
    """Merging ends with the first call that merges less than this share of what is present."""

    def __post_init__(self) -> None:
        if list(self.layers) != sorted(set(self.layers)) or not all(0 < at < self.num_layers for at in self.layers):
            raise ValueError(f"layers={self.layers} must be layers 1 to {self.num_layers - 1} of the LLM, increasing")

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published threshold of this family; calls before layers 1 to 8 of 28 or more."""
        last = host.llm_layer(8)
        own = {"layers": tuple(cut for cut in host.cut_layers if cut <= last), "num_layers": host.llm_layers}
        return cls(**{**own, "threshold": FrameFusion.for_host(host).threshold, **options})

    @property
    def stages(self) -> tuple[Stage, ...]:
        edges = [0, *self.layers, self.num_layers]
        return tuple(Call(layer=layer, until=until, method=self) for layer, until in pairwise(edges))


@dataclass(frozen=True, kw_only=True)
class Call(PerVideo):
    """One call of FrameFusion, before LLM layer `layer` (0: on the embeddings): it merges, or prunes as the last one.

    `scores_G` is minus the similarity where it merges, the attention where it prunes."""

    needs_time: ClassVar[str] = FrameFusion.needs_time
    paper: ClassVar[str] = FrameFusion.paper
    newlines: ClassVar[Newlines] = FrameFusion.newlines
    positions: ClassVar[Positions] = "original"
    count_known: ClassVar[bool] = False

    layer: int
    until: int
    """The layer of the next call, or the number of layers."""
    method: FrameFusionInner

    @property
    def site(self) -> Site:  # type: ignore[override]  # a field decides, so it cannot be a class variable
        return Site("llm", layer=self.layer, share=1.0, closes=True) if self.layer else Site("pre_llm")

    @property
    def signals(self) -> frozenset[Signal]:  # type: ignore[override]
        return frozenset({"last_row"}) if self.layer else frozenset()

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        """Decide for one video; one host synchronisation where it merges."""
        present, before = video.num_groups, video.num_before
        if before is None or 1 - present / before >= self.method.least:
            place_N = video.cell_G % video.grid.per_frame
            similarity_N = similarity_of(video, place_N)
            merged_N = merge_most_similar(similarity_N, place_N, present - budget.num_kept)
            merged_N &= similarity_N >= self.method.threshold
            index_K, x_KD = merge_runs(video.x_ND, place_N, merged_N)
            left = len(index_K)
            if left == budget.num_kept or (not budget.exact and left <= self._most(budget.num_kept)):
                return Kept(index_K=index_K, x_KD=x_KD.to(video.x_ND.dtype), scores_G=-similarity_N)
        if not self.layer:  # there is no attention yet
            return FrameFusion().prune(video, replace(budget, exact=True))
        return keep_top(video, ops.need(video.salience_G, "last_row", video).detach().float(), budget.num_kept)

    def _most(self, num_kept: int) -> int:
        """Tokens that the layers up to the next call may see, so that at least one is left for those behind it.

        num_kept: tokens which all layers from here on may see."""
        to_come, here = self.method.num_layers - self.layer, self.until - self.layer
        return (num_kept * to_come - (to_come - here)) // here

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 5 * grid.num_groups * width


# --- chains --------------------------------------------------------------------------------------------------------


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
