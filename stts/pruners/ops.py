"""Arithmetic that several methods share, each with its formula.

Shape suffixes beside those of `stts.tokens`: B = batches of points, C = clusters, L = tokens that are left of a
frame, R = run length, or rows of two tensors; A = rows of the second.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stts.tokens import Grid, Kept, Signal, VideoTokens

_T = TypeVar("_T")

CACHED = 2**17
"""Elements that a CPU keeps in its cache from one operation to the next."""
FEW_PAIRS = 2**18
"""Pairs of points whose distances cost less than starting the operators once more."""


def neighbour_similarity(x_ND: Tensor, grid: Grid, norm_N: Tensor | None = None) -> Tensor:
    """Cosine of each token with the token at the same place one frame earlier.

        s[t, i] = cos(x[t, i], x[t-1, i]),   s[0, i] = 0  (nothing came before frame 0)

    norm_N: `VideoTokens.norm_N`, computed where it is None. Returns (N,) fp32 in [-1, 1], without gradient. Computed in
    fp32: in bf16 two near-identical frames round to equal scores and the ranking is decided by ties."""
    if x_ND.shape[0] != grid.num_groups:
        raise ValueError(f"got {x_ND.shape[0]} tokens for {grid} = {grid.num_groups}; this needs the full grid")
    x_TPD = x_ND.view(grid.t, grid.per_frame, -1)
    norm_TP = (lengths(x_ND) if norm_N is None else norm_N).view(grid.t, -1)
    cosine_TP = row_dots(x_TPD[1:], x_TPD[:-1]) / (norm_TP[1:] * norm_TP[:-1])
    return F.pad(cosine_TP, (0, 0, 1, 0)).flatten()


def similarity_to(x_ND: Tensor, other_N: Tensor, norm_N: Tensor | None = None) -> Tensor:
    """(N,) fp32 cosine of each token with the token `other_N` (int64), as `neighbour_similarity`."""
    norm_N = lengths(x_ND) if norm_N is None else norm_N
    block = frame_block(x_ND)
    parts = zip(torch.split(x_ND, block), torch.split(other_N, block), strict=True)
    dots = [row_dots(part_ND[None], x_ND.index_select(0, other)[None])[0] for part_ND, other in parts]
    return torch.cat(dots) / (norm_N * norm_N[other_N])


def lengths(x_ND: Tensor) -> Tensor:
    """(N,) fp32 lengths of tokens, at least 1e-12, without gradient."""
    at_least_fp32 = torch.promote_types(x_ND.dtype, torch.float32)
    norm_N: Tensor = torch.linalg.vector_norm(x_ND.detach(), dim=-1, dtype=at_least_fp32)
    return norm_N.float().clamp_min_(1e-12)


def row_dots(x_TPD: Tensor, y_TPD: Tensor) -> Tensor:
    """(T, P) fp32 products of each row of x with the same row of y, without gradient.

    Large ones on a CPU frame by frame by NumPy, which writes no products to memory: torch would take two to six times
    as long."""
    x_TPD, y_TPD = x_TPD.detach(), y_TPD.detach()
    if x_TPD.device.type != "cpu" or x_TPD.numel() <= CACHED:
        dot_TP: Tensor = torch.linalg.vecdot(x_TPD.float(), y_TPD.float())
        return dot_TP
    dots = [np.vecdot(x_PD.float().numpy(), y_PD.float().numpy()) for x_PD, y_PD in zip(x_TPD, y_TPD, strict=True)]
    return torch.from_numpy(np.stack(dots))


def frame_block(x_TPD: Tensor) -> int:
    """Entries of the first axis to work on at a time: all, or on a CPU what stays in its cache between operators."""
    return min(max(1, len(x_TPD)), cached_block(x_TPD[0].numel(), x_TPD.device))


def cached_block(size: int, device: torch.device) -> int:
    """How many parts of `size` elements to work on at a time; on a CPU as many as stay in its cache, at least one."""
    return max(1, CACHED // size) if device.type == "cpu" else sys.maxsize


# --- what a method may expect of a video ---------------------------------------------------------------------------


def need(value: _T | None, signal: Signal, video: VideoTokens) -> _T:
    """The collected signal; ValueError when the caller did not collect it."""
    if value is None:
        raise ValueError(
            f"video {video.uid!r} carries no {signal!r} signal; the stage declares it in `signals`, so whoever calls "
            "the stage must collect it first"
        )
    return value


def need_full_grid(video: VideoTokens) -> None:
    """ValueError where an earlier stage has already dropped groups, for methods that compare whole frames."""
    if video.num_groups != video.grid.num_groups:
        raise ValueError(
            f"video {video.uid!r} has {video.num_groups} of {video.grid.num_groups} groups left, and this method needs "
            "whole frames; let it act first, or alone"
        )


def evenly_spaced(total: int, number: int, device: torch.device) -> Tensor:
    """(number,) int64 places floor((i + 0.5) total / number), i = 0..number-1; integers, so exact at any size."""
    step_K = 2 * torch.arange(number, device=device) + 1
    return step_K * total // (2 * number)


# --- ranking -------------------------------------------------------------------------------------------------------


def top(scores_BN: Tensor, num_kept: int) -> Tensor:
    """Places of the `num_kept` largest scores along the last axis, best first; ties go to the earlier place."""
    return torch.sort(scores_BN, dim=-1, descending=True, stable=True).indices[..., :num_kept]


def highest(scores_N: Tensor, num_kept: int) -> Tensor:
    """(K,) int64 places of the `num_kept` largest scores, increasing; ties go to the earlier place.

    Nothing is sorted: what lies above the K-th largest score stays, and of its equals the first. NaN counts as +inf."""
    scores_N = scores_N.nan_to_num(torch.inf, torch.inf, -torch.inf)
    least = scores_N.topk(num_kept, sorted=False).values.amin()
    above_N, equal_N = scores_N > least, scores_N == least
    chosen_N = above_N | equal_N & (equal_N.cumsum(0) <= num_kept - above_N.sum())
    return chosen_N.nonzero_static(size=num_kept)[:, 0]


def farthest_first(
    x_BND: Tensor, num_kept: int, weight_BN: Tensor | None = None, norm_BN: Tensor | None = None
) -> Tensor:
    """(B, K) int64 tokens of each pool in the order of a greedy max-min choice; none is chosen twice.

        C_ij = (1 - cos(x_i, x_j)) w_j;   first: argmax_j of the second smallest C_ij of column j (token i = j has 0);
        next: argmax_j min over chosen i of C_ij

    weight_BN: w, 1 where it is None; norm_BN: lengths of x, computed where it is None. Ties go to the earlier token.
    Distances stand in one matrix while this is about as large as the tokens themselves, else each row is computed when
    its token is chosen. No host synchronisation."""
    x_BND, (num_pools, num_tokens, width) = x_BND.float(), x_BND.shape
    weight_BN = torch.ones_like(x_BND[..., 0]) if weight_BN is None else weight_BN.float()
    whole_BNN = None
    if num_tokens <= width:  # fewer pairs than features: scale the pairs
        inverse_BN = 1 / (lengths(x_BND) if norm_BN is None else norm_BN)
        whole_BNN = (x_BND @ x_BND.transpose(1, 2)).mul_(inverse_BN[:, :, None]).mul_(inverse_BN[:, None, :])
    else:
        x_BND = F.normalize(x_BND, dim=-1)
        whole_BNN = x_BND @ x_BND.transpose(1, 2) if num_tokens <= 2 * width else None
    whole_BNN = None if whole_BNN is None else whole_BNN.neg_().add_(1)
    block = max(1, min(num_tokens, width // 2))  # rows at a time, half as large as the tokens
    second = []
    for start in range(0, num_tokens, block):
        rows = slice(start, start + block)
        distance_BRN = 1 - x_BND[:, rows] @ x_BND.transpose(1, 2) if whole_BNN is None else whole_BNN[:, rows].clone()
        distance_BRN.diagonal(start, 1, 2).zero_()
        cost_BRN = distance_BRN.mul_(weight_BN[:, rows, None])  # symmetric, so row j is column j
        second.append(cost_BRN.topk(min(2, num_tokens), dim=-1, largest=False).values[..., -1])
    pool_B = torch.arange(num_pools, device=x_BND.device)
    pick_B1 = torch.cat(second, 1).argmax(-1, keepdim=True)
    least_BN = torch.full_like(weight_BN, torch.inf)
    chosen = [pick_B1]
    for _ in range(num_kept - 1):
        if whole_BNN is None:
            row_BN = 1 - (x_BND @ x_BND[pool_B, pick_B1[:, 0]][:, :, None])[..., 0]
        else:
            row_BN = whole_BNN[pool_B, pick_B1[:, 0]]
        least_BN = torch.minimum(least_BN, row_BN * weight_BN).scatter_(1, pick_B1, -torch.inf)
        pick_B1 = least_BN.argmax(-1, keepdim=True)
        chosen.append(pick_B1)
    return torch.cat(chosen, 1)


def rank_salience(video: VideoTokens) -> Tensor:
    """(G,) fp32 attention by which a method ranks tokens.

    A'[t, p] = A[t, p] - mu_s s_p        (SToP, arXiv:2604.20937; plain A without a sink penalty)"""
    salience_G = need(video.salience_G, "attn", video).float()
    if video.sink is None:
        return salience_G
    return salience_G - video.sink.salience * video.sink.penalty_P[video.cell_G % video.grid.per_frame]


