"""`dycoke` as loops to be read. The fast path is tested against this."""

from __future__ import annotations

import torch

from stts.tokens import Budget, Kept, VideoTokens


def dycoke(video: VideoTokens, budget: Budget) -> Kept:
    """Frame by frame: whole, or the tokens least like its reference."""
    num_frames, places = video.grid.t, range(video.grid.per_frame)
    x, group = video.x_ND.view(num_frames, len(places), -1), 4
    whole = range(0, num_frames, group)
    while budget.exact and len(whole) * len(places) > budget.num_kept and group < num_frames:
        group *= 2
        whole = range(0, num_frames, group)
    if budget.exact and budget.num_kept < len(places):
        return Kept(
            index_K=torch.tensor([(2 * i + 1) * len(places) // (2 * budget.num_kept) for i in range(budget.num_kept)])
        )
    pruned = [t for t in range(num_frames) if t not in whole]
    cosine = {}
    for t in pruned:
        step = next(2**bit for bit in range(20) if t % 2 ** (bit + 1))  # 1 for odd frames, 2 for 2, 6, ..., then 4
        cosine[t] = [float(torch.cosine_similarity(x[t, p], x[t - step, p], dim=0)) for p in places]
    count = {t: int(max(0.0, (4 * budget.retention_ratio - 1) / 3) * len(places) + 1e-9) for t in pruned}
    if budget.exact and pruned:
        share, more = divmod(budget.num_kept - len(whole) * len(places), len(pruned))
        by_mean = sorted(pruned, key=lambda t: sum(cosine[t]))
        count = {t: share + (by_mean.index(t) < more) for t in pruned}
    kept = [t * len(places) + p for t in whole for p in places]
    for t in pruned:
        kept += [t * len(places) + p for p in sorted(places, key=lambda p: cosine[t][p])[: count[t]]]
    return Kept(index_K=torch.tensor(sorted(kept)))
