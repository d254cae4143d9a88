"""`flashvid` as loops to be read, for the count that the ratio gives. The fast path is tested against this."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stts.tokens import Budget, Kept, VideoTokens


def flashvid(video: VideoTokens, budget: Budget, min_segments: int = 8) -> Kept:
    """Segment by segment: select, grow trees from the last frame to the first, cluster their roots frame by frame."""
    num_frames, num_places = video.grid.t, video.grid.per_frame
    x = video.x_ND.double().view(num_frames, num_places, -1)
    assert video.salience_G is not None
    attention = video.salience_G.view(num_frames, num_places).tolist()
    total = max(1, math.ceil(round(num_places * budget.retention_ratio, 9)))
    num_selected = max(1, math.ceil(round(total * 0.7, 9)))
    kept: dict[int, Tensor] = {}
    for segment in _segments(x, min_segments):
        event = torch.stack([x[t].mean(0) for t in segment]).mean(0)
        selected = {t: _select(x[t], attention[t], event, num_selected) for t in segment}
        roots = _trees(x, segment, selected, total)
        for t in segment:
            kept |= {t * num_places + p: x[t, p] for p in selected[t]}
            share = (total - num_selected) * len(segment) / max(1, sum(map(len, roots.values())))
            merged = roots[t] if share >= 1 else _cluster(roots[t], math.ceil(round(len(roots[t]) * share, 9)))
            kept |= {t * num_places + p: value for p, value in merged.items()}
    cells = sorted(kept)
    return Kept(index_K=torch.tensor(cells), x_KD=torch.stack([kept[cell] for cell in cells]))


def _cosine(a_D: Tensor, b_D: Tensor) -> float:
    return float(a_D @ b_D / (a_D.norm() * b_D.norm()).clamp_min(1e-12))


def _segments(x: Tensor, min_segments: int) -> list[list[int]]:
    pairs = range(len(x) - 1)
    similar = [_cosine(x[t].mean(0), x[t + 1].mean(0)) for t in pairs]
    cuts = {t for t in pairs if similar[t] < 0.9} | set(sorted(pairs, key=lambda t: similar[t])[: min_segments - 1])
    segments: list[list[int]] = [[]]
    for t in range(len(x)):
        segments[-1].append(t)
        if t in cuts:
            segments.append([])
    return segments


def _select(frame: Tensor, attention: list[float], event: Tensor, number: int) -> list[int]:
    places = range(len(frame))
    weight = [attention[j] * float(frame[j] @ event) for j in places]
    cost = [[0.0 if i == j else (1 - _cosine(frame[i], frame[j])) * weight[j] for j in places] for i in places]
    chosen = [max(places, key=lambda j: sorted(cost[i][j] for i in places)[min(1, len(frame) - 1)])]
    while len(chosen) < number:
        left = [j for j in places if j not in chosen]
        chosen.append(max(left, key=lambda j: min(cost[i][j] for i in chosen)))
    return sorted(chosen)


def _trees(x: Tensor, segment: list[int], selected: dict[int, list[int]], total: int) -> dict[int, dict[int, Tensor]]:
    """Frame -> place -> mean of the tree that ends there."""
    places = range(x.shape[1])
    match = {(t, p): (-1.0, 0) for t in segment for p in places}
    for t in segment[1:]:
        for p in places:
            if p not in selected[t]:
                free = [(_cosine(x[t, p], x[t - 1, q]), q) for q in places if q not in selected[t - 1]]
                match[t, p] = max(free, key=lambda pair: pair[0], default=(-1.0, 0))
    limit, room = 0.8, total * len(segment)
    if sum(value <= limit for value, _ in match.values()) < room:
        most = len(match) - room
        limit = max(-1 + 1e-6, sorted((v for v, _ in match.values()), reverse=True)[most - 1]) if most else math.inf
    members = {(t, p): [x[t, p]] for t in segment for p in places}
    roots: dict[int, dict[int, Tensor]] = {}
    for t in reversed(segment):
        roots[t] = {}
        for p in places:
            value, parent = match[t, p]
            if value > limit:
                members[t - 1, parent] += members[t, p]
            elif p not in selected[t]:
                roots[t][p] = torch.stack(members[t, p]).mean(0)
    return roots


def _cluster(roots: dict[int, Tensor], number: int) -> dict[int, Tensor]:
    """Density peaks of the roots of one frame, each the mean of its cluster."""
    if not number:
        return {}
    near = min(7, number)
    distance = {i: {j: float((a - b).norm()) / math.sqrt(len(a)) for j, b in roots.items()} for i, a in roots.items()}
    sparse = {i: sum(d * d for d in sorted(row.values())[:near]) / min(near, len(roots)) for i, row in distance.items()}
    score = {}
    for i in roots:
        denser = [distance[i][j] for j in roots if (sparse[j], j) < (sparse[i], i)]
        widest = max(max(row.values()) for row in distance.values())
        score[i] = math.exp(-sparse[i]) * (min(denser) if denser else widest)
    centres = sorted(roots, key=lambda i: -score[i])[:number]
    owner = {i: i if i in centres else min(sorted(centres), key=lambda c: distance[i][c]) for i in roots}
    return {c: torch.stack([roots[i] for i in roots if owner[i] == c]).mean(0) for c in centres}
