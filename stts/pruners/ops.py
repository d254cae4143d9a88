"""Arithmetic that several methods share, each with its formula.

Shape suffixes: N = tokens, D = width, T = frames, S = tokens per frame.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stts.tokens import Grid


def neighbour_similarity(x_ND: Tensor, grid: Grid) -> Tensor:
    """Cosine of each token with the token at the same place one frame earlier.

        s[t, i] = cos(x[t, i], x[t-1, i]),   s[0, i] = 0  (nothing came before frame 0)

    Returns (N,) fp32 in [-1, 1]. Computed in fp32: in bf16 two near-identical frames round to equal scores and the
    ranking is decided by ties."""
    if x_ND.shape[0] != grid.num_groups:
        raise ValueError(f"got {x_ND.shape[0]} tokens for {grid} = {grid.num_groups}; this needs the full grid")
    x_TSD = F.normalize(x_ND.float(), dim=-1).view(grid.t, grid.per_frame, -1)
    s_TS = x_TSD.new_zeros(x_TSD.shape[:2])
    s_TS[1:] = (x_TSD[1:] * x_TSD[:-1]).sum(-1)
    return s_TS.flatten()
