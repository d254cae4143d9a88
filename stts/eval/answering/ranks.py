"""Which part of the questions this process answers, from the variables that torchrun and SLURM launchers set.

Ranks never talk to each other: each writes its own file, and rank 0 reads them all. A slow or dead rank cannot hang the
others in a collective."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Self:
        """RANK, WORLD_SIZE and LOCAL_RANK; one process where they are not set. ValueError for what is no rank."""
        words = [env.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]
        try:
            rank, world_size, local_rank = map(int, words)
        except ValueError as error:
            raise ValueError(
                f"RANK, WORLD_SIZE, LOCAL_RANK are {words}, expected integers; start with torchrun"
            ) from error
        if not 0 <= rank < world_size or local_rank < 0:
            raise ValueError(f"RANK={rank} must be in [0, WORLD_SIZE={world_size}); start with torchrun, or unset both")
        return cls(rank, world_size, local_rank)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self) -> torch.device:
        """The GPU of this rank, else the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())
