"""Density peaks (DPC-KNN): points that are dense and far from any denser one are good centres.

Shape suffixes beside those of `stts.tokens`: B = sets of points, R = rows of a block, Q = points of a set, padded to
the most of any, C = centres, M = points of all sets, one set behind the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from stts.pruners.ops import FEW_PAIRS, cached_block, top


def distances(x_BND: Tensor, *, scratch: bool = False) -> Tensor:
    """(B, N, N) fp32 Euclidean distances; the diagonal is exactly 0.

    By one matrix product of the centred points: |a - b|^2 = |a|^2 + |b|^2 - 2 a.b. scratch: `x_BND` may be centred in
    place."""
    x_BND, square_BN = _centred(x_BND, scratch)
    squares_BNN = torch.matmul(x_BND, x_BND.transpose(1, 2)).mul_(-2)
    squares_BNN += square_BN[:, :, None]
    squares_BNN += square_BN[:, None, :]
    squares_BNN = torch.maximum(squares_BNN, squares_BNN.transpose(1, 2))  # a product is not symmetric to the last bit
    squares_BNN.diagonal(dim1=1, dim2=2).zero_()
    return squares_BNN.clamp_min_(0).sqrt_()


def take_rows(x_ND: Tensor, row_M: Tensor, extra_AD: Tensor | None = None) -> Tensor:
    """(..., D) rows `row_M` of `x_ND` and of `extra_AD` behind them."""
    if extra_AD is None or not len(extra_AD):
        return x_ND[row_M]
    inside_M = row_M < len(x_ND)
    own_MD, extra_MD = x_ND[row_M.clamp_max(len(x_ND) - 1)], extra_AD[(row_M - len(x_ND)).clamp_min(0)]
    return torch.where(inside_M[..., None], own_MD.to(extra_MD.dtype), extra_MD)


def distances_of(x_ND: Tensor, row_BQ: Tensor, extra_AD: Tensor | None = None) -> Tensor:
    """(B, Q, Q) `distances` between rows `row_BQ` of `x_ND` and of `extra_AD` behind them.

    On a CPU a few sets at a time, so that their copies stay in its cache."""
    num_sets, size = row_BQ.shape
    block = cached_block(size * x_ND.shape[1], x_ND.device)
    if block >= num_sets:
        return distances(take_rows(x_ND, row_BQ, extra_AD), scratch=True)
    distance_BQQ = x_ND.new_empty(num_sets, size, size, dtype=torch.float32)
    for start in range(0, num_sets, block):
        part_EQ = row_BQ[start : start + block]
        distance_BQQ[start : start + block] = distances(take_rows(x_ND, part_EQ, extra_AD), scratch=True)
    return distance_BQQ


def _centred(x_BND: Tensor, scratch: bool = False) -> tuple[Tensor, Tensor]:
    """fp32 points less their mean, and their squared lengths (by the norm, which writes no squares to memory)."""
    x_BND = x_BND.float()
    mean_B1D = x_BND.mean(1, keepdim=True)
    x_BND = x_BND.sub_(mean_B1D) if scratch else x_BND - mean_B1D
    return x_BND, torch.linalg.vector_norm(x_BND, dim=-1).square()


def density_peaks(
    distance_BNN: Tensor,
    num_neighbours: int,
    *,
    count_self: bool,
    valid_BN: Tensor | None = None,
    fewer_B: Tensor | None = None,
) -> Tensor:
    """(B, N) fp32 score rho * delta of DPC-KNN: dense points far from any denser one are good centres.

        rho_i = exp(-mean of the k smallest d_ij^2),   delta_i = min d_ij over denser j, the largest d for the densest

    count_self: whether the distance of a point to itself is one of the k (HoliTom, FastVID: yes; Tango: no). k is cut
    to the points there are, and to `fewer_B` where given. valid_BN: bool, False at padding, which scores -inf. Equally
    dense: the earlier is denser (the releases break ties by noise), so the result is the same on every device and every
    run."""
    return _peaks(lambda: [(0, distance_BNN)], num_neighbours, count_self, valid_BN, fewer_B)


def fits(x_BND: Tensor) -> bool:
    """The distances of all pairs are few, or at most twice as large as the points."""
    return x_BND.shape[1] ** 2 * len(x_BND) <= max(FEW_PAIRS, 2 * x_BND.numel())


def density_peaks_of(x_BND: Tensor, num_neighbours: int, *, count_self: bool, valid_BN: Tensor | None = None) -> Tensor:
    """(B, N) `density_peaks` of points.

    Where the distances of all pairs would be more than twice as large as the points, they are computed twice, in blocks
    of rows half as large."""
    num_points, width = x_BND.shape[1:]
    if fits(x_BND):
        return density_peaks(distances(x_BND), num_neighbours, count_self=count_self, valid_BN=valid_BN)
    x_BND, square_BN = _centred(x_BND)
    block = max(1, width // 2, FEW_PAIRS // (num_points * len(x_BND)))

    def blocks() -> Iterable[tuple[int, Tensor]]:
        for start in range(0, num_points, block):
            rows = slice(start, start + block)
            squares_BRN = torch.matmul(x_BND[:, rows], x_BND.transpose(1, 2)).mul_(-2)
            squares_BRN += square_BN[:, rows, None]
            squares_BRN += square_BN[:, None, :]
            squares_BRN.diagonal(start, 1, 2).zero_()
            yield start, squares_BRN.clamp_min_(0).sqrt_()

    return _peaks(blocks, num_neighbours, count_self, valid_BN, None)


def _peaks(
    blocks: Callable[[], Iterable[tuple[int, Tensor]]],
    num_neighbours: int,
    count_self: bool,
    valid_BN: Tensor | None,
    fewer_B: Tensor | None,
) -> Tensor:
    """`density_peaks`; blocks: rows of the distances and the number of the first, called once in each of two passes."""
    skip, sparse, widest = 0 if count_self else 1, [], []
    for start, distance_BRN in blocks():
        masked_BRN, inner_BRN = distance_BRN, distance_BRN
        if valid_BN is not None:
            row_BR1 = valid_BN[:, start : start + distance_BRN.shape[1], None]
            masked_BRN = distance_BRN.masked_fill(~valid_BN[:, None, :], torch.inf)
            inner_BRN = distance_BRN.masked_fill(~(valid_BN[:, None, :] & row_BR1), 0)
        widest.append(inner_BRN.amax((1, 2)))
        number = min(num_neighbours + skip, distance_BRN.shape[2])
        near_BRK = masked_BRN.topk(number, dim=-1, largest=False).values[..., skip:]
        finite_BRK = near_BRK.isfinite()
        if fewer_B is not None:
            finite_BRK &= torch.arange(near_BRK.shape[-1], device=fewer_B.device) < fewer_B[:, None, None]
        near_BRK = near_BRK.masked_fill(~finite_BRK, 0)
        sparse.append(near_BRK.square().sum(-1) / finite_BRK.sum(-1).clamp_min(1))
    sparse_BN = torch.cat(sparse, 1)  # ranked itself: exp(-x) may underflow
    ranked_BN = sparse_BN if valid_BN is None else sparse_BN.masked_fill(~valid_BN, torch.inf)
    order_BN = torch.sort(ranked_BN, dim=-1, stable=True).indices
    rank_BN = torch.empty_like(order_BN).scatter_(
        -1, order_BN, torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN)
    )
    delta = []
    for start, distance_BRN in blocks():
        sparser_BRN = rank_BN[:, None, :] >= rank_BN[:, start : start + distance_BRN.shape[1], None]
        delta.append(distance_BRN.masked_fill(sparser_BRN, torch.inf).amin(-1))  # padding is the sparsest
    delta_BN, widest_B = torch.cat(delta, 1), torch.stack(widest).amax(0)
    delta_BN = torch.where(delta_BN.isfinite(), delta_BN, widest_B[:, None])
    score_BN = torch.exp(-sparse_BN) * delta_BN
    return score_BN if valid_BN is None else score_BN.masked_fill(~valid_BN, -torch.inf)


def alike(sizes: Sequence[int]) -> list[list[int]]:
    """Numbers of sets of points, divided so that the sets of a group may be padded to its largest.

    All in one group where comparing pairs then costs at most twice what it must, or little; else the sets above a half,
    a quarter and an eighth of the largest are apart, so that there are four groups at most."""
    if not sizes:
        return []
    pairs, largest = sum(size**2 for size in sizes), max(sizes)
    if len(sizes) * largest**2 <= max(FEW_PAIRS, 2 * pairs):
        return [list(range(len(sizes)))]
    octave = [min(3, int(math.log2(largest / size))) if size else 3 for size in sizes]
    groups = [[n for n, own in enumerate(octave) if own == number] for number in range(4)]
    return [group for group in groups if group]


class Clusters(NamedTuple):
    """Of points in sets."""

    centre_C: Tensor
    """int64 points, increasing."""
    cluster_M: Tensor
    """int64 number of the centre that each point belongs to, the first of the nearest; -1 in a set without centres."""
    score_C: Tensor
    """fp32 score by which each centre was chosen."""


def cluster(
    x_ND: Tensor,
    row_M: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    num_neighbours: int,
    *,
    fewer: bool = False,
    extra_AD: Tensor | None = None,
) -> Clusters:
    """DPC-KNN in sets of any size: the `counts` points of highest score rho * delta in each, and who belongs to whom.

    row_M: int64 rows of `x_ND`, and of `extra_AD` behind them, one set of `sizes` behind the other. Distances are
    divided by sqrt(D), that of a point to itself counts as one of the nearest. fewer: no more neighbours than centres.
    A centre belongs to itself. Sets of alike size are worked on together; no gradient, no host synchronisation."""
    num_points, starts = len(row_M), list(accumulate(sizes, initial=0))
    # The last entry of each takes what is padding.
    own_M, score_M = (
        torch.full((num_points + 1,), -1, device=row_M.device, dtype=t) for t in (torch.int64, x_ND.dtype)
    )
    is_centre_M = torch.zeros_like(own_M, dtype=torch.bool)
    with_centres = [n for n, count in enumerate(counts) if count]
    for group in alike([sizes[n] for n in with_centres]):
        table = [(sizes[n], counts[n], starts[n]) for n in (with_centres[g] for g in group)]
        size_B1, count_B1, start_B1 = torch.tensor(table, device=row_M.device)[..., None].unbind(1)
        number_Q = torch.arange(max(size for size, _, _ in table), device=row_M.device)
        valid_BQ = number_Q < size_B1
        point_BQ = torch.where(valid_BQ, start_B1 + number_Q, num_points)
        distance_BQQ = distances_of(x_ND, row_M[point_BQ.clamp_max(num_points - 1)], extra_AD)
        distance_BQQ.div_(math.sqrt(x_ND.shape[1]))
        padded = min(size for size, _, _ in table) < len(number_Q)
        score_BQ = density_peaks(
            distance_BQQ,
            num_neighbours,
            count_self=True,
            valid_BN=valid_BQ if padded else None,
            fewer_B=count_B1[:, 0] if fewer else None,
        )
        centre_BQ = torch.zeros_like(valid_BQ).scatter_(1, top(score_BQ, len(number_Q)), number_Q < count_B1)
        nearest_BQ = distance_BQQ.masked_fill_(~centre_BQ[:, None, :], torch.inf).argmin(-1)
        nearest_BQ = torch.where(centre_BQ, number_Q, nearest_BQ)
        for all_M, value_BQ in ((own_M, start_B1 + nearest_BQ), (score_M, score_BQ), (is_centre_M, centre_BQ)):
            all_M.scatter_(0, point_BQ.flatten(), value_BQ.flatten())
    is_centre_M = is_centre_M[:num_points]
    number_M = is_centre_M.cumsum(0) - 1
    own_M = own_M[:num_points]
    cluster_M = torch.where(own_M < 0, -1, number_M[own_M]) if num_points else own_M
    centre_C = is_centre_M.nonzero_static(size=sum(counts))[:, 0]
    return Clusters(centre_C, cluster_M, score_M[centre_C])
