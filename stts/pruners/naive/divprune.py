"""`divprune` as loops to be read. The fast path is tested against this."""

from __future__ import annotations

import torch

from stts.tokens import Budget, Kept, VideoTokens


def divprune(video: VideoTokens, budget: Budget) -> Kept:
    """The pool of the whole clip: the lonely token first, then always the one farthest from those chosen."""
    unit = [x_D.double() / x_D.double().norm().clamp_min(1e-12) for x_D in video.x_ND]
    tokens = range(len(unit))
    distance = [[0.0 if i == j else round(1 - float(unit[i] @ unit[j]), 6) for j in tokens] for i in tokens]
    nearest = [sorted(distance[i][j] for i in tokens)[min(1, len(unit) - 1)] for j in tokens]
    chosen = [max(tokens, key=lambda j: nearest[j])]
    while len(chosen) < budget.num_kept:
        left = [j for j in tokens if j not in chosen]
        chosen.append(max(left, key=lambda j: min(distance[i][j] for i in chosen)))
    return Kept(index_K=torch.tensor(sorted(chosen)))
