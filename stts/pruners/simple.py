"""The pruners that look at nothing: `none`, `random`, `uniform`. Floors that any method has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from stts.pruners import ops
from stts.pruners.base import PerVideo, Stage
from stts.tokens import Budget, Kept, VideoTokens


@dataclass(frozen=True)
class Dense:
    """Keep everything: no stage, so the host model runs its stock code."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        return ()


@dataclass(frozen=True)
class Uniform(PerVideo):
    """Keep groups floor((i + 0.5) * N / K), i = 0..K-1: evenly spread over space and time."""

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        return Kept(index_K=ops.evenly_spaced(video.num_groups, budget.num_kept, video.cell_G.device))


@dataclass(frozen=True)
class Random(PerVideo):
    """Keep a uniformly random subset, the same for a given `uid`, seed and count on every device and rank."""

    seed: int = 0

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        digest = hashlib.sha256(f"{self.seed}:{video.uid}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        order_G = torch.randperm(video.num_groups, generator=generator)  # drawn on the CPU: equal on every device
        return Kept(index_K=order_G[: budget.num_kept].sort().values.to(video.cell_G.device))
