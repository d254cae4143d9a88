"""ToMe: groups of patches that look alike are merged inside the ViT (arXiv 2210.09461).

Shape suffixes beside those of `stts.tokens`: B = sequences (frames) side by side, C = width of the metric, W =
patches per group, R = sources of a merge, X = tokens that are not merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.temporal import AtPruneBlock
from stts.tokens import Budget, Grid, Kept, Signal, VideoTokens


class Match(NamedTuple):
    """What one step of bipartite matching does; places in the sequence before it, int64."""

    unmerged_BX: Tensor
    """Tokens of set A that stay, as released: by falling similarity, with a class token in their own order."""
    source_BR: Tensor
    """Tokens of set A that leave, most similar first."""
    target_BR: Tensor
    """The token of set B that each of them joins."""


@dataclass(frozen=True, kw_only=True)
class ToMe(AtPruneBlock):
    """Merge, in each frame, the groups of patches that look most alike; nothing is thrown away.

    One step removes r of n tokens: even places (A) each name the most similar odd place (B) by the cosine of their
    attention keys, and the r most similar of them join it as a size-weighted mean. On the output of block
    `prune_block` + 1, where STTS drops, steps of at most half repeat until every frame has its equal share of the
    budget; patch j of a group joins patch j of the other. Behind it each key counts as often as patches it stands for:

        softmax(q k / sqrt(d) + log s_j)      (proportional attention; `proportional=False` leaves it out)

    arXiv 2210.09461; matching and merging of `tome/merge.py` of facebookresearch/ToMe. **Our reconstruction** as a
    pruner: connectors need whole windows, so groups merge instead of patches, all at one block instead of a few in
    every block, with the mean over heads and patches of keys of that block as metric (before the next step: the mean
    over the groups merged). `match`, `schedule` and `schedule_for_total` are the release's parts.

    **Differs** from the release: survivors stay in the order of the video, so that even and odd places alternate in
    space at every step. Where windows overlap, a patch that a surviving group needs stays as it is."""

    label: ClassVar[str] = "our reconstruction"
    paper: ClassVar[str] = "2210.09461"
    signals: ClassVar[frozenset[Signal]] = frozenset({"keys"})

    proportional: bool = True

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        grid, group_GW = video.grid, self.need_windows(video)
        keys_GD = ops.need(video.keys_GD, "keys", video).detach().float()
        share, more = divmod(budget.num_kept, grid.t)  # earlier frames keep what does not divide
        target_T = [max(1, share + (t < more)) for t in range(grid.t)]
        root_TP = merge_down(keys_GD.view(grid.t, grid.per_frame, -1), target_T)
        root_G = (root_TP + grid.per_frame * torch.arange(grid.t, device=root_TP.device)[:, None]).flatten()
        index_K = (root_G == torch.arange(grid.num_groups, device=root_G.device)).nonzero()[:, 0]
        if len(index_K) > budget.num_kept:  # less than one group a frame: frames evenly spaced
            index_K = index_K[ops.evenly_spaced(len(index_K), budget.num_kept, index_K.device)]
        to_N = destination(root_G, group_GW, len(video.x_ND))
        x_ND, size_N = ops.cluster_mean(video.x_ND, to_N, len(video.x_ND))
        return Kept(
            index_K=index_K,
            x_ND=x_ND.to(video.x_ND.dtype),
            size_N=size_N.clamp_min(1).float() if self.proportional else None,
        )

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Cosines of A with B at the first step and what follows of it, a geometric series; means of the patches."""
        return (grid.t * grid.per_frame**2 * 2 // 3 + 4 * grid.num_groups) * width


# --- the release's parts -------------------------------------------------------------------------------------------


def match(metric_BNC: Tensor, number: int, *, class_token: bool = False) -> Match:
    """One step: of the even places the `number` with the most similar odd place, at most half of all tokens.

    class_token: place 0 is no source, and unmerged tokens keep their order so that it stays first."""
    num_tokens = metric_BNC.shape[1]
    number = max(0, min(number, (num_tokens - class_token) // 2))
    unit_BNC = F.normalize(metric_BNC.float(), dim=-1)
    score_BAB = unit_BNC[:, ::2] @ unit_BNC[:, 1::2].transpose(1, 2)
    if class_token:
        score_BAB[:, 0] = -torch.inf
    best_BA, partner_BA = score_BAB.max(-1)
    order_BA = ops.top(best_BA, best_BA.shape[1])
    source_BR, unmerged_BX = order_BA[:, :number], order_BA[:, number:]
    if class_token:
        unmerged_BX = unmerged_BX.sort(-1).values
    return Match(2 * unmerged_BX, 2 * source_BR, 2 * partner_BA.gather(1, source_BR) + 1)


def merge(x_BND: Tensor, size_BN: Tensor, step: Match) -> tuple[Tensor, Tensor]:
    """Tokens and sizes behind one step: unmerged ones of A, then all of B; size-weighted means, summed in order."""
    (num_rows, num_tokens), device = size_BN.shape, x_BND.device
    to_BN = torch.arange(num_tokens, device=device).expand(num_rows, -1).scatter(1, step.source_BR, step.target_BR)
    joins_BNN = F.one_hot(to_BN, num_tokens).transpose(1, 2).to(x_BND.dtype)
    sum_BND = joins_BNN @ (x_BND * size_BN[..., None])
    total_BN = (joins_BNN @ size_BN[..., None])[..., 0]
    odd_B = torch.arange(1, num_tokens, 2, device=device).expand(num_rows, -1)
    order_BM = torch.cat([step.unmerged_BX, odd_B], 1)
    size_BM = total_BN.gather(1, order_BM)
    x_BMD = sum_BND.gather(1, order_BM[..., None].expand(-1, -1, x_BND.shape[-1]))
    return x_BMD / size_BM[..., None], size_BM


def schedule(rate: int | tuple[int, float] | Sequence[int], num_blocks: int) -> list[int]:
    """Tokens to remove in every block: the same everywhere, a list filled up with 0, or (r, inflection).

    An inflection of f in [-1, 1] goes in a line from trunc(r (1 - f)) in the first block to the mirror image of that
    around r in the last: -1 removes 2 r at first and 0 at the end."""
    if isinstance(rate, int):
        rate = (rate, 0.0)
    if not isinstance(rate, tuple):
        return [*rate, *[0] * (num_blocks - len(rate))]
    number, inflection = int(rate[0]), float(rate[1])
    first = int(number * (1 - inflection))
    last = 2 * number - first
    return [int(first + (last - first) / max(1, num_blocks - 1) * block) for block in range(num_blocks)]


def schedule_for_total(total: int, num_blocks: int, inflection: float = -0.5) -> tuple[int, list[int]]:
    """The integer rate whose schedule removes nearest to `total`, and that schedule with the rest made up for.

    The rest goes to the first block, or to the last for an inflection of 0 or more. As in EarlyTom's port of ToMe."""
    rates = range(total // num_blocks + 3)
    rate = min(rates, key=lambda r: abs(total - sum(schedule((r, inflection), num_blocks))))
    blocks = schedule((rate, inflection), num_blocks)
    blocks[0 if inflection < 0 else -1] += total - sum(blocks)
    return rate, blocks


# --- groups of a video ---------------------------------------------------------------------------------------------


def merge_down(metric_TPC: Tensor, target_T: Sequence[int]) -> Tensor:
    """(T, P) int64 the place that each place of a frame ends in, by steps of at most half down to `target_T` places.

    Targets may differ by one. Places are those of the frame; a survivor ends in itself."""
    num_frames, num_places, _ = metric_TPC.shape
    device = metric_TPC.device
    root_TP = torch.arange(num_places, device=device).repeat(num_frames, 1)
    left_TN, size_TN = root_TP, torch.ones_like(root_TP, dtype=torch.float32)
    metric_TNC = metric_TPC
    while (num_left := left_TN.shape[1]) > min(target_T):
        remove = [min(num_left - target, num_left // 2) for target in target_T]
        step = match(metric_TNC, max(remove))
        real_TR = torch.arange(max(remove), device=device) < torch.tensor(remove, device=device)[:, None]
        source_TR, target_TR = left_TN.gather(1, step.source_BR), left_TN.gather(1, step.target_BR)
        to_TP = torch.arange(num_places, device=device).repeat(num_frames, 1)
        to_TP.scatter_(1, source_TR, torch.where(real_TR, target_TR, source_TR))
        root_TP = to_TP.gather(1, root_TP)
        if max(remove) != min(remove):  # only in the last step
            break
        metric_TNC, size_TN = merge(metric_TNC, size_TN, step)
        stays_TN = torch.ones_like(left_TN, dtype=torch.bool).scatter_(1, step.source_BR, False)
        order_TN = torch.cat([step.unmerged_BX, torch.arange(1, num_left, 2, device=device).expand(num_frames, -1)], 1)
        order_TN = order_TN.argsort(1)  # back to the order of the frame
        metric_TNC = metric_TNC.gather(1, order_TN[..., None].expand_as(metric_TNC))
        size_TN = size_TN.gather(1, order_TN)
        left_TN = left_TN[stays_TN].view(num_frames, -1)
    return root_TP


def destination(root_G: Tensor, group_GW: Tensor, num_patches: int) -> Tensor:
    """(N,) int64 the patch that each patch joins, itself where a surviving group needs it; -1: it is left out.

    A patch joins the one of the same number in the group that its group ended in; the first group that has a patch
    counts."""
    width, device = group_GW.shape[1], group_GW.device
    row_GW = torch.where(group_GW < 0, num_patches, group_GW)
    slot_GW = torch.arange(group_GW.numel(), device=device).view_as(group_GW)
    first_N = slot_GW.new_full((num_patches + 1,), group_GW.numel())
    first_N = first_N.scatter_reduce(0, row_GW.flatten(), slot_GW.flatten(), "amin")[:num_patches]
    held_N = first_N < group_GW.numel()  # Qwen and overlapping windows hold every patch; padding may not
    first_N = first_N.clamp_max(group_GW.numel() - 1)
    to_N = group_GW[root_G[first_N // width], first_N % width]
    survivor_G = root_G == torch.arange(len(root_G), device=device)
    needed_N = torch.zeros(num_patches + 1, dtype=torch.int64, device=device)
    needed_N.scatter_add_(0, row_GW.flatten(), survivor_G.long().repeat_interleave(width))
    itself_N = torch.arange(num_patches, device=device)
    return torch.where(needed_N[:num_patches] > 0, itself_N, torch.where(held_N, to_N, -1))
