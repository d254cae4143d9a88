"""Tango's pools over plain points: every pool of equal size, none standing for static places."""

from __future__ import annotations

import torch
from torch import Tensor

from stts.pruners.tango_pools import Pool, Tokens, merge_context, select_salient


def salient_places(
    z_ND: Tensor, salience_N: Tensor, row_BP: Tensor, num_kept: int, expansion: float, num_neighbours: int
) -> Tensor:
    """(B, K) places in each row of `row_BP`, increasing."""
    tokens = Tokens(z_ND, z_ND[:0], z_ND, torch.arange(len(z_ND)), salience_N)
    pools = [Pool(row_BP.shape[1], num_kept)] * len(row_BP)
    chosen_BP = select_salient(tokens, row_BP, pools, expansion, num_neighbours)
    return chosen_BP.nonzero()[:, 1].view(len(row_BP), -1)


def merged(
    x_BND: Tensor, z_BND: Tensor, num_centres: int, num_neighbours: int, beta: float, *, swapped: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, C) centres of each pool, their (B, C, D) values and (B, C) scores."""
    num_pools, num_points, width = x_BND.shape
    row_L = torch.arange(num_pools * num_points)
    tokens = Tokens(x_BND.flatten(0, 1), x_BND.new_zeros(0, width), z_BND.flatten(0, 1), row_L, torch.zeros(len(row_L)))
    pools = [Pool(num_points, num_centres)] * num_pools
    place_C, value_CD, score_C = merge_context(tokens, row_L, pools, num_neighbours, beta, swapped=swapped)
    shape = (num_pools, num_centres)
    return place_C.view(shape) % num_points, value_CD.view(*shape, width), score_C.view(shape)
