"""How the authors of methods that merge tokens compute their choices, and SToP around a base.

To be read like `rival_pruners.py`. ToMe and EarlyTom are theirs in the place in which we use them, behind one block.
Shape suffixes beside those of `stts.tokens`: C = centres, M = members of a set, A = tokens selected of a frame.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from rival_pruners import RIVALS as SELECTING
from rival_pruners import Rival, density_scores, frames_of, salience_of
from torch import Tensor

from stts.pruners.prunevid import refine
from stts.tokens import Budget, SinkPenalty, VideoTokens


def spans(cuts: set[int], num_frames: int) -> list[tuple[int, int]]:
    """First frame and the one behind the last, of each segment; a cut lies behind its frame."""
    ends = [*(cut + 1 for cut in sorted(cuts)), num_frames]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def clustered(z_MD: Tensor, num_centres: int, num_neighbours: int) -> Tensor:
    """(C,) centres by falling score; all become the means of their clusters."""
    distance_MM = torch.cdist(z_MD, z_MD) / math.sqrt(z_MD.shape[1])
    centre_C = density_scores(distance_MM, num_neighbours).topk(num_centres).indices
    nearest_M = distance_MM[:, centre_C].argmin(1)
    nearest_M[centre_C] = torch.arange(num_centres)
    member_MC = F.one_hot(nearest_M, num_centres).float()
    _ = member_MC.T @ z_MD / member_MC.sum(0)[:, None]
    return centre_C


# --- before the LLM ------------------------------------------------------------------------------------------------


def flashvid(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    x_TPD, attention_TP, per_frame = frames_of(video), salience_of(video), video.grid.per_frame
    num_selected, num_merged = stage.counts(budget, video.grid)
    similar_T = F.cosine_similarity(x_TPD[:-1].mean(1), x_TPD[1:].mean(1), dim=-1)
    cuts = set((similar_T < stage.segment_tau).nonzero()[:, 0].tolist())
    cuts |= set(similar_T.topk(min(stage.min_segments - 1, len(similar_T)), largest=False).indices.tolist())
    kept = []
    for start, end in spans(cuts, len(x_TPD)):
        x, unit = x_TPD[start:end], F.normalize(x_TPD[start:end], dim=-1)
        place_TA = diverse(x, unit, attention_TP[start:end], num_selected, stage.selection)
        selected_TP = torch.zeros(x.shape[:2], dtype=torch.bool).scatter_(1, place_TA, True)
        root_TP, mean_TPD = trees(x, unit, selected_TP, stage.tau, num_selected + num_merged)
        share = num_merged * len(x) / max(1, int(root_TP.sum()))
        for t in range(len(x)):
            root = root_TP[t].nonzero()[:, 0]
            if share < 1 and len(root):
                number = math.ceil(len(root) * share)
                root = root[clustered(mean_TPD[t, root], number, min(number, stage.num_neighbours))]
            kept += [(start + t) * per_frame + place_TA[t], (start + t) * per_frame + root]
    return torch.cat(kept).sort().values


def diverse(x: Tensor, unit: Tensor, attention: Tensor, number: int, selection: str) -> Tensor:
    """Max-min choice in all frames of a segment; every step gathers the rows of all tokens chosen so far."""
    weight = attention * 1e6
    if selection == "attn_div_v2":
        weight = weight * (x @ x.mean(1).T).mean(-1)
    cost = (1 - unit @ unit.transpose(1, 2)) * weight[:, None, :]
    chosen = cost.topk(2, 1, largest=False).values[:, 1].argmax(-1, keepdim=True)
    while chosen.shape[1] < number:
        least = cost.gather(1, chosen[..., None].expand(-1, -1, cost.shape[2])).min(1).values
        chosen = torch.cat([chosen, least.scatter(1, chosen, -torch.inf).argmax(-1, keepdim=True)], 1)
    return chosen.sort(-1).values


def trees(x: Tensor, unit: Tensor, selected_TP: Tensor, tau: float, budget: int) -> tuple[Tensor, Tensor]:
    """Roots of a segment and the means of their trees, frame by frame from the last to the first."""
    num_frames, per_frame = selected_TP.shape
    match, parent = torch.full((num_frames, per_frame), -1.0), torch.zeros(num_frames, per_frame, dtype=torch.long)
    if num_frames > 1:
        taken = selected_TP[1:, :, None] | selected_TP[:-1, None, :]
        match[1:], parent[1:] = (unit[1:] @ unit[:-1].transpose(1, 2)).masked_fill(taken, -1).max(-1)
    limit, leave = tau, num_frames * (per_frame - budget)
    if (match <= tau).sum().item() < budget * num_frames:
        limit = max(match.flatten().sort(descending=True).values[leave - 1].item(), -1 + 1e-6) if leave else math.inf
    joins, total, count = match > limit, x.clone(), torch.ones(num_frames, per_frame)
    for t in range(num_frames - 1, 0, -1):
        target = parent[t, joins[t]]
        total[t - 1].index_add_(0, target, total[t, joins[t]])
        count[t - 1].index_add_(0, target, count[t, joins[t]])
    return ~joins & ~selected_TP, total / count[..., None]


def prunevid(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    x_TPD, per_frame, kept = frames_of(video), video.grid.per_frame, []
    frame_TD = x_TPD.mean(1)
    distance_TT = torch.cdist(frame_TD, frame_TD) / math.sqrt(frame_TD.shape[1])
    centre_C = density_scores(distance_TT, stage.num_neighbours).topk(int(len(x_TPD) * stage.segment_share)).indices
    cluster_T = distance_TT[:, centre_C].argmin(1)
    cluster_T[centre_C] = torch.arange(len(centre_C))
    segment = refine([label.item() for label in cluster_T])

    def merged(x: Tensor, place: Tensor, first: int) -> None:
        for t, x_MD in enumerate(x):
            centre = torch.arange(len(place))
            if len(place) > stage.smallest:
                centre = clustered(x_MD, int(len(place) * stage.cluster_share), stage.num_neighbours)
            kept.append((first + t) * per_frame + place[centre])

    for start, end in spans({t for t in range(len(segment) - 1) if segment[t] != segment[t + 1]}, len(segment)):
        frames, still_P = end - start, torch.zeros(per_frame, dtype=torch.bool)
        if frames > 1:
            unit = F.normalize(x_TPD[start:end], dim=-1).transpose(0, 1)
            pair_PTT = unit @ unit.transpose(1, 2)
            still_P = (pair_PTT.sum((1, 2)) - frames) / (frames * (frames - 1)) > stage.tau
        merged(x_TPD[start:end].mean(0)[None, still_P], still_P.nonzero()[:, 0], start)
        merged(x_TPD[start:end, ~still_P], (~still_P).nonzero()[:, 0], start)
    return torch.cat(kept).sort().values


def stop(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    """The sink score first, then the base with it."""
    attention_TP = salience_of(video)
    strength, num_slots = stage.salience, stage.num_slots
    if stage.rescale:
        strength *= attention_TP.mean().item() * 729
        num_slots = round(num_slots * attention_TP.shape[1] / 196)
    raised_P = attention_TP.mean(0) ** stage.power
    sink_P = (raised_P - raised_P.min()) / (raised_P.max() - raised_P.min() + 1e-12)
    sink = SinkPenalty(sink_P, strength, stage.temporal, stage.density, num_slots)
    base = {**SELECTING, **RIVALS}[type(stage.base).__name__]
    return base(replace(video, sink=sink), budget, stage.base)


# --- inside the ViT ------------------------------------------------------------------------------------------------


def tome(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    """The release's step, repeated until each frame has its share; frames with one token more apart."""
    grid, group_GW = video.grid, video.group_GW
    assert video.keys_GD is not None and group_GW is not None
    x_TPD = video.x_ND[group_GW].float().view(grid.t, grid.per_frame, -1)
    key_TPC = video.keys_GD.float().view(grid.t, grid.per_frame, -1)
    share, more = divmod(budget.num_kept, grid.t)
    kept = []
    for first, last, target in ((0, more, share + 1), (more, grid.t, share)):
        if first < last:
            place = halved(x_TPD[first:last], key_TPC[first:last], target)
            kept.append((place + grid.per_frame * torch.arange(first, last)[:, None]).flatten())
    return torch.cat(kept).sort().values


