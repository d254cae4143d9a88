"""What STTS and its training-free relatives share: window features, the key bias, the temporal loss, their place.

Shape suffixes beside those of `stts.tokens`: W = patches per window, R = ranges over which scores are rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import HostInfo, PerVideo
from stts.tokens import Site, VideoTokens


def gather_windows(x_ND: Tensor, group_GW: Tensor) -> Tensor:
    """(G, W, D) rows of `x_ND` per window; zeros where `group_GW` is -1 (outside the grid)."""
    return x_ND[group_GW.clamp_min(0)].masked_fill_((group_GW < 0)[..., None], 0)  # in place: a longer x is a copy


def window_features(x_ND: Tensor, group_GW: Tensor, *, missing_is_first: bool = False) -> Tensor:
    """(G, E) fp32: the W patches of each window one behind the other, L2-normalised.

    Slots outside the grid are zeros, so they add nothing to a cosine; with `missing_is_first` they repeat row 0 of
    `x_ND`, as the STTS release does. fp32, because in bf16 near-identical frames round to equal cosines."""
    return F.normalize(_windows(x_ND, group_GW, missing_is_first), dim=-1)


def _windows(x_ND: Tensor, group_GW: Tensor, missing_is_first: bool) -> Tensor:
    x_GWD = x_ND[group_GW.clamp_min(0)] if missing_is_first else gather_windows(x_ND, group_GW)
    return x_GWD.flatten(1).float()


def temporal_target(feature_GE: Tensor, previous_G: Tensor) -> Tensor:
    """(G,) 1 - cosine with the group at the same place one frame earlier, in [0, 2]; 0 = an exact repeat.

    `previous_G` int64 is that group's number, -1 where there is none (target 1: nothing like it came before)."""
    similarity_G = (feature_GE * feature_GE[previous_G.clamp_min(0)]).sum(-1)
    return 1 - similarity_G * (previous_G >= 0)


def window_change(x_ND: Tensor, group_GW: Tensor, previous_G: Tensor, *, missing_is_first: bool = False) -> Tensor:
    """`temporal_target` of `window_features`, without gradient and without a copy of unit length."""
    x_GE = _windows(x_ND.detach(), group_GW, missing_is_first)
    return 1 - ops.similarity_to(x_GE, previous_G.clamp_min(0)) * (previous_G >= 0)


def temporal_loss(scores_G: Tensor, target_G: Tensor, counted_G: Tensor) -> Tensor:
    """Mean of (s - target)^2 over the groups where bool `counted_G` holds.

    Exactly 0, with zero rather than missing gradients, when none is counted: every rank then takes part in the same
    collectives."""
    squared_G = torch.where(counted_G, (scores_G - target_G).square(), 0.0)
    return squared_G.sum() / counted_G.sum().clamp_min(1)


def rescale(scores_G: Tensor, range_G: Tensor, num_ranges: int, floor: float) -> Tensor:
    """Stretch the scores of each range to [floor, 1], min and max staying in the graph.

        a' = floor + (a - lo) (1 - floor) / (hi - lo + 1e-6),  lo and hi over the groups with the same `range_G`

    Equal scores all give `floor`: a constant key bias, which softmax ignores."""
    low_R = scores_G.new_full((num_ranges,), float("inf")).scatter_reduce(0, range_G, scores_G, "amin")
    high_R = scores_G.new_full((num_ranges,), float("-inf")).scatter_reduce(0, range_G, scores_G, "amax")
    low_G, high_G = low_R[range_G], high_R[range_G]
    return floor + (scores_G - low_G) * (1 - floor) / (high_G - low_G + 1e-6)


def key_bias(weight_G: Tensor, group_GW: Tensor, num_patches: int) -> Tensor:
    """(N,) fp32 log of each patch's weight; `weight_G` must be positive.

    A patch in several windows takes the largest of their weights, a patch in none gets bias 0."""
    row_GW = torch.where(group_GW < 0, num_patches, group_GW)
    # Weights are positive, so 0 marks a patch that no window reads and never ties with a real maximum.
    weight_N = weight_G.new_zeros(num_patches + 1).scatter_reduce(
        0, row_GW.flatten(), weight_G[:, None].expand_as(row_GW).flatten(), "amax"
    )[:num_patches]
    return torch.where(weight_N > 0, weight_N, 1.0).log()


@dataclass(frozen=True, kw_only=True)
class AtPruneBlock(PerVideo):
    """A method inside the tower that decides and drops behind block `prune_block` + 1, where STTS drops."""

    prune_block: int = 3

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """At the same place as STTS; ValueError for a `prune_block` that the tower does not allow."""
        pruner = cls(**options)
        check_prune_block(host, pruner.prune_block)
        return pruner

    @property
    def site(self) -> Site:  # type: ignore[override]  # a field decides, so it cannot be a class variable
        return Site("vit", layer=self.prune_block + 1, drop_after=self.prune_block + 1)

    def need_windows(self, video: VideoTokens) -> Tensor:
        """The patches of every group; ValueError where some are missing."""
        num_groups = video.grid.num_groups
        if video.group_GW is None or len(video.group_GW) != num_groups:
            raise ValueError(f"{type(self).__name__} needs group_GW with {num_groups} rows; use it at a vit site")
        ops.need_full_grid(video)
        return video.group_GW


def check_prune_block(host: HostInfo, prune_block: int) -> None:
    """ValueError unless blocks remain after the drop (k <= depth - 3) and no feature is tapped before it."""
    largest = min(host.vit_depth - 3, host.lowest_tap - 2)
    if not 0 <= prune_block <= largest:
        raise ValueError(
            f"prune_block={prune_block} does not fit the tower of {host.family!r} ({host.vit_depth} blocks, lowest "
            f"tapped block {host.lowest_tap}); expected 0 to {largest}: set prune_block={largest} or lower"
        )
