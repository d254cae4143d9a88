"""Tango (arXiv 2604.09547) as one reads it: loops over windows, frames and tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stts.pruners import ops
from stts.tokens import Budget, Kept, VideoTokens


def tango(
    video: VideoTokens,
    budget: Budget,
    tau: float = 0.8,
    static_tau: float = 0.8,
    expansion: float = 1.5,
    context_share: float = 0.4,
    num_neighbours: int = 7,
    beta: float = 0.6,
    sinks: tuple[int, ...] = (),
    official: bool = False,
) -> Kept:
    """What `Tango` keeps; a token is called by its cell, points by their number in a list."""
    assert video.salience_G is not None
    grid, num_places, ratio = video.grid, video.grid.per_frame, budget.retention_ratio
    x, salience = video.x_ND.float(), video.salience_G.float().clone()
    seconds = range(grid.t) if video.timestamps_T is None else video.timestamps_T.tolist()
    z = []
    for cell in range(grid.num_groups):
        frame, place = divmod(cell, num_places)
        if place in sinks:
            salience[cell] = 0
        z.append(rotate(x[cell] / x[cell].norm(), (seconds[frame], place // grid.w, place % grid.w)))

    similarity = torch.zeros(grid.t - 1, num_places)
    for t in range(grid.t - 1):
        for place in range(num_places):
            one, two = x[t * num_places + place], x[(t + 1) * num_places + place]
            similarity[t, place] = torch.dot(one, two) / (one.norm() * two.norm())

    kept: dict[int, tuple[Tensor, float]] = {}  # cell -> its value and the score of the merging, inf where unchanged

    def keep_part(cells: list[list[int]], value: dict[int, Tensor], weight: dict[int, float], share: float) -> None:
        count = math.ceil(len(cells[0]) * share)
        num_salient = math.floor(count * (1 - context_share))
        rest = []
        for frame_cells in cells:
            candidates = sorted(frame_cells, key=lambda cell: -weight[cell])[: math.floor(expansion * num_salient)]
            salient = candidates
            if len(candidates) > max(1, num_salient):
                centres, _, distance = density_peaks([z[cell] for cell in candidates], num_salient, num_neighbours)
                clusters = assign(distance, sorted(centres))
                salient = [candidates[members[0]] for members in clusters]  # candidates fall in salience
            kept.update({cell: (value[cell], math.inf) for cell in salient})
            rest += [cell for cell in frame_cells if cell not in salient]
        num_context = len(cells) * (count - num_salient)
        if num_context and len(rest) <= num_context:
            kept.update({cell: (value[cell], math.inf) for cell in rest})
        elif num_context:
            centres, score, distance = density_peaks([z[cell] for cell in rest], num_context, num_neighbours)
            clusters = assign(distance, sorted(centres))
            for number, (centre, members) in enumerate(zip(sorted(centres), clusters, strict=True)):
                mean = torch.stack([value[rest[member]] for member in members]).mean(0)
                own = max(1 / len(members), beta)
                target = centres[number] if official else centre
                kept[rest[target]] = (own * value[rest[centre]] + (1 - own) * mean, score[target])

    for start, end in windows(similarity > tau):
        length = end - start
        still = [p for p in range(num_places) if length > 1 and all(similarity[start : end - 1, p] > static_tau)]
        size = length * num_places
        raised = ratio if length == 1 else min(1, ratio * size / (size - (length - 1) * len(still)))
        if still:
            times = {start * num_places + p: [t * num_places + p for t in range(start, end)] for p in still}
            mean_value = {cell: x[over_time].mean(0) for cell, over_time in times.items()}
            mean_weight = {cell: float(salience[over_time].mean()) for cell, over_time in times.items()}
            keep_part([list(times)], mean_value, mean_weight, raised)
        moving = [p for p in range(num_places) if p not in still]
        if moving:
            cells = [[t * num_places + p for p in moving] for t in range(start, end)]
            own_value = {cell: x[cell] for row in cells for cell in row}
            keep_part(cells, own_value, {cell: float(salience[cell]) for cell in own_value}, raised)

    index = sorted(kept)
    tokens = Kept(torch.tensor(index), torch.stack([kept[cell][0] for cell in index]).to(video.x_ND.dtype))
    scores = torch.tensor([kept[cell][1] for cell in index])
    return ops.fit_count(video, tokens, budget.num_kept, salience, scores) if budget.exact else tokens


def rotate(unit: Tensor, position: tuple[float, float, float]) -> Tensor:
    """Turn channel m with channel m + d/2, in one block for each of second, row and column."""
    side = 2 * (len(unit) // 6)
    turned, start = [], 0
    for size, place, base in zip((len(unit) - 2 * side, side, side), position, (1e4, 1e3, 1e3), strict=True):
        first, second = unit[start : start + size // 2], unit[start + size // 2 : start + size]
        angle = place * base ** (-2 * torch.arange(size // 2).double() / max(size, 1))
        cos, sin = angle.cos().float(), angle.sin().float()
        turned += [first * cos - second * sin, second * cos + first * sin]
        start += size
    return torch.cat(turned)


def windows(static: Tensor) -> list[tuple[int, int]]:
    """Cuts with the largest sum of (places static throughout) x (frames - 1); ties: the shorter last window."""
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for end in range(1, len(static) + 2):
        options = []
        for start in range(end - 1, -1, -1):
            throughout = int(static[start : end - 1].all(0).sum()) if end - start > 1 else 0
            options.append((best[start][0] + throughout * (end - start - 1), [*best[start][1], (start, end)]))
        best.append(max(options, key=lambda option: option[0]))  # the first of equals
    return best[-1][1]


def density_peaks(points: list[Tensor], num_centres: int, num_neighbours: int) -> tuple[list[int], list[float], Tensor]:
    """Centres by falling score, all scores rho * delta, and distances."""
    z = torch.stack(points)
    distance = torch.stack([(z - point).norm(dim=1) for point in points])
    rho = []
    for row in distance:
        near = row.sort().values[1 : num_neighbours + 1]  # without the point itself
        rho.append(math.exp(-float(near.square().mean())) if len(near) else 1.0)
    score = []
    for i in range(len(points)):
        denser = [j for j in range(len(points)) if (rho[j], -j) > (rho[i], -i)]
        score.append(rho[i] * float(distance[i, denser].min() if denser else distance.max()))
    return sorted(range(len(points)), key=lambda i: -score[i])[:num_centres], score, distance


def assign(distance: Tensor, centres: list[int]) -> list[list[int]]:
    """Members of each centre: the points nearest to it, and itself."""
    clusters: list[list[int]] = [[] for _ in centres]
    for i in range(len(distance)):
        nearest = centres.index(i) if i in centres else int(distance[i, centres].argmin())
        clusters[nearest].append(i)
    return clusters
