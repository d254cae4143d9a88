"""`tome` as loops to be read. The fast path is tested against this."""

from __future__ import annotations

import torch
from torch import Tensor

from stts.tokens import Budget, Kept, VideoTokens


def tome(video: VideoTokens, budget: Budget) -> Kept:
    """Frame by frame, step by step; windows side by side, as most connectors have them."""
    assert video.keys_GD is not None and video.group_GW is not None
    num_frames, per_frame = video.grid.t, video.grid.per_frame
    x_ND, size_N = video.x_ND.float().clone(), torch.ones(len(video.x_ND))
    kept: list[int] = []
    for t in range(num_frames):
        groups = list(range(t * per_frame, (t + 1) * per_frame))
        metric = {g: video.keys_GD[g].double() for g in groups}
        size = dict.fromkeys(groups, 1)
        target = budget.num_kept // num_frames + (t < budget.num_kept % num_frames)
        while len(groups) > target:
            for source, into in _step(groups, metric, min(len(groups) - target, len(groups) // 2)):
                total = size[source] + size[into]
                metric[into] = (size[source] * metric[source] + size[into] * metric[into]) / total
                size[into] = total
                for a, b in zip(video.group_GW[source].tolist(), video.group_GW[into].tolist(), strict=True):
                    x_ND[b] = (size_N[a] * x_ND[a] + size_N[b] * x_ND[b]) / (size_N[a] + size_N[b])
                    size_N[b] += size_N[a]
                groups.remove(source)
        kept += groups
    return Kept(index_K=torch.tensor(kept), x_ND=x_ND, size_N=size_N)


def _step(groups: list[int], metric: dict[int, Tensor], number: int) -> list[tuple[int, int]]:
    """(source, target): the most similar pairs of an even place with an odd one."""
    pairs = []
    for a in groups[::2]:
        cosines = [float(torch.cosine_similarity(metric[a], metric[b], dim=0)) for b in groups[1::2]]
        if cosines:
            pairs.append((max(cosines), a, groups[1::2][cosines.index(max(cosines))]))
    pairs.sort(key=lambda pair: -pair[0])
    return [(a, b) for _, a, b in pairs[:number]]
