"""VisionZip as a reader would write it from the paper: one frame after the other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.tokens import Budget, Kept, VideoTokens


def visionzip(video: VideoTokens, budget: Budget, dominant_ratio: float = 54 / 64) -> Kept:
    """The corrected order, and floor(S r) tokens per frame, at least one: no table for S = 196 (arXiv:2412.04467)."""
    assert video.salience_G is not None and video.keys_GD is not None
    num_places = video.grid.per_frame
    num_kept = max(1, math.floor(num_places * budget.retention_ratio + 1e-9))
    num_dominant = math.floor(num_kept * dominant_ratio)
    index: list[int] = []
    rows: list[Tensor] = []
    for frame in range(video.grid.t):
        here = slice(frame * num_places, (frame + 1) * num_places)
        x_PD, salience, key_PH = video.x_ND[here], video.salience_G[here].tolist(), video.keys_GD[here]
        dominant = sorted(range(num_places), key=lambda place, a=salience: -a[place])[:num_dominant]  # type: ignore[misc]
        rest = [place for place in range(num_places) if place not in dominant]
        targets = rest[:: max(1, len(rest) // (num_kept - num_dominant))][: num_kept - num_dominant]
        members: dict[int, list[int]] = {target: [] for target in targets}
        for place in rest:
            if place not in targets:
                cosine = [float(F.cosine_similarity(key_PH[place], key_PH[target], dim=0)) for target in targets]
                members[targets[cosine.index(max(cosine))]].append(place)
        for place in sorted([*dominant, *targets]):
            index.append(frame * num_places + place)
            joined = [x_PD[member] for member in members.get(place, [])]
            rows.append(x_PD[place] + torch.stack(joined).mean(0) if joined else x_PD[place])
    return Kept(index_K=torch.tensor(index), x_KD=torch.stack(rows))
