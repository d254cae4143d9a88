"""STTS: a scorer inside the ViT learns which groups of patches a video can lose (arXiv 2603.18004).

Shape suffixes beside those of `stts.tokens`: W = patches per group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stts.pruners import temporal
from stts.pruners.base import HostInfo, Newlines, Positions, Stage, check_finite
from stts.pruners.scorer import Scorer
from stts.pruners.teacher import Teacher, make_teacher
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens, Watch

RescaleScope = Literal["row", "frame", "video"]


class STTS(nn.Module):
    """Keep the groups a small network scores highest: taught by what changes between frames and by the answer loss.

    arXiv 2603.18004 and `olmo/nn/temporal_image_vit.py`, `temporal_vision_backbone.py` of allenai/molmo2. On the output
    of block k = `prune_block`:

        s = Scorer([pooled group one frame earlier ; pooled group])            in (0, 1), high = keep
        a' = floor + (s - lo)(1 - floor)/(hi - lo + 1e-6),  key bias = log a'  blocks k+1 .. drop_after, on all patches
        temporal = mean (s - (1 - cos(e_t, e_t-1)))^2                          e: patches of the group, concatenated

    The first frame of a video is kept whole, has bias 0 and is left out of the loss; the other places go to the highest
    scores of the whole video. A video whose budget is all its groups has bias 0 and no share in the loss. The choice
    has no gradient: the answer reaches the scorer through the bias (and through `straight_through`).

    **Differs** from the release. Undone by `compat="official"`, which ignores `detach_target` and `clamp_target`: no
    look across the border between videos, in score or loss (a video must not depend on its neighbours in the batch);
    the loss target is detached (else the tower lowers the loss by changing its features) and clamped to [0, 1] (a score
    cannot reach 2); windows at the grid's edge average and attend their own patches only. Always: budget and ties, see
    `budget.plan` and `choose`; the pooling starts with the release's gain at every width, see `WindowPooling`; where
    windows overlap, scores are rescaled over a row of *cells* and a shared patch takes its largest weight (for windows
    side by side that is the release's range over a row of patches).
    """

    paper: ClassVar[str] = "2603.18004"
    signals: frozenset[Signal] = frozenset()
    count_known: bool = True
    positions: Positions = "compact"
    newlines: Newlines = "all"

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        num_heads: int,
        *,
        prune_block: int = 3,
        drop_after: int | None = None,
        rescale_scope: RescaleScope = "row",
        rescale_min: float = math.exp(-2),
        detach_target: bool = True,
        clamp_target: bool = True,
        straight_through: bool = False,
        gumbel: float = 0.0,
        answer_gradient: bool = True,
        min_groups_per_frame: int = 0,
        patches_per_group: int = 9,
        teacher: Mapping[str, Any] | None = None,
        compat: Literal["official"] | None = None,
    ) -> None:
        """`dim`, `mlp_dim`, `num_heads`: width of the tower, hidden width of the scorer, heads of its pooling.

        prune_block: decide on the output of this block. drop_after: last block that runs on every patch, with the bias
        (default prune_block + 1; later ones give the scorer more gradient, the last block is "soft only").
        rescale_scope: scores that share one range; `video` leaves the first frame out. rescale_min: smallest weight.
        straight_through: also scale kept groups by 1 + s - stop_gradient(s). gumbel: in training choose the highest of
        logit(s) + gumbel * Gumbel noise, so that groups outside the best are tried; 0: off.
        answer_gradient: False keeps the answer loss from the scorer, which then learns from the temporal loss alone.
        min_groups_per_frame: kept in every frame as far as the budget goes. patches_per_group: for `flops` only.
        teacher: what passes at ratio 1 teach the scorer in training: by default the answer's gradient says which groups
        to keep, as the loss `teacher` (settings: `stts.pruners.teacher.Teacher`); None: nothing.
        """
        super().__init__()
        if rescale_scope not in ("row", "frame", "video"):
            raise ValueError(f"rescale_scope={rescale_scope!r} is unknown; expected 'row', 'frame' or 'video'")
        if not 0 < rescale_min < 1:
            raise ValueError(f"rescale_min={rescale_min} must be in (0, 1): its logarithm is the strongest bias")
        if min_groups_per_frame < 0:
            raise ValueError(f"min_groups_per_frame={min_groups_per_frame} must be 0 (off) or more")
        if gumbel < 0:
            raise ValueError(f"gumbel={gumbel} must be 0 (off) or more: the noise added to logits")
        if straight_through and not answer_gradient:
            raise ValueError("straight_through=True gives the scorer the gradient that answer_gradient=False withholds")
        if compat not in (None, "official"):
            raise ValueError(f"compat={compat!r} is unknown; expected None or 'official'")
        self.site = Site("vit", layer=prune_block, drop_after=prune_block + 1 if drop_after is None else drop_after)
        if self.site.drop_after == prune_block:
            raise ValueError(f"drop_after={drop_after} leaves no block for the bias; use {prune_block + 1} or more")
        self.rescale_scope = rescale_scope
        self.rescale_min = rescale_min
        self.detach_target = detach_target and compat is None
        self.clamp_target = clamp_target and compat is None
        self.straight_through = straight_through
        self.gumbel = gumbel
        self.answer_gradient = answer_gradient
        self.min_groups_per_frame = min_groups_per_frame
        self.patches_per_group = patches_per_group
        self.mlp_dim = mlp_dim
        self.teacher: Teacher | None = make_teacher(teacher)
        self.compat = compat
        self.scorer = Scorer(dim, mlp_dim, num_heads, attend_missing=compat == "official")

    @classmethod
    def for_host(cls, host: HostInfo, *, prune_block: int = 3, soft_only: bool = False, **options: Any) -> STTS:
        """Sized for this host. `soft_only`: the bias stays on to the last block and nothing leaves inside the tower.

        ValueError for a `prune_block` that the tower does not allow."""
        if soft_only:
            options["drop_after"] = host.vit_depth - 1
        else:
            temporal.check_prune_block(host, prune_block)
        made = make_teacher(options.get("teacher"))
        if made is not None and made.layer is not None and not 0 <= made.layer < host.llm_layers:
            raise ValueError(f"teacher: layer={made.layer} is outside [0, {host.llm_layers - 1}] of this LLM")
        options.setdefault("mlp_dim", host.vit_mlp)
        options.setdefault("patches_per_group", host.patches_per_group)
        return cls(host.vit_width, num_heads=host.vit_heads, prune_block=prune_block, **options)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (self,)

    def forward(self, videos: Sequence[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]:
        """One scorer call for all videos of the batch."""
        if not videos:
            return []
        check_finite(videos)
        batch = _flatten(videos, budgets, across_videos=self.compat == "official")
        scores_G = self.scorer(batch.x_ND, batch.group_GW, batch.previous_G)
        grids = [video.grid for video in videos]
        num_patches = [len(video.x_ND) for video in videos]
        num_groups = [grid.num_groups for grid in grids]
        indices, weights = self.settle(torch.split(scores_G, num_groups), grids, budgets)
        losses = {"temporal": self._loss(batch, scores_G)} if self.training else {}

        biases: Sequence[Tensor | None] = [None] * len(videos)
        gates: Sequence[Tensor | None] = [None] * len(videos)
        if weights is not None and not self.answer_gradient:
            weights = [weight.detach() for weight in weights]
        if weights is not None:  # without a bias the tower stays bit-identical to the dense one
            bias_N = temporal.key_bias(torch.cat(weights), batch.group_GW, len(batch.x_ND))
            biases = torch.split(bias_N, num_patches)
            if self.straight_through:
                free_G = batch.prunable_G & ~batch.first_G
                gate_G = torch.where(free_G, 1 + (scores_G - scores_G.detach()), 1.0)
                gates = torch.split(gate_G, num_groups)
        watches = self._watches(batch, torch.split(scores_G, num_groups), grids, budgets)
        parts = zip(indices, biases, gates, torch.split(scores_G.detach(), num_groups), watches, strict=True)
        return [
            Kept(index_K, None, bias, gate, score, losses if number == 0 else {}, watch)
            for number, (index_K, bias, gate, score, watch) in enumerate(parts)
        ]

    def score(self, videos: Sequence[VideoTokens]) -> list[Tensor]:
        """(G,) fp32 per video. Needs one frame of context only: a long video can be scored in pieces that begin with
        the last frame of the piece before (whose scores are then dropped); `settle` needs all scores of the video."""
        full = [Budget(video.grid.num_groups, 1.0) for video in videos]
        batch = _flatten(videos, full, across_videos=self.compat == "official")
        scores_G: Tensor = self.scorer(batch.x_ND, batch.group_GW, batch.previous_G)
        return list(torch.split(scores_G, [video.grid.num_groups for video in videos]))

    def settle(
        self, scores: Sequence[Tensor], grids: Sequence[Grid], budgets: Sequence[Budget]
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Kept groups of every video, int64 (K,), and the weights of its groups, (G,) in (0, 1], whose logarithm is the
        key bias; None where no video loses any, except in a step that learns at a ratio below 1: there bias and its
        gradient are 0, but the backward pass goes the same way as on a rank whose videos lose some (ZeRO-3 gathers
        weights along it). `scores` are those of whole videos, also when `score` made them in pieces."""
        scores_G = torch.cat(list(scores))
        ranking_G = scores_G.detach()
        if self.training and self.gumbel:
            noise_G = -torch.empty_like(ranking_G).exponential_().log()
            ranking_G = torch.logit(ranking_G, eps=1e-6) + self.gumbel * noise_G
        indices = choose(ranking_G, grids, budgets, min_groups_per_frame=self.min_groups_per_frame)
        prunable = [budget.num_kept < grid.num_groups for grid, budget in zip(grids, budgets, strict=True)]
        learning = self.training and scores_G.requires_grad and not is_dense(budgets)
        if not any(prunable) and not learning:
            return indices, None
        free, ranges, num_ranges = [], [], 0
        for grid, prune in zip(grids, prunable, strict=True):
            number_G = torch.arange(grid.num_groups, device=scores_G.device)
            free.append(number_G >= (grid.per_frame if prune else grid.num_groups))
            # The first frame is a range of its own in every scope: its weights are never used.
            size = {"row": grid.w, "frame": grid.per_frame}.get(self.rescale_scope)
            ranges.append((number_G // size if size else (number_G >= grid.per_frame).long()) + num_ranges)
            num_ranges += grid.num_groups // size if size else 2
        weight_G = temporal.rescale(scores_G, torch.cat(ranges), num_ranges, self.rescale_min)
        weight_G = torch.where(torch.cat(free), weight_G, 1.0)
        return indices, list(torch.split(weight_G, [grid.num_groups for grid in grids]))

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Pooling attention and MLP of every group; the temporal target, used in training only, is not in it."""
        hidden, slots = self.mlp_dim, self.patches_per_group
        pooling = (4 + 4 * slots) * width**2 + 4 * slots * width
        return grid.num_groups * (pooling + 2 * (2 * width * hidden + hidden * hidden + hidden))

    def _change(self, batch: _Batch, *, with_grad: bool = False) -> Tensor:
        """(G,) fp32: how much every group changed since the frame before, in [0, 2]."""
        first = self.compat == "official"
        with torch.autocast(batch.x_ND.device.type, enabled=False):
            if not with_grad:
                return temporal.window_change(batch.x_ND, batch.group_GW, batch.previous_G, missing_is_first=first)
            feature_GE = temporal.window_features(batch.x_ND, batch.group_GW, missing_is_first=first)
            return temporal.temporal_target(feature_GE, batch.previous_G)

    def _watches(
        self, batch: _Batch, scores: Sequence[Tensor], grids: Sequence[Grid], budgets: Sequence[Budget]
    ) -> list[Watch | None]:
        """The teacher's look at every video, in dense passes."""
        if self.teacher is None or not self.training or not is_dense(budgets):
            return [None] * len(grids)
        changes = torch.split(self._change(batch).clamp(0, 1), [grid.num_groups for grid in grids])
        return [
            self.teacher.watch(scores_G, change_G, grid.per_frame)
            for scores_G, change_G, grid in zip(scores, changes, grids, strict=True)
        ]

    def _loss(self, batch: _Batch, scores_G: Tensor) -> Tensor:
        target_G = self._change(batch, with_grad=torch.is_grad_enabled() and not self.detach_target)
        if self.clamp_target:
            target_G = target_G.clamp(0, 1)
        return temporal.temporal_loss(scores_G, target_G, batch.prunable_G & (batch.previous_G >= 0))


def is_dense(budgets: Sequence[Budget]) -> bool:
    """Whether the pass was to keep everything, on every rank; a video of one frame keeps everything in any pass."""
    return all(budget.retention_ratio >= 1 for budget in budgets)


def choose(
    scores_G: Tensor, grids: Sequence[Grid], budgets: Sequence[Budget], *, min_groups_per_frame: int = 0
) -> list[Tensor]:
    """The kept groups of every video, int64 (K,) and increasing, from the scores of all videos one behind the other.

    Order of choice: the first frame of the video, then the `min_groups_per_frame` best of each frame, then the rest;
    within each of these by score, ties to the earlier group. No host synchronisation."""
    device = scores_G.device
    sizes = [grid.num_groups for grid in grids]
    for budget, size in zip(budgets, sizes, strict=True):
        if not 1 <= budget.num_kept <= size:
            raise ValueError(f"num_kept={budget.num_kept} is outside [1, {size}]; see budget.plan")
    numbers = [torch.arange(size, device=device) for size in sizes]
    place_G = torch.cat([number % grid.per_frame for number, grid in zip(numbers, grids, strict=True)])
    first_G = torch.cat([number < grid.per_frame for number, grid in zip(numbers, grids, strict=True)])
    video_G = torch.cat([torch.full_like(number, video) for video, number in enumerate(numbers)])
    ranked_G = torch.sort(scores_G.detach(), descending=True, stable=True).indices
    turn_G = torch.where(first_G, 0, 2)
    if min_groups_per_frame:
        frame_G = (place_G == 0).cumsum(0)
        by_frame_G = ranked_G[torch.sort(frame_G[ranked_G], stable=True).indices]
        rank_G = torch.empty_like(place_G).scatter(0, by_frame_G, place_G)  # frames are sorted blocks: place = rank
        turn_G = torch.where(~first_G & (rank_G < min_groups_per_frame), 1, turn_G)
    ranked_G = ranked_G[torch.sort((3 * video_G + turn_G)[ranked_G], stable=True).indices]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        part[: budget.num_kept].sort().values - start
        for part, budget, start in zip(torch.split(ranked_G, sizes), budgets, starts, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Batch:
    """All videos one behind the other."""

    x_ND: Tensor
    group_GW: Tensor
    previous_G: Tensor  # number of the group one frame earlier, -1 = none
    first_G: Tensor  # bool, in the first frame of its video
    prunable_G: Tensor  # bool, its video loses groups


def _flatten(videos: Sequence[VideoTokens], budgets: Sequence[Budget], *, across_videos: bool) -> _Batch:
    device = videos[0].x_ND.device
    windows: list[Tensor] = []
    slots = 0
    for video in videos:
        if (
            video.group_GW is None
            or len(video.group_GW) != video.grid.num_groups
            or video.num_groups != len(video.group_GW)
        ):
            shape = None if video.group_GW is None else tuple(video.group_GW.shape)
            raise ValueError(
                f"STTS needs group_GW, the patches of each of the {video.grid.num_groups} groups of {video.grid}, got "
                f"shape {shape} with {video.num_groups} groups present; it must be the first stage, at a vit site"
            )
        slots = max(slots, video.group_GW.shape[1])
    if across_videos and len({video.grid.per_frame for video in videos}) > 1:
        raise ValueError('compat="official" needs frames of one size in the batch; pass one video at a time')

    previous, first = [], []
    num_patches = num_groups = 0
    for video in videos:
        grid, group_GW = video.grid, video.group_GW
        assert group_GW is not None
        shifted_GW = torch.where(group_GW < 0, -1, group_GW + num_patches)
        windows.append(F.pad(shifted_GW, (0, slots - group_GW.shape[1]), value=-1))
        number_G = torch.arange(grid.num_groups, device=device)
        first.append(number_G < grid.per_frame)
        before_G = number_G - grid.per_frame + num_groups
        previous.append(before_G if across_videos else torch.where(first[-1], -1, before_G))
        num_patches += len(video.x_ND)
        num_groups += grid.num_groups
    prunable = [budget.num_kept < video.grid.num_groups for video, budget in zip(videos, budgets, strict=True)]
    return _Batch(
        x_ND=torch.cat([video.x_ND for video in videos]) if len(videos) > 1 else videos[0].x_ND,
        group_GW=torch.cat(windows),
        previous_G=torch.cat(previous).clamp_min(-1),
        first_G=torch.cat(first),
        prunable_G=torch.cat([torch.full_like(f, p) for f, p in zip(first, prunable, strict=True)]),
    )
