"""`dart` as loops to be read. The fast path is tested against this."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.tokens import Budget, Kept, VideoTokens


def dart(video: VideoTokens, budget: Budget, num_image: int = 4, num_text: int = 4) -> Kept:
    """Pivots by key norm; each in turn takes the groups least similar to it out of those that are left."""
    assert video.keys_GD is not None and video.prompt is not None
    prompt, num_groups = video.prompt, video.num_groups
    if budget.exact:
        num_image = min(num_image, max(1, budget.num_kept // 3))
        num_text = min(num_text, max(1, budget.num_kept // 3))

    image_pivots = _largest_keys(video.keys_GD, num_image)
    text_pivots = _largest_keys(prompt.keys_LD, num_text)
    pivots = [video.x_ND[i] * prompt.norm_D for i in image_pivots]
    pivots += [prompt.x_LD[i] * prompt.norm_D for i in text_pivots]
    if budget.exact:
        rest = budget.num_kept - len(image_pivots)
        picks = [rest // len(pivots) + (1 if p < rest % len(pivots) else 0) for p in range(len(pivots))]
    else:
        picks = [int(num_groups * budget.retention_ratio / len(pivots))] * len(pivots)

    kept = list(image_pivots)
    left = [g for g in range(num_groups) if g not in image_pivots]
    for pivot_D, number in zip(pivots, picks, strict=True):
        cosine = {g: float(F.cosine_similarity(pivot_D, video.x_ND[g] * prompt.norm_D, dim=0)) for g in left}
        for group in sorted(left, key=lambda g: cosine[g])[:number]:
            kept.append(group)
            left.remove(group)
    return Kept(index_K=torch.tensor(sorted(kept)))


def _largest_keys(keys_ND: Tensor, number: int) -> list[int]:
    norms = [float(key_D.abs().sum()) for key_D in keys_ND]
    return sorted(range(len(norms)), key=lambda i: -norms[i])[:number]
