"""PruneVid: what stands still in a scene becomes one token, what moves is clustered frame by frame; then the question.

Shape suffixes beside those of `stts.tokens`: W = segments, B = sets of tokens (one of the static places of each
segment, one of the moving places of each frame), M = tokens of all sets, A = means of places, C = cluster centres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from stts.pruners import density, ops
from stts.pruners.base import ByHost, HostInfo, Newlines, PerVideo, Positions
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens


class Sets(NamedTuple):
    """Static places of every segment, then moving places of every frame."""

    mean_AD: Tensor
    """fp32 means of all places over the frames of each segment."""
    row_M: Tensor
    """int64 rows of the tokens of the sets, one set behind the other, in the video and behind it in `mean_AD`."""
    cell_M: Tensor
    """int64 cell at which each of them is placed: static ones in the first frame of their segment."""
    sizes: list[int]


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
        similarity_WP = pair_similarity(x_TPD.detach(), segment_T, segments[-1] + 1, video.norm_N)
        tau, share = self.tau, self.cluster_share
        if budget.exact:
            tau, share = self._settle(similarity_WP, segment_T, budget.num_kept)
        sets = static_and_moving(x_TPD, segment_T, similarity_WP > tau)
        counts = [self._kept(size, share) for size in sets.sizes]
        x_ND = x_TPD.flatten(0, 1)
        found = density.cluster(
            x_ND.detach(), sets.row_M, sets.sizes, counts, self.num_neighbours, extra_AD=sets.mean_AD.detach()
        )
        order_C = self._order(video, sets, counts, found)
        place_C = torch.empty_like(order_C).scatter_(0, order_C, torch.arange(len(order_C), device=order_C.device))
        cluster_R = sets.row_M.new_full((len(x_ND) + len(sets.mean_AD),), -1)
        cluster_R = cluster_R.index_copy_(0, sets.row_M, place_C[found.cluster_M])  # no set loses all of its tokens
        x_CD, _ = ops.cluster_mean(x_ND, cluster_R, len(order_C), sets.mean_AD)
        cell_C, score_C = sets.cell_M[found.centre_C][order_C], found.score_C[order_C]
        kept = Kept(index_K=cell_C, x_KD=x_CD.to(video.x_ND.dtype))
        if not budget.exact:
            return kept
        big_M = torch.tensor([size > self.smallest for size in sets.sizes for _ in range(size)], device=cell_C.device)
        merged_C = score_C.masked_fill(~big_M[found.centre_C][order_C], torch.inf)
        rank_N = torch.full((video.num_groups,), torch.inf, device=cell_C.device).scatter_(0, cell_C, score_C)
        return ops.fit_count(video, kept, budget.num_kept, rank_N, merged_C)

    def frame_clusters(self, x_TPD: Tensor) -> list[int]:
        """Cluster of every frame, numbered by the rank of its centre; one host synchronisation."""
        frame_1TD = (x_TPD.new_ones(len(x_TPD), 1, x_TPD.shape[1]) @ x_TPD.detach() / x_TPD.shape[1]).transpose(0, 1)
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
        return sum(self._kept(size, share) for size in sizes)

    def _kept(self, size: int, share: float) -> int:
        """Tokens that become of a set of `size`."""
        return max(1, int(size * share)) if size > self.smallest else size

    def _order(self, video: VideoTokens, sets: Sets, counts: Sequence[int], found: density.Clusters) -> Tensor:
        """Centres in video order, or as released: static tokens before the moving ones of the segment, each set by its
        rank."""
        cell_C = sets.cell_M[found.centre_C]
        if self.compat != "official":
            return cell_C.argsort()
        first, device = len(counts) - video.grid.t, cell_C.device  # of the sets of moving places
        set_C = torch.tensor([n for n, count in enumerate(counts) for _ in range(count)], device=device)
        small_C = torch.tensor([size <= self.smallest for size in sets.sizes], device=device)[set_C]
        by_score_C = found.score_C.masked_fill(small_C, 0).argsort(descending=True, stable=True)
        key_C = 2 * (cell_C // video.grid.per_frame) + (set_C >= first)
        return by_score_C[key_C[by_score_C].argsort(stable=True)]

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


def pair_similarity(x_TPD: Tensor, segment_T: Tensor, num_segments: int, norm_N: Tensor | None = None) -> Tensor:
    """(W, S) fp32 mean cosine of each place over all pairs of different frames of a segment; -inf for one frame.

    norm_N: `VideoTokens.norm_N`, computed where it is None."""
    norm_TP = (ops.lengths(x_TPD) if norm_N is None else norm_N).view(x_TPD.shape[:2])
    member_WT = (segment_T == torch.arange(num_segments, device=segment_T.device)[:, None]).float()
    sum_PWD = (member_WT / norm_TP.T[:, None]) @ x_TPD.transpose(0, 1)
    length_W1 = member_WT.sum(1, keepdim=True)
    square_WP = torch.linalg.vector_norm(sum_PWD, dim=-1).T.square()
    similarity_WP: Tensor = (square_WP - length_W1) / (length_W1 * (length_W1 - 1)).clamp_min(1)
    return similarity_WP.masked_fill(length_W1 == 1, -torch.inf)


def static_and_moving(x_TPD: Tensor, segment_T: Tensor, static_WP: Tensor) -> Sets:
    """The sets that are merged, each on its own; one host synchronisation."""
    (num_frames, num_places, _), device = x_TPD.shape, x_TPD.device
    member_WT = (segment_T == torch.arange(len(static_WP), device=device)[:, None]).float()
    mean_WN = member_WT @ x_TPD.flatten(1) / member_WT.sum(1, keepdim=True)
    member_BP = torch.cat([static_WP, ~static_WP[segment_T]])
    sizes: list[int] = member_BP.sum(1).tolist()
    frame_B = torch.cat([member_WT.argmax(1), torch.arange(num_frames, device=device)])
    number_B = torch.arange(len(sizes), device=device)  # static sets stand behind the frames of the video
    row_B = torch.where(number_B < len(static_WP), number_B + num_frames, number_B - len(static_WP))
    token_M = member_BP.flatten().nonzero_static(size=sum(sizes))[:, 0]
    set_M, place_M = token_M // num_places, token_M % num_places
    row_M, cell_M = row_B[set_M] * num_places + place_M, frame_B[set_M] * num_places + place_M
    return Sets(mean_WN.view(-1, x_TPD.shape[2]), row_M, cell_M, sizes)


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
