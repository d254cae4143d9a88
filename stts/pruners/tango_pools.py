"""How Tango divides a video: rows of tokens, pools of them padded to one size, and what is chosen and merged in each.

Shape suffixes beside those of `stts.tokens`: W = windows, A = tokens that stand for static places, R = N + A rows, Q =
frames of all parts, B = pools, L = tokens of a pool, or of all one behind the other, C = centres, M = some rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import density, ops
from stts.tokens import VideoTokens


class Pool(NamedTuple):
    """Tokens among which centres are chosen."""

    num_tokens: int
    num_centres: int


class Part(NamedTuple):
    """Static places of a window, which are one frame of means, or the places of its frames that move."""

    num_frames: int
    num_places: int
    num_kept: int
    """Of each frame."""
    num_salient: int
    """Among them."""

    @property
    def frame(self) -> Pool:
        return Pool(self.num_places, self.num_salient)


class Tokens(NamedTuple):
    """Rows: the tokens of a video, then those that stand for static places of a window."""

    x_ND: Tensor
    still_AD: Tensor
    """fp32."""
    z_ND: Tensor
    """`st_rope` features by cell."""
    cell_R: Tensor
    """int64 cell of each row, N + A in all."""
    salience_R: Tensor

    def still(self, row_M: Tensor) -> Tensor:
        """(M, D) of rows behind the tokens of the video."""
        return self.still_AD[row_M - len(self.x_ND)]


def rows_of(video: VideoTokens, salience_G: Tensor, z_GD: Tensor, still: Sequence[tuple[int, int]]) -> Tokens:
    """The tokens of a video, and the means over the frames of each window in `still`."""
    grid, device = video.grid, video.x_ND.device
    set_T = torch.full((grid.t,), -1)
    for number, (start, end) in enumerate(still):
        set_T[start:end] = number
    set_T = set_T.to(device)
    x_AD = ops.cluster_mean(video.x_ND.view(grid.t, -1), set_T, len(still))[0].view(-1, video.x_ND.shape[1])
    salience_AP, _ = ops.cluster_mean(salience_G.view(grid.t, -1), set_T, len(still))
    start_A = torch.tensor([start for start, _ in still], dtype=torch.long, device=device)
    cell_AP = start_A[:, None] * grid.per_frame + torch.arange(grid.per_frame, device=device)
    cell_R, salience_R = torch.cat([video.cell_G, cell_AP.flatten()]), torch.cat([salience_G, salience_AP.flatten()])
    return Tokens(video.x_ND, x_AD, z_GD, cell_R, salience_R)


def pool_rows(windows: Sequence[tuple[int, int]], static_WP: Tensor, num_static: Sequence[int]) -> Tensor:
    """(Q, P) rows of `Tokens`: the static places of each window that has some, then each frame's moving places.

    Places rise; behind them is padding."""
    num_places, device, num_frames = static_WP.shape[1], static_WP.device, windows[-1][1]
    place_P, frame_T = torch.arange(num_places, device=device), torch.arange(num_frames, device=device)
    order_WP = torch.sort(~static_WP, dim=1, stable=True).indices  # static places first
    still = torch.tensor([w for w, number in enumerate(num_static) if number], dtype=torch.long, device=device)
    frame_A = num_frames + torch.arange(len(still), device=device)
    moving_WP = order_WP.gather(1, (place_P + static_WP.sum(1, keepdim=True)).clamp_max(num_places - 1))
    window_of = [number for number, (start, end) in enumerate(windows) for _ in range(start, end)]
    window_T = torch.tensor(window_of, device=device)
    return torch.cat([order_WP[still], moving_WP[window_T]]) + num_places * torch.cat([frame_A, frame_T])[:, None]


def candidates(pool: Pool, expansion: float) -> int:
    """Tokens of a pool that are clustered to choose its salient ones."""
    return min(pool.num_tokens, math.floor(expansion * pool.num_centres))


def select_salient(
    tokens: Tokens, row_BP: Tensor, pools: Sequence[Pool], expansion: float, num_neighbours: int
) -> Tensor:
    """bool (B, P): in each pool the most salient token of each cluster of its most salient ones.

    `candidates` are clustered by DPC-KNN; there are as many clusters as centres, or fewer where there are fewer
    candidates. row_BP: rows of each pool, padded to the largest."""
    widest = max(candidates(pool, expansion) for pool in pools)
    chosen_BP = torch.zeros_like(row_BP, dtype=torch.bool)
    if widest == 0:
        return chosen_BP
    shapes = [(pool.num_tokens, pool.num_centres, candidates(pool, expansion)) for pool in pools]
    size_B1, num_B1, wide_B1 = torch.tensor(shapes, device=row_BP.device)[..., None].unbind(1)
    number_P = torch.arange(row_BP.shape[1], device=row_BP.device)
    number_N = number_P[:widest]
    salience_BP = tokens.salience_R[row_BP].masked_fill(number_P >= size_B1, -torch.inf)
    candidate_BN, valid_BN = ops.top(salience_BP, widest), number_N < wide_B1

    distance_BNN = density.distances_of(tokens.z_ND, tokens.cell_R[row_BP.gather(1, candidate_BN)])
    score_BN = density.density_peaks(distance_BNN, num_neighbours, count_self=False, valid_BN=valid_BN)
    centre_BN = torch.zeros_like(valid_BN).scatter_(1, ops.top(score_BN, widest), number_N < num_B1) & valid_BN
    nearest_BN = distance_BNN.masked_fill_(~centre_BN[:, None, :], torch.inf).argmin(-1)
    cluster_BN = torch.where(centre_BN, number_N, nearest_BN).masked_fill_(~valid_BN, widest)
    first_BN = candidate_BN.new_full((len(pools), widest + 1), widest)
    first_BN = first_BN.scatter_reduce_(1, cluster_BN, number_N.expand_as(cluster_BN), "amin")[:, :widest]
    # Candidates fall in salience, so the first of a cluster has the most.
    picked_BN = torch.zeros_like(first_BN, dtype=torch.bool).scatter_(
        1, first_BN.clamp_max(widest - 1), first_BN < widest
    )
    return chosen_BP.scatter_(1, candidate_BN, picked_BN)


class Division(NamedTuple):
    """What becomes of all rows."""

    settled_M: Tensor
    """Rows that stay as they are: the salient ones, and what they leave where all of it may stay."""
    settled: list[int]
    """Their number in each part."""
    open_L: Tensor
    """Rows of the parts that are merged, one part behind the other."""
    pools: list[Pool]
    """These parts."""


def divide(row_QP: Tensor, chosen_QP: Tensor, parts: Sequence[Part], expansion: float) -> Division:
    """row_QP: rows of every frame of every part; chosen_QP: those that `select_salient` chose."""
    settled, pools, table = [], [], []  # table: of every frame its places, whether all stay, whether it is merged
    for part in parts:
        salient = min(part.num_salient, candidates(part.frame, expansion))
        rest = Pool(part.num_frames * (part.num_places - salient), part.num_frames * (part.num_kept - part.num_salient))
        all_stay, merged = rest.num_tokens <= rest.num_centres, 0 < rest.num_centres < rest.num_tokens
        settled.append(part.num_frames * salient + all_stay * rest.num_tokens)
        pools += [rest] * merged
        table += [(part.num_places, all_stay, merged)] * part.num_frames
    size_Q1, stays_Q1, merged_Q1 = torch.tensor(table, device=row_QP.device)[..., None].unbind(1)
    left_QP = (torch.arange(row_QP.shape[1], device=row_QP.device) < size_Q1) & ~chosen_QP

    def rows(mask_QP: Tensor, number: int) -> Tensor:
        return row_QP.flatten()[mask_QP.flatten().nonzero_static(size=number)[:, 0]]

    settled_M = rows(chosen_QP | left_QP & stays_Q1.bool(), sum(settled))
    open_L = rows(left_QP & merged_Q1.bool(), sum(pool.num_tokens for pool in pools))
    return Division(settled_M, settled, open_L, pools)


def merge_context(
    tokens: Tokens,
    row_L: Tensor,
    pools: Sequence[Pool],
    num_neighbours: int,
    beta: float,
    *,
    swapped: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the centres in `row_L`, (C,), rising; their (C, D) fp32 values and (C,) scores rho * delta.

        value = w x_centre + (1 - w) mean of the cluster,   w = max(1 / size, beta)

    row_L: rows of the pools, one behind the other. The paper averages; the weight is the release's. swapped: value j
    goes to the centre of its pool with the j-th highest score, the release's mistake."""
    num_rows, total = len(row_L), sum(pool.num_centres for pool in pools)
    starts = list(accumulate((pool.num_tokens for pool in pools), initial=0))
    firsts = list(accumulate((pool.num_centres for pool in pools), initial=0))
    # The last entry of each takes what is padding.
    cluster_L, place_C, source_C = (row_L.new_zeros(size + 1) for size in (num_rows, total, total))
    score_C = tokens.z_ND.new_zeros(total + 1)
    for group in density.alike([pool.num_tokens for pool in pools]):
        table = [(*pools[n], starts[n], firsts[n]) for n in group]
        size_B1, num_B1, start_B1, first_B1 = torch.tensor(table, device=row_L.device)[..., None].unbind(1)
        number_L = torch.arange(max(pools[n].num_tokens for n in group), device=row_L.device)
        number_C = torch.arange(max(pools[n].num_centres for n in group), device=row_L.device)
        valid_BL, real_BC = number_L < size_B1, number_C < num_B1
        place_BL = torch.where(valid_BL, start_B1 + number_L, num_rows)
        z_BLD = tokens.z_ND[tokens.cell_R[row_L[place_BL.clamp_max(num_rows - 1)]]]
        padded = len(number_L) > min(pools[n].num_tokens for n in group)
        chosen = clusters(z_BLD, valid_BL if padded else None, real_BC, num_neighbours)
        cluster_L.scatter_(0, place_BL.flatten(), (chosen.cluster_BL + first_B1).flatten())
        target_C = torch.where(real_BC, first_B1 + number_C, total).flatten()
        place_C.scatter_(0, target_C, place_BL.gather(1, chosen.centre_BC).flatten())
        source_C.scatter_(0, target_C, (first_B1 + chosen.rank_BC).flatten())
        score_C.scatter_(0, target_C, chosen.score_BC.flatten())

    place_C = place_C[:total]
    cluster_R = torch.full_like(tokens.cell_R, -1).index_copy_(0, row_L, cluster_L[:num_rows])
    cluster_N, cluster_A = torch.split(cluster_R, [len(tokens.x_ND), len(tokens.still_AD)])
    value_CD, size_C = ops.cluster_mean(tokens.x_ND, cluster_N, total)
    row_C = row_L[place_C]
    own_CD = tokens.x_ND[row_C.clamp_max(len(tokens.x_ND) - 1)].float()
    if len(tokens.still_AD):
        still_CD, still_C = ops.cluster_mean(tokens.still_AD, cluster_A, total)
        value_CD, size_C = value_CD.add_(still_CD), size_C + still_C  # no cluster holds both
        inside_C1 = (row_C < len(tokens.x_ND))[:, None]
        own_CD = torch.where(inside_C1, own_CD, tokens.still(row_C.clamp_min(len(tokens.x_ND))))
    value_CD = value_CD.lerp_(own_CD, (1 / size_C).clamp_min(beta)[:, None])
    return place_C, value_CD[source_C[:total]] if swapped else value_CD, score_C[:total]


