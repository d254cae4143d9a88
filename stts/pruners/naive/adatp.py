"""AdaTP (our reconstruction) in plain loops.

Shape suffixes beside those of `stts.tokens`: C = width of a frame feature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stts.tokens import Budget, Kept, VideoTokens


def adatp(
    video: VideoTokens,
    budget: Budget,
    *,
    tau_s: float = 0.95,
    tau_t: float = 0.5,
    alpha_boost: float = 1.5,
    gamma_cap: float = 0.9,
    max_copies: int = 1,
) -> Kept:
    """One cut of AdaTP, our reconstruction, step by step."""
    assert video.frame_TC is not None and video.salience_G is not None
    frame_TC = F.normalize(video.frame_TC.float(), dim=-1)
    segments = [[0]]  # frames of each segment
    for t in range(1, video.grid.t):
        if frame_TC[t] @ frame_TC[t - 1] < tau_s:
            segments.append([])
        segments[-1].append(t)

    relevant = [False] * len(segments)
    if video.text_C is not None:
        text_C = F.normalize(video.text_C.float(), dim=-1)
        scores = [float(torch.stack([frame_TC[t] @ text_C for t in segment]).mean()) for segment in segments]
        low, high = min(scores), max(scores)
        if high - low >= 1e-6:
            relevant = [(score - low) / (high - low) >= tau_t for score in scores]

    cells = video.cell_G.tolist()
    attention = video.salience_G.float().tolist()
    tokens = [[g for g, cell in enumerate(cells) if cell // video.grid.per_frame in segment] for segment in segments]

    def shares(rho: float) -> list[float]:
        ratios = [max(rho, min(alpha_boost * rho, gamma_cap)) if boosted else rho for boosted in relevant]
        return [ratio * len(members) for ratio, members in zip(ratios, tokens, strict=True)]

    below, above = 0.0, 1.0
    for _ in range(100):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(shares(middle)) < budget.num_kept else (below, middle)
    due = [round(share * 1_000_000) for share in shares(above)]  # integers, so that equal shares tie

    quotas = [0] * len(segments)
    present = [j for j, members in enumerate(tokens) if members]
    if budget.num_kept >= len(present):
        for j in present:
            quotas[j] = 1
    while sum(quotas) < budget.num_kept:  # one by one to whoever is owed most
        open_segments = [j for j in present if quotas[j] < len(tokens[j])]
        quotas[max(open_segments, key=lambda j: (due[j] - 1_000_000 * quotas[j], -j))] += 1

    kept = []
    for quota, members in zip(quotas, tokens, strict=True):
        waiting, copies, taken = sorted(members, key=lambda g: (-attention[g], g)), max_copies, dict[int, int]()
        accepted: list[int] = []
        while len(accepted) < quota:
            for g in list(waiting):
                place = cells[g] % video.grid.per_frame
                if taken.get(place, 0) < copies and len(accepted) < quota:
                    taken[place] = taken.get(place, 0) + 1
                    accepted.append(g)
                    waiting.remove(g)
            copies += 1
        kept += accepted
    return Kept(index_K=torch.tensor(sorted(kept)))
