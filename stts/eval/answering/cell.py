"""A cell of a comparison: one method at one ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stts.pruners.base import Positions

DENSE = "dense"
BEFORE = "dense (before fine-tuning)"
Kind = Literal["unpruned", "learned", "in the ViT", "before the LLM", "inside the LLM"]
"""Where a method drops tokens, the deepest place if there are several; "learned" wherever it is."""


@dataclass(frozen=True)
class Cell:
    """One method at one ratio."""

    method: str
    retention_configured: float = 1.0
    reason: str | None = None
    """Why it could not be run; None: it was."""
    kind: Kind = "unpruned"
    label: str = ""
    """What a reader must know wherever the name stands ("our reconstruction")."""
    equal_flops_to: str = ""
    """Title of the cell whose FLOPs this ratio was solved for; "": the ratio is the user's."""

    point: int = 0
    """Place among the run's numbers of frames."""
    num_frames: int | None = None
    parts: int = 1
    """Interleaved parts in which the frames were shown."""
    positions: Positions | Literal[""] = ""
    """Of surviving tokens in the LLM; "": nothing was dropped, or not noted."""

    @property
    def title(self) -> str:
        return f"{self.method} ({self.label})" if self.label else self.method

    @property
    def key(self) -> str:
        further = f" at {self.num_frames} frames" if self.point else ""  # files of one point have plain keys
        if self.method in (DENSE, BEFORE):
            return self.method + further
        equal = f"={self.equal_flops_to}" if self.equal_flops_to else ""
        return f"{self.method}@{self.retention_configured:g}{equal}{further}"