def rank_density(video: VideoTokens, score_BN: Tensor, place_BN: Tensor) -> Tensor:
    """Density scores by which centres are chosen, less `density * s` at their places of the frame.

    place_BN: int64 place in [0, S) of each score, broadcastable to it. Unchanged without a sink penalty."""
    if video.sink is None:
        return score_BN
    return score_BN - video.sink.density * video.sink.penalty_P[place_BN]


def is_static(video: VideoTokens, similarity_TP: Tensor, threshold: float) -> Tensor:
    """bool (T - 1, S): the place hardly changes from frame t to t + 1.

    cos[t, p] + mu_t s_p > tau           (SToP; plain cos > tau without a sink penalty)"""
    if video.sink is None:
        return similarity_TP > threshold
    return similarity_TP + video.sink.temporal * video.sink.penalty_P > threshold


def free_slots(video: VideoTokens, slot_C: Tensor, rest_TL: Tensor) -> Tensor:
    """(T, C) numbers in the rest list of merge targets, moved off the worst sinks.

    slot_C: int64 wanted numbers, equal for all frames; rest_TL: int64 (T, L) places left in each frame, ascending. A
    slot on one of the `num_slots` worst places moves to the next free one, at most to L - 1. Unchanged without a sink
    penalty. With `official` the number itself is compared with the places, as the release of SToP does."""
    num_frames, length = rest_TL.shape
    if video.sink is None or not video.sink.num_slots:
        return slot_C.expand(num_frames, -1)
    penalty_P = video.sink.penalty_P
    bad_P = torch.zeros_like(penalty_P, dtype=torch.bool)
    bad_P[top(penalty_P, min(video.sink.num_slots, len(penalty_P)))] = True
    number_L = torch.arange(length, device=rest_TL.device)
    bad_TL = (bad_P[:length].expand(num_frames, -1)) if video.sink.official else bad_P[rest_TL]
    free_TL = torch.where(bad_TL, length - 1, number_L)
    next_TL = free_TL.flip(1).cummin(1).values.flip(1)  # the first free number at or behind each one
    return next_TL[:, slot_C]


