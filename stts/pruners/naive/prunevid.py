"""`prunevid` as loops to be read, for the count that its own settings give. The fast path is tested against this."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stts.pruners.prunevid import refine
from stts.tokens import Budget, Kept, VideoTokens


def prunevid(video: VideoTokens, budget: Budget) -> Kept:
    """Segments, static means, clusters: set by set, token by token."""
    num_frames, places = video.grid.t, range(video.grid.per_frame)
    x = video.x_ND.float().view(num_frames, len(places), -1)
    means = [frame.mean(0) for frame in x]
    segments = refine(_assign(means, _clusters(means, max(1, num_frames // 4))))
    kept: dict[int, Tensor] = {}
    for segment in sorted(set(segments)):
        frames = [t for t in range(num_frames) if segments[t] == segment]
        static = [p for p in places if len(frames) > 1 and _mean_cosine(x[frames, p]) > 0.8]
        kept |= _merge({frames[0] * len(places) + p: x[frames, p].mean(0) for p in static})
        for t in frames:
            kept |= _merge({t * len(places) + p: x[t, p] for p in places if p not in static})
    cells = sorted(kept)
    return Kept(index_K=torch.tensor(cells), x_KD=torch.stack([kept[cell] for cell in cells]))


def _mean_cosine(x_TD: Tensor) -> float:
    pairs = [(a, b) for a in range(len(x_TD)) for b in range(len(x_TD)) if a != b]
    return sum(float(torch.cosine_similarity(x_TD[a], x_TD[b], dim=0)) for a, b in pairs) / len(pairs)


def _merge(tokens: dict[int, Tensor]) -> dict[int, Tensor]:
    if len(tokens) <= 14:
        return tokens
    cells, values = list(tokens), list(tokens.values())
    centres = _clusters(values, len(values) // 2)
    owner = _assign(values, centres)
    return {cells[c]: torch.stack([values[i] for i in range(len(values)) if owner[i] == c]).mean(0) for c in centres}


def _clusters(values: list[Tensor], number: int) -> list[int]:
    """Centres: the points with the largest product of density and distance to a denser point."""
    points = range(len(values))
    distance = [[float((a - b).norm()) / math.sqrt(len(a)) for b in values] for a in values]
    sparse = [sum(d * d for d in sorted(row)[:7]) / min(7, len(values)) for row in distance]
    score = []
    for i in points:
        denser = [distance[i][j] for j in points if (sparse[j], j) < (sparse[i], i)]
        score.append(math.exp(-sparse[i]) * (min(denser) if denser else max(map(max, distance))))
    return sorted(points, key=lambda i: -score[i])[:number]


def _assign(values: list[Tensor], centres: list[int]) -> list[int]:
    """Nearest centre of every point, centres their own."""
    return [
        i if i in centres else min(centres, key=lambda c: float((x_D - values[c]).norm()))
        for i, x_D in enumerate(values)
    ]
