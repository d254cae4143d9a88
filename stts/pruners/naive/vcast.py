"""`vcast` as loops to be read. The fast path is tested against this."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stts.tokens import Budget, Kept, VideoTokens


def vcast(video: VideoTokens, budget: Budget) -> Kept:
    """Turns frame by frame, counts by filling one token at a time, scores token by token."""
    num_frames, per_frame = video.grid.t, video.grid.per_frame
    x = video.x_ND.double().view(num_frames, per_frame, -1)
    means = [frame.mean(0) / frame.mean(0).norm() for frame in x]
    curve = [1.0] * num_frames
    for t in range(1, num_frames - 1):
        curve[t] = 1 - _cosine(means[t] - means[t - 1], means[t + 1] - means[t])
    weight = [math.exp(c / 0.7) for c in curve]

    least = 1 if budget.num_kept >= num_frames else 0
    room, rest = per_frame - least, budget.num_kept - least * num_frames
    low, high = 0.0, float(rest + per_frame)  # the level at which quotas min(room, level * weight) sum to the rest
    for _ in range(200):
        level = (low + high) / 2
        low, high = (low, level) if sum(min(room, level * w) for w in weight) > rest else (level, high)
    quota = [min(room, low * w) for w in weight]
    count = [math.floor(q + 1e-9) for q in quota]
    by_remainder = sorted(range(num_frames), key=lambda t: (round(count[t] - quota[t], 9), t))
    for t in by_remainder[: rest - sum(count)]:
        count[t] += 1

    kept, scores = [], []
    for t in range(num_frames):
        norms = [float(token.norm()) for token in x[t]]
        span = max(norms) - min(norms) + 1e-6
        score = [1 - _cosine(x[t, p], means[t]) + (norms[p] - min(norms)) / span for p in range(per_frame)]
        ranked = sorted(range(per_frame), key=lambda p: -score[p])
        kept += sorted(t * per_frame + p for p in ranked[: least + count[t]])
        scores += score
    return Kept(index_K=torch.tensor(kept), scores_G=torch.tensor(scores))


def _cosine(a_D: Tensor, b_D: Tensor) -> float:
    return float(a_D @ b_D) / (max(float(a_D.norm()), 1e-6) * max(float(b_D.norm()), 1e-6))
