"""How the authors of learned methods compute their choices, with the weights of ours, and AdaTP as described.

To be read like `rival_pruners.py`.
Shape suffixes beside those of `stts.tokens`: W = patches of a group, E = width of a head.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from rival_pruners import Rival
from torch import Tensor

from stts.tokens import Budget, VideoTokens


def stts(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    """Scores of all frames, bias and choice; in training the cosines of all groups and the temporal loss too."""
    grid, group_GW, pooling = video.grid, video.group_GW, stage.scorer.pooling
    assert group_GW is not None
    x_ND = video.x_ND.float()
    x_GWD = torch.cat([x_ND, x_ND.new_zeros(1, x_ND.shape[1])])[group_GW.where(group_GW >= 0, len(x_ND))]
    query_G1D = x_GWD.mean(1, keepdim=True)

    def heads(layer: Any, y: Tensor) -> Tensor:
        split: Tensor = layer(y).unflatten(-1, (pooling.num_heads, -1)).transpose(1, 2)
        return split

    key, value = heads(pooling.key, x_GWD), heads(pooling.value, x_GWD)
    attended = F.scaled_dot_product_attention(heads(pooling.query, query_G1D), key, value)
    pooled_TPD = pooling.out(attended.transpose(1, 2).flatten(1)).view(grid.t, grid.per_frame, -1)
    before_TPD = torch.cat([torch.zeros_like(pooled_TPD[:1]), pooled_TPD[:-1]])
    hidden = torch.cat([before_TPD, pooled_TPD], -1)
    for layer in stage.scorer.mlp[:-1]:
        hidden = F.silu(layer(hidden))
    score_TP = stage.scorer.mlp[-1](hidden)[..., 0].sigmoid()
    if stage.training:
        unit = F.normalize(x_GWD.flatten(1), dim=-1).view(grid.t, grid.per_frame, -1)
        target_TP = 1 - (unit[1:] * unit[:-1]).sum(-1)
        _ = ((score_TP[1:] - target_TP) ** 2).sum() / target_TP.numel()

    side = math.isqrt(group_GW.shape[1])
    weight = score_TP.view(grid.t, grid.h, grid.w).repeat_interleave(side, 1).repeat_interleave(side, 2)
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    weight = stage.rescale_min + (weight - low) * (1 - stage.rescale_min) / (high - low + 1e-6)
    weight[0] = 1
    _ = weight.log()
    ranked = score_TP.clone()
    ranked[0] = 100
    keep = torch.ones(grid.num_groups, dtype=torch.bool)
    keep[ranked.flatten().sort().indices[: grid.num_groups - budget.num_kept]] = False
    return keep.nonzero()[:, 0]


def visionselector(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    """All products of a query and a key, then their mean."""
    scorer, x_ND = stage.importance_scorer, video.x_ND.float()
    query, key = (F.linear(x_ND, layer.weight, layer.bias) for layer in (scorer.q_proj, scorer.k_proj))
    score_N = (query @ key.T / math.sqrt(key.shape[1])).mean(1)
    return score_N.topk(budget.num_kept).indices.sort().values


def cacovid(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    """One layer on the whole prompt (fused attention, as theirs), then counts and choice frame by frame."""
    assert video.words is not None
    grid, policy, share, spread = video.grid, stage.compression_policy, stage.important_share, stage.spread
    first = len(video.words.before_LD)
    prompt = torch.cat([video.words.before_LD, video.x_ND, video.words.behind_LD])
    h_TPD = policy.layers[0](prompt[None], None)[0, first : first + grid.num_groups].view(grid.t, grid.per_frame, -1)
    token = policy.token_compress(policy.layernorm(h_TPD))
    frame = policy.frame_compress(policy.layernorm(h_TPD.mean(1)))
    score_TP, score_T = token[..., 1] - token[..., 0], frame[..., 1] - frame[..., 0]
    p_T = (3 * score_T / score_T.abs().max()).softmax(0).clamp(1 / (2 * grid.t), spread / grid.t)
    p_T /= p_T.sum()
    wanted = share * budget.retention_ratio * grid.num_groups
    cap = int(share * grid.per_frame * spread * budget.retention_ratio)
    counts = [min(max(1, round(p.item() * round(wanted))), cap) for p in p_T]
    while (rest := int(wanted) - sum(counts)) != 0:
        counts[counts.index(max(counts) if rest < 0 else min(counts))] += 1 if rest > 0 else -1
    keep_TP = torch.zeros(grid.t, grid.per_frame, dtype=torch.bool)
    for t, count in enumerate(counts):
        keep_TP[t, (score_TP[t].double() / 1000).softmax(0).sort(descending=True).indices[:count]] = (
            True  # ties in fp32
        )
    rest_M, left = (~keep_TP).flatten().nonzero()[:, 0], int(budget.retention_ratio * grid.num_groups) - sum(counts)
    keep_TP.view(-1)[rest_M[torch.linspace(0, len(rest_M) - 1, left, dtype=torch.float64).round().long()]] = True
    return keep_TP.flatten().nonzero()[:, 0]


def adatp(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    """No code of its authors is known: the steps as described, segment by segment and token by token."""
    method, per_frame = stage.method, video.grid.per_frame
    assert video.frame_TC is not None and video.salience_G is not None
    unit_TC = F.normalize(video.frame_TC.float(), dim=-1)
    similar = (unit_TC[1:] * unit_TC[:-1]).sum(-1).tolist()
    segment_of = [0]
    for value in similar:
        segment_of.append(segment_of[-1] + (value < method.tau_s))
    number = segment_of[-1] + 1
    member: list[list[int]] = [[] for _ in range(number)]
    cell = video.cell_G.tolist()
    for token in video.salience_G.float().sort(descending=True, stable=True).indices.tolist():
        member[segment_of[cell[token] // per_frame]].append(token)
    relevant = [False] * number
    if video.text_C is not None and number > 1:
        cosine = (unit_TC @ F.normalize(video.text_C.float(), dim=-1)).tolist()
        of = [[c for c, s in zip(cosine, segment_of, strict=True) if s == j] for j in range(number)]
        score = [sum(own) / len(own) for own in of]
        relevant = [(own - min(score)) / (max(score) - min(score)) >= method.tau_t for own in score]
    size = [len(own) for own in member]

    def due(rho: float) -> list[float]:
        raised = max(rho, min(method.alpha_boost * rho, method.gamma_cap))
        return [n * (raised if boosted else rho) for n, boosted in zip(size, relevant, strict=True)]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(due(middle)) < budget.num_kept else (low, middle)
    share = due(high)
    quota = [max(1, int(value)) for value in share]
    by_rest = sorted(range(number), key=lambda j: quota[j] - share[j])
    for j in by_rest[: budget.num_kept - sum(quota)]:
        quota[j] += 1
    kept = []
    for own, count in zip(member, quota, strict=True):
        copies, taken, copies_of = method.max_copies, [], Counter[int]()
        while len(taken) < count:
            later = []
            for token in own:
                place = cell[token] % per_frame
                if len(taken) < count and copies_of[place] < copies:
                    copies_of[place] += 1
                    taken.append(token)
                else:
                    later.append(token)
            own, copies = later, copies + 1
        kept += taken
    return torch.tensor(sorted(kept))


RIVALS: dict[str, Rival] = {"STTS": stts, "VisionSelector": visionselector, "CaCoVID": cacovid, "Cut": adatp}
