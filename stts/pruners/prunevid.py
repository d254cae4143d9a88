"""PruneVid: what stands still in a scene becomes one token, what moves is clustered frame by frame; then the question.

Shape suffixes beside those of `stts.tokens`: W = segments, B = sets of tokens (one of the static places of each
segment, one of the moving places of each frame).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import density, ops
from stts.pruners.base import ByHost, HostInfo, Newlines, PerVideo, Positions
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens


class Sets(NamedTuple):
    """Static places of every segment, then moving places of every frame."""

    x_BPD: Tensor
    """fp32; static places hold means over the frames of the segment."""
    member_BP: Tensor
    """bool: places that belong to the set."""
    frame_B: Tensor
    """int64 frame in which tokens of the set are placed: the first of a segment, or the frame itself."""


@dataclass(frozen=True, kw_only=True)
class PruneVid(ByHost):
    """Average the places that stand still over a scene; cluster those means, and the moving tokens of each frame.

    Frames are clustered (DPC-KNN, int(T gamma) centres) and the clusters made into segments of neighbours. A place is
    static in a segment of W frames if the mean cosine over all pairs of its frames exceeds tau. Every set of more than
    14 tokens, static ones of a segment or moving ones of a frame, then becomes int(n beta) cluster means:

        s_p = (|sum_t u_tp|^2 - W) / (W (W - 1)) > tau,   u = x / |x|,   score = rho delta of |x_i - x_j| / sqrt(D)

    arXiv:2412.16117, stage 1; `merge_frames_dynamic` of Visual-AI/PruneVid. The method has no target ratio: with
    `exact=False` the count is what beta and tau give, whatever the ratio. An exact budget takes the smallest beta that
    gives enough tokens, at the tau nearest to the published one for which there is such a beta, and drops the cluster
    means of lowest score until the count is met (ours).

    **Differs:** equally dense tokens go by order (the release adds noise); a segment of one frame has no static places
    (0 / 0 there, settled by rounding). Tokens stand in the order of their centres; the release lists each set by
    falling score (compat="official", same tokens). `prunevid+inner` adds its stage 2, `PruneVidInner`."""

    paper: ClassVar[str] = "2412.16117"
    needs_time: ClassVar[str] = "it merges places that stand still over a scene"
    newlines: ClassVar[Newlines] = "kept_rows"
    count_known: ClassVar[bool] = False

    tau: float = 0.8
    """Mean cosine above which a place is static."""
    segment_share: float = 0.25
    """Clusters of frames, as a share of the frames (gamma)."""
    cluster_share: float = 0.5
    """Cluster means, as a share of the tokens of a set (beta)."""
    num_neighbours: int = 7
    smallest: int = 14
    """Sets of at most so many tokens stay as they are."""
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if not (0 < self.segment_share <= 1 and 0 < self.cluster_share <= 1):
            raise ValueError(
                f"segment_share={self.segment_share} and cluster_share={self.cluster_share} are shares kept and must "
                "be in (0, 1]"
            )
        if self.num_neighbours < 1 or self.smallest < 1:
            raise ValueError(f"num_neighbours={self.num_neighbours} and smallest={self.smallest} must be at least 1")

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        x_TPD = video.x_ND.float().view(video.grid.t, video.grid.per_frame, -1)
        segments = refine(self.frame_clusters(x_TPD))
        segment_T = torch.tensor(segments, device=x_TPD.device)
        similarity_WP = pair_similarity(x_TPD.detach(), segment_T, segments[-1] + 1)
        tau, share = self.tau, self.cluster_share
        if budget.exact:
            tau, share = self._settle(similarity_WP, segment_T, budget.num_kept)
        sets = static_and_moving(x_TPD, segment_T, similarity_WP > tau)
        centre_BP, merged_BPD, score_BP = self.merge(sets, share)
        kept = self._in_order(video, sets, centre_BP, merged_BPD, score_BP)
        if not budget.exact:
            return kept
        big_B1 = sets.member_BP.sum(1, keepdim=True) > self.smallest
        cell_BP = sets.frame_B[:, None] * video.grid.per_frame + torch.arange(x_TPD.shape[1], device=x_TPD.device)
        spot_N = torch.where(centre_BP, cell_BP, video.num_groups).flatten()  # the last entry takes what is no centre
        rank_N, merged_N = (
            torch.full((video.num_groups + 1,), torch.inf, device=x_TPD.device).scatter_(0, spot_N, value_BP.flatten())
            for value_BP in (score_BP, score_BP.masked_fill(~big_B1, torch.inf))
        )
        return ops.fit_count(video, kept, budget.num_kept, rank_N[:-1], merged_N[kept.index_K])

    def frame_clusters(self, x_TPD: Tensor) -> list[int]:
        """Cluster of every frame, numbered by the rank of its centre; one host synchronisation."""
        frame_1TD = x_TPD.detach().mean(1)[None]
        distance_1TT = density.distances(frame_1TD) / math.sqrt(x_TPD.shape[-1])
        num_centres = max(1, int(len(x_TPD) * self.segment_share))
        score_1T = density.density_peaks(distance_1TT, self.num_neighbours, count_self=True)
        centre_C = ops.top(score_1T, num_centres)[0]
        cluster_T = distance_1TT[0][:, centre_C].argmin(1)
        cluster_T[centre_C] = torch.arange(num_centres, device=centre_C.device)
        clusters: list[int] = cluster_T.tolist()
        return clusters

    def _settle(self, similarity_WP: Tensor, segment_T: Tensor, num_kept: int) -> tuple[float, float]:
        """tau and beta that give at least `num_kept` tokens, and as few more as may be; one host synchronisation."""
        steps = [round(self.tau + 0.05 * n, 6) for n in range(-40, 41)]
        taus = sorted((tau for tau in steps if -1 <= tau <= 1), key=lambda tau: abs(tau - self.tau))
        taus.append(math.inf)  # nothing is static
        static_CW = torch.stack([(similarity_WP > tau).sum(1) for tau in taus])
        moving_CT = similarity_WP.shape[1] - static_CW[:, segment_T]
        sizes_of = zip(taus, torch.cat([static_CW, moving_CT], 1).tolist(), strict=True)
        fits = [(tau, sizes) for tau, sizes in sizes_of if self._count(sizes, 0) <= num_kept <= sum(sizes)]
        if not fits:  # even the fewest clusters are too many
            return -1.0, 1e-9
        tau, sizes = fits[0]
        shares = sorted({k / size for size in sizes if size > self.smallest for k in range(1, size + 1)} | {1e-9, 1.0})
        low, high = 0, len(shares) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._count(sizes, shares[middle]) >= num_kept else (middle + 1, high)
        return tau, shares[low]

    def _count(self, sizes: Sequence[int], share: float) -> int:
        return sum(max(1, int(size * share)) if size > self.smallest else size for size in sizes)

    def merge(self, sets: Sets, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Centres of every set, bool (B, S); means of their clusters, (B, S, D); density scores, (B, S)."""
        num_sets, num_places, width = sets.x_BPD.shape
        with torch.no_grad():
            distance_BPP = density.distances(sets.x_BPD) / math.sqrt(width)
            score_BP = density.density_peaks(
                distance_BPP, self.num_neighbours, count_self=True, valid_BN=sets.member_BP
            )
            size_B = sets.member_BP.sum(1)
            count_B = torch.where(size_B > self.smallest, (size_B.double() * share).long().clamp_min(1), size_B)
            order_BP = ops.top(score_BP, num_places)
            first_BP = torch.arange(num_places, device=order_BP.device) < count_B[:, None]
            centre_BP = torch.zeros_like(first_BP).scatter_(1, order_BP, first_BP)
            nearest_BP = distance_BPP.masked_fill(~centre_BP[:, None, :], torch.inf).argmin(-1)
            place_P = torch.arange(num_places, device=order_BP.device)
            nearest_BP = torch.where(centre_BP, place_P, nearest_BP)
            cluster_BP = nearest_BP + num_places * torch.arange(num_sets, device=order_BP.device)[:, None]
            cluster_BP = torch.where(sets.member_BP, cluster_BP, -1)
        mean_ND, _ = ops.cluster_mean(sets.x_BPD.flatten(0, 1), cluster_BP.flatten(), num_sets * num_places)
        return centre_BP, mean_ND.view(num_sets, num_places, width), score_BP

    def _in_order(
        self, video: VideoTokens, sets: Sets, centre_BP: Tensor, merged_BPD: Tensor, score_BP: Tensor
    ) -> Kept:
        """In video order, or as released: static tokens before the moving ones of the segment, each set by its rank."""
        per_frame, device = video.grid.per_frame, centre_BP.device
        set_K, place_K = centre_BP.nonzero(as_tuple=True)
        index_K = sets.frame_B[set_K] * per_frame + place_K
        x_KD = merged_BPD[set_K, place_K].to(video.x_ND.dtype)
        order_K = index_K.argsort()
        if self.compat == "official":
            rank_BP = torch.empty_like(score_BP, dtype=torch.long)
            number_BP = torch.arange(per_frame, device=device).expand_as(rank_BP)
            rank_BP.scatter_(1, ops.top(score_BP, per_frame), number_BP)
            rank_BP = torch.where(sets.member_BP.sum(1, keepdim=True) > self.smallest, rank_BP, number_BP)
            moving_B = torch.arange(len(sets.frame_B), device=device) >= len(sets.frame_B) - video.grid.t
            key_B = 2 * sets.frame_B + moving_B
            order_K = (key_B[set_K] * per_frame + rank_BP[set_K, place_K]).argsort()
        return Kept(index_K=index_K[order_K], x_KD=x_KD[order_K])

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Unit tokens, their sum and its square; distances of frames, and those inside every frame."""
        return 8 * grid.num_groups * width + 2 * (grid.t**2 + grid.t * grid.per_frame**2) * width


def refine(labels: Sequence[int]) -> list[int]:
    """Segment of every frame, 0, 1, ...: clusters of frames made contiguous.

    Of each cluster only its longest runs stay, if they are longer than one frame. A gap goes to the longer of its
    neighbours, the left one on ties; all frames are one segment where no run stays."""
    runs = [(label, len(list(run))) for label, run in groupby(labels)]
    longest = {label: max(length for other, length in runs if other == label) for label in set(labels)}
    kept = [label if 1 < length == longest[label] else None for label, length in runs for _ in range(length)]
    end = 0
    while end < len(kept):
        start = end
        while end < len(kept) and kept[end] is None:
            end += 1
        if end > start:
            left, right = _run(kept[:start][::-1]), _run(kept[end:])
            chosen = kept[end] if right > left else kept[start - 1] if left else 0
            kept[start:end] = [chosen] * (end - start)
        else:
            end += 1
    return [number for number, (_, run) in enumerate(groupby(kept)) for _ in run]


def _run(labels: Sequence[int | None]) -> int:
    """Length of the run at the beginning."""
    return next((n for n, label in enumerate(labels) if label != labels[0]), len(labels))


def pair_similarity(x_TPD: Tensor, segment_T: Tensor, num_segments: int) -> Tensor:
    """(W, S) fp32 mean cosine of each place over all pairs of different frames of a segment; -inf for one frame."""
    unit_TN = F.normalize(x_TPD, dim=-1).flatten(1)
    member_WT = (segment_T == torch.arange(num_segments, device=segment_T.device)[:, None]).float()
    sum_WPD = (member_WT @ unit_TN).view(len(member_WT), *x_TPD.shape[1:])
    length_W1 = member_WT.sum(1, keepdim=True)
    similarity_WP: Tensor = (sum_WPD.square().sum(-1) - length_W1) / (length_W1 * (length_W1 - 1)).clamp_min(1)
    return similarity_WP.masked_fill(length_W1 == 1, -torch.inf)


def static_and_moving(x_TPD: Tensor, segment_T: Tensor, static_WP: Tensor) -> Sets:
    """The sets that are merged, each on its own."""
    member_WT = (segment_T == torch.arange(len(static_WP), device=x_TPD.device)[:, None]).float()
    mean_WPD = (member_WT @ x_TPD.flatten(1) / member_WT.sum(1, keepdim=True)).view(-1, *x_TPD.shape[1:])
    frame_T = torch.arange(len(x_TPD), device=x_TPD.device)
    return Sets(
        torch.cat([mean_WPD, x_TPD]),
        torch.cat([static_WP, ~static_WP[segment_T]]),
        torch.cat([member_WT.argmax(1), frame_T]),
    )


def asked_tokens(attention_HQN: Tensor, sizes: Sequence[int], share: float) -> Tensor:
    """Stage 2 of the release: int(share n) tokens of each set that the words behind the video attend to most.

    attention_HQN: probabilities of LLM layer 10 (from 0), heads x words behind the video x tokens in the order of
    stage 1; a token counts the most that any head of any word gives it. sizes: tokens of each set (the static ones of a
    segment, then the moving ones of each frame) in that order. Returns int64 numbers of tokens, increasing."""
    score_N, start, kept = attention_HQN.amax((0, 1)), 0, []
    for size in sizes:
        kept.append(start + ops.top(score_N[start : start + size], int(share * size)))
        start += size
    return torch.cat(kept).sort().values


# --- inside the LLM ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PruneVidInner(PerVideo):
    """Keep in each frame the tokens that the words behind the video attend to most: stage 2 of PruneVid.

        a_g = max over heads and words of the attention in LLM layer 10 of 28 (from 0),   int(alpha n) of n, alpha = 0.4

    arXiv:2412.16117; `elastic_cache.py` of Visual-AI/PruneVid (`asked_tokens`). An exact budget trims or fills by
    attention over the whole video.

    **Differs:** the release ranks the static tokens of a segment apart from the moving ones of its first frame; here
    they stand in that frame and are ranked with it, as an LLM sees cells only. The release shortens the cache of the
    layers up to 10 too; here they keep what they have read. Where every frame would lose all tokens, one stays. In
    shallow LLMs the layer number is scaled."""

    paper: ClassVar[str] = "2412.16117"
    signals: ClassVar[frozenset[Signal]] = frozenset({"asked"})
    positions: ClassVar[Positions] = "original"
    count_known: ClassVar[bool] = False
    reads_features: ClassVar[bool] = False

    layer: int = 11
    """Groups are dropped before this LLM layer, by the attention of the layer before."""
    share: float = 0.4

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published layer, scaled to this host."""
        return cls(**{"layer": host.llm_layer(11), **options})

    @property
    def site(self) -> Site:  # type: ignore[override]  # fields decide, so it cannot be a class variable
        return Site("llm", layer=self.layer, share=self.share)

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        salience_G = ops.need(video.salience_G, "asked", video).detach().float()
        frame_G = video.cell_G // video.grid.per_frame
        count_T = torch.zeros(video.grid.t, dtype=torch.int64, device=frame_G.device)
        count_T = count_T.scatter_add_(0, frame_G, torch.ones_like(frame_G))
        by_score_G = ops.top(salience_G, video.num_groups)
        order_G = by_score_G[frame_G[by_score_G].sort(stable=True).indices]  # by frame, then by attention
        number_G = torch.arange(video.num_groups, device=frame_G.device)
        frame_order_G = frame_G[order_G]
        rank_G = number_G - (count_T.cumsum(0) - count_T)[frame_order_G]
        stays_G = rank_G < (count_T.double() * self.share).long()[frame_order_G]
        first_G = torch.zeros_like(stays_G).scatter_(0, order_G, stays_G)[by_score_G]
        ranked_G = by_score_G[first_G.sort(descending=True, stable=True).indices]  # those that stay, by attention
        num_kept = budget.num_kept if budget.exact else max(1, int(stays_G.sum()))
        return Kept(index_K=ranked_G[:num_kept].sort().values, scores_G=salience_G)
