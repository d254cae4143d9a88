"""A rank or a host that dies: what the others say before they end."""

from __future__ import annotations

import re

import lightning.pytorch as pl
import torch

_SIGNS = ("closed by peer", "reset by peer", "timed out waiting", "connection refused", "broken pipe")


class RankLost(Exception):
    """Another rank of the run has ended or cannot be reached; the same command goes on from the newest checkpoint."""


def lost_rank(error: RuntimeError, trainer: pl.Trainer) -> RankLost | None:
    """What to say of this error; None where it does not come from the communication between ranks."""
    text = str(error).splitlines()[0] if str(error) else ""
    is_told = isinstance(error, torch.distributed.DistError) or any(sign in text.lower() for sign in _SIGNS)
    if trainer.world_size == 1 or not is_told:
        return None
    reason = re.sub(r"^\[[^]]*\] ", "", text).partition(". ")[0]  # without gloo's source file and its advice
    return RankLost(
        f"rank {trainer.global_rank} of {trainer.world_size} lost another rank in step {trainer.global_step + 1}: "
        f"{reason}; see the output of that rank or host, then start all ranks again with the same command, which goes "
        "on from the newest checkpoint"
    )
