"""HoliTom, token by token.

Shape suffixes beside those of `stts.tokens`: Q = static places of a window.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.tokens import Budget, Kept, VideoTokens


def holitom(video: VideoTokens, budget: Budget, *, tau: float, beta: float = 0.6, num_neighbours: int = 7) -> Kept:
    """The outer stage as in arXiv 2505.21334, with the count of the release, in the order of the video."""
    num_frames, num_places = video.grid.t, video.grid.per_frame
    assert video.salience_G is not None
    x_TPD = video.x_ND.float().view(num_frames, num_places, -1)
    attention_TP = video.salience_G.view(num_frames, num_places).tolist()
    repeats = [
        [float(F.cosine_similarity(x_TPD[t, p], x_TPD[t + 1, p], dim=0)) > tau for p in range(num_places)]
        for t in range(num_frames - 1)
    ]

    def static_places(first: int, last: int) -> list[int]:
        return [p for p in range(num_places) if first < last and all(repeats[t][p] for t in range(first, last))]

    best, start_of = [0], []  # best[i]: tokens saved in the first i frames
    for last in range(num_frames):
        gain, start = best[last], last
        for first in range(last - 1, -1, -1):
            candidate = best[first] + len(static_places(first, last)) * (last - first)
            if candidate > gain:
                gain, start = candidate, first
        best.append(gain)
        start_of.append(start)
    num_groups = num_frames * num_places
    ratio = min(budget.retention_ratio / ((num_groups - best[-1]) / num_groups), 1.0)

    token_of: dict[int, Tensor] = {}
    last = num_frames - 1
    while last >= 0:
        first = start_of[last]
        static = static_places(first, last)
        moving = [p for p in range(num_places) if p not in static]
        for t in range(first, last + 1):
            ranked = sorted(moving, key=lambda p: -attention_TP[t][p])
            for p in ranked[: math.ceil(len(moving) * ratio)]:
                token_of[t * num_places + p] = x_TPD[t, p]
        tokens = [torch.stack([x_TPD[t, p] for t in range(first, last + 1)]).mean(0) for p in static]
        for i, token_D in _centres(tokens, round(len(static) * ratio), beta, num_neighbours):
            token_of[first * num_places + static[i]] = token_D
        last = first - 1
    index = sorted(token_of)
    return Kept(torch.tensor(index), torch.stack([token_of[i] for i in index]).to(video.x_ND.dtype))


def _centres(tokens: list[Tensor], num_centres: int, beta: float, num_neighbours: int) -> list[tuple[int, Tensor]]:
    """Density peaks among the static tokens: number and blended token of each centre."""
    if not num_centres:
        return []
    points = range(len(tokens))
    far = [[float((a - b).norm()) / math.sqrt(len(a)) for b in tokens] for a in tokens]
    k = min(num_neighbours, num_centres)
    rho = [math.exp(-sum(d * d for d in sorted(far[i])[:k]) / k) for i in points]
    widest = max(max(row) for row in far)
    # Two points that are each other's nearest are equally dense if k = 2: the earlier counts as denser.
    delta = [min((far[i][j] for j in points if (rho[j], -j) > (rho[i], -i)), default=widest) for i in points]
    centres = sorted(sorted(points, key=lambda i: -rho[i] * delta[i])[:num_centres])
    members: dict[int, list[Tensor]] = {c: [] for c in centres}
    for i in points:
        if i not in members:
            members[min(centres, key=lambda c: far[i][c])].append(tokens[i])
    return [(c, beta * tokens[c] + (1 - beta) * torch.stack(m).mean(0) if m else tokens[c]) for c, m in members.items()]


def holitom_inner(video: VideoTokens, budget: Budget) -> Kept:
    """The inner stage: sources are halved into their target one after the other."""
    assert video.salience_G is not None
    attention, x_ND = video.salience_G.tolist(), video.x_ND.float()
    kept = sorted(sorted(range(len(attention)), key=lambda i: -attention[i])[: budget.num_kept])
    token_of = {i: x_ND[i] for i in kept}
    for source in range(len(attention)):
        if source not in token_of:
            target = max(kept, key=lambda i: float(F.cosine_similarity(x_ND[source], x_ND[i], dim=0)))
            token_of[target] = (token_of[target] + x_ND[source]) / 2
    return Kept(torch.tensor(kept), torch.stack([token_of[i] for i in kept]).to(video.x_ND.dtype))
