"""How a budget is shared out among the frames of a video, and the best tokens of each frame taken."""

from __future__ import annotations

import torch
from torch import Tensor

from stts.pruners.ops import top


def share_out(weight_T: Tensor, total: int, most: int) -> Tensor:
    """(T,) int64 proportional to `weight_T` that sum to `total`, by largest remainder; no host synchronisation.

        q_t = w_t total / sum of w;   unit u = 0, 1, ... of t is worth q_t - u, and the `total` worthiest are given

    Each is at most `most`, and at least 1 if `total` allows, so what those bounds add or take is spread over the others
    one by one. Ties favour the earlier one."""
    least = min(1, total // len(weight_T))
    quota_T = weight_T.double() * total / weight_T.double().sum()
    unit_P = torch.arange(most, device=weight_T.device)
    worth_TP = (quota_T[:, None] - unit_P).masked_fill_(unit_P < least, torch.inf)
    given_K = top(worth_TP.flatten(), total) // most
    return torch.zeros(len(weight_T), dtype=torch.int64, device=given_K.device).index_add_(
        0, given_K, torch.ones_like(given_K)
    )


def top_per_frame(score_TP: Tensor, count_T: Tensor) -> Tensor:
    """(K,) int64 cells t S + p, increasing: of each frame the `count_T` best places, ties to the earlier place."""
    order_TP = top(score_TP, score_TP.shape[1])
    first_TP = torch.arange(score_TP.shape[1], device=score_TP.device) < count_T[:, None]
    return torch.zeros_like(first_TP).scatter_(1, order_TP, first_TP).flatten().nonzero()[:, 0]
