"""STTS without learning: `random-vit`, `easy` and `heuristic` decide on patch embeddings, before the first block.

Shape suffixes beside those of `stts.tokens`: W = patches per group, Q = tries.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners.base import HostInfo
from stts.pruners.simple import Random
from stts.pruners.temporal import AtPruneBlock, window_features
from stts.tokens import Budget, Grid, Kept, Site, VideoTokens


@dataclass(frozen=True, kw_only=True)
class InVit(AtPruneBlock):
    """A method that decides before block 0 and drops after block `prune_block` + 1, so that it costs what STTS costs.

    **Differs** from the baselines of the STTS release (arXiv 2603.18004), which drop one block earlier and have another
    budget: equal tokens are equal tower cost here."""

    paper: ClassVar[str] = "2603.18004"
    patches_per_group: int = 9
    """For `flops` only."""

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """Sized for this host; ValueError for a `prune_block` that the tower does not allow."""
        return super().for_host(host, **{"patches_per_group": host.patches_per_group, **options})

    @property
    def site(self) -> Site:  # type: ignore[override]  # a field decides, so it cannot be a class variable
        return Site("vit", layer=-1, drop_after=self.prune_block + 1)


@dataclass(frozen=True, kw_only=True)
class RandomVit(InVit):
    """Keep a uniformly random subset of groups, the first frame not favoured; the same for equal `uid` and seed."""

    seed: int = 0

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        return Random(seed=self.seed).prune(video, budget)


@dataclass(frozen=True, kw_only=True)
class _Similar(InVit):
    """Drop the groups most similar to something earlier; frames that changed as a whole are exempt.

    A frame with mean similarity below tau is exempt, and so is frame 0. If the budget needs exempt groups, tau falls by
    `tau_step` and everything starts again, `num_tries` times in all; what is still missing then comes from the exempt
    frames, most similar first, and from frame 0 last.

    **Differs** from the release, which fails on an index shape, and keeps the drops of earlier tries."""

    tau: float = 0.85
    tau_step: float = 0.05
    num_tries: int = 5

    @abstractmethod
    def similarity(self, feature_TPE: Tensor, tau_Q: Tensor) -> Tensor:
        """(Q, T, P) similarity of each group with its reference, for every tau; frame 0 is not read."""

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        grid = video.grid
        feature_TPE = window_features(video.x_ND, self.need_windows(video)).view(grid.t, grid.per_frame, -1)
        # All tries at once and the first that fits picked on the device: no host synchronisation.
        tau_Q = self.tau - self.tau_step * torch.arange(self.num_tries, device=video.x_ND.device)
        similarity_QTP = self.similarity(feature_TPE, tau_Q)
        exempt_QT = similarity_QTP.mean(-1) < tau_Q[:, None]
        exempt_QT[:, 0] = True
        fits_Q = (~exempt_QT).sum(-1) * grid.per_frame >= grid.num_groups - budget.num_kept
        fits_Q[-1] = True
        chosen = fits_Q.long().argmax()[None]
        similarity_G = similarity_QTP.index_select(0, chosen).flatten()
        last_T = exempt_QT.index_select(0, chosen)[0].long()  # 0: dropped first, 1: exempt, 2: frame 0
        last_T[0] = 2
        kept_first_G = torch.sort(similarity_G, stable=True).indices
        last_G = last_T.repeat_interleave(grid.per_frame, output_size=grid.num_groups)
        kept_first_G = kept_first_G[torch.sort(last_G[kept_first_G], descending=True, stable=True).indices]
        return Kept(index_K=kept_first_G[: budget.num_kept].sort().values, scores_G=-similarity_G)


@dataclass(frozen=True, kw_only=True)
class Easy(_Similar):
    """Drop what repeats the previous frame: similarity = window cosine with the same place one frame earlier.

    Baseline of arXiv 2603.18004 (`easy`)."""

    def similarity(self, feature_TPE: Tensor, tau_Q: Tensor) -> Tensor:
        similarity_TP = F.pad((feature_TPE[1:] * feature_TPE[:-1]).sum(-1), (0, 0, 1, 0), value=1.0)
        return similarity_TP.expand(len(tau_Q), -1, -1)

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 4 * grid.num_groups * self.patches_per_group * width  # one norm and one dot product per patch


@dataclass(frozen=True, kw_only=True)
class Heuristic(_Similar):
    """Drop what repeats a reference that follows the scene, place by place.

    Baseline of arXiv 2603.18004 (`heuristic`): the reference starts at frame 0; a frame with mean similarity below tau
    becomes the reference everywhere, otherwise only places below tau move theirs to the current frame."""

    def similarity(self, feature_TPE: Tensor, tau_Q: Tensor) -> Tensor:
        num_frames, num_places, _ = feature_TPE.shape
        place_P = torch.arange(num_places, device=feature_TPE.device)
        reference_QP = torch.zeros(len(tau_Q), num_places, dtype=torch.long, device=feature_TPE.device)
        rows = [torch.ones_like(reference_QP, dtype=feature_TPE.dtype)]
        for t in range(1, num_frames):  # a recurrence: each reference depends on the comparison before it
            similarity_QP = (feature_TPE[t] * feature_TPE[reference_QP, place_P]).sum(-1)
            scene_Q1 = similarity_QP.mean(-1, keepdim=True) < tau_Q[:, None]
            reference_QP = torch.where(scene_Q1 | (similarity_QP < tau_Q[:, None]), t, reference_QP)
            rows.append(similarity_QP)
        return torch.stack(rows, 1)

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 2 * (1 + self.num_tries) * grid.num_groups * self.patches_per_group * width  # a norm, a dot per try
