"""`fastv` as one loop to be read. The fast path is tested against this."""

from __future__ import annotations

import torch

from stts.tokens import Budget, Kept, VideoTokens


def fastv(video: VideoTokens, budget: Budget) -> Kept:
    """Take the group with the most attention, again and again; the first one of equals."""
    assert video.salience_G is not None
    salience = video.salience_G.tolist()
    left = list(range(video.num_groups))
    kept = []
    for _ in range(budget.num_kept):
        best = left[0]
        for group in left:
            if salience[group] > salience[best]:
                best = group
        kept.append(best)
        left.remove(best)
    return Kept(index_K=torch.tensor(sorted(kept)), scores_G=video.salience_G)
