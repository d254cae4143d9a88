"""`vidcom2` as loops to be read. The fast path is tested against this."""

from __future__ import annotations

import math

import torch

from stts.tokens import Budget, Kept, VideoTokens


def vidcom2(video: VideoTokens, budget: Budget) -> Kept:
    """Scores token by token, counts frame by frame."""
    num_frames, per_frame = video.grid.t, video.grid.per_frame
    frames = range(num_frames)
    variance_D = ((video.x_ND - video.x_ND.mean(0)) ** 2).mean(0)
    channel_C = variance_D.argsort()[: len(variance_D) // 2]
    x = [[video.x_ND[t * per_frame + s][channel_C] for s in range(per_frame)] for t in frames]
    x = [[token_C / token_C.norm() for token_C in frame] for frame in x]
    video_mean_C = sum(token_C for frame in x for token_C in frame) / (num_frames * per_frame)
    v, w = [], []
    for frame in x:
        frame_mean_C = sum(frame) / per_frame
        v.append([_kernel(float(((token_C - video_mean_C) ** 2).sum())) for token_C in frame])
        w.append([_kernel(float(((token_C - frame_mean_C) ** 2).sum())) for token_C in frame])

    unique = [-sum(v[t]) / per_frame for t in frames]
    weight = [math.exp((u - max(unique)) / 0.01) for u in unique]
    scale = [min(1.0, budget.retention_ratio * (1 + e / sum(weight) - 1 / num_frames)) for e in weight]
    if budget.exact:
        quota = [s * budget.num_kept / sum(scale) for s in scale]
        least = 1 if budget.num_kept >= num_frames else 0
        count = [min(per_frame, max(least, math.floor(q))) for q in quota]
        while sum(count) != budget.num_kept:
            step = 1 if sum(count) < budget.num_kept else -1
            open_frames = [t for t in frames if least <= count[t] + step <= per_frame]
            chosen = max(open_frames, key=lambda t: (step * (quota[t] - count[t]), -step * t))
            count[chosen] += step
    else:
        count = [max(1, round(s * per_frame)) for s in scale]

    kept = []
    for t in frames:
        ranked = sorted(range(per_frame), key=lambda s: v[t][s] + w[t][s])
        kept += sorted(t * per_frame + s for s in ranked[: count[t]])
    scores = [-(v[t][s] + w[t][s]) for t in frames for s in range(per_frame)]
    return Kept(index_K=torch.tensor(kept), scores_G=torch.tensor(scores))


def _kernel(square: float) -> float:
    return sum(math.exp(-square / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))
