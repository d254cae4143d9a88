"""FastVID (arXiv:2503.11187) token by token, to be read beside the paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.tokens import Budget, Kept, VideoTokens


def fastvid(
    video: VideoTokens, budget: Budget, variant: str = "ov", min_segments: int = 8, tau: float | None = None,
    repeat: float = 0.95, context: float = 0.4, stride: int = 4, beta: float = 0.6, num_neighbours: int = 4,
) -> Kept:  # fmt: skip
    """As `FastVID(variant=..., ...).prune(video, budget)` without a sink penalty; no gradients."""
    assert video.salience_G is not None and video.frame_TC is not None
    num_frames, places = video.grid.t, video.grid.per_frame
    x = video.x_ND.detach().float().view(num_frames, places, -1)
    attention = video.salience_G.view(num_frames, places).tolist()
    tau = (0.84 if variant == "qw" else 0.9) if tau is None else tau
    frame = F.normalize(video.frame_TC.float(), dim=-1)
    similarity = [float(frame[t] @ frame[t + 1]) for t in range(num_frames - 1)]
    least = sorted(range(num_frames - 1), key=lambda t: similarity[t])[: min(min_segments, num_frames) - 1]
    ends = [t + 1 for t in range(num_frames - 1) if t in least or similarity[t] < tau] + [num_frames]

    tokens: dict[int, Tensor] = {}  # cell -> feature
    worth: dict[int, float] = {}  # cell -> who stays when the budget is exceeded
    n = max(1, int(places * budget.retention_ratio))
    for start, end in zip([0, *ends], ends, strict=False):
        length = end - start
        keeping = [t for t in range(start, end) if variant != "qw" or t == end - 1 or similarity[t] < repeat]
        anchor_frames = [t for j, t in enumerate(keeping) if (len(keeping) - 1 - j) % stride == 0][::-1]
        total = max(int(n * length * context), 1 if variant == "qw" else 0)
        num_anchors, salient = {}, {t: set[int]() for t in range(start, end)}
        for j, t in enumerate(keeping):
            q = (n * length - total) // len(keeping) + (j < (n * length - total) % len(keeping))
            m = total // len(anchor_frames) + (anchor_frames[: total % len(anchor_frames)].count(t))
            if variant == "ov":
                q, m = n - int(n * context), int(n * context) * length // len(anchor_frames)
            if variant == "qw" and length > 1:
                m = min(m, places // 2)
                q = min(q, places - m if t in anchor_frames else places)
            num_anchors[t] = min(m, places - q)
            salient[t] = set(sorted(range(places), key=lambda p: -attention[t][p])[:q])
            tokens |= {t * places + p: x[t, p] for p in salient[t]}
            worth |= {t * places + p: torch.inf for p in salient[t]}
        for t in anchor_frames:
            rest = [p for p in range(places) if p not in salient[t]]
            score = dict(zip(rest, peak_scores(x[t, rest], num_neighbours), strict=True))
            anchors = sorted(rest, key=lambda p: -score[p])[: num_anchors[t]]
            direction = F.normalize(x[t, anchors], dim=-1)
            members: list[list[Tensor]] = [[] for _ in anchors]
            for u in range(start, end) if anchors else ():
                for p in range(places):
                    if p not in salient[u] and not (variant != "ov" and u == t and p in anchors):
                        members[int((direction @ F.normalize(x[u, p], dim=0)).argmax())].append(x[u, p])
            for p, group in zip(anchors, members, strict=True):
                mean = torch.stack(group).mean(0) if group else 0
                weight = max(1 / (len(group) + 1), beta)
                tokens[t * places + p] = weight * x[t, p] + (1 - weight) * mean
                worth[t * places + p] = score[p]

    cells = sorted(tokens)
    kept = Kept(torch.tensor(cells), torch.stack([tokens[cell] for cell in cells]).to(video.x_ND.dtype))
    if not budget.exact:
        return kept
    return ops.fit_count(video, kept, budget.num_kept, video.salience_G, torch.tensor([worth[c] for c in cells]))


def peak_scores(x: Tensor, num_neighbours: int) -> list[float]:
    """rho * delta of each token among these; of equally dense ones the first counts as denser."""
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    rho = [float(torch.exp(-row.sort().values[:num_neighbours].square().mean())) for row in distance]
    scores = []
    for i in range(len(rho)):
        denser = [j for j in range(len(rho)) if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        scores.append(rho[i] * float(distance[i, denser].min() if denser else distance.max()))
    return scores
