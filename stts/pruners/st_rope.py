"""ST-RoPE: features that know their second, row and column, and what Tango chooses by their distances. Pure functions.

Shape suffixes beside those of `stts.tokens`: B = batches of them, C = centres.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.tokens import Grid

# --- features for distances ----------------------------------------------------------------------------------------


def sections(width: int) -> tuple[int, int, int]:
    """Even numbers of channels for time, row and column: 2 floor(D / 6) for each of the last two, the rest for time."""
    if width % 2:
        raise ValueError(f"width {width} is odd, and rotation needs pairs of channels; this model cannot use Tango")
    side = 2 * (width // 6)
    return width - 2 * side, side, side


def st_rope(
    x_GD: Tensor,
    grid: Grid,
    second_T: Tensor,
    section: tuple[int, int, int] | None = None,
    base_time: float = 1e4,
    base_space: float = 1e3,
) -> Tensor:
    """(G, D) fp32 unit features, turned by second, row and column in one block of channels each (Eq. 8).

        z_m = u_m cos(p theta_m) - u_m' sin(p theta_m),   z_m' = u_m' cos(p theta_m) + u_m sin(p theta_m)
        m' = m + d/2,   theta_m = base^(-2m/d)

    Pairs are halves of a block, as in the release; the paper prints neighbours."""
    section = sections(x_GD.shape[1]) if section is None else section
    if sum(section) != x_GD.shape[1] or any(size < 0 or size % 2 for size in section):
        raise ValueError(f"section={section} must be three even numbers that sum to the width {x_GD.shape[1]}")
    x_THWD = F.normalize(x_GD.float(), dim=-1).view(grid.t, grid.h, grid.w, -1)
    place_H, place_W = (torch.arange(size, device=x_GD.device) for size in (grid.h, grid.w))
    positions = (second_T[:, None, None, None], place_H[:, None, None], place_W[:, None])
    turned = []
    for block, position, base in zip(
        torch.split(x_THWD, list(section), dim=-1), positions, (base_time, base_space, base_space), strict=True
    ):
        half = block.shape[-1] // 2
        theta = base ** (-torch.arange(half, dtype=torch.float64, device=x_GD.device) / max(half, 1))
        angle = position.double() * theta
        cos, sin = angle.cos().float(), angle.sin().float()
        first, second = block[..., :half], block[..., half:]
        turned += [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(turned, -1).flatten(0, 2)


# --- density peaks -------------------------------------------------------------------------------------------------


def find_centres(z_BND: Tensor, num_centres: int, num_neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """DPC-KNN: (B, C) centres by falling score, (B, N) scores rho * delta, (B, N, N) distances."""
    distance_BNN = ops.distances(z_BND)
    score_BN = ops.density_peaks(distance_BNN, num_neighbours, count_self=False)
    return ops.top(score_BN, num_centres), score_BN, distance_BNN


def nearest_centre(distance_BNN: Tensor, centre_BC: Tensor) -> Tensor:
    """(B, N) number in `centre_BC` of the nearest centre, the first on ties; a centre belongs to itself."""
    distance_BCN = distance_BNN.gather(1, centre_BC[..., None].expand(-1, -1, distance_BNN.shape[-1]))
    number_BC = torch.arange(centre_BC.shape[1], device=centre_BC.device).expand_as(centre_BC)
    return distance_BCN.argmin(1).scatter(1, centre_BC, number_BC)


def select_salient(
    z_ND: Tensor, salience_N: Tensor, row_BP: Tensor, num_kept: int, expansion: float, num_neighbours: int
) -> Tensor:
    """(B, K) places of each frame, increasing: the most salient of each of K clusters of the most salient tokens.

    Candidates are the floor(expansion * num_kept) most salient ones, clustered by DPC-KNN. row_BP: rows of each frame.
    K is `num_kept`, or less where there are fewer candidates."""
    salience_BP = salience_N[row_BP]
    candidate_BN = ops.top(salience_BP, math.floor(expansion * num_kept))
    num_candidates = candidate_BN.shape[1]
    if num_candidates <= max(1, num_kept):
        return candidate_BN.sort(1).values
    z_BND = z_ND[row_BP.gather(1, candidate_BN)]
    centre_BC, _, distance_BNN = find_centres(z_BND, num_kept, num_neighbours)
    cluster_BN = nearest_centre(distance_BNN, centre_BC.sort(1).values)
    number_BN = torch.arange(num_candidates, device=z_ND.device).expand_as(cluster_BN)
    first_BC = torch.full_like(centre_BC, num_candidates).scatter_reduce(1, cluster_BN, number_BN, "amin")
    return candidate_BN.gather(1, first_BC).sort(1).values  # candidates fall in salience, so the first has the most


def merge_context(
    x_BND: Tensor, z_BND: Tensor, num_centres: int, num_neighbours: int, beta: float, *, swapped: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, C) centres, increasing, their (B, C, D) fp32 values and (B, C) scores rho * delta.

        value = w x_centre + (1 - w) mean of the cluster,   w = max(1 / size, beta)

    The paper averages; the weight is the release's. swapped: value j goes to the centre with the j-th highest score,
    the release's mistake."""
    by_score_BC, score_BN, distance_BNN = find_centres(z_BND, num_centres, num_neighbours)
    centre_BC, order_BC = by_score_BC.sort(1)
    cluster_BN = nearest_centre(distance_BNN, centre_BC)
    shift_B = num_centres * torch.arange(len(x_BND), device=x_BND.device)
    mean_MD, size_M = ops.cluster_mean(
        x_BND.flatten(0, 1), (cluster_BN + shift_B[:, None]).flatten(), centre_BC.numel()
    )
    x_BCD = x_BND.gather(1, centre_BC[..., None].expand(-1, -1, x_BND.shape[-1])).float()
    weight_BC1 = (1 / size_M).clamp_min(beta).view_as(centre_BC)[..., None]
    value_BCD = torch.lerp(mean_MD.view_as(x_BCD), x_BCD, weight_BC1)
    if swapped:
        value_BCD = value_BCD.gather(1, order_BC[..., None].expand_as(value_BCD))
    return centre_BC, value_BCD, score_BN.gather(1, centre_BC)