def halved(x: Tensor, key: Tensor, target: int) -> Tensor:
    place, size = torch.arange(x.shape[1]).repeat(len(x), 1)[..., None], torch.ones(*x.shape[:2], 1)
    while (left := x.shape[1]) > target:
        number, unit = min(left - target, left // 2), F.normalize(key, dim=-1)
        best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
        order = best.sort(dim=-1, descending=True, stable=True).indices[..., None]
        source, stays = order[:, :number], order[:, number:]
        to = partner[..., None].gather(1, source)

        def rows(y: Tensor, index: Tensor) -> Tensor:
            return y.gather(1, index.expand(-1, -1, y.shape[2]))

        def joined(y: Tensor, source: Tensor = source, stays: Tensor = stays, to: Tensor = to) -> Tensor:
            even, odd = y[:, ::2], y[:, 1::2]
            odd = odd.scatter_reduce(1, to.expand(-1, -1, y.shape[2]), rows(even, source), "sum")
            return torch.cat([rows(even, stays), odd], 1)

        total = joined(size)
        x, key, size = joined(x * size) / total, joined(key * size) / total, total
        place = torch.cat([rows(place[:, ::2], stays), place[:, 1::2]], 1)
        again = place.argsort(1)  # back to the order of the frame, as our reconstruction has it
        x, key, size, place = (rows(y, again) for y in (x, key, size, place))
    return place[..., 0]


def earlytom(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    """Frame after frame; every cosine is asked for when it is needed."""
    grid, per_frame, kept = video.grid, video.grid.per_frame, []
    x = list(video.x_ND.float().view(grid.t, -1, video.x_ND.shape[-1]))
    attention, own = list(salience_of(video)), list(range(grid.t))
    frames: list[tuple[Tensor, Tensor, int]] = []
    for start, end in segments(x, stage):
        frames.append((x[start], attention[start], own[start]))
        frames += between(x, attention, start, end, stage.compat == "official")
        frames += [(x[end], attention[end], own[end])] * (end > start)
    share = min(budget.retention_ratio * grid.t / len(frames), 1.0)
    number, windows = math.ceil(per_frame * share), max(1, round(per_frame * share))
    for start, end in segments([frame for frame, _, _ in frames], stage):
        for t in range(start, end + 1):
            _, attention_P, first = frames[t]
            place = attention_P.topk(number).indices
            if start < t < end:
                parts = torch.tensor_split(attention_P, windows)
                starts = [0]
                for part in parts[:-1]:
                    starts.append(starts[-1] + len(part))
                place = torch.stack([part.argmax() + at for part, at in zip(parts, starts, strict=True)])
            kept.append(first * per_frame + place)
    return torch.cat(kept).sort().values


def alike(a_UD: Tensor, b_UD: Tensor) -> float:
    return F.cosine_similarity(a_UD, b_UD, dim=-1).mean().item()


def segments(x: list[Tensor], stage: Any) -> list[tuple[int, int]]:
    found, start, running = [], 0, 1.0
    for t in range(1, len(x)):
        running = stage.smoothing * alike(x[start], x[t]) + (1 - stage.smoothing) * running
        if running < stage.tau or t - start + 1 >= stage.limit:
            found.append((start, t - 1))
            start, running = t, 1.0
    return [*found, (start, len(x) - 1)]


def between(x: list[Tensor], attention: list[Tensor], start: int, end: int, drops: bool) -> list[Any]:
    """What becomes of the frames inside a segment."""
    middle = list(range(start + 1, end))
    if len(middle) < 2:
        return [(x[t], attention[t], t) for t in middle]
    least, frames, j = alike(x[start], x[end]), [], 0
    cosine = [alike(x[t], x[t + 1]) for t in middle[:-1]]
    while j < len(cosine):
        t, last = middle[j], j == len(cosine) - 1
        if cosine[j] > least and (last or cosine[j] > cosine[j + 1]):
            w = (1.0 if drops else 0.5) if last else cosine[j] / (cosine[j] + cosine[j + 1])
            mixed = (w * y[t] + (1 - w) * y[t + 1] for y in (x, attention))
            frames.append((*mixed, t if w >= 0.5 else t + 1))
            j += 2
        else:
            frames.append((x[t], attention[t], t))
            j += 1
    if j == len(cosine) and not drops:
        frames.append((x[middle[-1]], attention[middle[-1]], middle[-1]))
    return frames


# --- inside the LLM ------------------------------------------------------------------------------------------------


def nearest_kept(video: VideoTokens, budget: Budget) -> tuple[Tensor, Tensor, Tensor]:
    """Kept tokens, the others, and for each of those the kept one most like it, from a matrix of all pairs."""
    assert video.salience_G is not None
    kept = video.salience_G.topk(budget.num_kept).indices.sort().values
    others = torch.ones(video.num_groups, dtype=torch.bool)
    others[kept] = False
    rest, unit = others.nonzero()[:, 0], F.normalize(video.x_ND.float(), dim=-1)
    return kept, rest, (unit[rest] @ unit[kept].T).argmax(1)


def holitom_inner(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    kept, rest, nearest = nearest_kept(video, budget)
    x = video.x_ND.float().clone()
    for source, target in zip(rest.tolist(), kept[nearest].tolist(), strict=True):
        x[target] = (x[target] + x[source]) / 2
    _ = x[kept]
    return kept


def tango_inner(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    kept, rest, nearest = nearest_kept(video, budget)
    own = video.x_ND[kept].float()
    total = own.clone().index_add_(0, nearest, video.x_ND[rest].float())
    count = torch.ones(len(kept)).index_add_(0, nearest, torch.ones(len(rest)))
    _ = stage.beta * own + (1 - stage.beta) * total / count[:, None]
    return kept


def framefusion_call(video: VideoTokens, budget: Budget, stage: Any) -> Tensor:
    """Sorts the tokens by place, merges run by run, and prunes by attention where too many would be left."""
    assert video.num_before is None, "the first call of a row"
    place = video.cell_G % video.grid.per_frame
    order = place.argsort(stable=True)
    x = video.x_ND[order].float()
    similar = F.pad(F.cosine_similarity(x[1:], x[:-1], dim=-1), (1, 0), value=-2)
    similar[1:][place[order][1:] != place[order][:-1]] = -2
    most = torch.zeros_like(similar, dtype=torch.bool)
    most[similar.topk(len(x) - budget.num_kept).indices] = True

    def merged(joins: Tensor) -> Tensor:
        starts = [*(~joins).nonzero()[:, 0].tolist(), len(x)]
        for start, end in pairwise(starts):
            if end - start > 1:
                x[start] = x[start:end].mean(0)
        return order[~joins].sort().values

    left = merged(most & (similar >= stage.method.threshold))
    if len(left) <= max(budget.num_kept, stage._most(budget.num_kept)):
        return left
    if not stage.layer:
        left = merged(most & (similar > -2))
        return left[((torch.arange(budget.num_kept) + 0.5) * len(left) / budget.num_kept).long()]
    assert video.salience_G is not None
    return video.salience_G.topk(budget.num_kept).indices.sort().values


RIVALS: dict[str, Rival] = {
    "FlashVID": flashvid, "PruneVid": prunevid, "SToP": stop, "ToMe": tome, "EarlyTom": earlytom,
    "HoliTomInner": holitom_inner, "TangoInner": tango_inner, "Call": framefusion_call,
}  # fmt: skip