# --- segments ------------------------------------------------------------------------------------------------------


def temporal_windows(static_TP: Tensor, max_window: int = 1024) -> tuple[list[tuple[int, int]], int]:
    """Cut a video into windows of frames so that the most tokens repeat (HoliTom, arXiv:2505.21334; Tango).

        n(s, e) = places static in all of s..e-1,   gain(s, e) = n(s, e) (e - s),   the sum of gains is maximal

    static_TP: bool (T - 1, S). Returns windows as (first frame, frame behind the last), and the whole gain: tokens
    saved by merging static places over time. Ties go to the shorter last window. Counts are exact integers; one host
    synchronisation."""
    num_frames = static_TP.shape[0] + 1
    if num_frames == 1:
        return [(0, 1)], 0
    frame_T = torch.arange(num_frames - 1, device=static_TP.device)
    broken_TP = torch.where(static_TP, -1, frame_T[:, None])
    run_TP = frame_T[:, None] - broken_TP.cummax(0).values
    histogram_TR = torch.zeros(num_frames - 1, num_frames, dtype=torch.long, device=static_TP.device)
    histogram_TR.scatter_add_(1, run_TP, torch.ones_like(run_TP))
    longer_TR = histogram_TR.flip(1).cumsum(1).flip(1)  # [t, r]: places whose run that ends at t has at least r steps
    step_R = torch.arange(num_frames, device=static_TP.device)
    gain_TR = (
        (longer_TR * step_R)[:, :max_window].cpu().numpy()
    )  # [t, r]: of a window of r + 1 frames that ends at t + 1
    best = np.zeros(num_frames + 1, dtype=np.int64)  # of the first i frames
    start_of = np.zeros(num_frames, dtype=np.int64)
    for last in range(1, num_frames):  # a recurrence, on the host
        longest = min(last + 1, max_window)
        total_R = best[last + 1 - longest : last + 1][::-1] + gain_TR[last - 1, :longest]
        steps = int(total_R.argmax())  # the first of equals is the shortest
        best[last + 1], start_of[last] = total_R[steps], last - steps
    windows, end = [], num_frames
    while end:
        windows.append((int(start_of[end - 1]), end))
        end = int(start_of[end - 1])
    return windows[::-1], int(best[-1])


