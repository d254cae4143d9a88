"""How the authors compute their choices: loops over frames and windows, matrices of all pairs. Only the work is theirs.

Each function takes a video, its budget and our stage, whose settings it reads, and returns the kept groups, increasing;
merged features are computed and thrown away. Written from the published steps, each as its release arranges them.
Shape suffixes beside those of `stts.tokens`: C = centres, M = candidates, A = static places, L = what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners.st_rope import sections
from stts.tokens import Budget, SinkPenalty, VideoTokens

Rival = Callable[[VideoTokens, Budget, Any], Tensor]


def frames_of(video: VideoTokens) -> Tensor:
    return video.x_ND.float().view(video.grid.t, video.grid.per_frame, -1)


def salience_of(video: VideoTokens) -> Tensor:
    """Attention, less that of sinks where SToP asks for it."""
    assert video.salience_G is not None
    attention_TP = video.salience_G.float().view(video.grid.t, -1)
    return attention_TP if video.sink is None else attention_TP - video.sink.salience * video.sink.penalty_P


def density_scores(distance_MM: Tensor, num_neighbours: int, skip: int = 0) -> Tensor:
    """Density peaks with a mask of all pairs, as every release writes them."""
    near = distance_MM.topk(min(num_neighbours + skip, len(distance_MM)), dim=-1, largest=False).values[:, skip:]
    rho_M = (-(near**2).mean(-1)).exp()
    mask_MM = (rho_M[None, :] > rho_M[:, None]).float()
    delta_M = (distance_MM * mask_MM + distance_MM.max() * (1 - mask_MM)).min(-1).values
    return rho_M * delta_M


def windows(static_TP: Tensor) -> list[tuple[int, int]]:
    """Windows by dynamic programming over all pairs of frames; each pair counts its static places anew."""
    best, start_of = [0.0], []
    for last in range(len(static_TP) + 1):
        gain, start = best[last], last
        for first in range(last - 1, -1, -1):
            total = best[first] + static_TP[first:last].all(0).sum().item() * (last - first)
            if total > gain:
                gain, start = total, first
        best.append(gain)
        start_of.append(start)
    cut, end = [], len(start_of)
    while end:
        cut.append((start_of[end - 1], end))
        end = start_of[end - 1]
    return cut[::-1]


def saved(static_TP: Tensor, cut: list[tuple[int, int]]) -> int:
    return sum(int(static_TP[a : b - 1].all(0).sum()) * (b - a - 1) for a, b in cut if b - a > 1)


# --- before the LLM ------------------------------------------------------------------------------------------------


def visionzip(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    x_TPD, attention_TP = frames_of(video), salience_of(video)
    assert video.keys_GD is not None
    keys_TPC = F.normalize(video.keys_GD.float(), dim=-1).view(*x_TPD.shape[:2], -1)
    num_kept = sum(stage._counts(video.grid.per_frame, budget.retention_ratio))  # the release's table
    num_top = num_kept * 54 // 64
    top_TK = attention_TP.topk(num_top, dim=1).indices
    rest_TP = torch.ones_like(attention_TP, dtype=torch.bool).scatter_(1, top_TK, False)
    left = video.grid.per_frame - num_top
    place_TL = torch.arange(video.grid.per_frame).expand_as(rest_TP)[rest_TP].view(video.grid.t, left)
    x_TLD, key_TLC = x_TPD[rest_TP].view(video.grid.t, left, -1), keys_TPC[rest_TP].view(video.grid.t, left, -1)
    step = max(1, left // (num_kept - num_top))
    slot_TC = torch.arange(0, left, step)[: num_kept - num_top].repeat(video.grid.t, 1)
    if video.sink is not None:
        slot_TC = off_sinks(slot_TC, place_TL, video.sink)
    other_TL = torch.ones(video.grid.t, left, dtype=torch.bool).scatter_(1, slot_TC, False)
    frame_T1 = torch.arange(video.grid.t)[:, None]
    similarity = key_TLC[other_TL].view(video.grid.t, -1, key_TLC.shape[2]) @ key_TLC[frame_T1, slot_TC].transpose(1, 2)
    one_hot = torch.zeros_like(similarity).scatter_(2, similarity.argmax(2, keepdim=True), 1)
    others = x_TLD[other_TL].view(video.grid.t, -1, x_TLD.shape[2])
    mean = one_hot.transpose(1, 2) @ others / one_hot.sum(1).clamp_min(1)[..., None]
    top_TKD = x_TPD.gather(1, top_TK[..., None].expand(-1, -1, x_TPD.shape[2]))
    _ = torch.cat([top_TKD, x_TLD[frame_T1, slot_TC] + mean], 1)
    place_TK = torch.cat([top_TK, place_TL.gather(1, slot_TC)], 1)
    return (place_TK + video.grid.per_frame * torch.arange(video.grid.t)[:, None]).flatten().sort().values


def off_sinks(slot_TC: Tensor, place_TL: Tensor, sink: SinkPenalty) -> Tensor:
    """Slots moved to the right one by one, off the places of the worst sinks and off one another (SToP)."""
    worst, last = set(sink.penalty_P.topk(sink.num_slots).indices.tolist()), place_TL.shape[1] - 1
    moved = []
    for slots, place in zip(slot_TC.tolist(), place_TL.tolist(), strict=True):
        row: list[int] = []
        for number, slot in enumerate(slots):
            while slot < last and place[slot] in worst:
                slot += 1
            row.append(min(max(slot, row[-1] + 1 if row else 0), last + 1 - len(slots) + number))
        moved.append(row)
    return torch.tensor(moved)


def holitom(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    x_TPD, attention_TP = frames_of(video), salience_of(video)
    unit_TPD = F.normalize(x_TPD, dim=-1)
    similarity_TP = (unit_TPD[1:] * unit_TPD[:-1]).sum(-1)
    static_TP, sink_P, weight = similarity_TP > 0.8, torch.zeros(video.grid.per_frame), 0.0
    cut = windows(static_TP)
    ratio = min(1.0, budget.retention_ratio / (1 - saved(static_TP, cut) / video.num_groups))
    kept, per_frame = [], video.grid.per_frame
    if video.sink is not None:
        sink_P, weight = video.sink.penalty_P, video.sink.density
        static_TP = similarity_TP + video.sink.temporal * sink_P > 0.8
    for start, end in cut:
        still_P = static_TP[start : end - 1].all(0) if end - start > 1 else torch.zeros(per_frame, dtype=torch.bool)
        moving = (~still_P).nonzero()[:, 0]
        for t in range(start, end):
            best = attention_TP[t, moving].topk(math.ceil(len(moving) * ratio)).indices.sort().values
            _ = x_TPD[t, moving[best]]
            kept.append(t * per_frame + moving[best])
        if num_centres := round(int(still_P.sum()) * ratio):
            y_AD = x_TPD[start:end].mean(0)[still_P]
            distance = torch.cdist(y_AD, y_AD) / math.sqrt(y_AD.shape[1])
            score_A = density_scores(distance, min(7, num_centres)) - weight * sink_P[still_P]
            centre_C = score_A.topk(num_centres).indices.sort().values
            nearest = distance[:, centre_C].argmin(1)
            for number, centre in enumerate(centre_C.tolist()):
                members = y_AD[nearest == number]
                _ = 0.6 * y_AD[centre] + 0.4 * members.mean(0)
            kept.append(start * per_frame + still_P.nonzero()[:, 0][centre_C])
    return torch.cat(kept).sort().values


def turned(video: VideoTokens, unit: Tensor) -> Tensor:
    """ST-RoPE of unit features (T, h, w, D), block by block."""
    assert video.timestamps_T is not None
    blocks, grid = [], video.grid
    positions = (video.timestamps_T, torch.arange(grid.h).double(), torch.arange(grid.w).double())
    parts = torch.split(unit, list(sections(unit.shape[-1])), -1)
    for axis, (part, position, base) in enumerate(zip(parts, positions, (1e4, 1e3, 1e3), strict=True)):
        theta = base ** (-torch.arange(0, part.shape[-1], 2).double() / part.shape[-1])
        angle = torch.outer(position, theta).float().repeat(1, 2)
        angle = angle.view(*(-1 if i == axis else 1 for i in range(3)), part.shape[-1])
        first, second = part.chunk(2, -1)
        blocks.append(part * angle.cos() + torch.cat([-second, first], -1) * angle.sin())
    return torch.cat(blocks, -1).flatten(1, 2)


def tango(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    x_TPD, salience_TP, grid = frames_of(video), salience_of(video), video.grid
    unit = F.normalize(x_TPD, dim=-1).view(grid.t, grid.h, grid.w, -1)
    z_TPD = turned(video, unit)
    unit_TPD = unit.view_as(x_TPD)
    similarity_TP = (unit_TPD[1:] * unit_TPD[:-1]).sum(-1)
    kept: list[Tensor] = []

    def merged(x: Tensor, z: Tensor, num_centres: int) -> Tensor:
        distance = torch.cdist(z, z)
        centre_C = density_scores(distance, 7, skip=1).topk(num_centres).indices.sort().values
        nearest = distance[:, centre_C].argmin(1)
        for number in range(num_centres):
            members = x[nearest == number]
            own = max(1 / max(1, len(members)), 0.6)
            _ = own * x[centre_C[number]] + (1 - own) * members.mean(0)
        return centre_C

    def part_of(x: Tensor, z: Tensor, salience: Tensor, cell: Tensor, ratio: float) -> None:
        num_kept = math.ceil(cell.shape[1] * ratio)
        num_salient, rest = math.floor(num_kept * 0.6), []
        for t in range(len(cell)):
            taken = torch.zeros(cell.shape[1], dtype=torch.bool)
            candidate = salience[t].topk(min(cell.shape[1], math.floor(1.5 * num_salient))).indices
            if len(candidate) > max(1, num_salient):
                distance = torch.cdist(z[t, candidate], z[t, candidate])
                centre_C = density_scores(distance, 7, skip=1).topk(num_salient).indices.sort().values
                nearest = distance[:, centre_C].argmin(1)
                candidate = torch.stack([candidate[(nearest == n).nonzero()[0, 0]] for n in range(num_salient)])
            taken[candidate] = True
            kept.append(cell[t, taken])
            rest.append(~taken)
        left = torch.stack(rest)
        if num_context := len(cell) * (num_kept - num_salient):
            kept.append(cell[left][merged(x[left], z[left], num_context)])

    per_frame, cell_TP = grid.per_frame, torch.arange(grid.num_groups).view(grid.t, -1)
    for start, end in windows(similarity_TP > 0.8):
        frames, moving, ratio = end - start, torch.ones(per_frame, dtype=torch.bool), budget.retention_ratio
        if frames > 1:
            moving = ~(similarity_TP[start : end - 1] > 0.8).all(0)
            size, still = frames * per_frame, int((~moving).sum())
            ratio = min(1.0, ratio * size / (size - (frames - 1) * still))
            if still:
                mean, salience = x_TPD[start:end, ~moving].mean(0), salience_TP[start:end, ~moving].mean(0)
                part_of(mean[None], z_TPD[None, start, ~moving], salience[None], cell_TP[None, start, ~moving], ratio)
        if moving.any():
            chosen = (slice(start, end), moving)
            part_of(x_TPD[chosen], z_TPD[chosen], salience_TP[chosen], cell_TP[chosen], ratio)
    return torch.cat(kept).sort().values


def fastvid(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    x_TPD, salience_TP, per_frame = frames_of(video), salience_of(video), video.grid.per_frame
    assert video.frame_TC is not None
    unit = F.normalize(video.frame_TC.float(), dim=-1)
    similar_T = (unit[:-1] * unit[1:]).sum(-1)
    lowest = set(similar_T.topk(min(7, len(similar_T)), largest=False).indices.tolist())
    cuts = sorted(lowest | set((similar_T < 0.9).nonzero()[:, 0].tolist()))
    number = int(per_frame * budget.retention_ratio)
    num_context = int(number * 0.4)
    top_TK = salience_TP.topk(number - num_context, 1).indices
    rest_TP = torch.ones_like(salience_TP, dtype=torch.bool).scatter_(1, top_TK, False)
    left = int(rest_TP[0].sum())
    place_TL = rest_TP.nonzero()[:, 1].view(-1, left)
    x_TLD = x_TPD[rest_TP].view(len(x_TPD), left, -1)
    distance = torch.cdist(x_TLD, x_TLD) / math.sqrt(x_TLD.shape[-1])
    score_TL = torch.stack([density_scores(frame, 4) for frame in distance])
    if video.sink is not None:
        sink_TL = video.sink.density * video.sink.penalty_P[place_TL]
        score_TL -= sink_TL
    kept = [(top_TK + per_frame * torch.arange(len(x_TPD))[:, None]).flatten()]
    for start, end in zip([0, *(cut + 1 for cut in cuts)], [*(cut + 1 for cut in cuts), len(x_TPD)], strict=True):
        pool = x_TLD[start:end].flatten(0, 1)
        if video.sink is not None and end - start > 1:
            score_TL[start:end] -= sink_TL[start:end]  # once more, as released
        anchor_frames = list(range(end - 1, start - 1, -4))
        for t in anchor_frames:
            centre_C = score_TL[t].topk(num_context * (end - start) // len(anchor_frames)).indices
            similarity = F.normalize(pool, dim=-1) @ F.normalize(x_TLD[t, centre_C], dim=-1).T
            one_hot = F.one_hot(similarity.argmax(1), len(centre_C)).float()
            count = one_hot.sum(0)[:, None]
            own = (1 / (count + 1)).clamp_min(0.6)
            _ = own * x_TLD[t, centre_C] + (1 - own) * (one_hot.T @ pool / count.clamp_min(1))
            kept.append(t * per_frame + place_TL[t, centre_C])
    return torch.cat(kept).sort().values


def vidcom2(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    x_ND, (num_frames, per_frame) = video.x_ND.float(), (video.grid.t, video.grid.per_frame)
    channel = x_ND.var(0, unbiased=False).topk(x_ND.shape[1] // 2, largest=False).indices
    x_TPC = F.normalize(x_ND[:, channel], dim=-1).view(num_frames, per_frame, -1)
    scores = []
    for centre in (x_TPC.mean((0, 1), keepdim=True), x_TPC.mean(1, keepdim=True)):
        distance = ((x_TPC - centre) ** 2).sum(-1)
        scores.append(sum(torch.exp(-distance / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2)))
    p_T = ((-scores[0].mean(1)) / 0.01).softmax(0)
    scale_T = (budget.retention_ratio * (1 + p_T - p_T.mean())).clamp_max(1)
    kept = []
    for t in range(num_frames):
        number = max(1, round(scale_T[t].item() * per_frame))
        kept.append(t * per_frame + (scores[0] + scores[1])[t].topk(number, largest=False).indices.sort().values)
    return torch.cat(kept)


def evs(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    x_TPD = frames_of(video)
    score_TP = 1 - F.cosine_similarity(x_TPD[1:], x_TPD[:-1], dim=-1)
    score_N = torch.cat([torch.full_like(score_TP[:1], 255.0), score_TP]).flatten()
    mask_N = torch.zeros_like(score_N, dtype=torch.bool)
    mask_N[score_N.argsort(descending=True, stable=True)[: budget.num_kept]] = True
    return mask_N.nonzero()[:, 0]


def divprune(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    unit_ND = F.normalize(video.x_ND.float(), dim=-1)
    distance_NN = 1 - unit_ND @ unit_ND.T
    chosen = [distance_NN.topk(2, dim=0, largest=False).values[1].argmax()]
    while len(chosen) < budget.num_kept:
        chosen.append(distance_NN[torch.stack(chosen)].min(0).values.argmax())  # every chosen row is read again
    return torch.stack(chosen).sort().values


def cdpruner(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    unit_ND = F.normalize(video.x_ND.float(), dim=-1)
    quality_N = torch.ones(len(unit_ND))
    if video.aligned_GC is not None and video.text_C is not None:
        quality_N = -(F.normalize(video.aligned_GC.float(), dim=-1) @ F.normalize(video.text_C.float(), dim=0))
        quality_N = (quality_N - quality_N.min() + 1e-6) / (quality_N.max() - quality_N.min())
    kernel_NN = quality_N[:, None] * (unit_ND @ unit_ND.T) * quality_N
    rows_KN = torch.zeros(budget.num_kept, len(unit_ND))
    variance_N = kernel_NN.diagonal().clone()
    chosen = []
    for step in range(budget.num_kept):
        best = int(variance_N.argmax())
        chosen.append(best)
        row_N = kernel_NN[best] - rows_KN[:step, best] @ rows_KN[:step]
        rows_KN[step] = row_N / variance_N[best].sqrt()
        variance_N -= rows_KN[step] ** 2
        variance_N[best] = -torch.inf
    return torch.tensor(chosen).sort().values


def dycoke(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    x_TPD, per_frame = frames_of(video), video.grid.per_frame
    number = max(0, int((4 * budget.retention_ratio - 1) / 3 * per_frame))
    kept = []
    for t in range(len(x_TPD)):
        chosen = torch.arange(per_frame)
        if t % 4:
            similarity_P = F.cosine_similarity(x_TPD[t], x_TPD[t & (t - 1)], dim=-1)
            chosen = similarity_P.topk(number, largest=False).indices
        _ = x_TPD[t, chosen]
        kept.append(t * per_frame + chosen)
    return torch.cat(kept).sort().values


def vcast(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    x_TPD, per_frame = frames_of(video), video.grid.per_frame
    frame_TD = F.normalize(x_TPD.mean(1), dim=-1)
    step_TD = frame_TD.diff(dim=0)
    turn_T = torch.ones(len(frame_TD))
    turn_T[1:-1] = 1 - F.cosine_similarity(step_TD[1:], step_TD[:-1], dim=-1)
    share = (turn_T / 0.7).softmax(0) * (budget.num_kept - len(frame_TD))
    counts = [1 + min(int(value), per_frame - 1) for value in share.tolist()]
    counts[int((share - share.floor()).argmax())] += budget.num_kept - sum(counts)
    kept = []
    for t, frame_PD in enumerate(x_TPD):
        norm_P = frame_PD.norm(dim=-1)
        far_P = 1 - F.cosine_similarity(frame_PD, frame_TD[t][None], dim=-1)
        score_P = far_P + (norm_P - norm_P.min()) / (norm_P.max() - norm_P.min() + 1e-6)
        kept.append(t * per_frame + score_P.topk(min(counts[t], per_frame)).indices.sort().values)
    return torch.cat(kept)


def framefusion(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    """Its first merging; the release walks through the runs of every place."""
    x_ND, per_frame = video.x_ND.float().clone(), video.grid.per_frame
    similarity_N = torch.full((len(x_ND),), -2.0)
    similarity_N[per_frame:] = F.cosine_similarity(x_ND[per_frame:], x_ND[:-per_frame], dim=-1)
    merged_N = torch.zeros(len(x_ND), dtype=torch.bool)
    merged_N[similarity_N.topk(len(x_ND) - budget.num_kept).indices] = True
    merged_TP = merged_N.view(-1, per_frame)
    for place in range(per_frame):
        column, start = merged_TP[:, place].tolist(), 0
        for t in range(1, len(column) + 1):
            if t == len(column) or not column[t]:
                if t - start > 1:
                    x_ND[start * per_frame + place] = x_ND[start * per_frame + place : t * per_frame : per_frame].mean(
                        0
                    )
                start = t
    return (~merged_N).nonzero()[:, 0]


# --- inside the LLM ------------------------------------------------------------------------------------------------


def fastv(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    assert video.salience_G is not None
    return video.salience_G.topk(budget.num_kept).indices.sort().values


def prunevid_inner(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    assert video.salience_G is not None
    frame_G, kept = video.cell_G // video.grid.per_frame, []
    for t in range(video.grid.t):
        member = (frame_G == t).nonzero()[:, 0]
        kept.append(member[video.salience_G[member].topk(int(stage.share * len(member))).indices])
    return torch.cat(kept).sort().values


def dart(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    assert video.prompt is not None and video.keys_GD is not None
    hidden = torch.cat([video.x_ND, video.prompt.x_LD]).float()
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * video.prompt.norm_D
    keys, num_video = torch.cat([video.keys_GD, video.prompt.keys_LD]).float().abs().sum(-1), len(video.x_ND)
    images = keys[:num_video].topk(4).indices
    texts = num_video + keys[num_video:].topk(min(4, len(keys) - num_video)).indices
    pivots = torch.cat([images, texts]).tolist()
    left = [i for i in range(num_video) if i not in set(images.tolist())]
    kept = images.tolist()
    for pivot in pivots:
        candidate = torch.tensor(left)
        similarity = F.cosine_similarity(hidden[pivot][None], hidden[candidate], dim=-1)
        picks = candidate[similarity.topk((budget.num_kept - 4) // len(pivots), largest=False).indices].tolist()
        kept += picks
        taken = set(picks)
        left = [i for i in left if i not in taken]
    return torch.tensor(sorted(kept))


RIVALS: dict[str, Rival] = {
    "VisionZip": visionzip, "HoliTom": holitom, "Tango": tango, "FastVID": fastvid, "VidCom2": vidcom2, "EVS": evs,
    "DivPrune": divprune, "CDPruner": cdpruner, "DyCoke": dycoke, "VCAST": vcast, "FrameFusion": framefusion,
    "FastV": fastv, "FlashVIDInner": fastv, "PruneVidInner": prunevid_inner, "DART": dart,
}  # fmt: skip
