"""`cdpruner` as loops to be read. The fast path is tested against this."""

from __future__ import annotations

import torch

from stts.tokens import Budget, Kept, VideoTokens


def cdpruner(video: VideoTokens, budget: Budget) -> Kept:
    """Every step: the token of largest variance given the chosen ones, computed from scratch."""
    assert video.aligned_GC is not None and video.text_C is not None
    cosine = torch.cosine_similarity(video.aligned_GC.double(), video.text_C.double()[None], dim=-1)
    weight_N = (cosine.max() - cosine + 1e-6) / (cosine.max() - cosine.min())
    unit_ND = torch.nn.functional.normalize(video.x_ND.double(), dim=-1)
    kernel_NN = weight_N[:, None] * (unit_ND @ unit_ND.T) * weight_N
    chosen: list[int] = []
    while len(chosen) < budget.num_kept:
        between, within = kernel_NN[chosen], kernel_NN[chosen][:, chosen]
        variance_N = kernel_NN.diagonal() - (between * torch.linalg.solve(within, between)).sum(0)
        left = [n for n in range(len(unit_ND)) if n not in chosen]
        chosen.append(max(left, key=lambda n: float(variance_N[n])))
    return Kept(index_K=torch.tensor(sorted(chosen)), scores_G=weight_N.float())