def static_places(static_TP: Tensor, windows: Sequence[tuple[int, int]]) -> Tensor:
    """bool (W, P): places static over all pairs of frames of a window; none in a window of one frame.

    static_TP: bool (T - 1, P), as for `temporal_windows`."""
    broken_TP = F.pad((~static_TP).cumsum(0), (0, 0, 1, 0))  # [t]: pairs before frame t that are not static
    start_W, end_W = torch.tensor(windows, device=static_TP.device).unbind(1)
    return (broken_TP[end_W - 1] == broken_TP[start_W]) & (end_W - start_W > 1)[:, None]


# --- clusters ------------------------------------------------------------------------------------------------------


def nearest(x_BND: Tensor, centre_BCD: Tensor, less_BC: Tensor | None = None, norm_BC: Tensor | None = None) -> Tensor:
    """(B, N) int64 number of the centre with the largest x . c / norm_BC, less `less_BC`, where given; the first on
    ties.

    In blocks of rows where the products of all would be larger than the tokens; fp32."""
    num_sets, num_centres, _ = centre_BCD.shape
    block = max(1, max(FEW_PAIRS, x_BND.numel() // 2) // (num_sets * num_centres))
    numbers = []
    for x_BRD in torch.split(x_BND, block, dim=1):
        product_BRC = torch.matmul(x_BRD.float(), centre_BCD.transpose(1, 2))
        if norm_BC is not None:
            product_BRC /= norm_BC[:, None, :]
        if less_BC is not None:
            product_BRC -= less_BC[:, None, :]
        numbers.append(product_BRC.argmax(-1))
    return torch.cat(numbers, 1)


def cluster_mean(
    x_ND: Tensor, cluster_R: Tensor, num_clusters: int, extra_AD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of each cluster's rows, (C, D) fp32, zeros where a cluster is empty, and their number, (C,) int64.

    cluster_R: int64 in [0, C) of the rows of `x_ND` and of `extra_AD` behind them; rows with -1 belong nowhere.
    Deterministic: the rows of a cluster are summed in their order, on CUDA too, where `index_put_` sorts them
    (`index_add` adds as they come)."""
    spare_R = torch.where(cluster_R >= 0, cluster_R, num_clusters)
    # Counted by scattering ones: bincount would wait for the device.
    count_C = torch.zeros(num_clusters + 1, dtype=torch.int64, device=x_ND.device)
    count_C = count_C.scatter_add_(0, spare_R, torch.ones_like(spare_R))[:num_clusters]
    sum_CD = x_ND.new_zeros(num_clusters + 1, x_ND.shape[1], dtype=torch.float32)
    sum_CD = add_rows(sum_CD, spare_R[: len(x_ND)], x_ND)
    if extra_AD is not None and len(extra_AD):
        sum_CD = add_rows(sum_CD, spare_R[len(x_ND) :], extra_AD)
    return sum_CD[:num_clusters].div_(count_C.clamp_min(1)[:, None]), count_C


def add_rows(sum_CD: Tensor, row_N: Tensor, x_ND: Tensor) -> Tensor:
    """`sum_CD` with each of `x_ND` added to its row, in their order on every device; it may be changed in place.

    On CUDA `index_put_` sorts them, where `index_add_` adds as they come."""
    if x_ND.is_cuda:
        return sum_CD.index_put_((row_N,), x_ND.float(), accumulate=True)
    return sum_CD.index_add_(0, row_N, x_ND.float())


# --- counts --------------------------------------------------------------------------------------------------------


def fit_count(
    video: VideoTokens, kept: Kept, num_kept: int, salience_G: Tensor, merged_score_K: Tensor | None = None
) -> Kept:
    """Trim or fill to exactly `num_kept` groups, index increasing: the one way an exact budget is met.

    Too many: merged tokens go first, lowest `merged_score_K` first (fp32, +inf where the token is not merged), then the
    least salient. Too few: groups that are not kept come in by salience, with their own features. ValueError when the
    video has fewer groups than asked for."""
    if not 1 <= num_kept <= video.num_groups:
        raise ValueError(f"num_kept={num_kept} is outside [1, {video.num_groups}]; see budget.plan")
    index_K, x_KD = kept.index_K, kept.x_KD
    take_K = torch.arange(len(index_K), device=index_K.device)
    if len(index_K) > num_kept:
        take_K = torch.sort(salience_G[index_K], descending=True, stable=True).indices
        if merged_score_K is not None:
            take_K = take_K[torch.sort(merged_score_K[take_K], descending=True, stable=True).indices]
        take_K = take_K[:num_kept].sort().values
    elif len(index_K) < num_kept:
        free_G = torch.ones(video.num_groups, dtype=torch.bool, device=index_K.device)
        free_G[index_K] = False
        ranked_G = top(salience_G.float().masked_fill(~free_G, -torch.inf), num_kept - len(index_K))
        take_K = torch.arange(num_kept, device=index_K.device)
        index_K = torch.cat([index_K, ranked_G])
        x_KD = None if x_KD is None else torch.cat([x_KD, video.x_ND[ranked_G].to(x_KD.dtype)])
    index_K, order = index_K[take_K].sort()
    return replace(kept, index_K=index_K, x_KD=None if x_KD is None else x_KD[take_K[order]])


def features_of(x_ND: Tensor, index_K: Tensor, index_C: Tensor, merged_CD: Tensor) -> Tensor:
    """(K, D) tokens of the kept groups `index_K`, increasing; those found in `index_C` have their merged features.

    One copy of what is kept; no host synchronisation."""
    num_kept = len(index_K)
    place_C = torch.searchsorted(index_K, index_C)
    found_C = index_K[place_C.clamp_max(num_kept - 1)] == index_C
    x_KD = x_ND[F.pad(index_K, (0, 1))]  # the last row takes what is not kept
    return x_KD.index_copy_(0, torch.where(found_C, place_C, num_kept), merged_CD.to(x_ND.dtype))[:num_kept]


def soft_top_k(scores: Sequence[Tensor], counts: Sequence[int], steps: int = 64) -> tuple[list[Tensor], Tensor]:
    """p = sigmoid(s + t) of each pool with sum p = k, and the mean over pools of BCE(p, the k highest).

    Gradient of p: v ds - v (v . ds) / sum v with v = p (1 - p), that of the implicit function; it leaves constants out.
    t comes from bisection, all pools side by side. A pool of k = N has p = 1 and adds 0 to the loss."""
    sizes = [len(score_G) for score_G in scores]
    score_BN = nn.utils.rnn.pad_sequence(list(scores), batch_first=True)
    number_N = torch.arange(score_BN.shape[1], device=score_BN.device)
    size_B1, count_B1 = (torch.tensor(rows, device=score_BN.device)[:, None] for rows in (sizes, counts))
    valid_BN, whole_B1 = number_N < size_B1, count_B1 >= size_B1
    with torch.no_grad():
        low_B1 = -score_BN.masked_fill(~valid_BN, -torch.inf).amax(1, keepdim=True) - 10
        high_B1 = -score_BN.masked_fill(~valid_BN, torch.inf).amin(1, keepdim=True) + 10
        for _ in range(steps):
            shift_B1 = (low_B1 + high_B1) / 2
            few_B1 = ((score_BN + shift_B1).sigmoid() * valid_BN).sum(1, keepdim=True) < count_B1
            low_B1, high_B1 = torch.where(few_B1, shift_B1, low_B1), torch.where(few_B1, high_B1, shift_B1)
        shift_B1 = (low_B1 + high_B1) / 2
        p_BN = (score_BN + shift_B1).sigmoid() * valid_BN
        slope_BN = p_BN * (1 - p_BN)
        ranked_BN = top(score_BN.masked_fill(~valid_BN, -torch.inf), score_BN.shape[1])
        target_BN = torch.zeros_like(p_BN).scatter_(1, ranked_BN, (number_N < count_B1).to(p_BN.dtype))
    change_BN = score_BN - score_BN.detach()  # 0, with gradient
    mean_B1 = (slope_BN * change_BN).sum(1, keepdim=True) / slope_BN.sum(1, keepdim=True).clamp_min(1e-20)
    weight_BN = torch.where(whole_B1, 1.0 + 0 * change_BN, p_BN + slope_BN * (change_BN - mean_B1))
    # As sum p = sum of targets, the part of the gradient through t vanishes: t may count as a constant.
    bce_BN = F.binary_cross_entropy_with_logits(score_BN + shift_B1, target_BN, reduction="none")
    bce_B1 = (bce_BN * valid_BN).sum(1, keepdim=True) / size_B1
    weights = [weight_N[:size] for weight_N, size in zip(weight_BN, sizes, strict=True)]
    return weights, torch.where(whole_B1, 0 * bce_B1, bce_B1).mean()