class Clusters(NamedTuple):
    """Of pools of points."""

    centre_BC: Tensor
    """int64 points, increasing; arbitrary where there is no such centre."""
    rank_BC: Tensor
    """Of the centre by its score."""
    score_BC: Tensor
    cluster_BL: Tensor
    """int64 number of the nearest centre, the first on ties; a centre belongs to itself."""


def clusters(z_BLD: Tensor, valid_BL: Tensor | None, real_BC: Tensor, num_neighbours: int) -> Clusters:
    """DPC-KNN among the valid points of each pool; `z_BLD` may be centred in place."""
    num_points, num_centres = z_BLD.shape[1], real_BC.shape[1]
    distance_BLL = density.distances(z_BLD, scratch=True) if density.fits(z_BLD) else None
    if distance_BLL is None:
        score_BL = density.density_peaks_of(z_BLD, num_neighbours, count_self=False, valid_BN=valid_BL)
    else:
        score_BL = density.density_peaks(distance_BLL, num_neighbours, count_self=False, valid_BN=valid_BL)
    by_score_BC = ops.top(score_BL, num_centres)
    centre_BC, rank_BC = torch.where(real_BC, by_score_BC, num_points).sort(1)
    inside_BC = centre_BC.clamp_max(num_points - 1)
    if distance_BLL is None:
        z_BCD = z_BLD.gather(1, inside_BC[..., None].expand(-1, -1, z_BLD.shape[2]))
        half_BC = (z_BCD.square().sum(-1) / 2).masked_fill_(~real_BC, torch.inf)
        nearest_BL = ops.nearest(z_BLD, z_BCD, half_BC)  # |z - c|^2 = |z|^2 - 2 (z . c - |c|^2 / 2)
    else:
        own_BCL = distance_BLL.gather(1, inside_BC[..., None].expand(-1, -1, num_points))
        nearest_BL = own_BCL.masked_fill_(~real_BC[..., None], torch.inf).argmin(1)
    cluster_BL = F.pad(nearest_BL, (0, 1))
    number_BC = torch.arange(num_centres, device=z_BLD.device).expand_as(centre_BC)
    cluster_BL = cluster_BL.scatter_(1, centre_BC, number_BC)[:, :num_points]
    return Clusters(inside_BC, rank_BC, score_BL.gather(1, inside_BC), cluster_BL)
