"""Lines for people who watch a run."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def print_rank_zero(text: str) -> None:
    """Print one line on rank 0, at once: a log that is read while the run goes on must not wait in a buffer."""
    print(text, flush=True)
