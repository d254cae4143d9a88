"""Density peaks (DPC-KNN): points that are dense and far from any denser one are good centres.

Shape suffixes beside those of `stts.tokens`: B = sets of points, R = rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from stts.pruners.ops import FEW_PAIRS


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
